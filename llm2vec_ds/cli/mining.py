"""`mine`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds.cli.common import MicroBatchTokens, Model, examples, expanded, quiet_libraries
from llm2vec_ds.process.interrupts import kept

Pairs = Annotated[
    str,
    typer.Option(
        help="Queries with their positives: .jsonl, .csv, .parquet, a folder, or hub:name.",
        callback=expanded,
    ),
]
Output = Annotated[
    Path, typer.Option(help="A .jsonl file: query, positive, negative (a list).", callback=expanded)
]
Corpus = Annotated[
    str | None,
    typer.Option(
        help="Where negatives come from: any of those, or .txt. Default: all positives.",
        callback=expanded,
    ),
]
FirstRank = Annotated[
    int, typer.Option(metavar="N", help="Leave out the nearest candidates before this one.", min=1)
]
LastRank = Annotated[int, typer.Option(metavar="N", help="Leave out the candidates after this one.", min=1)]
Margin = Annotated[
    float,
    typer.Option(metavar="X", help="A candidate's cosine is below the positive's minus this.", min=0.0),
]
Ratio = Annotated[
    float,
    typer.Option(metavar="R", help="A candidate's cosine is below this times the positive's, such as 0.95."),
]
RerankerFolder = Annotated[
    str | None,
    typer.Option(
        help="A CrossEncoder of sentence-transformers: leaves out candidates as good as the positive for it.",
        callback=expanded,
    ),
]
RerankerMargin = Annotated[
    float, typer.Option(metavar="X", help="As --margin, of the reranker's score (0 to 1).", min=0.0)
]
RerankerRatio = Annotated[
    float, typer.Option(metavar="R", help="As --ratio, of the reranker's score (0 to 1).")
]
RerankerBatch = Annotated[int, typer.Option(metavar="N", help="Pairs of one pass of the reranker.", min=1)]
Sampling = Annotated[
    str, typer.Option(help="Which of the ranks: top (the nearest) or random (fixed by --seed).")
]
QueryInstruction = Annotated[str | None, typer.Option(help="Put before each query; attended, not pooled.")]
DocumentInstruction = Annotated[
    str | None, typer.Option(help="Put before each text of the corpus and each positive.")
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


@kept("what is encoded and searched so far is kept, run the same command to go on")
def mine(
    model: Model,
    pairs: Pairs,
    output: Output,
    corpus: Corpus = None,
    query_column: Annotated[str, typer.Option(help="Column of --pairs with the query.")] = "query",
    positive_column: Annotated[str, typer.Option(help="Column with its right document.")] = "positive",
    corpus_column: Annotated[str, typer.Option(help="Column of --corpus with the text.")] = "text",
    negatives: Annotated[int, typer.Option(metavar="N", help="Negatives of a pair.", min=1)] = 5,
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
    seed: Annotated[int, typer.Option(help="Fixes random sampling.", min=0)] = 42,
    bad_rows: Annotated[
        str, typer.Option(help="Rows that are not what their format says: raise (stop), or skip (count).")
    ] = "raise",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that exists.")] = False,
) -> None:
    """Find hard negatives: texts that the model takes for near a query, though they do not answer it.

    Every query is compared with the whole corpus (exact search). Never negatives: the positive, other
    positives of the same query, and what scores as high as the positive. Ranks count the rest, from 1.

    The log counts what was skipped and why. Killed, it goes on where it stopped. The output is data for the
    supervised stage.
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
