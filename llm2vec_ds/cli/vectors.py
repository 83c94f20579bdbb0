"""The commands `encode` and `search`: wiring only."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from llm2vec_ds.cli.common import (
    ROW_FILES,
    Attention,
    MicroBatchTokens,
    Model,
    Precision,
    encoder_place,
    examples,
    expanded,
    quiet_libraries,
)
from llm2vec_ds.errors import UserError
from llm2vec_ds.process.interrupts import kept

if TYPE_CHECKING:
    from llm2vec_ds.vectors.quantized import Stored

Input = Annotated[
    str,
    typer.Option(
        help=f"The texts: .txt (one per line), {ROW_FILES}, a folder of them, hub:name, or - for standard "
        "input.",
        callback=expanded,
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        help="The file to write: .npy ([texts, dimensions] float32), .jsonl or .parquet. Or a folder for "
        "shards.",
        callback=expanded,
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Encode only part I of N of the texts, into a file in the folder --output. I counts from 0.",
    ),
]
Store = Annotated[
    str,
    typer.Option(help="float32, int8 (a quarter of the bytes), or binary (only signs, a 32nd of the bytes)."),
]
BadTextsOption = Annotated[
    str,
    typer.Option(help="Empty or unreadable texts: raise (stop) or nan (name them, and write NaN vectors)."),
]


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(
        epilog=examples(
            "encode --model runs/smoke_simcse/encoder --input a.txt --output a.npy",
            "encode --model Qwen/Qwen3-0.6B --input a.parquet --output a.jsonl --normalize",
            "encode --model my/encoder --input big.parquet --output vectors --shard 3/16",
            "encode --model my/encoder --input - --output a.npy < a.txt",
            "encode --model my/encoder --input a.txt --output a.npy --store binary",
        )
    )(encode)
    app.command(
        epilog=examples(
            "search a.npy 'boats that leave in the morning'",
            "search vectors 'who repairs clocks?' --top 3 --instruction 'Find passages that answer'",
        )
    )(search)


def encode(
    model: Model,
    input: Input,
    output: Output,
    shard: ShardOption = None,
    format: Annotated[
        str, typer.Option(help="Format of the files if --output is a folder: npy, jsonl or parquet.")
    ] = "npy",
    text_column: Annotated[str, typer.Option(help="Column of --input with the text.")] = "text",
    instruction: Annotated[
        str | None, typer.Option(help="Goes before each text. The model attends to it, but it is not pooled.")
    ] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option(help="Name of an instruction that the encoder stores. Give this or --instruction."),
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Scale every vector to length 1.")] = False,
    truncate_dim: Annotated[
        int | None, typer.Option(metavar="N", help="Keep the first N dimensions (Matryoshka).", min=1)
    ] = None,
    store: Store = "float32",
    bad_texts: BadTextsOption = "raise",
    attention: Attention = "auto",
    precision: Precision = "auto",
    micro_batch_tokens: MicroBatchTokens = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output.")] = False,
) -> None:
    """Write the vectors of texts, in the order of the texts. Uses all GPUs of this machine.

    If the command is stopped, run it again. It continues where it stopped, and leaves finished files as they
    are. So you can submit a whole array of shards again. Texts and vectors need not fit in memory.
    """
    from llm2vec_ds.vectors.encode import EncodeOptions, Target, encode_file

    if bad_texts not in ("raise", "nan"):
        raise UserError(f"--bad-texts {bad_texts!r} is unknown: choose raise or nan")
    target = Target.of(output, shard, f".{format}")
    quiet_libraries()
    options = EncodeOptions(
        model=model,
        input=input,
        text_column=text_column,
        instruction=instruction,
        prompt_name=prompt_name,
        normalize=normalize,
        truncate_dim=truncate_dim,
        attention=attention,
        precision=precision,
        bad_texts="nan" if bad_texts == "nan" else "raise",
        micro_batch_tokens=micro_batch_tokens,
        stored=cast("Stored", store),
    )
    from_stdin = "nothing is kept from standard input; run the command again with the same input"
    from_file = "finished blocks of 4,096 texts are kept; run the same command to go on"
    with kept(from_stdin if input == "-" else from_file):
        encode_file(options, target, overwrite=overwrite)


def search(
    index: Annotated[
        Path,
        typer.Argument(help="Vectors that `encode` wrote: a file, or a folder of shards.", callback=expanded),
    ],
    query: Annotated[str, typer.Argument(help="The text to search for.")],
    top: Annotated[int, typer.Option(metavar="N", help="How many texts to print.", min=1)] = 10,
    model: Annotated[
        str | None,
        typer.Option(
            help="Encoder or run for the query. Default: the model that wrote the index.",
            callback=encoder_place,
        ),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(help="File of the texts. Default: the input that the index names.", callback=expanded),
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="Goes before the query.")] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option(help="Name of an instruction that the encoder stores. Give this or --instruction."),
    ] = None,
) -> None:
    """Print the texts nearest to a query: cosine, row and text, nearest first."""
    if not query.strip():
        raise UserError("the query is empty: give the text to search for")
    quiet_libraries()
    from llm2vec_ds.vectors.search import search as run

    for hit in run(
        index,
        query,
        top=top,
        model=model,
        texts=texts,
        instruction=instruction,
        prompt_name=prompt_name,
    ):
        print(f"{hit.cosine:.4f}  {hit.row}  {textwrap.shorten(hit.text, 200, placeholder=' …')}")
