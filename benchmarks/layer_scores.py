"""Measures every layer of encoders on graded sentence pairs: which layer should a vector come from?

    python benchmarks/layer_scores.py --sts stsb_dev.csv --output layers my/llm=uni runs/simcse/encoder=bi

A model is an encoder or any decoder-only LLM. `=uni` runs it causally, `=bi` with bidirectional attention.
The vector of a text is the mean over its tokens of what a layer gives. Layer 0 is the embedding, and the last
one includes the final norm. It writes `layers.json` (by model and layer: Spearman's ρ, and the share of texts
with a massive token) and `layers.png`. With `--whiten FILE` it also scores whitened vectors.
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
from llm2vec_ds.objectives.whitening import Whitening
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


def spearman_by_layer(vectors: np.ndarray, pairs: GradedPairs) -> list[float]:
    """Returns Spearman's ρ for each layer. `vectors [2 · pairs, layers, D]` has all first texts first."""
    first, second = np.split(vectors / np.linalg.norm(vectors, axis=2, keepdims=True), 2)
    cosines = (first * second).sum(axis=2)
    return [round(float(spearmanr(column, pairs.scores).statistic), 4) for column in cosines.T]


def scores(
    encoder: Encoder,
    pairs: GradedPairs,
    instruction: str | None = None,
    whiten_by: list[str] | None = None,
    power: float = 1.0,
) -> dict[str, list[float]]:
    """Returns for the embedding and each layer Spearman's ρ, and the share of texts with a massive token.

    With `whiten_by` it also returns ρ of vectors that are whitened by these texts.
    """
    vectors, massive = layer_vectors(encoder, pairs.first + pairs.second, instruction)
    found = {
        "spearman": spearman_by_layer(vectors, pairs),
        "share_with_massive_token": massive.mean(axis=0).round(3).tolist(),
    }
    if whiten_by:
        by, _ = layer_vectors(encoder, whiten_by, instruction)
        layers = [
            Whitening.of([by[:, i]], power)(torch.from_numpy(vectors[:, i])) for i in range(vectors.shape[1])
        ]
        found["spearman_whitened"] = spearman_by_layer(torch.stack(layers, dim=1).numpy(), pairs)
    return found


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
    parser.add_argument("--whiten", type=Path, metavar="FILE", help="texts to whiten by, one a line")
    parser.add_argument("--power", type=float, default=1.0, help="of whitening (default 1, 0: none)")
    parser.add_argument("--output", type=Path, required=True, help="path of the files, without suffix")
    arguments = parser.parse_args()
    pairs = load_graded_pairs(arguments.sts)
    n = slice(None, None, arguments.every)
    pairs = GradedPairs(pairs.first[n], pairs.second[n], pairs.scores[n])
    texts = None
    if arguments.whiten:
        texts = [line for line in arguments.whiten.read_text(encoding="utf-8").splitlines() if line.strip()]
    found: dict[str, dict[str, list[float]]] = {}
    for model in arguments.models:
        place, _, attention = model.partition("=")
        name, _, place = place.rpartition(":")
        encoder = Encoder.from_pretrained(place, causal=attention == "uni")
        name = name or f"{Path(place).name} ({attention})"
        found[name] = scores(encoder, pairs, arguments.instruction, texts, arguments.power)
        print(json.dumps({name: found[name]}), flush=True)
        measures = {measure: {m: own[measure] for m, own in found.items()} for measure in found[name]}
        values = {"n_pairs": len(pairs.scores), **measures}
        Path(f"{arguments.output}.json").write_text(json.dumps(values, indent=1) + "\n")
    curves = {name: own["spearman"] for name, own in found.items()}
    if texts:
        curves |= {f"{name}, whitened": own["spearman_whitened"] for name, own in found.items()}
    draw(curves, Path(f"{arguments.output}.png"))


if __name__ == "__main__":
    main()
