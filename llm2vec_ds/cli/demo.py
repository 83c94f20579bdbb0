"""The command `demo`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds.cli.common import check_installed, encoder_place, examples, expanded, quiet_libraries
from llm2vec_ds.process.interrupts import kept

BudgetName = Annotated[
    str,
    typer.Option(
        help="How much to train: quick (0.02 million tokens), default (0.15 million), or full (as many "
        "steps as the paper, for a GPU)."
    ),
]
GradedPairsFile = Annotated[
    Path | None,
    typer.Option(
        help="Your own graded pairs for the measurement: a CSV file with sentence1, sentence2, score.",
        callback=expanded,
    ),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        help="Your own training text, UTF-8. Blank lines stand between paragraphs. It needs 20 paragraphs of "
        "80 characters or more, and 64 sentences of 25 to 90.",
        callback=expanded,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of another LLM. Default: SmolLM2-135M-Instruct, from PyPI.",
        callback=encoder_place,
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        help="Learn from this encoder: a folder or hub id of sentence-transformers, or an encoder of this "
        "toolkit. Default: the model's own first layer. A model of sentence-transformers needs "
        "pip install 'llm2vec-ds[distil]'.",
        callback=encoder_place,
    ),
]


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(
        epilog=examples(
            "demo",
            "demo --budget quick --output demo-quick",
            "demo --budget quick --qlora --output demo-qlora",
            "demo --simcse --output demo-simcse",
            "demo --teacher sentence-transformers/all-MiniLM-L6-v2 --output demo-distilled",
            "demo --model Qwen/Qwen3-0.6B --text my.txt --sts my-pairs.csv",
        )
    )(demo)


@kept("the demo is not finished; the same command starts it again")
def demo(
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for the encoder, the scores (metrics.json, stages.png) and both training runs.",
            callback=expanded,
        ),
    ] = Path("demo-output"),
    budget: BudgetName = "default",
    sts: GradedPairsFile = None,
    text: TextFile = None,
    model: BaseModel = None,
    seed: Annotated[
        int, typer.Option(help="Seed for data order, masking, dropout and the adapters' start.", min=0)
    ] = 42,
    teacher: Teacher = None,
    simcse: Annotated[bool, typer.Option("--simcse", help="SimCSE in place of distillation.")] = False,
    qlora: Annotated[bool, typer.Option(help="Keep the LLM's weights in 4 bits (NF4, QLoRA).")] = False,
    print_model_dir: Annotated[
        bool,
        typer.Option(
            "--print-model-dir", help="Only download the default model and print its folder. Trains nothing."
        ),
    ] = False,
) -> None:
    """Turn a real LLM into a text encoder, and measure it after each step.

    The steps are causal attention, bidirectional attention, MNTP, and distillation from the first layer of
    the untrained model. With --simcse the last step is that of the LLM2Vec paper. With --teacher it learns
    from another encoder. Without options this needs no data of yours.
    """
    quiet_libraries()
    if print_model_dir:
        from llm2vec_ds.demo.model import demo_model_dir

        print(demo_model_dir())
        return
    check_installed("demo", "gguf", "scipy", "sklearn", "matplotlib")
    from llm2vec_ds.demo.run import run_demo

    run_demo(
        output,
        budget=budget,
        sts=sts,
        text=text,
        model=model,
        seed=seed,
        qlora=qlora,
        teacher=teacher,
        simcse=simcse,
    )
