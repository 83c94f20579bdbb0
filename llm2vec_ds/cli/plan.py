"""The command `plan`: wiring only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds.cli.common import AsJson, Overrides, RecipeFile, examples, expanded, quiet_libraries

Measured = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="RUN",
        help="Folder of a run on this kind of machine. The time of a step is estimated from its speed. "
        "Repeat it for more runs.",
        callback=expanded,
    ),
]


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(
        epilog=examples(
            "plan recipes/qlora_7b_24gb.yaml",
            "plan recipes/llama2_7b_chat/mntp.yaml --nodes 4 --gpus-per-node 8 --gpu-memory-gib 80 --json",
        )
    )(plan)


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(metavar="N", help="Number of machines.", min=1)] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(metavar="G", help="GPUs of each machine. 0: train on a CPU.", min=0)
    ] = None,
    gpu_memory_gib: Annotated[
        float | None,
        typer.Option(metavar="M", help="Memory of one GPU in GiB. For a CPU: of the machine.", min=0.1),
    ] = None,
    interconnect_gbps: Annotated[
        float | None,
        typer.Option(metavar="B", help="How fast one GPU sends, in gigabits per second.", min=0.001),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            metavar="F", help="Dense bf16 speed of one GPU, in 10¹² operations per second.", min=0.001
        ),
    ] = None,
    measured: Measured = None,
    as_json: AsJson = False,
) -> None:
    """Show whether a recipe fits a machine: memory by part, the largest batch, bytes sent.

    It needs the model's config.json: from the model's folder, model.config_file or the hub's cache. It needs
    no weights, no data and no GPU. The options describe the machine. Without them the recipe does.
    """
    from llm2vec_ds.recipe.files import load_stages

    given = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "memory_gib": gpu_memory_gib,
        "interconnect_gbps": interconnect_gbps,
        "tflops": tflops,
    }
    machine = [f"machine.{key}={value}" for key, value in given.items() if value is not None]
    stages = load_stages(recipe, [*(overrides or []), *machine])
    quiet_libraries()
    from llm2vec_ds.encoder.of_run import with_encoders_of_runs
    from llm2vec_ds.planner import table
    from llm2vec_ds.planner.measured import measured_speed
    from llm2vec_ds.planner.plan import Planner

    planners = [Planner(with_encoders_of_runs(stage), recipe) for stage in stages]
    fit = measured_speed(measured, planners[0].device) if measured else None
    results = [table.as_json(planner, fit) for planner in planners]
    if as_json:
        print(json.dumps(results if len(results) > 1 else results[0], indent=1))
    else:
        print("\n\n".join(map(table.as_table, results)))
