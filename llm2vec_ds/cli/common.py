"""What the commands share: examples in their help, quiet libraries, common arguments and options."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from llm2vec_ds.errors import UserError


def examples(*commands: str) -> str:
    """Returns the list of examples at the end of a command's help."""
    return "\n\n".join(["Examples:", *(f"- `llm2vec-ds {command}`" for command in commands)])


def check_installed(extra: str, *packages: str) -> None:
    """Checks that the packages of an extra are installed, before a command does any work.

    Raises:
        UserError: one is missing.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"{missing[0]} is not installed: pip install 'llm2vec-ds[{extra}]'")


def quiet_libraries() -> None:
    """Hides messages of libraries that do not help a user, and makes an unreachable hub fail at once.

    Hidden are advice of transformers and its progress bar for loading weights, bitsandbytes' message about
    its kernels, DeepSpeed's warning about a machine without a GPU, and deprecation warnings. Downloads keep
    their progress bar. `python -W default` shows the deprecation warnings.

    Commands call this late, because --help should not import these libraries.
    """
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    from llm2vec_ds.network import give_up_on_unreachable_hub

    give_up_on_unreachable_hub()
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
    downloads_shown = not hub.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if downloads_shown:
        hub.enable_progress_bars()
    # On import, bitsandbytes looks for a compiled CPU kernel and prints a message if there is none.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: not record.getMessage().startswith("Setting accelerator to CPU")
    )


def expanded(value: Any) -> Any:
    """Callback of options that name a place: replaces `~` by the home folder.

    The shell does not always do that, for example not in `--output=~/x`.
    """
    if isinstance(value, list | tuple):
        return [expanded(item) for item in value]
    # Unlike pathlib's expanduser, this keeps a hub id and the name of an unknown user.
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value  # noqa: PTH111


def encoder_place(value: Any) -> Any:
    """Callback as `expanded`. It also replaces a run's folder by the run's encoder."""
    from llm2vec_ds.encoder.of_run import encoder_of

    value = expanded(value)
    return encoder_of(value) if isinstance(value, str) else value


def _recipe_keys(incomplete: str) -> list[str]:
    """Returns the recipe keys that begin with `incomplete`, for completion in the shell."""
    from llm2vec_ds.recipe.recipe import documented_keys

    return [f"{key}=" for key, _, _ in documented_keys() if key.startswith(incomplete)]


ROW_FILES = ".jsonl, .json, .csv, .tsv (also as .gz, .bz2 or .xz), .parquet"
"""For the help of options: the formats that hold rows with columns."""

RecipeFile = Annotated[
    Path, typer.Argument(help="A recipe: a YAML file such as those in recipes/.", callback=expanded)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes keys of the recipe, e.g. seed=1 batch.global_batch_size=64. docs/recipe_keys.md lists "
        "all keys.",
        autocompletion=_recipe_keys,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="Folder of an encoder or of a run. Or any decoder-only LLM, as a folder or hub id.",
        callback=encoder_place,
    ),
]
Attention = Annotated[
    str, typer.Option(metavar="NAME", help="Attention backend: auto, triton, flash_attn, varlen or torch.")
]
Precision = Annotated[
    str,
    typer.Option(metavar="auto|fp32|bf16", help="Number format. auto: bf16 on CUDA, fp32 on a CPU."),
]
MicroBatchTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens of one forward pass. Lower it if memory is full. Default: 4,096 on a CPU, and 32,768 or "
        "what fits on a GPU.",
        min=1,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
