"""The rivals: an environment for each from the package index, and the model in a format that it reads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Rival:
    """A rival. `pins` are installed beside torch. `old_model`: it only reads models of transformers 4."""

    name: str
    pins: tuple[str, ...]
    worker: Path
    old_model: bool = False


RIVALS = {
    "llm2vec": Rival(
        "llm2vec",
        ("llm2vec==0.2.3", "transformers==4.44.2", "peft==0.12.0", "accelerate==0.34.2"),
        HERE / "worker_llm2vec.py",
        old_model=True,
    ),
    "sentence-transformers": Rival(
        "sentence-transformers",
        ("sentence-transformers==6.2.*", "transformers==5.23.0", "peft==0.21.2"),
        HERE / "worker_sentence_transformers.py",
    ),
}


def python_of(rival: Rival, folder: Path) -> Path:
    """Returns the interpreter of the rival's environment, and makes the environment if it is missing."""
    venv = folder / rival.name
    done = venv / "installed"
    wanted = " ".join((TORCH, *rival.pins))
    if not (done.is_file() and done.read_text() == wanted):
        print(f"making {venv}: {wanted}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, TORCH, *rival.pins], check=True)
        done.write_text(wanted)
    return venv / "bin" / "python"


def model_for(rival: Rival, model: Path, folder: Path) -> Path:
    """Makes a copy of the model for the rival, with linked weights. It is bidirectional if the rival can."""
    target = folder / f"model-{rival.name}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            (target / file.name).symlink_to(file.resolve())
        elif file.is_file() and file.name != "chat_template.jinja":
            # sentence-transformers would put every text into the chat template with its system prompt.
            shutil.copyfile(file, target / file.name)
    config = json.loads((model / "config.json").read_text())
    if not rival.old_model:
        config["is_causal"] = False
        (target / "config.json").write_text(json.dumps(config))
        return target
    (target / "config.json").write_text(json.dumps(_old_config(config)))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps(_old_tokenizer(tokenizer)))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    kept = {k: v for k, v in settings.items() if k in ("bos_token", "eos_token", "pad_token", "unk_token")}
    old = {**kept, "tokenizer_class": "PreTrainedTokenizerFast"}
    old["model_input_names"] = ["input_ids", "attention_mask"]
    (target / "tokenizer_config.json").write_text(json.dumps(old))
    return target


def _old_config(config: dict[str, Any]) -> dict[str, Any]:
    """Changes a config for transformers 4: `rope_theta` at the top, and the dtype under another name."""
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    config["torch_dtype"] = config.pop("dtype", "float32")
    return config


def _old_tokenizer(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Writes merges as strings, like tokenizers before 0.20."""
    model = tokenizer["model"]
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return tokenizer
