"""Every command that takes a model, as lines that a user would give, with what else they read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.evaluation_files import conllu, pairs_file
from tests.support.planted import as_quantised_encoder
from tests.support.runs import recipe, write_recipe
from tests.support.tiny import sentences, text_file

Line = list[object]


@dataclass(frozen=True)
class Case:
    """A checkpoint, one without code, and a folder for what else a command reads."""

    model: Path
    harmless: Path
    folder: Path

    @property
    def texts(self) -> Path:
        path = self.folder / "texts.txt"
        path.write_text("\n".join(sentences(20)) + "\n")
        return path

    def recipe(self, stage: str, **model: Any) -> Path:
        values = recipe(stage, self.model, self.texts, self.folder / "run", max_steps=1, overwrite=True)
        values["model"] |= model
        return write_recipe(values, self.folder / f"{stage}.yaml")

    def train(self) -> Iterator[Line]:
        for stage in ("mntp", "simcse"):
            yield ["train", self.recipe(stage)]

    def prepare(self) -> Iterator[Line]:
        yield ["prepare", self.recipe("mntp")]

    def plan(self) -> Iterator[Line]:
        yield ["plan", self.recipe("mntp")]
        elsewhere = {"path": "owner/name", "config_file": str(self.model / "config.json")}
        yield ["plan", self.recipe("simcse", **elsewhere)]

    def encode(self) -> Iterator[Line]:
        yield ["encode", "--model", self.model, "--input", self.texts, "--output", self.folder / "v.npy"]

    def search(self) -> Iterator[Line]:
        """The index itself names the model."""
        index = self.folder / "index.npy"
        yield ["encode", "--model", self.harmless, "--input", self.texts, "--output", index]
        note = index.with_name("index.npy.json")
        note.write_text(json.dumps(json.loads(note.read_text()) | {"model": str(self.model)}))
        yield ["search", index, "trout"]

    def mine(self) -> Iterator[Line]:
        pairs = self.folder / "pairs.jsonl"
        pairs.write_text('{"query": "fish", "positive": "trout"}\n' * 2)
        yield ["mine", "--model", self.model, "--pairs", pairs, "--output", self.folder / "m.jsonl"]

    def score(self) -> Iterator[Line]:
        pairs = self.folder / "pairs.jsonl"
        pairs.write_text('{"query": "fish", "positive": "trout"}\n')
        yield ["score", pairs, "--reranker", self.model, "--output", self.folder / "s.jsonl"]

    def export(self) -> Iterator[Line]:
        for kind in ("sentence-transformers", "transformers"):
            yield ["export", self.model, "--output", self.folder / kind, "--format", kind]

    def merge(self) -> Iterator[Line]:
        for name, model in (("from-it", self.model), ("onto-it", self.harmless)):
            encoder = as_quantised_encoder(model, self.folder / name)
            yield ["merge", encoder, "--output", self.folder / "merged", "--original", self.model]

    def demo(self) -> Iterator[Line]:
        yield ["demo", "--model", self.model, "--budget", "quick", "--output", self.folder / "demo"]

    def ablate(self) -> Iterator[Line]:
        values = {
            "model": str(self.model),
            "text": str(text_file(self.folder)),
            "variants": ["uni", "bi"],
            "evaluate": {"sentences": [f"sts:{pairs_file(self.folder)}"]},
        }
        file = self.folder / "ablation.yaml"
        file.write_text(yaml.safe_dump(values))
        yield ["ablate", file, "--output", self.folder / "ablation"]

    def report(self) -> Iterator[Line]:
        done = self.folder / "done"
        done.mkdir()
        (done / "encoder").symlink_to(self.model)
        (done / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        yield ["report", done, "--output", self.folder / "report.html"]

    def evaluate_mteb(self) -> Iterator[Line]:
        task, output = f"sts:{pairs_file(self.folder)}", self.folder / "scores"
        yield ["evaluate", "mteb", "--model", self.model, "--task", task, "--output", output]

    def evaluate_words(self) -> Iterator[Line]:
        file = conllu(self.folder / "a.conllu", 8)
        sets = ["--train", file, "--test", file, "--max-steps", 2, "--output", self.folder / "words"]
        yield ["evaluate", "words", "--model", self.model, *sets]


CASES: dict[str, Callable[[Case], Iterator[Line]]] = {
    "train": Case.train,
    "prepare": Case.prepare,
    "plan": Case.plan,
    "encode": Case.encode,
    "search": Case.search,
    "mine": Case.mine,
    "score": Case.score,
    "export": Case.export,
    "merge": Case.merge,
    "demo": Case.demo,
    "ablate": Case.ablate,
    "report": Case.report,
    "evaluate mteb": Case.evaluate_mteb,
    "evaluate words": Case.evaluate_words,
}
