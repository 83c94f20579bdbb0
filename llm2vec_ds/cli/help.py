"""Shows flags in the help as `--check / --no-check`. The default would be `--check <bool>`."""

from __future__ import annotations

import copy
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class _ShowsFlags:
    """Changes what a command's help prints. How the command parses its options stays the same."""

    params: list[Any]
    add_help_option: bool

    def format_help(self, ctx: Any, formatter: Any) -> None:
        shown = copy.copy(self)
        shown.params = [_as_shown(param) for param in self.get_params(ctx)]  # type: ignore[attr-defined]
        shown.add_help_option = False  # `params` already has it
        super(_ShowsFlags, shown).format_help(ctx, formatter)  # type: ignore[misc]


def _as_shown(param: Any) -> Any:
    if not getattr(param, "is_flag", False):
        return param
    flag = copy.copy(param)
    flag.metavar = ""
    # All forms in one name. Extra columns for short and negative forms would leave little room for the text.
    forms = filter(None, (", ".join(param.opts), ", ".join(param.secondary_opts)))
    flag.opts, flag.secondary_opts = [" / ".join(forms)], []
    return flag


class Command(_ShowsFlags, TyperCommand):
    pass


class Group(_ShowsFlags, TyperGroup):
    pass


def show_flags(app: typer.Typer) -> None:
    """Applies this to all registered commands, and to those of groups."""
    for command in app.registered_commands:
        command.cls = Command
    for group in app.registered_groups:
        assert group.typer_instance is not None
        group.cls = Group
        show_flags(group.typer_instance)
