"""Exports a run's encoder as a folder that other tools load without any code of this package.

    run, demo or encoder folder ─► trunk, flags, tokenizer, pooling, card ─► loaded and checked ─► OUTPUT

OUTPUT appears only after the written files give the encoder's vectors.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.prompts import Prompt, Template, TokenizedText, tokenize, truncate
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.of_run import check_is_of_finished_run, encoder_of
from llm2vec_ds.encoder.settings import EncoderSettings
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.export.card import (
    NOTHING_MORE,
    CardOptions,
    Provenance,
    copy_licence_files,
    licence,
    origin,
    write_card,
)
from llm2vec_ds.export.checked import checked_texts, compare
from llm2vec_ds.export.sentence_transformers import (
    Plan,
    padded_tokenizer,
    plan,
    save_tokenizer,
    tokenizer_for,
    write_config,
    write_sentence_transformers,
)
from llm2vec_ds.export.vllm import vllm_notes
from llm2vec_ds.model.pooling import POOLINGS
from llm2vec_ds.model.rope import length_of_change
from llm2vec_ds.storage.output_folder import check_new_folder, replaced_folder

log = logging.getLogger(__name__)

FORMATS = ("sentence-transformers", "transformers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOWEST_COSINE = {torch.float32: 0.99999, torch.float16: 0.999, torch.bfloat16: 0.99}
"""Lowest cosine that rounding the weights may cause. A wrong file changes vectors far more."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of all formats.

    Attributes:
        dtype: auto keeps the dtype of the encoder's folder (ONNX: fp32).
        prompts: additional instructions by name.
        format: `export` takes one of FORMATS. The functions for ONNX and GGUF do not read it.
        card: additional contents of the model card.
    """

    dtype: str = "auto"
    licence: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    overwrite: bool = False
    format: str = "sentence-transformers"
    card: CardOptions = NOTHING_MORE


def export(source: Path, output: Path, options: ExportOptions) -> list[str]:
    """Writes `output` and returns the limits of its readers, each a sentence.

    Raises:
        UserError: there is nothing to export; the format cannot express the encoder; the output exists or
            cannot be written; or it does not give the encoder's vectors.
    """
    folder = find_encoder(source)
    what = f"--output {output}"
    _check(options)
    check_new_folder(output, what, [source, folder], options.overwrite)
    encoder = load_for_export(folder, options)
    as_modules = plan(encoder) if options.format == "sentence-transformers" else None
    found = origin(source)
    licence_name = licence(found.base, options.licence)
    notes = limits(encoder, as_modules)
    expected = _expected(encoder)
    with writing(what), replaced_folder(output, what, [source, folder]) as unfinished:
        dtype = stored_dtype(folder) if options.dtype == "auto" else DTYPES[options.dtype]
        write_folder(unfinished, encoder, as_modules, dtype, found.matryoshka_dims)
        encoder.settings.write(unfinished)
        write_card(unfinished, encoder, found, licence_name, notes, options.format, options.card)
        copied = copy_licence_files(found.base, unfinished)
        _verify(unfinished, encoder, expected, as_modules, LOWEST_COSINE[dtype])
    log.info("%s: %s, %s", output, options.format, str(dtype).removeprefix("torch."))
    say(licence_name, found, copied, notes)
    return notes


def load_for_export(folder: Path, options: ExportOptions) -> Encoder:
    """Loads the encoder with the prompts of `options`.

    It is loaded on the CPU in fp32, as the exported files are when they are checked.
    """
    encoder = Encoder.from_pretrained(folder, precision="fp32", device="cpu")
    encoder.settings = replace(encoder.settings, prompts={**encoder.settings.prompts, **options.prompts})
    return encoder


def say(licence_name: str | None, found: Provenance, copied: list[str], notes: list[str]) -> None:
    """Logs the licence, the licence files that were `copied`, and the limits of readers."""
    if licence_name is None:
        log.warning("licence: none found for %s: look it up and give it with --licence", found.base_name)
    else:
        log.info("licence: %s (%s)", licence_name, ", ".join(copied) or f"from {found.base_name}")
    for note in notes:
        log.warning("limit: %s", note)


def find_encoder(source: Path) -> Path:
    """Returns the encoder folder of a run or demo folder, or the folder itself.

    Raises:
        UserError: there is no encoder, or it does not belong to the run that the folder describes.
    """
    folder = Path(encoder_of(str(source)))
    if not (folder / "config.json").is_file():
        raise UserError(f"{source} holds no encoder: give a run's folder, a demo's, or an encoder folder")
    check_is_of_finished_run(folder)
    return folder


def limits(encoder: Encoder, as_modules: Plan | None) -> list[str]:
    """Returns where readers of the export differ from this package, each a sentence."""
    settings, config = encoder.settings, encoder.trunk.config
    if as_modules is None:
        return ["A transformers folder holds no pooling: pool the token vectors yourself."]
    notes = []
    if as_modules.silent_ids:
        notes.append(
            "vLLM and text-embeddings-inference also pool the tokenizer's special tokens, which this encoder "
            "leaves out: their vectors differ. An encoder trained with pooled_tokens=all has no such limit."
        )
        notes.append(
            "Do not let sentence-transformers flatten its input (FlashAttention with unpadded inputs)."
        )
    if not as_modules.include_prompt:
        notes.append(
            "vLLM and text-embeddings-inference also pool the instruction, which this encoder leaves out: "
            "their vectors of texts with an instruction differ."
        )
        if as_modules.silent_ids:
            notes.append(
                "With a prompt, sentence-transformers gives vectors of the same direction but another "
                "length: compare them by cosine."
            )
    if as_modules.default_prompt:
        head = as_modules.prompts[as_modules.default_prompt]
        notes.append(
            f"This encoder needs {head!r} before each text. vLLM does not add it. text-embeddings-inference "
            f"adds it only with --default-prompt-name {as_modules.default_prompt}."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type == "llama" and rope != "default":
        notes.append(f"text-embeddings-inference does not support RoPE of type {rope} for Llama.")
    longest = length_of_change(config)
    if longest is not None and settings.max_tokens > longest:
        notes.append(
            f"RoPE changes beyond {longest} tokens. Other tools choose it by the longest text of a batch: "
            "keep texts to this length, or give longer ones one at a time."
        )
    if settings.pooling == "weighted_mean":
        notes.append("vLLM and text-embeddings-inference do not support weighted_mean pooling.")
    return notes + vllm_notes(config, settings.max_tokens)


def _check(options: ExportOptions) -> None:
    if options.format not in FORMATS:
        raise UserError(f"--format {options.format!r} is unknown: choose {', '.join(FORMATS)}, onnx or gguf")
    if options.dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {options.dtype!r} is unknown: choose auto, {', '.join(DTYPES)}")


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the dtype of an encoder folder's weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def write_folder(
    folder: Path,
    encoder: Encoder,
    as_modules: Plan | None,
    dtype: torch.dtype,
    matryoshka_dims: list[int] | None = None,
) -> None:
    """Writes weights, config and tokenizer for transformers, and the modules for sentence-transformers."""
    state = {name: value.to(dtype) for name, value in encoder.trunk.state_dict().items()}
    encoder.trunk.config.dtype = dtype
    encoder.save_weights(folder, state)
    prompts = as_modules.prompts if as_modules else {}
    tokenizer = tokenizer_for(encoder, prompts) if as_modules else padded_tokenizer(encoder)
    save_tokenizer(tokenizer, folder)
    write_config(folder, tokenizer, matryoshka_dims)
    if as_modules is not None:
        write_sentence_transformers(folder, encoder, as_modules)


def _expected(encoder: Encoder) -> dict[str | None, np.ndarray]:
    """Returns the encoder's own vectors of the checked texts, without a prompt and with each prompt."""
    texts = checked_texts()
    return {name: encoder.encode(texts, prompt_name=name) for name in (None, *encoder.settings.prompts)}


def _verify(
    folder: Path,
    encoder: Encoder,
    expected: dict[str | None, np.ndarray],
    as_modules: Plan | None,
    lowest: float,
) -> None:
    """Loads the written files with stock libraries, and compares their vectors with the encoder's."""
    encoder.trunk = None  # frees its memory for the exported copy
    gc.collect()
    stock = _auto_model(folder, encoder.settings)
    for name, vectors in expected.items():
        compare("transformers' AutoModel", name, stock[name], vectors, lowest)
    if as_modules is None:
        return
    if importlib.util.find_spec("sentence_transformers") is None:
        log.warning(
            "not checked with sentence-transformers, which is not installed: pip install 'llm2vec-ds[export]'"
        )
        return
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"dtype": torch.float32}, trust_remote_code=False
    )
    for name, vectors in expected.items():
        prompt = name or as_modules.default_prompt
        found = model.encode(checked_texts(), prompt_name=prompt, batch_size=8)
        same = _same_span(model.tokenizer, encoder.settings, as_modules, prompt)
        if not same.all():
            log.warning(
                "prompt %r: before %s of %s checked texts, the space at its end becomes a token of its own, "
                "which sentence-transformers pools: vectors of such texts differ a little",
                prompt,
                np.count_nonzero(~same),
                len(same),
            )
        compare("SentenceTransformer", name, found[same], vectors[same], lowest)


def _same_span(tokenizer: Any, settings: EncoderSettings, as_modules: Plan, prompt: str | None) -> np.ndarray:
    """Returns for which checked texts sentence-transformers finds the right first token, `[texts]` bool.

    It tokenizes the prompt alone and skips that many tokens. That is right if as many tokens stand before the
    text in the whole input.
    """
    texts = checked_texts()
    if prompt is None or as_modules.include_prompt:
        return np.ones(len(texts), dtype=bool)
    alone = tokenizer(as_modules.prompts[prompt])["input_ids"]
    length = len(alone) - (bool(alone) and alone[-1] in tokenizer.all_special_ids)
    template = Template(settings.template, settings.special_tokens)
    prompts = [Prompt(settings.prompts.get(prompt), text) for text in texts]
    return np.array([text.pool_start == length for text in tokenize(tokenizer, prompts, template)])


def _auto_model(folder: Path, settings: EncoderSettings) -> dict[str | None, np.ndarray]:
    """Returns stock transformers' vectors, without a prompt and with each. Only the pooling is ours."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    template = Template(settings.template, settings.special_tokens)
    found: dict[str | None, np.ndarray] = {}
    for name in (None, *settings.prompts):
        instruction = settings.prompts[name] if name else None
        texts = tokenize(
            tokenizer,
            [Prompt(instruction, text) for text in checked_texts()],
            template,
            end_with_eos=settings.pooling == "eos",
            text_span=settings.text_span,
        )
        vectors = [_vector(model, truncate(text, settings.max_tokens), settings) for text in texts]
        found[name] = np.stack(vectors)
    return found


@torch.no_grad()
def _vector(model: Any, text: TokenizedText, settings: EncoderSettings) -> np.ndarray:
    batch = pack([text])
    if settings.pooled_tokens == "all":
        batch = replace(batch, pool_mask=torch.ones_like(batch.pool_mask))
    hidden = model(batch.input_ids[None], use_cache=False).last_hidden_state[0]
    vector: np.ndarray = POOLINGS[settings.pooling](hidden, batch)[0].numpy()
    return vector
