"""The settings of an encoder beside its trunk: pooling, template, lengths, prompts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictBool, TypeAdapter, ValidationError

from llm2vec_ds import __version__
from llm2vec_ds.data.prompts import PLAIN, TEXT_SPANS, check_form
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.peft_adapters import file_of, upstream_settings
from llm2vec_ds.model.pooling import POOLINGS
from llm2vec_ds.storage.reading import explain, read_json

log = logging.getLogger(__name__)

SETTINGS_FILE = "llm2vec_ds.json"
SENTENCE_TRANSFORMERS_FILE = "modules.json"


@dataclass(frozen=True)
class EncoderSettings:
    """How an encoder prepares and pools texts. Its folder holds this beside the model's config.json.

    Attributes:
        pooling: a name of `POOLINGS` (model/pooling.py).
        max_tokens: a longer text is cut at its end.
        template: how instruction and text are put together. The default is `{instruction} {text}`.
        special_tokens: whether the tokenizer adds its own tokens.
        pooled_tokens: `text` leaves instruction, template and special tokens out of a vector. `all` pools the
            whole input, as servers do.
        text_span: `offsets` finds a text's tokens by character offsets. `upstream` finds them as `llm2vec`
            does.
        max_text_tokens: with `text_span: upstream`, a text with more tokens first loses words.
        prompts: instructions by name, for `encode(prompt_name=…)`.
    """

    pooling: str = "mean"
    max_tokens: Annotated[int, Field(ge=1)] = 512
    template: str = PLAIN
    special_tokens: StrictBool = True
    pooled_tokens: str = "text"
    text_span: str = "offsets"
    max_text_tokens: Annotated[int, Field(ge=1)] | None = None
    prompts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> EncoderSettings:
        """Makes settings from a mapping.

        Raises:
            UserError: a name, pooling or text span is unknown, or a value has a wrong type.
        """
        if unknown := sorted(values.keys() - cls.__dataclass_fields__.keys()):
            known = ", ".join(cls.__dataclass_fields__)
            raise UserError(f"unknown encoder setting {unknown[0]!r}: choose among {known}")
        try:
            settings = TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            raise UserError(f"encoder setting {explain(error.errors()[0])}") from None
        check_form(settings.template, "encoder setting template")
        for name, allowed in (
            ("pooling", tuple(POOLINGS)),
            ("text_span", TEXT_SPANS),
            ("pooled_tokens", ("text", "all")),
        ):
            if (value := getattr(settings, name)) not in allowed:
                raise UserError(f"encoder setting {name}={value!r} is unknown: choose {', '.join(allowed)}")
        return settings

    def write(self, folder: Path) -> None:
        """Writes the settings file into a folder."""
        values = {**asdict(self), "llm2vec_ds_version": __version__}
        said = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        (folder / SETTINGS_FILE).write_text(said, encoding="utf-8")


def settings_at(path: str, adapters: Sequence[Path], changes: Mapping[str, Any]) -> EncoderSettings:
    """Returns the settings that a model comes with, with some changes.

    Args:
        path: a folder or a hub id.
        adapters: the folders of the adapters on it. The last one may hold upstream's settings.

    Raises:
        UserError: a settings file is damaged, or a change has an unknown name or value.
    """
    upstream = upstream_settings(adapters[-1] if adapters else Path(path))
    own = stored_settings(path)
    if not own and not upstream and file_of(path, SENTENCE_TRANSFORMERS_FILE) is not None:
        log.warning(
            "%s is a model of sentence-transformers. It is read as an LLM here: its pooling, prompts and "
            "attention are not used",
            path,
        )
    return EncoderSettings.of({**upstream, **own, **changes})


def stored_settings(place: str) -> dict[str, Any]:
    """Reads the settings file of a folder or hub id. Empty if there is none.

    Ignores unknown names, which a later version may have written.

    Raises:
        UserError: the file is damaged.
    """
    file = file_of(place, SETTINGS_FILE)
    if file is None:
        return {}
    remedy = "copy the encoder folder from its run again"
    stored = read_json(file, dict[str, Any], remedy)
    known = {k: v for k, v in stored.items() if k in EncoderSettings.__dataclass_fields__}
    try:
        EncoderSettings.of(known)
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}): {remedy}") from None
    return known
