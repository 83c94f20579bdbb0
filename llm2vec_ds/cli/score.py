"""The command `score`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds.cli.common import ROW_FILES, examples, expanded, quiet_libraries
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


@kept("finished blocks are kept; run the same command to go on")
def score(
    pairs: Annotated[
        str,
        typer.Argument(
            help=f"Queries with a positive and negatives: {ROW_FILES}, a folder of them, or hub:name.",
            callback=expanded,
        ),
    ],
    reranker: Annotated[
        str,
        typer.Option(
            help="The CrossEncoder of sentence-transformers that scores: folder or hub id.", callback=expanded
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="The .jsonl file to write. With --shard: a folder.", callback=expanded)
    ],
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Score only part I of N of the rows. I counts from 0.")
    ] = None,
    query_column: Annotated[str, typer.Option(help="Column with the query.")] = "query",
    positive_column: Annotated[str, typer.Option(help="Column with the positive.")] = "positive",
    negative_column: Annotated[str, typer.Option(help="Column with the hard negatives.")] = "negative",
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens of a query and a document together.", min=8)
    ] = 512,
    batch_size: Annotated[
        int,
        typer.Option(metavar="N", help="Pairs in one forward pass. It changes only speed and memory.", min=1),
    ] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output.")] = False,
) -> None:
    """Score each query's documents with a reranker. The output is training data for the stage distil_scores.

    Each line gets a list `scores`: the positive's score first, then the negatives'. They are the model's own
    numbers, without a sigmoid. If the command is stopped, run it again. It continues where it stopped.
    """
    quiet_libraries()
    from llm2vec_ds.mining.score import ScoreOptions
    from llm2vec_ds.mining.score import score as run
    from llm2vec_ds.vectors.files import Shard

    part = None
    if shard is not None:
        if output.suffix == ".jsonl":
            raise UserError(f"--shard needs a folder, but --output {output} is a file: leave out .jsonl")
        part = Shard.parse(shard)
        output = part.file(output, ".jsonl")
        output.parent.mkdir(parents=True, exist_ok=True)
    options = ScoreOptions(
        reranker, pairs, query_column, positive_column, negative_column, max_tokens, batch_size
    )
    run(options, output, part, overwrite=overwrite)
