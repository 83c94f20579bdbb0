"""Sets environment variables for libraries in this process. The log shows each."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping

log = logging.getLogger(__name__)


def set_variables(
    values: Mapping[str, str], reader: str, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Sets all of `values`, and replaces old values.

    Args:
        reader: who reads the variables, for the log.
    """
    changed = {name: value for name, value in values.items() if environment.get(name) != value}
    environment.update(changed)
    if changed:
        shown = " ".join(f"{name}={value}" for name, value in changed.items())
        log.debug("environment for %s: %s", reader, shown)


def set_defaults(values: Mapping[str, str], reader: str) -> None:
    """Sets only those of `values` that the user has not set."""
    set_variables({name: value for name, value in values.items() if name not in os.environ}, reader)
