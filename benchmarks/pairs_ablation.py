"""Tests whether a guide, or rounding in training, makes a better encoder in the supervised stage.

    python benchmarks/pairs_ablation.py --model LLM --pairs snli.jsonl mrpc.jsonl wordnet.jsonl \
        --guide MODEL --dev stsb_dev.csv --questions wikiqa.jsonl --output runs/pairs_ablation

Variants are `plain`, `guide` (only `supervised.guide` is changed) and `stored` (`supervised.stored_as: [int8,
binary]`). Each trains with the same seeds, so on the same batches. These are measured of each encoder, with
vectors as float32, int8 and binary:

- Spearman's correlation on --dev, with both sentences stored in that form;
- nDCG@10 of the queries of --questions against all its positives and negatives. Documents are stored in that
  form and queries are not, as in `search`.

It writes one JSON line a run into OUTPUT/results.jsonl and skips runs that are there already. Then it prints
means and standard deviations over seeds. --dev and --questions must not be in --pairs, and must not be test
sets.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.evaluate.sts import GradedPairs, load_graded_pairs
from llm2vec_ds.vectors.quantized import STORED, Stored, dequantize, quantize

VARIANTS = ("plain", "guide", "stored")


def first_rows(files: list[str], n_rows: int, folder: Path) -> None:
    """Copies the files' first rows. Each file stays a separate source.

    An equal copy is not written again, so its time stamp stays and its prepared pairs are found again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in map(Path, files):
        rows = "".join(file.read_text().splitlines(keepends=True)[:n_rows])
        copy = folder / file.name
        if not copy.exists() or copy.read_text() != rows:
            copy.write_text(rows)


def recipe(arguments: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    output = Path(arguments.output)
    supervised: dict[str, Any] = {"scale": arguments.scale}
    if variant == "guide":
        supervised["guide"] = arguments.guide
    elif variant == "stored":
        supervised["stored_as"] = ["int8", "binary"]
    return {
        "stage": "supervised",
        "model": {"path": arguments.model, "activation_checkpointing": "none"},
        "data": {"path": str(output / "pairs"), "max_tokens": 64, "prepared_dir": str(output / "prepared")},
        "output_dir": str(output / f"{variant}_{seed}"),
        "overwrite": True,
        "seed": seed,
        "max_steps": arguments.steps,
        "batch": {"global_batch_size": arguments.batch, "micro_batch_tokens": 8192},
        "optimizer": {"lr": arguments.lr, "warmup_steps": arguments.steps // 10, "schedule": "linear"},
        "adapter": {"rank": 16, "alpha": 32, "dropout": 0.0},
        "supervised": supervised,
    }


def cosines(query_QD: np.ndarray, document_ND: np.ndarray) -> np.ndarray:
    """Returns scores `[Q, N]`."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query_QD, document_ND)]
    scores_QN: np.ndarray = unit[0] @ unit[1].T
    return scores_QN


def stored(vectors_ND: np.ndarray, form: Stored) -> np.ndarray:
    return dequantize(quantize(vectors_ND, form), form, vectors_ND.shape[1])


def sts(encoder: Encoder, pairs: GradedPairs) -> dict[str, float]:
    texts = list(dict.fromkeys(pairs.first + pairs.second))
    row = {text: n for n, text in enumerate(texts)}
    vector_ND = encoder.encode(texts, normalize=True)
    found = {}
    for form in STORED:
        unit_ND = stored(vector_ND, form)
        unit_ND = unit_ND / np.linalg.norm(unit_ND, axis=1, keepdims=True)
        first, second = (unit_ND[[row[text] for text in side]] for side in (pairs.first, pairs.second))
        found[form] = float(spearmanr((first * second).sum(1), pairs.scores).statistic)
    return found


def retrieval(encoder: Encoder, file: str) -> dict[str, float]:
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    queries = {text: n for n, text in enumerate(dict.fromkeys(row["query"] for row in rows))}
    texts = [row[key] for row in rows for key in ("positive", "negative") if row.get(key)]
    documents = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    relevant_QN = np.zeros((len(queries), len(documents)))
    for row in rows:
        relevant_QN[queries[row["query"]], documents[row["positive"]]] = 1
    query_QD, document_ND = (encoder.encode(list(x), normalize=True) for x in (queries, documents))
    return {
        form: float(ndcg_score(relevant_QN, cosines(query_QD, stored(document_ND, form)), k=10))
        for form in STORED
    }


def left_out(run: Path) -> dict[str, list[float]]:
    """Returns for each source the number of negatives that the guide left out, and of all negatives."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for line in (run / "metrics.jsonl").read_text().splitlines():
        for key, value in json.loads(line).items():
            kind, _, source = key.partition("/")
            if kind in ("guided_out", "negatives"):
                sums[source][kind == "negatives"] += value
    return dict(sums)


def measured(path: str | Path, arguments: argparse.Namespace) -> dict[str, Any]:
    encoder = Encoder.from_pretrained(path)
    found = {"sts": sts(encoder, load_graded_pairs(arguments.dev))}
    return found | {"retrieval": retrieval(encoder, arguments.questions)}


def run(arguments: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    settings = recipe(arguments, variant, seed)
    folder = Path(settings["output_dir"])
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "llm2vec_ds", "train", str(path)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"cpu_s": cpu_s, "left_out": left_out(folder)} | measured(folder / "encoder", arguments)


def show(rows: list[dict[str, Any]]) -> None:
    for task in ("sts", "retrieval"):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            of_variant = [row[task] for row in rows if row["variant"] == variant]
            cells = []
            for form in STORED:
                values = [found[form] for found in of_variant]
                spread = np.std(values, ddof=1) if len(values) > 1 else float("nan")
                cells.append(f"{form} {np.mean(values):.4f} ± {spread:.4f}")
            print(f"{task:9} {variant:9} n={len(of_variant)}  " + "  ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="LLM or encoder folder to start from")
    parser.add_argument("--pairs", required=True, nargs="+", help=".jsonl files of pairs to train on")
    parser.add_argument("--rows", type=int, default=6400, help="first rows of each (default %(default)s)")
    parser.add_argument("--guide", required=True, help="as supervised.guide")
    parser.add_argument("--dev", required=True, help="sentence1, sentence2, score")
    parser.add_argument("--questions", required=True, help=".jsonl: query, positive, negative")
    parser.add_argument("--output", default="runs/pairs_ablation", help="folder (default %(default)s)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--scale", type=float, default=20.0)
    arguments = parser.parse_args()
    output = Path(arguments.output)
    first_rows(arguments.pairs, arguments.rows, output / "pairs")
    results = output / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    wanted = [("before", 0), *((variant, seed) for seed in arguments.seeds for variant in arguments.variants)]
    for variant, seed in wanted:
        if any((row["variant"], row["seed"]) == (variant, seed) for row in rows):
            continue
        found = measured(arguments.model, arguments) if variant == "before" else run(arguments, variant, seed)
        rows.append({"variant": variant, "seed": seed} | found)
        with results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    show(rows)
    print(json.dumps({name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")}))


if __name__ == "__main__":
    main()
