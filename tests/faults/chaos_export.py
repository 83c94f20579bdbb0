"""Kills `llm2vec-ds export --overwrite` before every file operation: the export is the old or the new one."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.settings import EncoderSettings
from tests.faults.operations import Fault, Operations
from tests.support.forked import enter, exit_code_of, own_environment, server, wait, write_to
from tests.support.tiny import tiny_llama, tiny_tokenizer

KILLED = -9


@dataclass
class ExportOutcome:
    """`points`: file operations of an undisturbed export. `lost`: exports that were neither old nor new, that
    could not be made again, or that left something behind.
    """

    kills: int = 0
    points: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.lost and self.kills > 0


def _export(environment: dict[str, str], log: str, source: str, output: str, fault: Fault | None) -> None:
    write_to(log)
    enter(environment)
    operations = Operations(fault)
    code = exit_code_of(["export", source, "--output", output, "--format", "transformers", "--overwrite"])
    Path(f"{log}.operations").write_text(" ".join(operations.seen))
    os._exit(code)


def _contents(folder: Path) -> dict[str, str]:
    """Hashes of files; llm2vec-ds's own version of the settings is the same in all."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class ExportChaos:
    """Exports of two encoders over each other, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.log = folder, folder / "out" / "exported", folder / "log"
        trunk = tiny_llama(is_causal=False).base_model
        self.sources = {name: folder / name for name in ("mean", "last")}
        for name, source in self.sources.items():
            Encoder(trunk, tiny_tokenizer(), EncoderSettings(name)).save(source)
        self.expected: dict[str, dict[str, str]] = {}
        self.outcome = ExportOutcome()
        for name in ("mean", "last"):
            assert self._run(name) == 0, self.log.read_text()
            self.expected[name] = _contents(self.output)
        assert self.expected["mean"] != self.expected["last"]
        self.operations = Path(f"{self.log}.operations").read_text().split()
        self.outcome.points = len(self.operations)

    def _run(self, name: str, fault: Fault | None = None) -> int:
        arguments = (own_environment(), str(self.log), str(self.sources[name]), str(self.output), fault)
        process = server().Process(target=_export, args=arguments)
        process.start()
        return wait([process])[0]

    def disturb(self, at: int) -> None:
        """The export that is there is of `last`, or as the kill before left it; one of `mean` is killed."""
        assert self._run("last") == 0, self.log.read_text()
        code = self._run("mean", Fault(0, "kill", at))
        self.outcome.kills += code == KILLED
        if _contents(self.output) not in self.expected.values():
            self.outcome.lost.append(f"{at} {self.operations[at]}: neither old nor new")
        if self._run("mean") != 0 or _contents(self.output) != self.expected["mean"]:
            self.outcome.lost.append(
                f"{at} {self.operations[at]}: not made again: {self.log.read_text()[-300:]}"
            )
        if left := [path.name for path in self.output.parent.iterdir() if path != self.output]:
            self.outcome.lost.append(f"{at} {self.operations[at]}: left {json.dumps(left)}")


def run(folder: Path, every: int = 1) -> ExportOutcome:
    """A kill at each `every`-th file operation, and at those of the last move."""
    chaos = ExportChaos(folder)
    n = len(chaos.operations)
    move = next(i for i, name in enumerate(chaos.operations) if name.startswith("exchange"))
    for at in sorted({*range(0, n, every), move, min(move + 1, n - 1)}):
        chaos.disturb(at)
    return chaos.outcome
