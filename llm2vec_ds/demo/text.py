"""English text for the demo: Python's own help topics, or the user's file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.retrieval import RetrievalSet

HELD_OUT_EVERY = 4
PASSAGES_PER_TOPIC = 6
PASSAGE_WORDS = 70
SENTENCE_CHARACTERS = (25, 90)


@dataclass(frozen=True)
class DemoText:
    """Paragraphs for MNTP, held-out paragraphs, and short sentences and clauses for what follows."""

    paragraphs: list[str]
    held_out_paragraphs: list[str]
    sentences: list[str]

    def write(self, folder: Path) -> None:
        """Writes `paragraphs.txt`, `held_out.txt` and `sentences.txt`, one text a line.

        A file that holds this already stays as it is. So what was prepared from it stays valid.
        """
        texts = {
            "paragraphs": self.paragraphs,
            "held_out": self.held_out_paragraphs,
            "sentences": self.sentences,
        }
        for name, lines in texts.items():
            file, content = folder / f"{name}.txt", ("\n".join(lines) + "\n").encode()
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)


def training_text(file: Path | None) -> DemoText:
    """Reads the text of `file`, or of the help topics that the retrieval test does not use.

    Raises:
        UserError: the file is missing, is not UTF-8, or holds too little text.
    """
    documents = _read(file) if file else [body for _, body in _topics(held_out=False)]
    # Help topics quote each other. A paragraph of a held-out topic must not train under another heading.
    tested = {p for _, body in _topics(held_out=True) for p in _paragraphs(body)}
    paragraphs = list(
        dict.fromkeys(p for document in documents for p in _paragraphs(document) if p not in tested)
    )
    held_out = paragraphs[::20][:24]
    train = [p for i, p in enumerate(paragraphs) if i % 20 or i // 20 >= 24]
    sentences = list(dict.fromkeys(s for p in paragraphs for s in _sentences(p)))
    if len(train) < 20 or len(sentences) < 64:
        raise UserError(
            f"{file} has only {len(train)} paragraphs and {len(sentences)} sentences of 25 to 90 characters: "
            "the demo needs 20 and 64"
        )
    return DemoText(train, held_out, sentences)


def held_out_retrieval() -> RetrievalSet:
    """Returns the retrieval test. Queries are headings of held-out help topics, passages their texts."""
    queries: list[str] = []
    passages: list[str] = []
    owner: list[int] = []
    for heading, body in _topics(held_out=True):
        words = " ".join(_paragraphs(body)).split()
        pieces = [words[i : i + PASSAGE_WORDS] for i in range(0, len(words), PASSAGE_WORDS)][
            :PASSAGES_PER_TOPIC
        ]
        if not pieces:
            continue
        owner += [len(queries)] * len(pieces)
        queries.append(heading)
        passages += [" ".join(piece) for piece in pieces]
    return RetrievalSet(queries, passages, np.arange(len(queries))[:, None] == np.asarray(owner)[None, :])


def _topics(held_out: bool) -> list[tuple[str, str]]:
    """Returns (heading, body) of every fourth help topic, or of the others."""
    from pydoc_data.topics import topics

    chosen = [
        text.strip()
        for i, (_, text) in enumerate(sorted(topics.items()))
        if (i % HELD_OUT_EVERY == 0) == held_out
    ]
    return [(heading, body) for heading, _, body in (text.partition("\n") for text in chosen) if body]


def _read(file: Path) -> list[str]:
    try:
        return [file.read_text(encoding="utf-8-sig")]
    except OSError as error:
        raise UserError(f"--text {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--text {file} is not UTF-8 text") from None


def _paragraphs(document: str) -> list[str]:
    """Returns the blocks between blank lines, each as one line. Leaves out headings, rules and fragments."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", document))
    return [block for block in blocks if len(block) >= 80 and not block.startswith(("=", "*", "-"))]


def _sentences(paragraph: str) -> list[str]:
    """Returns sentences that are words rather than code and are about as long as a caption or headline.

    A longer sentence is cut into its clauses.
    """
    shortest, longest = SENTENCE_CHARACTERS
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", paragraph)
    pieces = (
        piece
        for sentence in sentences
        for piece in ([sentence] if len(sentence) <= longest else re.split(r"\s*[,;:]\s+", sentence))
    )
    return [
        piece
        for piece in pieces
        if shortest <= len(piece) <= longest
        and "<unk>" not in piece
        and sum(c.isalpha() or c == " " for c in piece) >= 0.85 * len(piece)
    ]
