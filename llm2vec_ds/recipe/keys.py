"""The keys of a section: their documentation, and the nearest to one that does not exist."""

from __future__ import annotations

import difflib
import json
from typing import Any

from pydantic_core import to_jsonable_python

from llm2vec_ds.recipe.sections import Section


def keys_of(section: type[Section], prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default or type, meaning) of every key of a section and of those inside."""
    rows = []
    for name, field in section.model_fields.items():
        inner = _section_at([name], section)
        if inner is not None:
            rows += keys_of(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else json.dumps(field.default)
        rows.append((prefix + name, default, " ".join((field.description or "").split())))
    return rows


def default_of(key: str, root: type[Section]) -> Any:
    """Of a dotted key, as JSON has it; None where there is no such key or no default."""
    *parents, name = key.split(".")
    section = _section_at(parents, root)
    field = section.model_fields.get(name) if section else None
    if field is None or field.is_required():
        return None
    return to_jsonable_python(field.get_default(call_default_factory=True))


def unknown_key(location: list[str], root: type[Section]) -> str:
    """What is wrong with a key at `location` that `root` does not have, and which it has."""
    section = _section_at(location[:-1], root)
    names = list(section.model_fields) if section else []
    key, prefix = ".".join(location), ".".join(location[:-1])
    near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.0)
    if not near:
        return f"unknown key `{key}`"
    suggestion = f"{prefix}.{near[0]}" if prefix else near[0]
    return f"unknown key `{key}`: did you mean `{suggestion}`?"


def _section_at(location: list[str], root: type[Section]) -> type[Section] | None:
    section = root
    for name in location:
        field = section.model_fields.get(name)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]
        if not found:
            return None
        section = found[0]
    return section
