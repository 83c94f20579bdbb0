"""The timed work in one JSON file: the same texts, LoRA, loss and optimizer for all tools."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

WORKS = ("mntp", "simcse", "supervised", "encode")
BLOCK_TOKENS, BLOCKS, SENTENCES, EXAMPLES = 512, 4, 64, 32
UNITS = {"mntp": "tokens", "simcse": "sentences", "supervised": "examples", "encode": "texts"}


@dataclass
class Spec:
    """One work. Dropouts are 0, so all tools have the same first loss."""

    work: str
    model: str
    n_steps: int
    threads: int
    lora_rank: int = 16
    lora_alpha: int = 32
    lr: float = 1e-4
    scale: float = 20.0
    mask_rate: float = 0.2
    max_tokens: int = 512
    rival_checkpointing: bool = False
    texts: list[str] = field(default_factory=list)
    examples: list[list[str]] = field(default_factory=list)
    input_ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)

    def write(self, path: Path, **changes: Any) -> Path:
        path.write_text(json.dumps({**asdict(self), **changes}))
        return path

    @property
    def n_units(self) -> int:
        """Returns the units of a step, or of the whole encoding."""
        tokens = sum(map(len, self.input_ids))
        return {"mntp": tokens, "supervised": len(self.examples)}.get(self.work, len(self.texts))


def make_spec(
    work: str, model: str, data: Path | None, n_steps: int, threads: int, n_examples: int = EXAMPLES
) -> Spec:
    """Makes a work. `data`: folder with stsb_*.csv, wikitext2_*.txt, ud_*.conllu; None: Python's own text."""
    spec = Spec(work, model, n_steps, threads)
    if work == "mntp":
        spec.texts = paragraphs(data)
    elif work == "simcse":
        spec.texts = drawn(sentences(data), SENTENCES)
    elif work == "supervised":
        spec.examples = triplets(paragraphs(data), n_examples)
    else:
        spec.texts = sentences(data)
    return spec


def paragraphs(data: Path | None) -> list[str]:
    """Returns running text."""
    if data is None:
        from pydoc_data.topics import topics

        return [" ".join(text.split()) for text in topics.values()]
    lines = (data / "wikitext2_valid.txt").read_text().splitlines()
    return [line.strip() for line in lines if len(line) > 200]


def sentences(data: Path | None) -> list[str]:
    """Returns short texts: those of STS-B test and UD English, or sentences of the help topics."""
    if data is None:
        found = (s.strip() for text in paragraphs(None) for s in text.split(". "))
        return list(dict.fromkeys(s for s in found if 25 <= len(s) <= 300))[:1000]
    with (data / "stsb_test.csv").open(newline="") as file:
        pairs = [text for row in csv.reader(file) for text in row[:2]]
    lines = (data / "ud_ewt_test.conllu").read_text().splitlines()
    treebank = [line.removeprefix("# text = ") for line in lines if line.startswith("# text = ")]
    return list(dict.fromkeys(pairs + treebank))


def drawn(texts: list[str], n_texts: int) -> list[str]:
    """Draws at random. The first texts of a data set are alike in length, which hides the cost of padding."""
    chosen = np.random.default_rng(0).choice(len(texts), min(n_texts, len(texts)), replace=False)
    return [texts[i] for i in chosen]


def triplets(texts: list[str], n_examples: int) -> list[list[str]]:
    """Returns query, positive, negative of 8 to 300 tokens (0.72 words a token), more short than long."""
    random = np.random.default_rng(0)
    words = cycle(" ".join(texts).split())
    lengths = np.exp(random.uniform(np.log(8), np.log(300), (n_examples, 3))) * 0.72
    return [[" ".join(islice(words, max(int(n), 5))) for n in row] for row in lengths]
