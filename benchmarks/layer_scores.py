"""Measures every layer of encoders on graded sentence pairs: which layer should a vector come from?

    python benchmarks/layer_scores.py --sts stsb_dev.csv --output layers my/llm=uni runs/simcse/encoder=bi

A model is an encoder or any decoder-only LLM. `=uni` runs it causally, `=bi` with bidirectional attention.
The vector of a text is the mean over its tokens of what a layer gives. Layer 0 is the embedding, and the last
one includes the final norm. It writes `layers.json` (by model and layer: Spearman's ρ, and the share of texts
with a massive token) and `layers.png`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.prompts import Prompt, tokenize
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.inference import no_graph
from llm2vec_ds.evaluate.sts import GradedPairs, load_graded_pairs
from llm2vec_ds.model.hidden_states import trunk_hidden_states
from llm2vec_ds.model.pooling import mean_pool
from llm2vec_ds.process.progress import Progress

TEXTS_PER_PASS = 64
MASSIVE = 5.0
"""A massive token (massive activations, arXiv 2402.17762) has so many times the median norm of its text."""


def layer_vectors(
    encoder: Encoder, texts: list[str], instruction: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pooled output of the embedding and of each layer, `[texts, 1 + layers, width]`.

    It also returns which of the texts have a massive token there, `[texts, 1 + layers]` bool.
    """
    trunk, inputs, found, massive = encoder.trunk.eval(), [], [], []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])) for layer in trunk.layers
    ]
    tokenized = tokenize(encoder.tokenizer, [Prompt(instruction, text) for text in texts])
    with Progress("encode", "text", total=len(texts)) as bar, no_graph(trunk):
        for first in range(0, len(texts), TEXTS_PER_PASS):
            batch = pack(tokenized[first : first + TEXTS_PER_PASS]).to(encoder.device)
            inputs.clear()
            last = trunk_hidden_states(trunk, batch)
            layers = [*inputs, last]
            found.append(torch.stack([mean_pool(hidden, batch) for hidden in layers], dim=1).cpu())
            massive.append(torch.stack([has_massive_token(hidden, batch) for hidden in layers], dim=1).cpu())
            bar.update(batch.n_texts)
    for hook in hooks:
        hook.remove()
    return torch.cat(found).numpy(), torch.cat(massive).numpy()


def has_massive_token(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Returns for each text whether a token's norm is above MASSIVE times the text's median norm."""
    norms = hidden.norm(dim=1).split(batch.cu_seqlens.diff().tolist())
    return torch.stack([own.max() > MASSIVE * own.median() for own in norms])


def scores(
    encoder: Encoder, pairs: GradedPairs, instruction: str | None = None
) -> tuple[list[float], list[float]]:
    """Returns for the embedding and each layer Spearman's ρ, and the share of texts with a massive token."""
    vectors, massive = layer_vectors(encoder, pairs.first + pairs.second, instruction)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    first, second = np.split(vectors, 2)
    cosines = (first * second).sum(axis=2)
    spearman = [round(float(spearmanr(column, pairs.scores).statistic), 4) for column in cosines.T]
    return spearman, massive.mean(axis=0).round(3).tolist()


def draw(found: dict[str, list[float]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, values in found.items():
        axes.plot(values, marker=".", label=name)
    axes.set_xlabel("layer (0: embedding)")
    axes.set_ylabel("Spearman's ρ")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="NAME:MODEL=uni|bi", help="NAME: may be left out")
    parser.add_argument("--sts", required=True, help="file of graded pairs (not a test set)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth pair")
    parser.add_argument("--instruction", help="goes before each text, and is not pooled")
    parser.add_argument("--output", type=Path, required=True, help="path of the files, without suffix")
    arguments = parser.parse_args()
    pairs = load_graded_pairs(arguments.sts)
    n = slice(None, None, arguments.every)
    pairs = GradedPairs(pairs.first[n], pairs.second[n], pairs.scores[n])
    found: dict[str, list[float]] = {}
    massive: dict[str, list[float]] = {}
    for model in arguments.models:
        place, _, attention = model.partition("=")
        name, _, place = place.rpartition(":")
        encoder = Encoder.from_pretrained(place, causal=attention == "uni")
        name = name or f"{Path(place).name} ({attention})"
        found[name], massive[name] = scores(encoder, pairs, arguments.instruction)
        print(json.dumps({name: found[name], "massive": massive[name]}), flush=True)
        file = arguments.output.with_suffix(".json")
        values = {"n_pairs": len(pairs.scores), "spearman": found, "share_with_massive_token": massive}
        file.write_text(json.dumps(values, indent=1) + "\n")
    draw(found, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
