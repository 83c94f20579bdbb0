"""Checkpoints that hold code. Each piece of code, where it is run, makes a folder of its own name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import save_tiny_llama

AUTO_MAP = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForCausalLM": "own.Model"}
TOKENIZER_MAP = {"AutoTokenizer": [None, "own_tokenizer.Tokenizer"]}

WORKING_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

class Config(LlamaConfig):
    model_type = "own"

class Model(LlamaModel):
    config_class = Config

class ModelForCausalLM(LlamaForCausalLM):
    config_class = Config
"""


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@dataclass(frozen=True)
class Plant:
    """Makes checkpoints in `folder / NAME`; what runs of them leaves its mark in `marks`."""

    folder: Path
    marks: Path

    def known_type(self) -> Path:
        """Of transformers' own type, and names its own code for everything."""
        model = self._model("known_type")
        _change(model / "config.json", auto_map=AUTO_MAP | TOKENIZER_MAP)
        _change(model / "tokenizer_config.json", auto_map=TOKENIZER_MAP)
        modules = [{"idx": 0, "name": "0", "path": "", "type": "own_module.Module"}]
        (model / "modules.json").write_text(json.dumps(modules))
        (model / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {}}))
        return model

    def unknown_type(self) -> Path:
        model = self._model("unknown_type")
        _change(model / "config.json", model_type="own", auto_map=AUTO_MAP)
        return model

    def unknown_class(self) -> Path:
        """A known type of configuration for which transformers has no model class."""
        model = self._model("unknown_class")
        _change(model / "config.json", model_type="clip_vision_model", auto_map=AUTO_MAP)
        return model

    def unknown_tokenizer(self) -> Path:
        model = self._model("unknown_tokenizer")
        _change(model / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=TOKENIZER_MAP)
        return model

    def pickled_weights(self) -> Path:
        model = self._model("pickled_weights")
        (model / "model.safetensors").unlink()
        torch.save({"weight": Payload(self.marks / "weights")}, model / "pytorch_model.bin")
        return model

    def pickled_parts(self) -> Path:
        """Weights in several files."""
        model, part = self._model("pickled_parts"), "pytorch_model-00001-of-00001.bin"
        (model / "model.safetensors").unlink()
        torch.save({"weight": Payload(self.marks / "parts")}, model / part)
        index = {"metadata": {}, "weight_map": {"weight": part}}
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        return model

    def pickled_adapter(self) -> Path:
        """An adapter alone, over a model without code."""
        base, model = self._model("base"), self._model("pickled_adapter")
        (model / "model.safetensors").unlink()
        self._add_adapter(model, base)
        return model

    def pickled_adapter_beside_weights(self) -> Path:
        """transformers puts an adapter that it finds beside a model's weights into the model."""
        model = self._model("pickled_adapter_beside_weights")
        self._add_adapter(model, model)
        return model

    def working_code(self) -> Path:
        """A type that transformers does not know; its code makes it a Llama."""
        model = self._model("working_code")
        classes = AUTO_MAP | {"AutoModelForCausalLM": "own.ModelForCausalLM"}
        _change(model / "config.json", model_type="own", auto_map=classes)
        with (model / "own.py").open("a") as code:
            code.write(WORKING_CODE)
        return model

    def _model(self, name: str) -> Path:
        """A tiny Llama, and code that nothing names yet."""
        model = save_tiny_llama(self.folder / name)
        for module in ("own", "own_tokenizer", "own_module"):
            mark = str(self.marks / module)
            (model / f"{module}.py").write_text(f"import os\nos.makedirs({mark!r}, exist_ok=True)\n")
        return model

    def _add_adapter(self, model: Path, base: Path) -> None:
        said = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": ["q_proj"]}
        (model / "adapter_config.json").write_text(json.dumps(said))
        torch.save({"weight": Payload(self.marks / "adapter")}, model / "adapter_model.bin")


PLANTS: dict[str, Callable[[Plant], Path]] = {
    make.__name__: make
    for make in (
        Plant.known_type,
        Plant.unknown_type,
        Plant.unknown_class,
        Plant.unknown_tokenizer,
        Plant.pickled_weights,
        Plant.pickled_adapter,
        Plant.pickled_adapter_beside_weights,
    )
}


def as_quantised_encoder(model: Path, folder: Path) -> Path:
    """A copy of `model` in the form of an encoder that was trained over NF4, from `model`."""
    shutil.copytree(model, folder)
    (folder / "adapters").mkdir()
    stack = {"base": str(model), "adapters": [{"file": "0.safetensors", "settings": {}}]}
    (folder / "adapters" / "stack.json").write_text(json.dumps(stack))
    return folder


def _change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
