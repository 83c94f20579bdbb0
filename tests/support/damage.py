"""Ways in which a file gets damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import tiny_llama, tiny_tokenizer

Damage = Callable[[bytes], bytes]

RANDOM = random.Random(0).randbytes(4000)
DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000

JSON_DAMAGE: dict[str, Damage] = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "random bytes": lambda content: RANDOM,
    "a list": lambda content: b"[1]",
    "null": lambda content: b"null",
    "nested 5,000 deep": lambda content: DEEP,
}


def changed(**values: Any) -> Damage:
    """Other values under some keys of a JSON object."""
    return lambda content: json.dumps({**json.loads(content), **values}).encode()


def damage(file: Path, how: Damage) -> Path:
    """Replaces the file's content by what `how` makes of it."""
    file.write_bytes(how(file.read_bytes()))
    return file


def save_nan_llama(folder: Path) -> Path:
    """A tiny Llama with a NaN among the weights of its second layer."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
