"""Finds out why a model cannot be loaded, gives NaN, or gets ids that it does not know."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.reading import checked_json

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
JSON_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    INDEX,
)


def damaged_file(folder: Path) -> str | None:
    """Names the first damaged or missing file and says what is wrong with it. None if none is found."""
    from safetensors import SafetensorError, safe_open

    for file in (folder / name for name in JSON_FILES if (folder / name).is_file()):
        try:
            values = checked_json(file.read_bytes(), dict[str, Any])
        except (OSError, ValueError) as error:
            return f"{file} is damaged ({error})"
        if file.name == INDEX and (missing := _missing_shard(folder, values)):
            return f"{missing} is missing, although {INDEX} names it"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{file} is damaged ({error})"
    return None


def _missing_shard(folder: Path, index: dict[str, Any]) -> Path | None:
    names = index.get("weight_map")
    files = sorted({folder / str(name) for name in names.values()}) if isinstance(names, dict) else []
    return next((file for file in files if not file.is_file()), None)


def why_not_finite(model: nn.Module) -> str:
    """Says why a model's outputs are NaN or infinite, and what to do. Reads all weights."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.detach().isfinite().all():
            return f"the model's weight {name} is not finite: get the model from its source again"
    dtype = next(model.parameters()).dtype
    return f"the model's weights are finite, so they overflow in {dtype}: choose another precision"


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """Refuses a tokenizer if the model has no embedding for some of its ordinary tokens.

    Some published text models lack embeddings of special tokens, such as one for images. The log names those
    tokens, and `check_ids` refuses a text with one of them.

    Raises:
        UserError: the model has no embedding for a token that is not special.
    """
    n_ids, n_tokens = model.config.get_text_config().vocab_size, len(tokenizer)
    if n_tokens <= n_ids:
        return
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= n_ids}
    special = {str(added) for added in tokenizer.added_tokens_decoder.values() if added.special}
    sizes = f"the tokenizer has {n_tokens} tokens, the model has embeddings for {n_ids}"
    if ordinary := sorted(set(beyond) - special, key=beyond.__getitem__):
        raise UserError(
            f"{sizes}: {', '.join(map(repr, ordinary[:3]))} … have none: use the tokenizer that belongs to "
            f"the model, or save the model after resize_token_embeddings({n_tokens})"
        )
    log.warning("%s: a text with %s is refused", sizes, ", ".join(sorted(beyond)[:5]))


def check_ids(largest: int, model: Any) -> None:
    """Refuses a token id that the model has no embedding for.

    Raises:
        UserError: the id is too large. It comes from the tokenizer of another model.
    """
    n_ids = model.config.get_text_config().vocab_size
    if largest >= n_ids:
        raise UserError(
            f"token id {largest} is beyond the model's vocabulary of {n_ids}: use the tokenizer that "
            "belongs to the model"
        )


def check_length(longest: int, model: Any) -> None:
    """Refuses a text that is longer than the model's table of learned positions (GPT-2).

    Raises:
        UserError: the text has more tokens than the table has rows.
    """
    config = model.config.get_text_config()
    n_positions = getattr(config, "max_position_embeddings", None)
    if n_positions is None or longest <= n_positions:
        return
    words = model.get_input_embeddings()
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding) and part is not words]
    if any(table.num_embeddings == n_positions for table in tables):
        raise UserError(
            f"a text of {longest} tokens is longer than the {n_positions} positions that the model has "
            f"learned: set max_tokens to at most {n_positions}"
        )
