"""Files that evaluations read: tagged sentences, graded pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support.tiny import WORDS, sentences

TAGS = ("NOUN", "VERB", "ADJ")


def conllu(path: Path, n: int, seed: int = 0) -> Path:
    """`n` sentences; a word's tag follows from its last letter, half of the words are NOUN."""
    rng = np.random.default_rng(seed)
    lines: list[str] = []
    for _ in range(n):
        words = [WORDS[i] for i in rng.integers(len(WORDS), size=6)]
        lines += [f"{i}\t{w}\t{w}\t{tag_of(w)}\t_\t_\t_\t_\t_\t_" for i, w in enumerate(words, 1)] + [""]
    path.write_text("\n".join(lines) + "\n")
    return path


def tag_of(word: str) -> str:
    return "NOUN" if word[-1] in "estn" else TAGS[1 + ord(word[-1]) % 2]


def pairs_file(folder: Path) -> Path:
    """20 pairs of sentences with a grade each."""
    texts = sentences(40, seed=3)
    rows = [f"{a},{b},{i % 5}.{i}" for i, (a, b) in enumerate(zip(texts[:20], texts[20:], strict=True))]
    path = folder / "pairs.csv"
    path.write_text("sentence1,sentence2,score\n" + "\n".join(rows) + "\n")
    return path
