"""`llm2vec-ds ablate`: the paper's table. It trains every variant with every seed and measures it.

Each training run is the ordinary command. Finished parts are kept, so a stopped ablation continues.
"""

from __future__ import annotations

import logging
import platform
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from llm2vec_ds.ablation.keys import evaluation_key, score_key, training_key
from llm2vec_ds.ablation.recipe import AblationRecipe, runs_of
from llm2vec_ds.data.sources import find_source
from llm2vec_ds.demo.model import demo_model_dir
from llm2vec_ds.demo.text import training_text
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.of_run import ENCODER, encoder_of
from llm2vec_ds.engine.metrics import training_totals
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.evaluate.word_level import ProbeOptions
from llm2vec_ds.evaluate.word_task import WordTask, run_word_task
from llm2vec_ds.process.child_command import train_in_child
from llm2vec_ds.process.versions import versions_of
from llm2vec_ds.recipe.recipe import Recipe, parse_recipe
from llm2vec_ds.storage.durable import replace_json, replace_text
from llm2vec_ds.storage.output_folder import check_no_foreign, check_reads_no_output
from llm2vec_ds.storage.reading import checked_json
from llm2vec_ds.storage.tables import markdown_table, mean_and_spread

log = logging.getLogger(__name__)


TEXTS = ("paragraphs", "held_out", "sentences")
WRITTEN = (*(f"{name}.txt" for name in TEXTS), "scores", "features", "mteb", "table.md", "report.html")
"""What an ablation writes into its folder. It also writes runs/ at the start, and results.json."""


@dataclass(frozen=True)
class Ablation:
    """A recipe, its budget, and the folder that everything goes to."""

    recipe: AblationRecipe
    budget: str | None
    output: Path
    model: str

    def run(self) -> dict[str, Any]:
        """Trains and measures what is missing. Returns the content of results.json.

        Raises:
            UserError: a mistake that the user can fix.
        """
        self._check()
        self._write_texts()
        results: dict[str, dict[str, Any]] = {}
        for seed in self.recipe.seeds:
            for run in runs_of(self.recipe.variants):
                self._train(run, seed)
            for variant in self.recipe.variants:
                results.setdefault(variant, {})[str(seed)] = self._measure(variant, seed)
                self._write(results)
        return self._write(results)

    def _check(self) -> None:
        """Refuses a mistake of any stage before the first one is trained."""
        for run in runs_of(self.recipe.variants):
            data = self._recipe(run, self.recipe.seeds[0]).data
            if data.path not in self._texts.values():
                find_source(data.path, f"stages.{run.rpartition('+')[2]}.data.path")
        for words in self.recipe.evaluate.words.values():
            WordTask(words.train, words.test, words.column).check()
        _ = self._evaluation_key  # it reads the data of all tasks
        what = f"--output {self.output}"
        text = [Path(self.recipe.text)] if self.recipe.text else []
        check_reads_no_output([*map(Path, self._texts.values())], text, what)
        check_no_foreign(self.output, what, WRITTEN, marks=["runs", "results.json"])
        with writing(what):
            (self.output / "runs").mkdir(parents=True, exist_ok=True)

    @property
    def _texts(self) -> dict[str, str]:
        """Files of the paragraphs, held-out paragraphs and sentences."""
        return {name: str(self.output / f"{name}.txt") for name in TEXTS}

    @cached_property
    def _evaluation_key(self) -> str:
        return evaluation_key(self.recipe.evaluate)

    def _write_texts(self) -> None:
        material = training_text(Path(self.recipe.text) if self.recipe.text else None)
        with writing(f"--output {self.output}"):
            material.write(self.output)

    def folder(self, variant: str, seed: int) -> str:
        """Returns where the variant's encoder is. A variant without training is the model itself."""
        return self.model if "+" not in variant else str(self._run_folder(variant, seed) / ENCODER)

    def has_mntp(self, variant: str) -> bool:
        """Returns whether one of the variant's stages is MNTP."""
        return "mntp" in map(self.recipe.trains, variant.split("+")[1:])

    def _run_folder(self, run: str, seed: int) -> Path:
        return self.output / "runs" / f"seed-{seed}" / run

    def _train(self, run: str, seed: int) -> None:
        folder = self._run_folder(run, seed)
        key = training_key(self._recipe(run, seed))
        begun, done, file = (folder.with_name(f"{run}.{end}") for end in ("begun", "done", "yaml"))
        if _holds(done, key):
            log.info("%s, seed %s: already trained", run, seed)
            return
        going_on = ["resume=true"] if _holds(begun, key) else []
        with writing(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not going_on:  # what is there belongs to another recipe, data or model
                done.unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
            values = self._stage_recipe(run, seed)
            file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
            replace_text(begun, key)
        train_in_child(file, *going_on)
        replace_text(done, key)

    def _recipe(self, run: str, seed: int) -> Recipe:
        return parse_recipe(self._stage_recipe(run, seed), source=f"stages.{run.rpartition('+')[2]}")

    def _stage_recipe(self, run: str, seed: int) -> dict[str, Any]:
        """Returns the recipe of a run, which starts from the run before it."""
        before, _, stage = run.rpartition("+")
        texts, trains = self._texts, self.recipe.trains(stage)
        values = self.recipe.stage_values(stage, self.budget)
        data = dict(values.pop("data", {}))
        own = {
            "mntp": {"path": texts["paragraphs"], "held_out_path": texts["held_out"], "long_texts": "split"},
            "simcse": {"path": texts["sentences"]},
            "distil": {"path": texts["sentences"]},
        }.get(trains)
        if "path" not in data and own is None:
            raise UserError(f"stages.{stage}.data.path is missing: set it, this stage needs its own data")
        if (values.get("distil") or {}).get("teacher_layer"):
            # The teacher that needs no other model: a layer of the untrained one.
            values["distil"] = {"teacher": self.model, **values["distil"]}
        causal = run.startswith("uni")
        return {
            "stage": trains,
            "model": {"path": self.folder(before, seed), "causal": causal, **values.pop("model", {})},
            "data": {**({} if "path" in data else own or {}), **data},
            "output_dir": str(self._run_folder(run, seed)),
            "overwrite": True,
            "seed": seed,
            **values,
        }

    def _measure(self, variant: str, seed: int) -> dict[str, Any]:
        model = self.folder(variant, seed)
        file = self.output / "scores" / f"{variant}.seed-{seed}.json"
        key = score_key(model, variant, self._evaluation_key)
        stored = _stored(file)
        if stored is not None and stored.key == key:
            log.info("%s, seed %s: already measured", variant, seed)
            return stored.scores
        encoder = Encoder.from_pretrained(model, causal=variant.startswith("uni"))
        scores = {**self._sentence_scores(encoder, model), **self._word_scores(encoder, model, variant, seed)}
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_json(file, {"key": key, "scores": scores})
        log.info("%s, seed %s: %s", variant, seed, ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        return scores

    def _sentence_scores(self, encoder: Encoder, model: str) -> dict[str, float]:
        names = self.recipe.evaluate.sentences
        if not names:
            return {}
        from llm2vec_ds.evaluate.mteb import MtebEncoder, evaluate_mteb, model_meta
        from llm2vec_ds.evaluate.mteb_tasks import tasks_for
        from llm2vec_ds.evaluate.shards import RankEncoder

        ranked = RankEncoder(encoder)
        wrapped = MtebEncoder(ranked, model_meta(model, ranked, {}), {})
        scores = evaluate_mteb(wrapped, tasks_for(names), self.output / "mteb")
        return {score.task: score.value for score in scores}

    def _word_scores(self, encoder: Encoder, model: str, variant: str, seed: int) -> dict[str, float]:
        """Returns word-level scores by the paper's protocol.

        The main accuracy is next_token for variants with MNTP, else same_token. The other accuracy and the F1
        of entities are added.
        """
        scores: dict[str, float] = {}
        shift, other = ("same_token", "next_token")
        if self.has_mntp(variant):
            shift, other = other, shift
        for name, words in self.recipe.evaluate.words.items():
            task = WordTask(words.train, words.test, words.column, words.max_sentences)
            probes = [ProbeOptions(max_steps=words.max_steps, seed=seed)]
            features = self.output / "features" / variant
            result = run_word_task(encoder, model, task, probes, features)
            scores[name] = result[shift]["accuracy"]
            scores[f"{name}, {other}"] = result[other]["accuracy"]
            if result[shift]["entity_f1"] is not None:
                scores[f"{name}, entity F1"] = result[shift]["entity_f1"]
            # An untrained variant has the same features for all seeds, so the next seed still needs them.
            if "+" in variant or seed == self.recipe.seeds[-1]:
                shutil.rmtree(features, ignore_errors=True)
        return scores

    def _write(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        summary = {
            "recipe": self.recipe.model_dump(mode="json"),
            "budget": self.budget,
            "model": self.model,
            "scores": results,
            "runs": self._totals(list(results)),
            "versions": versions(),
            "hardware": hardware(),
        }
        with writing(f"--output {self.output}"):
            replace_json(self.output / "results.json", summary)
            replace_text(self.output / "table.md", table(results) + "\n")
        return summary

    def _totals(self, variants: list[str]) -> dict[str, dict[str, dict[str, float]]]:
        """Returns what training took, by run and seed, of the runs that are finished."""
        totals: dict[str, dict[str, dict[str, float]]] = {}
        for run in runs_of(variants):
            for seed in self.recipe.seeds:
                folder = self._run_folder(run, seed)
                if folder.with_name(f"{run}.done").exists():
                    totals.setdefault(run, {})[str(seed)] = training_totals(folder)._asdict()
        return totals


def _holds(file: Path, key: str) -> bool:
    return file.exists() and file.read_text(encoding="utf-8", errors="replace") == key


@dataclass(frozen=True)
class _Measured:
    """A variant's scores with one seed, and what they were measured on."""

    key: str
    scores: dict[str, float]


def _stored(file: Path) -> _Measured | None:
    """Returns what an earlier ablation measured. None: there is nothing, or it is damaged."""
    if not file.exists():
        return None
    try:
        return checked_json(file.read_bytes(), _Measured)
    except ValueError as error:
        log.warning("%s is damaged (%s): measuring again", file, error)
        return None


def run_ablation(recipe: AblationRecipe, budget: str | None, output: Path) -> dict[str, Any]:
    """Runs an ablation. See `Ablation.run`."""
    model = str(demo_model_dir()) if recipe.model is None else encoder_of(recipe.model)
    return Ablation(recipe, budget, output, model).run()


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Returns a Markdown table: one row per variant, the mean over seeds ± their standard deviation."""
    metrics = list(dict.fromkeys(m for by_seed in results.values() for s in by_seed.values() for m in s))
    rows = [
        [variant, *(mean_and_spread([s[m] for s in by_seed.values() if m in s]) for m in metrics)]
        for variant, by_seed in results.items()
    ]
    return markdown_table(["variant", *metrics], rows)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the scores depend on."""
    packages = ("llm2vec-ds", "torch", "transformers", "deepspeed", "peft", "mteb")
    return {"python": platform.python_version(), **versions_of(packages)}


def hardware() -> str:
    """Returns the name of the GPUs, or of the processor."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    return f"{name}, {torch.get_num_threads()} threads"
