"""Keys of earlier versions. They still work, and the log names the new key."""

from __future__ import annotations

import logging
from typing import Any

from llm2vec_ds.errors import UserError

log = logging.getLogger(__name__)

RENAMED = {"batch.max_tokens_per_micro_batch": "batch.micro_batch_tokens"}


def with_names_of_today(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns `values` with today's name for each former key.

    Raises:
        UserError: `values` holds a key under both names.
    """
    for former, key in RENAMED.items():
        section, name = former.split(".")
        if not isinstance(inner := values.get(section), dict) or name not in inner:
            continue
        new_name = key.split(".")[1]
        if new_name in inner:
            raise UserError(f"{source}: `{former}` is called `{key}` now, and both are set: remove the first")
        log.warning("%s: `%s` is called `%s` now", source, former, key)
        renamed = {new_name if own == name else own: value for own, value in inner.items()}
        values = {**values, section: renamed}
    return values
