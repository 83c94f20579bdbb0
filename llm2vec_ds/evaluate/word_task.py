"""Runs a word-level task: the encoder once over the data, then the linear layer with several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec_ds.data.tagged import HUB, TaggedSentence, load_tagged
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.evaluate.identity import result_key, weights_key
from llm2vec_ds.evaluate.scores_file import OF_WORDS, SCORES_FILE, read_scores
from llm2vec_ds.evaluate.word_features import SHIFTS, WordFeatures, word_features
from llm2vec_ds.evaluate.word_level import ProbeOptions, probe
from llm2vec_ds.storage.durable import replace_json
from llm2vec_ds.storage.fingerprint import file_sha256
from llm2vec_ds.storage.tables import markdown_table


@dataclass(frozen=True)
class WordTask:
    """Training and test sentences (see `load_tagged`), and the column of their labels."""

    train: str
    test: str
    column: str = "upos"
    max_sentences: int | None = None

    def check(self) -> None:
        """Checks that the data can be read. Call it before you load a model.

        Raises:
            UserError: see `load_tagged`.
        """
        for source in (self.train, self.test):
            if not source.startswith(HUB) and not Path(source).is_file():
                raise UserError(f"{source}: there is no such file")
            load_tagged(source, self.column)

    def sentences(self, source: str) -> list[TaggedSentence]:
        """Returns the first `max_sentences` sentences of a source."""
        return load_tagged(source, self.column)[: self.max_sentences]


def run_word_task(
    encoder: Encoder,
    model: str,
    task: WordTask,
    probes: Sequence[ProbeOptions],
    cache: Path | None,
    *,
    micro_batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Returns scores by shift: the mean over seeds, and each seed's accuracy.

    Args:
        model: where the encoder was loaded from, for the cache and the result.
        cache: folder for word vectors. Each encoder and file has its own folder in it.

    Raises:
        UserError: the data have no word that can be scored, or `cache` cannot be written.
    """
    parts = [
        word_features(
            encoder,
            task.sentences(source),
            micro_batch_tokens=micro_batch_tokens,
            cache=cache and cache / _key(encoder, model, task, source),
            progress=True,
        )
        for source in (task.train, task.test)
    ]
    return {
        "model": model,
        "task": asdict(task),
        "probe": {**asdict(probes[0]), "seed": [options.seed for options in probes]},
        **{shift: _over_seeds(parts[0], parts[1], shift, probes) for shift in SHIFTS},
    }


def _over_seeds(
    train: WordFeatures, test: WordFeatures, shift: Any, probes: Sequence[ProbeOptions]
) -> dict[str, Any]:
    scores = [asdict(probe(train, test, shift, options)) for options in probes]
    means = {
        name: None if v is None else float(np.mean([s[name] for s in scores]))
        for name, v in scores[0].items()
    }
    whole = {name: int(means[name] or 0) for name in ("n_words", "n_unscored")}
    return {**means, **whole, "accuracy_by_seed": [s["accuracy"] for s in scores]}


def _key(encoder: Encoder, model: str, task: WordTask, source: str) -> str:
    trunk, settings = encoder.trunk, encoder.settings
    data = source if source.startswith(HUB) else file_sha256(Path(source))
    weights = weights_key(model)
    return result_key(weights, encoder.causal, str(trunk.dtype), vars(settings), data, task.max_sentences)


def table(result: Mapping[str, Any]) -> str:
    """Returns the scores as a Markdown table."""
    rows = []
    for shift in SHIFTS:
        s = result[shift]
        f1 = "" if s["entity_f1"] is None else f"{s['entity_f1']:.4f}"
        rows.append([shift, f"{s['accuracy']:.4f}", f1, f"{s['majority']:.4f}", str(s["n_words"])])
    return markdown_table(["vectors from", "accuracy", "entity F1", "majority", "words"], rows)


def write_scores(result: Mapping[str, Any], output: Path) -> None:
    """Writes `scores.json` into `output`.

    Raises:
        UserError: `evaluate mteb` wrote a `scores.json` there, or the file cannot be written.
    """
    read_scores(output, OF_WORDS)
    with writing(f"--output {output}"):
        output.mkdir(parents=True, exist_ok=True)
        replace_json(output / SCORES_FILE, result)
