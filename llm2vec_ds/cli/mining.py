"""The command `mine`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds.cli.common import ROW_FILES, MicroBatchTokens, Model, examples, expanded, quiet_libraries
from llm2vec_ds.process.interrupts import kept

Pairs = Annotated[
    str,
    typer.Option(
        help=f"Queries with their positives: {ROW_FILES}, a folder of them, or hub:name.",
        callback=expanded,
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        help="The .jsonl file to write. A line has query, positive and negative (a list).", callback=expanded
    ),
]
Corpus = Annotated[
    str | None,
    typer.Option(
        help="Texts that negatives come from: the same formats, or .txt. Default: all positives.",
        callback=expanded,
    ),
]
FirstRank = Annotated[
    int,
    typer.Option(
        metavar="N", help="Use candidates from this rank on. Nearer ones are often unmarked positives.", min=1
    ),
]
LastRank = Annotated[int, typer.Option(metavar="N", help="Use candidates up to this rank.", min=1)]
Margin = Annotated[
    float,
    typer.Option(
        metavar="X", help="A candidate's cosine must be lower than the positive's minus X.", min=0.0
    ),
]
Ratio = Annotated[
    float,
    typer.Option(
        metavar="R", help="A candidate's cosine must be lower than R times the positive's, e.g. 0.95."
    ),
]
RerankerFolder = Annotated[
    str | None,
    typer.Option(
        help="A CrossEncoder of sentence-transformers (folder or hub id). It leaves out the candidates that "
        "it finds as good as the positive. This is slow.",
        callback=expanded,
    ),
]
RerankerMargin = Annotated[
    float, typer.Option(metavar="X", help="As --margin, for the reranker's scores (0 to 1).", min=0.0)
]
RerankerRatio = Annotated[
    float, typer.Option(metavar="R", help="As --ratio, for the reranker's scores (0 to 1).")
]
RerankerBatch = Annotated[
    int, typer.Option(metavar="N", help="Pairs in one forward pass of the reranker.", min=1)
]
Sampling = Annotated[
    str,
    typer.Option(
        metavar="top|random",
        help="Which candidates of the rank range: the nearest, or random ones (fixed by --seed).",
    ),
]
QueryInstruction = Annotated[
    str | None, typer.Option(help="Goes before each query. The model attends to it, but it is not pooled.")
]
DocumentInstruction = Annotated[
    str | None, typer.Option(help="The same before each text of the corpus and each positive.")
]
BadRows = Annotated[
    str,
    typer.Option(
        metavar="raise|skip", help="Rows that break their format: stop, or leave them out and count them."
    ),
]


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(
        epilog=examples(
            "mine --model my/encoder --pairs recipes/data/smoke_pairs --output runs/mined.jsonl",
            "mine --model my/encoder --pairs p.jsonl --corpus c.parquet --output m.jsonl --first-rank 10",
            "mine --model my/encoder --pairs p.csv --output m.jsonl --ratio 0.95 --sampling random",
            "mine --model my/encoder --pairs p.csv --output m.jsonl --reranker my/reranker --last-rank 20",
        )
    )(mine)


@kept("finished blocks are kept; run the same command to go on")
def mine(
    model: Model,
    pairs: Pairs,
    output: Output,
    corpus: Corpus = None,
    query_column: Annotated[str, typer.Option(help="Column of --pairs with the query.")] = "query",
    positive_column: Annotated[str, typer.Option(help="Column of --pairs with the positive.")] = "positive",
    corpus_column: Annotated[str, typer.Option(help="Column of --corpus with the text.")] = "text",
    negatives: Annotated[int, typer.Option(metavar="N", help="Negatives for each pair.", min=1)] = 5,
    first_rank: FirstRank = 1,
    last_rank: LastRank = 50,
    margin: Margin = 0.0,
    ratio: Ratio = 1.0,
    reranker: RerankerFolder = None,
    reranker_margin: RerankerMargin = 0.0,
    reranker_ratio: RerankerRatio = 1.0,
    reranker_batch_size: RerankerBatch = 32,
    sampling: Sampling = "top",
    query_instruction: QueryInstruction = None,
    document_instruction: DocumentInstruction = None,
    micro_batch_tokens: MicroBatchTokens = None,
    seed: Annotated[int, typer.Option(help="Seed for --sampling random.", min=0)] = 42,
    bad_rows: BadRows = "raise",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output.")] = False,
) -> None:
    """Find hard negatives: texts that the model finds near a query, though they do not answer it.

    They train the supervised stage. The log counts what was left out. If the command stops, run it again.

    Every query is compared with the whole corpus (exact search). A text is a candidate if it is no positive
    of this query, and if its cosine is lower than the positive's. Ranks count candidates, from 1 (nearest).
    """
    quiet_libraries()
    from llm2vec_ds.mining.mine import mine as run
    from llm2vec_ds.mining.options import MiningOptions

    options = MiningOptions(
        model=model,
        pairs=pairs,
        corpus=corpus,
        query_column=query_column,
        positive_column=positive_column,
        corpus_column=corpus_column,
        negatives=negatives,
        first_rank=first_rank,
        last_rank=last_rank,
        margin=margin,
        ratio=ratio,
        reranker=reranker,
        reranker_margin=reranker_margin,
        reranker_ratio=reranker_ratio,
        reranker_batch_size=reranker_batch_size,
        sampling=sampling,
        query_instruction=query_instruction,
        document_instruction=document_instruction,
        micro_batch_tokens=micro_batch_tokens,
        seed=seed,
        bad_rows=bad_rows,
    )
    run(options, output, overwrite=overwrite)
