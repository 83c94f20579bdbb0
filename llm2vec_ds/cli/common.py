"""What commands share: examples in their help, quiet libraries, the arguments that name a recipe."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer


def examples(*commands: str) -> str:
    """An epilog of a command's help."""
    return "\n\n".join(["Examples:", *(f"- `llm2vec-ds {command}`" for command in commands)])


def quiet_libraries() -> None:
    """transformers' advice and its bar over weights that load (downloads from the hub keep theirs),
    bitsandbytes' about its kernels, DeepSpeed's warning that a machine without GPU has none, and what
    libraries say to those who program with them (`python -W default` shows that). The hub is not asked again
    and again. Called late: --help needs none of it.
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
    # Loaded for the first time it looks for a compiled CPU kernel, and says so where there is none.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: not record.getMessage().startswith("Setting accelerator to CPU")
    )


def expanded(value: Any) -> Any:
    """Callback of all that names a place: `~` is the home folder, also where no shell saw it (--to=~/x)."""
    if isinstance(value, list | tuple):
        return [expanded(item) for item in value]
    # Unlike pathlib's, this leaves a hub id and the name of an unknown user as they are.
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value  # noqa: PTH111


def encoder_place(value: Any) -> Any:
    """As `expanded`; a run's folder stands for its encoder."""
    from llm2vec_ds.encoder.of_run import encoder_of

    value = expanded(value)
    return encoder_of(value) if isinstance(value, str) else value


def _recipe_keys(incomplete: str) -> list[str]:
    """For the shell: recipe keys that begin so."""
    from llm2vec_ds.recipe.recipe import documented_keys

    return [f"{key}=" for key, _, _ in documented_keys() if key.startswith(incomplete)]


RecipeFile = Annotated[Path, typer.Argument(help="A recipe file, see recipes/.", callback=expanded)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Recipe keys to change, e.g. seed=1 batch.global_batch_size=64.",
        autocompletion=_recipe_keys,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="Folder of an encoder or of a run, or any decoder-only LLM (folder or hub id).",
        callback=encoder_place,
    ),
]
Attention = Annotated[str, typer.Option(help="Attention backend: auto, triton, flash_attn, varlen or torch.")]
Precision = Annotated[str, typer.Option(help="auto (bf16 on CUDA, fp32 on CPU), fp32 or bf16.")]
MicroBatchTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens of one forward pass. Default: 4,096 on a CPU; on a GPU 32,768 or what fits.",
        min=1,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")]
