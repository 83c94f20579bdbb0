"""Writes the model card of an export: what it is, how to load it, how it was made, its scores, its limits."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm2vec_ds import __version__
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.of_run import ENCODER, METRICS, RECIPE
from llm2vec_ds.engine.metrics import training_totals
from llm2vec_ds.errors import UserError
from llm2vec_ds.export.scores import (
    Score,
    demo_scores,
    model_index,
    score_table,
    stage_table,
)
from llm2vec_ds.export.usage import how_to_load
from llm2vec_ds.recipe.files import load_recipe
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.storage.reading import parse_yaml, read_json
from llm2vec_ds.storage.tables import markdown_table

ELSEWHERE = "export the encoder folder from another place, without it"
LIBRARIES = {".onnx": "transformers.js", ".gguf": "llama.cpp"}
"""The hub's name of the library that loads a file. For a folder, the library is the format."""
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class CardOptions:
    """Additional contents of a card: scores of `evaluate mteb`, and the hub repository it goes to."""

    scores: tuple[Score, ...] = ()
    repository: str | None = None


NOTHING_MORE = CardOptions()


@dataclass(frozen=True)
class Provenance:
    """Where an encoder comes from: the base model, its stages from first to last (recipe and run folder), and
    the demo's scores."""

    base: str | None
    stages: tuple[tuple[Recipe, Path], ...]
    scores: dict[str, Any]

    @property
    def base_name(self) -> str:
        """The hub id, or a folder's own name without its path, which means nothing to others."""
        if self.base is None:
            return "unknown"
        return (
            Path(self.base).name if Path(self.base).exists() or Path(self.base).is_absolute() else self.base
        )

    @property
    def matryoshka_dims(self) -> list[int] | None:
        """The shorter vector lengths that the last stage trained, or None."""
        found: list[int] | None = None
        if self.stages:
            found = getattr(self.stages[-1][0].objective, "matryoshka_dims", None)
        return found


def origin(source: Path) -> Provenance:
    """Follows the recipes from a run, demo or encoder folder back to the base model."""
    stages: list[tuple[Recipe, Path]] = []
    base: str | None = None
    folder: Path | None = _run_folder(source)
    while folder is not None:
        recipe = _recipe(folder / RECIPE)
        stages.insert(0, (recipe, folder))
        base = _found(recipe.model.path, folder)
        before = _run_folder(Path(base)) if Path(base).is_dir() else None
        folder = before if before not in [seen for _, seen in stages] else None
    return Provenance(base, tuple(stages), _scores_of_demo(source))


def _recipe(file: Path) -> Recipe:
    try:
        return load_recipe(file)
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}): {ELSEWHERE}") from None


def _found(path: str, run: Path) -> str:
    """Finds the folder that a recipe's relative path means.

    The path starts where the run was started, which is above the run's folder.
    """
    above = [Path(), *run.resolve().parents]
    return next((str(place / path) for place in above if (place / path).is_dir()), path)


def _run_folder(folder: Path) -> Path | None:
    """Returns the run that an encoder comes from. For a demo it is that of its last stage.

    Args:
        folder: of a run, of a demo, or the encoder/ of one of them.
    """
    for place in (folder, *([folder.parent] if folder.name == ENCODER else [])):
        if (place / RECIPE).is_file():
            return place
        if (place / "mntp" / RECIPE).is_file():  # a demo
            stages = [place / name for name in _scores_of_demo(place) if (place / name / RECIPE).is_file()]
            return stages[-1] if stages else None
    return None


def _scores_of_demo(folder: Path) -> dict[str, Any]:
    """Returns a demo's metrics.json: scores by stage, from first to last. Empty for another folder."""
    file = folder / "metrics.json"
    return read_json(file, dict[str, dict[str, Any]], ELSEWHERE) if file.is_file() else {}


def licence(base: str | None, given: str | None) -> str | None:
    """Returns the given licence, or else the one in the base model's card (local or on the hub), or None."""
    if given or base is None:
        return given
    card = Path(base) / "README.md"
    if card.is_file():
        said = _front_matter(card.read_text(encoding="utf-8", errors="replace")).get("license")
        return str(said) if said else None
    return None if Path(base).exists() else _licence_on_hub(base)


def _licence_on_hub(name: str) -> str | None:
    from huggingface_hub import ModelCard

    try:
        said = ModelCard.load(name).data.to_dict().get("license")
    except Exception:  # no network, no such model or no card: the licence is then reported as unknown
        return None
    return str(said) if said else None


def _front_matter(text: str) -> dict[str, Any]:
    if not text.startswith("---\n"):
        return {}
    try:
        values = parse_yaml(text[4:].partition("\n---")[0])
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def copy_licence_files(base: str | None, folder: Path) -> list[str]:
    """Copies the base model's licence and notice files, and returns their names."""
    if base is None or not Path(base).is_dir():
        return []
    found = [file for pattern in LICENCE_FILES for file in sorted(Path(base).glob(pattern)) if file.is_file()]
    for file in found:
        shutil.copyfile(file, folder / file.name)
    return [file.name for file in found]


def write_card(
    folder: Path,
    encoder: Encoder,
    origin: Provenance,
    licence: str | None,
    limits: list[str],
    format: str,
    options: CardOptions = NOTHING_MORE,
) -> None:
    """Writes README.md with the front matter that the hub reads.

    Args:
        format: as in `how_to_load`.
    """
    scores = [*demo_scores(origin.scores), *options.scores]
    tables = [
        *([stage_table(origin.scores)] if origin.scores else []),
        *([score_table(options.scores)] if options.scores else []),
    ]
    limits = limits or ["No limits are known besides those of the base model."]
    parts = [
        f"---\n{yaml.safe_dump(_front(origin, licence, format, scores, options), sort_keys=False)}---",
        f"# Text encoder from {origin.base_name}\n\n{_what(encoder)}",
        "## How to load it\n\n" + how_to_load(encoder, format, options.repository),
        "## How it was made\n\n" + _stages(origin),
        *(["## Scores\n\n" + "\n\n".join(tables)] if tables else []),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits),
        "## Licence\n\n" + _licence_words(origin, licence),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front(
    origin: Provenance, licence: str | None, format: str, scores: list[Score], options: CardOptions
) -> dict[str, Any]:
    library = LIBRARIES.get(Path(format).suffix, format)
    tags = {"transformers.js": ["onnx"], "llama.cpp": ["gguf"]}
    readers = tags.get(library, ["text-embeddings-inference"])
    is_pooled = format == "sentence-transformers"
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "sentence-similarity" if is_pooled else "feature-extraction",
        "tags": ["llm2vec", "feature-extraction", "sentence-similarity", *readers],
        "license": licence or "other",
    }
    if origin.base is not None and "/" in origin.base_name:
        front["base_model"] = origin.base_name
    if scores:
        front["model-index"] = model_index(options.repository or f"encoder-{origin.base_name}", scores)
    return front


def _what(encoder: Encoder) -> str:
    settings = encoder.settings
    attention = "causal" if not _bidirectional(encoder) else "bidirectional"
    tokens = "the text's own tokens" if settings.pooled_tokens == "text" else "all tokens"
    return (
        f"A decoder-only LLM as text encoder ([LLM2Vec](https://arxiv.org/abs/2404.05961)): {attention} "
        f"attention, `{settings.pooling}` pooling over {tokens}, {encoder.dimensions} dimensions, texts of "
        f"up to {settings.max_tokens} tokens, cosine similarity. Made with LLM2Vec-DS {__version__}. It "
        "loads without custom code."
    )


def _bidirectional(encoder: Encoder) -> bool:
    from llm2vec_ds.model.bidirectional import is_causal

    return is_causal(encoder.trunk.config) is False


def _stages(origin: Provenance) -> str:
    if not origin.stages:
        return f"Made from {origin.base_name}. No recipe was found with the encoder."
    rows = []
    for recipe, folder in origin.stages:
        adapter = recipe.adapter
        rows.append(
            [
                recipe.stage,
                _data_name(recipe.data.path),
                f"{recipe.max_steps} × {recipe.batch.global_batch_size}",
                f"{recipe.optimizer.lr:g}",
                f"LoRA r={adapter.rank}, α={adapter.alpha:g}" if adapter else "none: all weights",
                *_measured(folder),
            ]
        )
    header = "stage, data, steps × batch, learning rate, adapter, tokens trained, tokens a second".split(", ")
    seeds = ", ".join(str(recipe.seed) for recipe, _ in origin.stages)
    said = f"Seed(s): {seeds}. Tokens a second are those of all processes together."
    return f"{markdown_table(header, rows)}\n\n{said}"


def _data_name(path: str | list[str]) -> str:
    paths = [path] if isinstance(path, str) else path
    return ", ".join(p if p.startswith("hub:") else Path(p).name for p in paths)


def _measured(folder: Path) -> tuple[str, str]:
    """Returns the number of trained tokens and the speed in tokens a second, from the run's metrics."""
    if not (folder / METRICS).is_file():
        return "–", "–"
    totals = training_totals(folder)
    tokens_per_s = totals.trained_tokens / totals.training_s if totals.training_s else None
    return f"{totals.trained_tokens:,}", "–" if tokens_per_s is None else f"{tokens_per_s:,.0f}"


def _licence_words(origin: Provenance, licence: str | None) -> str:
    if licence is None:
        return (
            f"The licence of {origin.base_name} applies. It was not found at export: look it up before you "
            "share this model."
        )
    return f"`{licence}`, the licence of {origin.base_name}. Its terms also apply to this model."
