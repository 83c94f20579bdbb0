"""Reads JSON and YAML that may be damaged. Every kind of damage becomes an error that names the cause."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from llm2vec_ds.errors import UserError

T = TypeVar("T")

TOO_DEEP = "it is nested too deeply"
MERGE = "tag:yaml.org,2002:merge"
"""The tag of `<<`, which may occur in a mapping more than once."""


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: it is no JSON or no Unicode, or is nested too deeply for Python.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML text.

    Raises:
        ValueError: it is no YAML, is nested too deeply for Python, or has a key twice in a mapping.
    """
    import yaml

    try:
        return yaml.load(text, _unique_keys())
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def read_yaml_mapping(file: Path, what: str, of: str, remedy: str) -> dict[str, Any]:
    """Reads a YAML file that maps texts to values.

    Args:
        what: what the messages call the file, such as `recipe my.yaml`.
        of: what it maps, such as `keys to values`.
        remedy: what the user can do if the file cannot be read.

    Raises:
        UserError: the file cannot be read, is no YAML, or holds something else.
    """
    try:
        values = parse_yaml(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror or error}): {remedy}") from None
    except ValueError as error:
        raise UserError(f"{what} is not valid YAML: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{what} must be a YAML mapping of {of}")
    return {str(key): value for key, value in values.items()}


@cache
def _unique_keys() -> Any:
    """Returns a safe loader that rejects a repeated key. PyYAML's own silently takes the last one."""
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            lines: dict[str, int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                    continue
                line = key.start_mark.line + 1
                if first := lines.get(key.value):
                    raise yaml.YAMLError(f"`{key.value}` occurs twice, in lines {first} and {line}")
                lines[key.value] = line
            return super().construct_mapping(node, deep)

    return UniqueKeys


def read_json(file: Path, shape: type[T], remedy: str) -> T:
    """Reads a JSON file as the type `shape`. Values are not converted to it.

    Args:
        remedy: what the user can do about a damaged file.

    Raises:
        UserError: the file cannot be read, is no JSON, or its value has another shape.
    """
    try:
        return checked_json(file.read_bytes(), shape)
    except OSError as error:
        cause = error.strerror or str(error)
    except ValueError as error:
        cause = str(error)
    raise UserError(f"{file} is damaged ({cause}): {remedy}")


def read_json_lines(file: Path, shape: type[T], remedy: str) -> Iterator[T]:
    """Yields a value of the type `shape` for each line.

    A last line that is cut off is left out. Its writer is not done, or was killed.

    Args:
        remedy: what the user can do about a damaged file.

    Raises:
        UserError: the file cannot be read, or another line is damaged.
    """
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{file} is damaged ({error.strerror or error}): {remedy}") from None
    for number, line in enumerate(lines, 1):
        try:
            yield checked_json(line, shape)
        except ValueError as error:
            if not line.endswith(b"\n"):
                return
            raise UserError(f"{file}, line {number} is damaged ({error}): {remedy}") from None


def checked_json(text: bytes, shape: type[T]) -> T:
    """Returns the value of a JSON text as the type `shape`. Values are not converted to it.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or has another shape. The message is one line.
    """
    try:
        value: T = _adapter(shape).validate_json(text, strict=True)  # type: ignore[arg-type]
        return value
    except ValidationError as error:
        raise ValueError("; ".join(map(explain, error.errors()[:3]))) from None


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    """Returns the type's adapter. It is cached, because building one costs as much as reading a long line."""
    return TypeAdapter(shape)


def explain(mistake: Any) -> str:
    """Returns one of pydantic's mistakes in a few words."""
    key = ".".join(str(part) for part in mistake["loc"])
    said = in_words(mistake)
    return f"`{key}`: {said}" if key else said


def in_words(mistake: Any) -> str:
    """Returns what one of pydantic's mistakes says, without the key."""
    said: str = mistake["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    said = said.partition(", unable to parse")[0]
    if mistake["type"] == "string_type" and isinstance(mistake["input"], list):
        said += ". Square brackets make a list in YAML: put the value in quotes"
    return said
