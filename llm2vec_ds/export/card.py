"""The model card of an export: what it is, how it is loaded and was made, its scores, what it cannot do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm2vec_ds import __version__
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.export.vllm import start_of
from llm2vec_ds.recipe.files import load_recipe
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.storage.reading import parse_yaml, read_json, read_json_lines

ELSEWHERE = "export the encoder folder from another place, without it"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class _Step:
    """What a line of a run's metrics.jsonl has to say for its card."""

    n_tokens: int
    step_ms: float


@dataclass(frozen=True)
class Origin:
    """Where an encoder comes from: its stages, first to last (recipe and run folder), and the base model."""

    base: str | None
    stages: tuple[tuple[Recipe, Path], ...]
    scores: dict[str, Any]

    @property
    def base_name(self) -> str:
        """A hub id as it is; of a folder the last part, which is all that others can use."""
        if self.base is None:
            return "unknown"
        return (
            Path(self.base).name if Path(self.base).exists() or Path(self.base).is_absolute() else self.base
        )

    @property
    def matryoshka_dims(self) -> list[int] | None:
        """Shorter lengths of vectors that the last stage trained."""
        found: list[int] | None = None
        if self.stages:
            found = getattr(self.stages[-1][0].objective, "matryoshka_dims", None)
        return found


def origin(source: Path) -> Origin:
    """Follows recipes back from a run, demo or encoder folder to the base model."""
    stages: list[tuple[Recipe, Path]] = []
    base: str | None = None
    folder: Path | None = _run_folder(source)
    while folder is not None:
        recipe = _recipe(folder / "recipe.yaml")
        stages.insert(0, (recipe, folder))
        base = _found(recipe.model.path, folder)
        before = _run_folder(Path(base)) if Path(base).is_dir() else None
        folder = before if before not in [seen for _, seen in stages] else None
    scores_file = source / "metrics.json"
    scores = read_json(scores_file, dict[str, dict[str, Any]], ELSEWHERE) if scores_file.is_file() else {}
    return Origin(base, tuple(stages), scores)


def _recipe(file: Path) -> Recipe:
    try:
        return load_recipe(file)
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}): {ELSEWHERE}") from None


def _found(path: str, run: Path) -> str:
    """A recipe's relative path starts where the run was started, which lies above the run's folder."""
    above = [Path(), *run.resolve().parents]
    return next((str(place / path) for place in above if (place / path).is_dir()), path)


def _run_folder(folder: Path) -> Path | None:
    """The run that a run, its encoder/, or a demo's output came from."""
    candidates = [folder, folder.parent, folder / "simcse", folder.parent / "simcse"]
    return next((c for c in candidates if (c / "recipe.yaml").is_file()), None)


def licence(base: str | None, given: str | None) -> str | None:
    """The given one, or what the base model's card says, in its folder or on the hub; None: nowhere said."""
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
    except Exception:  # no network, no such model, no card: it is then said that the licence is unknown
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
    """The base model's licence and notice files, where it has any."""
    if base is None or not Path(base).is_dir():
        return []
    found = [file for pattern in LICENCE_FILES for file in sorted(Path(base).glob(pattern)) if file.is_file()]
    for file in found:
        shutil.copyfile(file, folder / file.name)
    return [file.name for file in found]


def write_card(
    folder: Path, encoder: Encoder, origin: Origin, licence: str | None, limits: list[str], format: str
) -> None:
    """README.md with the front matter that the hub reads; `format`: of an ONNX export the graph's file."""
    readers = ["onnx"] if _is_onnx(format) else ["text-embeddings-inference"]
    front: dict[str, Any] = {
        "library_name": "transformers.js" if _is_onnx(format) else format,
        "pipeline_tag": "sentence-similarity" if format == "sentence-transformers" else "feature-extraction",
        "tags": ["llm2vec", "feature-extraction", "sentence-similarity", *readers],
        "license": licence or "other",
    }
    if origin.base is not None and "/" in origin.base_name:
        front["base_model"] = origin.base_name
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# Text encoder from {origin.base_name}\n\n{_what(encoder)}",
        "## How to load it\n\n" + _how_to_load(encoder, format),
        "## How it was made\n\n" + _stages(origin),
        *(["## Scores\n\n" + _scores(origin.scores)] if origin.scores else []),
        "## Limits\n\n"
        + "\n".join(f"- {limit}" for limit in limits or ["None known beyond its base model's."]),
        "## Licence\n\n" + _licence_words(origin, licence),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _what(encoder: Encoder) -> str:
    settings = encoder.settings
    attention = "causal" if not _bidirectional(encoder) else "bidirectional"
    tokens = "the text's own tokens" if settings.pooled_tokens == "text" else "all tokens"
    return (
        f"A decoder-only LLM as text encoder ([LLM2Vec](https://arxiv.org/abs/2404.05961)): {attention} "
        f"attention, `{settings.pooling}` pooling over {tokens}, {encoder.dimensions} dimensions, texts of "
        f"up to {settings.max_tokens} tokens, cosine similarity. Made with LLM2Vec-DS {__version__}. No code "
        "comes with it and none is needed."
    )


def _bidirectional(encoder: Encoder) -> bool:
    from llm2vec_ds.model.bidirectional import is_causal

    return is_causal(encoder.trunk.config) is False


def _is_onnx(format: str) -> bool:
    return format.endswith(".onnx")


def _how_to_load_onnx(encoder: Encoder, file: str) -> str:
    length = encoder.settings.max_tokens
    return (
        "```python\nimport numpy as np\nimport onnxruntime\nfrom tokenizers import Tokenizer\n\n"
        'tokenizer = Tokenizer.from_file("FOLDER/tokenizer.json")\n'
        f"tokenizer.enable_truncation({length})\ntokenizer.enable_padding()\n"
        f'session = onnxruntime.InferenceSession("FOLDER/{file}")\n'
        'encoded = tokenizer.encode_batch(["a text"])\n'
        'inputs = {"input_ids": np.array([e.ids for e in encoded]), '
        '"attention_mask": np.array([e.attention_mask for e in encoded])}\n'
        '(vectors,) = session.run(["sentence_embedding"], inputs)  # of length 1\n```\n\n'
        "transformers.js: `AutoModel.from_pretrained`; take `sentence_embedding` of its output. "
        "sentence-transformers: "
        f'`SentenceTransformer("FOLDER", backend="onnx", model_kwargs={{"file_name": "{file}"}})`.'
    )


def _how_to_load(encoder: Encoder, format: str) -> str:
    if _is_onnx(format):
        return _how_to_load_onnx(encoder, format)
    prompt = next(iter(encoder.settings.prompts), None)
    named = f', prompt_name="{prompt}"' if prompt else ""
    own = (
        "```python\nfrom llm2vec_ds import Encoder\n\n"
        f'vectors = Encoder.from_pretrained("FOLDER").encode(["a text"]{named}, normalize=True)\n```'
    )
    trunk = (
        "`AutoModel.from_pretrained` of transformers ≥ 5.2 gives the token vectors (earlier versions ignore "
        "`is_causal` and stay causal)."
    )
    if format == "transformers":
        return f"{own}\n\n{trunk}"
    standard = (
        "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        f'vectors = SentenceTransformer("FOLDER").encode(["a text"]{named}, normalize_embeddings=True)\n```'
    )
    vllm = start_of(encoder.trunk.config, encoder.settings.max_tokens)
    lines = ["text-embeddings-router --model-id FOLDER --dtype float16"]
    if vllm.refusal is None:
        lines.insert(0, f"vllm serve FOLDER --runner pooling{vllm.line}")
    servers = "\n".join(lines)
    return f"{standard}\n\n{own}\n\nServers (see the limits below):\n\n```\n{servers}\n```\n\n{trunk}"


def _stages(origin: Origin) -> str:
    if not origin.stages:
        return f"From {origin.base_name}; no recipe was found beside the encoder."
    rows = [
        "| stage | data | steps × batch | learning rate | adapter | tokens trained | tokens a second |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe, folder in origin.stages:
        adapter = recipe.adapter
        lora = f"LoRA r={adapter.rank}, α={adapter.alpha:g}" if adapter else "none: all weights"
        n_tokens, tokens_per_s = _measured(folder)
        rows.append(
            f"| {recipe.stage} | {_data_name(recipe.data.path)} "
            f"| {recipe.max_steps} × {recipe.batch.global_batch_size} | {recipe.optimizer.lr:g} "
            f"| {lora} | {n_tokens} | {tokens_per_s} |"
        )
    seeds = ", ".join(str(recipe.seed) for recipe, _ in origin.stages)
    return "\n".join([*rows, "", f"Seed(s) {seeds}; tokens a second over all processes."])


def _data_name(path: str | list[str]) -> str:
    paths = [path] if isinstance(path, str) else path
    return ", ".join(p if p.startswith("hub:") else Path(p).name for p in paths)


def _measured(folder: Path) -> tuple[str, str]:
    """Trained tokens and their speed, from the run's own metrics."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return "–", "–"
    steps = list(read_json_lines(file, _Step, ELSEWHERE))
    n_tokens, ms = sum(step.n_tokens for step in steps), sum(step.step_ms for step in steps)
    return f"{n_tokens:,}", f"{n_tokens / ms * 1e3:,.0f}" if ms else "–"


def _scores(scores: dict[str, Any]) -> str:
    """The demo's metrics.json: figures after each stage."""
    run = scores.get("run", {})
    figures = {
        stage: {name: value for name, value in values.items() if isinstance(value, float)}
        for stage, values in scores.items()
        if stage != "run" and isinstance(values, dict)
    }
    names = list(
        dict.fromkeys(name for found in figures.values() for name in found if name != "tokens_per_s")
    )
    rows = [f"| after | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for stage, found in figures.items():
        rows.append(f"| {stage} | {' | '.join(f'{found[n]:.4f}' if n in found else '–' for n in names)} |")
    versions = ", ".join(f"{n} {run[n]}" for n in ("python", "torch", "transformers") if n in run)
    return "\n".join([*rows, "", f"Measured on {run.get('sts', '?')}; {versions}."])


def _licence_words(origin: Origin, licence: str | None) -> str:
    if licence is None:
        return (
            f"That of {origin.base_name}, which was not found at export: look it up before you pass this on."
        )
    return f"`{licence}`, that of {origin.base_name}: its terms hold for this model too."
