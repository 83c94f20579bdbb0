"""`encode` and `search`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from llm2vec_ds.cli.common import (
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
        help="Texts: .txt (one a line), .jsonl, .csv, .parquet, hub:name, or - for stdin.",
        callback=expanded,
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        help="Where the vectors go: a .npy file ([texts, dimensions] float32), .jsonl or .parquet, or a "
        "folder for shards.",
        callback=expanded,
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        metavar="I/N", help="Only part I of N of the texts, I from 0, as a file of the folder --output."
    ),
]
BadTextsOption = Annotated[
    str, typer.Option(help="Empty or unreadable texts: raise (stop), or nan (name them and go on).")
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
    format: Annotated[str, typer.Option(help="Of the files in a folder: npy, jsonl or parquet.")] = "npy",
    text_column: Annotated[str, typer.Option(help="Column of --input with the text.")] = "text",
    instruction: Annotated[
        str | None, typer.Option(help="Put before each text; attended, not pooled.")
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Instead of it: an instruction that the encoder's folder names.")
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Scale every vector to length 1.")] = False,
    truncate_dim: Annotated[
        int | None, typer.Option(metavar="N", help="Keep the first N dimensions (Matryoshka).", min=1)
    ] = None,
    store: Annotated[
        str,
        typer.Option(help="float32; int8: a quarter of the bytes; binary: signs alone, a 32nd of them."),
    ] = "float32",
    bad_texts: BadTextsOption = "raise",
    attention: Attention = "auto",
    precision: Precision = "auto",
    micro_batch_tokens: MicroBatchTokens = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an --output of other options or texts.")
    ] = False,
) -> None:
    """Write the vectors of texts, in their order, on all GPUs there are.

    Killed, it goes on where it stopped; what is finished is left alone, so that an array of shards can
    simply be run again. Neither texts nor vectors need to fit in memory.
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
    from_stdin = "nothing is kept of standard input, give it again"
    with kept(from_stdin if input == "-" else "finished blocks are kept, run the same command to go on"):
        encode_file(options, target, overwrite=overwrite)


def search(
    index: Annotated[
        Path, typer.Argument(help="What encode wrote: a file, or a folder of shards.", callback=expanded)
    ],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    top: Annotated[int, typer.Option(metavar="N", help="How many texts.", min=1)] = 10,
    model: Annotated[
        str | None,
        typer.Option(help="Encoder or run; default: the one that the index names.", callback=encoder_place),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(help="Where the texts are; default: the input that the index names.", callback=expanded),
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="Put before the query.")] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Instead of it: an instruction that the encoder's folder names.")
    ] = None,
) -> None:
    """Print the encoded texts that are nearest to a query: cosine, row and text, nearest first."""
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
        print(f"{hit.cosine:.4f}  {hit.row}  {' '.join(hit.text.split())[:200]}")
