"""What the modules of the command line share."""

from __future__ import annotations

import logging


def examples(*commands: str) -> str:
    """An epilog of a command's help."""
    return "\n\n".join(["Examples:", *(f"- `llm2vec-ds {command}`" for command in commands)])


def quiet_libraries() -> None:
    """transformers' advice and its bar over weights that load (downloads from the hub keep theirs), and
    DeepSpeed's warning that a machine without GPU has none. Called late: --help needs none of it.
    """
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    downloads_shown = not hub.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if downloads_shown:
        hub.enable_progress_bars()
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: not record.getMessage().startswith("Setting accelerator to CPU")
    )
