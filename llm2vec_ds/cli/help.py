"""Help that shows a flag as one: `--check / --no-check`, and not `--check <bool>`, which takes no value."""

from __future__ import annotations

import copy
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class _ShowsFlags:
    """Of a command: what its help prints. What it parses stays as it is."""

    params: list[Any]
    add_help_option: bool

    def format_help(self, ctx: Any, formatter: Any) -> None:
        shown = copy.copy(self)
        shown.params = [_as_shown(param) for param in self.get_params(ctx)]  # type: ignore[attr-defined]
        shown.add_help_option = False  # it is among them
        super(_ShowsFlags, shown).format_help(ctx, formatter)  # type: ignore[misc]


def _as_shown(param: Any) -> Any:
    if not getattr(param, "is_flag", False):
        return param
    flag = copy.copy(param)
    flag.metavar = ""
    # One name each: columns for short and for negative ones would leave little for what they mean.
    forms = filter(None, (", ".join(param.opts), ", ".join(param.secondary_opts)))
    flag.opts, flag.secondary_opts = [" / ".join(forms)], []
    return flag


class Command(_ShowsFlags, TyperCommand):
    pass


class Group(_ShowsFlags, TyperGroup):
    pass


def show_flags(app: typer.Typer) -> None:
    """In the help of all commands that are registered, those of groups too."""
    for command in app.registered_commands:
        command.cls = Command
    for group in app.registered_groups:
        assert group.typer_instance is not None
        group.cls = Group
        show_flags(group.typer_instance)
