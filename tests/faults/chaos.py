"""Kills runs before every file operation of a save and of writing the encoder, and at random moments.

    python -m tests.faults.chaos --kills 100

Two ranks under ZeRO-2, dropout on. After each kill the run is started again with resume=true, perhaps to be
killed once more; at its end its losses and weights must be those of a run that nobody disturbed, bit by bit.
No checkpoint that was valid before a kill may be gone after it; `encoder/` is whole or absent. A rank whose
peer dies must end by itself once all have begun to train; before, when they may not have met, it is ended as
launchers do. Exports are killed likewise (chaos_export.py).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from llm2vec_ds.engine.checkpoint import CheckpointStore
from tests.faults import chaos_export
from tests.faults.attempt import attempt, start
from tests.faults.operations import WRITES, Fault
from tests.support.forked import HUNG, wait
from tests.support.runs import choose_library, recipe, write_recipe
from tests.support.tiny import save_tiny_llama, sentences

WORLD, STEPS, EVERY_STEPS = 2, 6, 2
KILLED = -9
FINISHED = [0] * WORLD
LAUNCHER_WAITS_S = 30


@dataclass
class Outcome:
    """What a chaos run saw.

    Attributes:
        hung: ranks that did not notice a peer's death in a save, or any time after all had begun to train.
        points: file operations of an undisturbed run; `points_hit`: kills at them.
    """

    kills: int = 0
    resumes: int = 0
    lost: int = 0
    hung: int = 0
    unequal: list[str] = field(default_factory=list)
    points: int = 0
    points_hit: set[Fault] = field(default_factory=set)

    def line(self) -> str:
        equal = "no" if self.unequal else "yes"
        return f"kills: {self.kills}, resumes: {self.resumes}, lost: {self.lost}, bit_equal: {equal}"

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.hung or self.unequal) and len(self.points_hit) == self.points


class Chaos:
    """Runs in `folder`: one undisturbed, then each with its kills."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.model = save_tiny_llama(folder / "model")
        self.texts = folder / "texts.txt"
        self.texts.write_text("\n".join(sentences(64)) + "\n")
        self.outcome = Outcome()
        self._undisturbed("first")  # starts the server, which must not count as the run's time
        self.whole_s = self._undisturbed("whole")
        self.expected = self._result("whole")

    def _undisturbed(self, name: str) -> float:
        """Seconds that the run takes."""
        started = time.monotonic()
        codes = attempt(self._recipe(name), WORLD, self.folder / f"{name}.log")
        assert codes == FINISHED, (self.folder / f"{name}.log.0").read_text()
        return time.monotonic() - started

    def _recipe(self, name: str) -> Path:
        values = recipe("simcse", self.model, self.texts, self.folder / name, max_steps=STEPS)
        values["simcse"] = {"attention_dropout": 0.3}
        values["data"]["prepared_dir"] = str(self.folder / "prepared")
        values["checkpoint"] = {"every_steps": EVERY_STEPS, "keep_last": 1}
        values["deepspeed"] = "ds_configs/zero2.json"
        return write_recipe(values, self.folder / f"{name}.yaml")

    def _result(self, name: str) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
        rows = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        weights = load_file(self.folder / name / "encoder" / "model.safetensors")
        return [(row["loss"], row["grad_norm"]) for row in rows], weights

    def faults(self, phases: Collection[str] | None = None) -> list[Fault]:
        """A kill before each file operation of the undisturbed run, and one in the middle of each write.

        Args:
            phases: only those of these: `start`, the number of a save, counted from 1, or `encoder`.
        """
        faults = []
        for rank in range(WORLD):
            operations = (self.folder / f"whole.log.{rank}.operations").read_text().split()
            for number, operation in enumerate(operations):
                kind, phase = operation.split(":")
                if phases is not None and phase not in phases:
                    continue
                faults.append(Fault(rank, "kill", number))
                if kind in WRITES:
                    faults.append(Fault(rank, "kill", number, half=True))
        return faults

    def disturb(self, name: str, fault: Fault) -> None:
        """One run: killed at `fault`, perhaps again at a random moment, then left to end."""
        recipe_file, log = self._recipe(name), self.folder / f"{name}.log"
        codes = wait(start(recipe_file, WORLD, log, fault), timeout_s=LAUNCHER_WAITS_S)
        if codes[fault.rank] == KILLED:
            self.outcome.points_hit.add(fault)
        self._count_hung(codes, log)
        newest = self._after_kill(codes, name, newest=0)
        while self.random.random() < 1 / 3:
            self.outcome.resumes += 1
            newest = self._after_kill(self._killed_at_random(recipe_file, log), name, newest)
        self.outcome.resumes += 1
        codes = attempt(recipe_file, WORLD, log)
        if codes != FINISHED:
            self.outcome.unequal.append(
                f"{name}: exit codes {codes}: {(Path(f'{log}.0')).read_text()[-500:]}"
            )
            return
        losses, weights = self._result(name)
        same = losses == self.expected[0] and weights.keys() == self.expected[1].keys()
        if not same or not all(torch.equal(value, self.expected[1][key]) for key, value in weights.items()):
            self.outcome.unequal.append(name)
        left = [path.name for path in (self.folder / name).iterdir() if path.name.startswith(".")]
        if left or (self.folder / name / "lock").exists():
            self.outcome.unequal.append(f"{name}: left behind {left}, or a lock")
        shutil.rmtree(self.folder / name)

    def _killed_at_random(self, recipe_file: Path, log: Path) -> list[int]:
        processes = start(recipe_file, WORLD, log)
        time.sleep(self.random.uniform(0, self.whole_s))
        for process in self.random.sample(processes, self.random.randint(1, WORLD)):
            process.kill()
        codes = wait(processes, timeout_s=LAUNCHER_WAITS_S)
        self._count_hung(codes, log)
        return codes

    def _count_hung(self, codes: list[int], log: Path) -> None:
        if all(Path(f"{log}.{rank}.training").exists() for rank in range(WORLD)):
            self.outcome.hung += HUNG in codes

    def _after_kill(self, codes: list[int], name: str, newest: int) -> int:
        """Counts; the step of the newest valid checkpoint now."""
        self.outcome.kills += KILLED in codes
        store = CheckpointStore(self.folder / name / "checkpoints", keep_last=1)
        found = store.newest_valid()
        step = found.step if found else 0
        self.outcome.lost += step < newest or not self._encoder_is_whole(name)
        return step

    def _encoder_is_whole(self, name: str) -> bool:
        folder = self.folder / name / "encoder"
        files = sorted(path.name for path in folder.rglob("*")) if folder.exists() else []
        return files in ([], sorted(path.name for path in (self.folder / "whole" / "encoder").rglob("*")))


def run(
    folder: Path, n_kills: int, seed: int, phases: Collection[str] | None = None, every: int = 1
) -> Outcome:
    """At least `n_kills` kills, and one at each `every`-th file operation of these phases (None: of all)."""
    chaos = Chaos(folder, seed)
    faults = chaos.faults(phases)[::every]
    chaos.outcome.points = len(faults)
    number = 0
    with tqdm(total=n_kills, desc="kills", unit="kill", disable=None) as bar:
        while chaos.outcome.kills < n_kills or number < len(faults):
            chaos.disturb(f"run-{number}", faults[number % len(faults)])
            number += 1
            bar.update(min(chaos.outcome.kills, n_kills) - bar.n)
    return chaos.outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least so many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    arguments = parser.parse_args()
    choose_library()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(Path(folder), arguments.kills, arguments.seed)
        export = chaos_export.run(Path(folder) / "exports")
    for name in (*outcome.unequal, *export.lost):
        print(f"not as it should be: {name}", file=sys.stderr)
    print(f"file operations of an undisturbed run: {outcome.points}, killed at: {len(outcome.points_hit)}")
    print(f"exports: {export.points} file operations, kills: {export.kills}, lost: {len(export.lost)}")
    print(outcome.line())
    sys.exit(not (outcome.is_good and export.is_good))


if __name__ == "__main__":
    main()
