"""The commands `ablate` and `report`: wiring only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds.cli.common import check_installed, examples, expanded, quiet_libraries
from llm2vec_ds.errors import UserError
from llm2vec_ds.process.interrupts import kept


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(
        epilog=examples(
            "ablate recipes/smollm2_ablation.yaml --budget quick",
            "ablate recipes/smollm2_ablation.yaml --output my-ablation 'seeds=[1,2,3]' model=my/llm",
        )
    )(ablate)
    app.command(
        epilog=examples(
            "report runs/smoke_mntp",
            "report runs/one runs/another --output compared.html",
            "report ablation",
        )
    )(report)


@kept("finished runs and scores are kept; run the same command to go on")
def ablate(
    recipe: Annotated[
        Path,
        typer.Argument(help="recipes/smollm2_ablation.yaml, or your own ablation file.", callback=expanded),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change, e.g. model=my/llm."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for runs, scores, table.md and report.html. A stopped ablation continues there.",
            callback=expanded,
        ),
    ] = Path("ablation"),
    budget: Annotated[
        str | None,
        typer.Option(
            help="One of the budgets in the recipe, such as quick, cpu or full. Without it, the stages "
            "train as they stand in the recipe."
        ),
    ] = None,
) -> None:
    """Train and measure variants, such as the paper's: uni, bi, bi+mntp, bi+simcse, bi+mntp+simcse.

    Use it to see what each step adds. The recipe names the data, which you bring. The command prints a table,
    and writes table.md, results.json and report.html.
    """
    from llm2vec_ds.ablation.recipe import load_ablation

    loaded = load_ablation(recipe, budget, overrides)
    check_installed("report", "matplotlib")
    quiet_libraries()
    from llm2vec_ds.ablation.run import run_ablation, table
    from llm2vec_ds.report.page import write_report

    result = run_ablation(loaded, budget, output)
    write_report([output], output / "report.html")
    print(table(result["scores"]))
    logging.getLogger("llm2vec_ds").info("%s, %s", output / "table.md", output / "report.html")


@kept("the report is not finished; run the same command again")
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of training runs, ablations, demos, evaluations or merges.", callback=expanded
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="The HTML file to write. Its figures go into a folder of the same name, as PNG.",
            callback=expanded,
        ),
    ] = Path("report.html"),
    examples: Annotated[
        bool,
        typer.Option(help="Also load the encoders, to draw a map and similarities of example sentences."),
    ] = True,
) -> None:
    """Draw the measurements of runs into one HTML file, which needs no network.

    It shows scores, loss, speed and memory over the steps, and how each encoder places example sentences.
    """
    if output.suffix != ".html":
        raise UserError(f"--output {output} must end in .html")
    check_installed("report", "matplotlib")
    quiet_libraries()
    from llm2vec_ds.report.page import write_report

    figures = write_report(folders, output, with_examples=examples)
    logging.getLogger("llm2vec_ds").info("%s: %s figures", output, len(figures))
