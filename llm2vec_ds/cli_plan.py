"""`llm2vec-ds plan`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def plan(
    recipe: Path,
    overrides: list[str] | None,
    *,
    nodes: int | None,
    gpus_per_node: int | None,
    gpu_memory_gib: float | None,
    interconnect_gbps: float | None,
    tflops: float | None,
    as_json: bool,
) -> None:
    """Prints a plan; options replace keys of the recipe's `machine`."""
    import json

    from llm2vec_ds.config import load_recipe

    given: dict[str, Any] = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "memory_gib": gpu_memory_gib,
        "interconnect_gbps": interconnect_gbps,
        "tflops": tflops,
    }
    machine = [f"machine.{key}={value}" for key, value in given.items() if value is not None]
    resolved = load_recipe(recipe, [*(overrides or []), *machine])
    from llm2vec_ds.planner import table
    from llm2vec_ds.planner.plan import Planner

    result = table.as_json(Planner(resolved, recipe))
    print(json.dumps(result, indent=1) if as_json else table.as_table(result))


Nodes = Annotated[int | None, typer.Option(metavar="N", help="Machines.", min=1)]
GpusPerNode = Annotated[int | None, typer.Option(metavar="G", help="GPUs of each; 0: a CPU.", min=0)]
MemoryGib = Annotated[float | None, typer.Option(metavar="M", help="Memory of one GPU, GiB.", min=0.1)]
InterconnectGbps = Annotated[
    float | None, typer.Option(metavar="B", help="What one GPU sends, gigabits a second.", min=0.001)
]
Tflops = Annotated[
    float | None, typer.Option(metavar="F", help="Dense bf16 speed of one GPU, 10¹² a second.", min=0.001)
]
AsJson = Annotated[bool, typer.Option("--json", help="A JSON object instead of the table.")]
