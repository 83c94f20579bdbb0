"""The keys of a section: their documentation, and the nearest key to one that does not exist."""

from __future__ import annotations

import difflib
import json
from typing import Any

from pydantic_core import to_jsonable_python

from llm2vec_ds.recipe.habits import answer_to
from llm2vec_ds.recipe.sections import Section


def keys_of(section: type[Section], prefix: str = "") -> list[tuple[str, str, str]]:
    """Returns (dotted key, default or type, meaning) of every key of a section and of its inner sections.

    A section that can be null has a row of its own.
    """
    rows = []
    for name, field in section.model_fields.items():
        inner, meaning = _section_at([name], section), " ".join((field.description or "").split())
        if inner is None:
            default = "required" if field.is_required() else json.dumps(field.default)
            rows.append((prefix + name, default, meaning))
            continue
        if meaning:  # a section that can be left out
            rows.append((prefix + name, "null" if field.default is None else "section", meaning))
        rows += keys_of(inner, f"{prefix}{name}.")
    return rows


def default_of(key: str, root: type[Section]) -> Any:
    """Returns the default of a dotted key as a JSON value. None: there is no such key or no default."""
    *parents, name = key.split(".")
    section = _section_at(parents, root)
    field = section.model_fields.get(name) if section else None
    if field is None or field.is_required():
        return None
    return to_jsonable_python(field.get_default(call_default_factory=True))


LEAST_LIKENESS = 0.85
"""A key that is less like the unknown one is not proposed."""


def unknown_key(location: list[str], root: type[Section]) -> str:
    """Returns the error message for a key at `location` that `root` does not have.

    It proposes the answer to another tool's key, else a key of this name in another section, else the nearest
    key.
    """
    key, name = ".".join(location), location[-1]
    if answer := answer_to(name):
        return f"unknown key `{key}`: set {answer}"
    everywhere = [found for found, *_ in keys_of(root)]
    if same := [found for found in everywhere if found.rpartition(".")[2] == name]:
        return f"unknown key `{key}`: did you mean {' or '.join(f'`{found}`' for found in same)}?"
    if (section := _section_at(location[:-1], root)) is None:
        return f"unknown key `{key}`"
    prefix = "".join(f"{part}." for part in location[:-1])
    candidates = [prefix + field for field in section.model_fields] + everywhere

    def likeness(candidate: str) -> float:
        is_beside = candidate.rpartition(".")[0] == prefix[:-1]
        return _likeness(name, candidate.rpartition(".")[2]) + (0.2 if is_beside else 0.0)

    nearest = max(candidates, key=likeness)
    if likeness(nearest) < LEAST_LIKENESS:
        return f"unknown key `{key}`: docs/recipe_keys.md lists all keys"
    return f"unknown key `{key}`: did you mean `{nearest}`?"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def section_given_a_value(location: list[str], value: Any, root: type[Section]) -> str:
    """Returns the error message for a single value at `location`, where `root` has a section."""
    key, section = ".".join(location), _section_at(location, root)
    first = f", such as `{key}.{next(iter(section.model_fields))}`" if section else ""
    none = f", or {key}=null for none" if value == "none" else ""
    return f"`{key}` is a section: set its keys{first}{none} (got {value!r})"


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
