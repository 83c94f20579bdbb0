"""`score`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds.cli.common import examples, expanded, quiet_libraries
from llm2vec_ds.errors import UserError
from llm2vec_ds.process.interrupts import kept


def register(app: typer.Typer) -> None:
    """Adds this command to the command line."""
    app.command(
        epilog=examples(
            "score runs/mined.jsonl --reranker cross-encoder/ms-marco-MiniLM-L6-v2 --output scored.jsonl",
            "score big.parquet --reranker my/reranker --output scored --shard 3/16",
        )
    )(score)


@kept("finished blocks are kept, run the same command to go on")
def score(
    pairs: Annotated[
        str,
        typer.Argument(
            help="Queries with positive and negatives: .jsonl, .csv, .parquet, or hub:name.",
            callback=expanded,
        ),
    ],
    reranker: Annotated[
        str,
        typer.Option(help="A CrossEncoder of sentence-transformers: folder or hub id.", callback=expanded),
    ],
    output: Annotated[
        Path, typer.Option(help="A .jsonl file; with --shard a folder of them.", callback=expanded)
    ],
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only part I of N of the rows, I from 0.")
    ] = None,
    query_column: Annotated[str, typer.Option(help="Column with the query.")] = "query",
    positive_column: Annotated[str, typer.Option(help="Column with its right document.")] = "positive",
    negative_column: Annotated[str, typer.Option(help="Column with hard negatives.")] = "negative",
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest query and document together.", min=8)
    ] = 512,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Pairs of one pass; changes nothing but speed.", min=1)
    ] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that exists.")] = False,
) -> None:
    """Let a reranker judge each query's documents: writes the pairs with a list `scores`, the positive first.

    The scores are the model's own numbers, without a sigmoid. Killed, it goes on where it stopped. The output
    is data for the stage distil_scores.
    """
    quiet_libraries()
    from llm2vec_ds.mining.score import ScoreOptions
    from llm2vec_ds.mining.score import score as run
    from llm2vec_ds.vectors.files import Shard

    part = None
    if shard is not None:
        if output.suffix == ".jsonl":
            raise UserError(f"--shard needs a folder, --output {output} is a file: drop .jsonl")
        part = Shard.parse(shard)
        output = part.file(output, ".jsonl")
        output.parent.mkdir(parents=True, exist_ok=True)
    options = ScoreOptions(
        reranker, pairs, query_column, positive_column, negative_column, max_tokens, batch_size
    )
    run(options, output, part, overwrite=overwrite)
