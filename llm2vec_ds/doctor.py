"""`llm2vec-ds doctor`: what this machine has, what a run would use, and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from llm2vec_ds.storage.cache_folder import cache_root

GIB = 2**30
LEAST_FREE_GIB = 5.0
LONGEST_CHECK_S = 300

OPTIONAL = {
    "triton": "pip install 'llm2vec-ds[gpu]' for attention kernels on GPUs",
    "flash_attn": "pip install 'llm2vec-ds[flash]' for another attention backend on GPUs",
    "bitsandbytes": "pip install 'llm2vec-ds[qlora]' for LoRA over 4-bit weights",
    "gguf": "pip install 'llm2vec-ds[demo]' for the demo, 'llm2vec-ds[gguf]' for export to llama.cpp",
    "matplotlib": "pip install 'llm2vec-ds[report]' for `report` and `ablate`",
    "mteb": "pip install 'llm2vec-ds[eval]' for `evaluate`, and for `evaluation` in a recipe",
    "sentence_transformers": "pip install 'llm2vec-ds[export]' for the check of an export, "
    "'llm2vec-ds[distil]' for teachers and rerankers",
    "onnxruntime": "pip install 'llm2vec-ds[onnx]' for export to ONNX",
    "tensorboard": "pip install 'llm2vec-ds[monitor]' for `monitor: tensorboard` in a recipe",
    "wandb": "pip install 'llm2vec-ds[monitor]' for `monitor: wandb` in a recipe",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        fix: how to get what is missing; empty if nothing is.
        blocks: no run is possible without it.
        optional: every run is possible without it.
    """

    name: str
    value: str
    fix: str = ""
    blocks: bool = False
    optional: bool = False

    @property
    def mark(self) -> str:
        if not self.fix:
            return "✓"
        return "✗" if self.blocks else "·" if self.optional else "!"


def examine() -> Iterator[Finding]:
    """Yields all findings but the training check. This is fast and needs no network."""
    yield _python()
    for package in ("torch", "transformers", "peft", "deepspeed", "datasets", "pyarrow"):
        yield _package(package, f"pip install {package}", blocks=True)
    if importlib.util.find_spec("torch") is not None:
        yield from _devices()
    yield _tool("g++", "apt-get install g++ to build DeepSpeed's CPU optimizer (offload)")
    yield _tool("ninja", "pip install ninja, and put the environment's bin folder on PATH")
    for package, fix in OPTIONAL.items():
        yield _package(package, fix, optional=True)
    yield _cache()
    yield _launch()


def training_check() -> Finding:
    """Trains one MNTP step on a tiny model, through the whole engine and all file formats."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {k: v for k, v in os.environ.items() if k not in own and not k.startswith("SLURM_")}
    with tempfile.TemporaryDirectory() as folder:
        recipe = _tiny_run(Path(folder))
        try:
            outcome = subprocess.run(
                [sys.executable, "-m", "llm2vec_ds", "train", str(recipe)],
                capture_output=True,
                text=True,
                check=False,
                env={**environment, "LLM2VEC_DS_CACHE": folder},
                timeout=LONGEST_CHECK_S,
            )
        except subprocess.TimeoutExpired:
            return _failed(f"it did not end within {LONGEST_CHECK_S} s")
        if outcome.returncode:
            last = (outcome.stderr.strip().splitlines() or [f"exit code {outcome.returncode}"])[-1]
            return _failed(last.removeprefix("llm2vec-ds: error: "))
        row = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8"))
        return Finding("training check", f"one step, loss {row['loss']:.2f}, {row['step_ms']:.0f} ms")


def _failed(cause: str) -> Finding:
    fix = "fix this, then try a run: llm2vec-ds train recipes/smoke_mntp.yaml"
    return Finding("training check", f"failed: {cause}", fix, blocks=True)


def _python() -> Finding:
    old = sys.version_info < (3, 11)
    fix = "install Python 3.11 or later" if old else ""
    return Finding("Python", f"{platform.python_version()}, {platform.machine()}", fix, blocks=old)


def _package(name: str, fix: str, *, blocks: bool = False, optional: bool = False) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, "not installed", fix, blocks, optional)
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "installed")


def _devices() -> Iterator[Finding]:
    import psutil
    import torch
    from llm2vec_kernels.attention import AttentionNeeds, choose_attention_backend
    from llm2vec_kernels.products import cpu_products

    memory_gib = psutil.virtual_memory().total / GIB
    products = cpu_products()
    yield Finding(
        "CPU",
        f"torch uses {torch.get_num_threads()} of {os.cpu_count()} threads, {memory_gib:.0f} GiB memory, "
        f"fp32 matrix products by {products.name} ({products.reason})",
    )
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        size = f"{card.total_memory / GIB:.0f} GiB, compute capability {card.major}.{card.minor}"
        yield Finding(f"GPU {index}", f"{card.name}, {size}, CUDA {torch.version.cuda}")
    if not torch.cuda.is_available():
        fix = (
            "install a driver and torch's CUDA build: https://pytorch.org"
            if shutil.which("nvidia-smi")
            else ""
        )
        yield Finding("GPU", "none that torch can use", fix)
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = choose_attention_backend("auto", AttentionNeeds(device))
    yield Finding("a run uses", f"{precision}, attention by {backend.name} ({backend.reason})")


def _tool(name: str, fix: str) -> Finding:
    where = shutil.which(name)
    return Finding(name, where or "not found", "" if where else fix)


def _cache() -> Finding:
    root = cache_root()
    nearest = next(folder for folder in (root, *root.parents) if folder.exists())
    free_gib = shutil.disk_usage(nearest).free / GIB
    if not os.access(nearest, os.W_OK):
        return Finding(
            "cache", f"{root} is not writable", "set LLM2VEC_DS_CACHE to a folder of yours", blocks=True
        )
    fix = "set LLM2VEC_DS_CACHE to a folder on a larger disk" if free_gib < LEAST_FREE_GIB else ""
    return Finding("cache", f"{root}, {free_gib:.0f} GiB free", fix)


def _launch() -> Finding:
    if "SLURM_JOB_ID" in os.environ:
        return Finding("launcher", f"SLURM job {os.environ['SLURM_JOB_ID']}: srun, one task per GPU")
    return Finding("launcher", "deepspeed --num_gpus N" + (", or sbatch" if shutil.which("sbatch") else ""))


def _tiny_run(folder: Path) -> Path:
    """Writes a model, a tokenizer, texts and a recipe for one step. Returns the recipe's path."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = "the river runs past an old mill where children fish for trout _ <unk> </s>".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=words.index("</s>"),
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n".join(" ".join(words[i : i + 9]) for i in range(4)) + "\n")
    recipe = {
        "stage": "mntp",
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "texts.txt"), "max_tokens": 16},
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "batch": {"global_batch_size": 4, "micro_batch_tokens": 64},
        "mntp": {"mask_rate": 0.5},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
