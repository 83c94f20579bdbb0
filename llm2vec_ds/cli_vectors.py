"""Commands around vectors: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds.cli_common import examples, expanded, quiet_libraries
from llm2vec_ds.errors import UserError
from llm2vec_ds.interrupts import kept

ENCODE_EXAMPLES = (
    "encode --model runs/smoke_simcse/encoder --input a.txt --output a.npy",
    "encode --model Qwen/Qwen3-0.6B --input a.parquet --output a.jsonl --normalize",
    "encode --model my/encoder --input big.parquet --output vectors --shard 3/16",
    "encode --model my/encoder --input - --output a.npy < a.txt",
)


SEARCH_EXAMPLES = (
    "search a.npy 'boats that leave in the morning'",
    "search vectors 'who repairs clocks?' --top 3 --instruction 'Find passages that answer'",
)
EXPORT_EXAMPLES = (
    "export runs/smoke_simcse --output exported",
    "export demo-output --output exported --dtype bf16 --push owner/name",
    "export runs/my_run --output exported --prompt 'query=Find passages that answer'",
)


def register(app: typer.Typer) -> None:
    """Adds them to the command line."""
    app.command(epilog=examples(*ENCODE_EXAMPLES))(encode)
    app.command(epilog=examples(*SEARCH_EXAMPLES))(search)
    app.command(epilog=examples(*EXPORT_EXAMPLES))(export)


def encode(
    model: Annotated[
        str,
        typer.Option(help="Encoder folder, or any decoder-only LLM (folder or hub id).", callback=expanded),
    ],
    input: Annotated[
        str,
        typer.Option(
            help="Texts: .txt (one a line), .jsonl, .csv, .parquet, hub:name, or - for stdin.",
            callback=expanded,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Where the vectors go: a .npy file ([texts, dimensions] float32), .jsonl or .parquet, or a "
            "folder for shards.",
            callback=expanded,
        ),
    ],
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Only part I of N of the texts, I from 0, as a file of the folder --output."
        ),
    ] = None,
    format: Annotated[str, typer.Option(help="Of the files in a folder: npy, jsonl or parquet.")] = "npy",
    text_column: Annotated[str, typer.Option(help="Column of --input with the text.")] = "text",
    instruction: Annotated[
        str | None, typer.Option(help="Put before each text; attended, not pooled.")
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Instead of it: an instruction that the encoder's folder names.")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale every vector to length 1.")] = False,
    truncate_dim: Annotated[
        int | None, typer.Option(metavar="N", help="Keep the first N dimensions (Matryoshka).", min=1)
    ] = None,
    bad_texts: Annotated[
        str, typer.Option(help="Empty or unreadable texts: raise (stop), or nan (name them and go on).")
    ] = "raise",
    attention: Annotated[
        str, typer.Option(help="Attention backend: auto, triton, flash_attn, varlen or torch.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="auto (bf16 on CUDA, fp32 on CPU), fp32 or bf16.")] = "auto",
    micro_batch_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of one forward pass.", min=1)
    ] = 4096,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an --output of other options or texts.")
    ] = False,
) -> None:
    """Write the vectors of texts, in their order, on all GPUs there are.

    Killed, it goes on where it stopped; what is finished is left alone, so that an array of shards can
    simply be run again. Neither texts nor vectors need to fit in memory.
    """
    from llm2vec_ds.encode_files import EncodeOptions, Target, encode_file

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
        batch_tokens=micro_batch_tokens,
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
        str | None, typer.Option(help="Encoder; default: the one that the index names.", callback=expanded)
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
    from llm2vec_ds.vector_search import search as run

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


def export(
    source: Annotated[
        Path, typer.Argument(help="Folder of a run, of a demo, or an encoder folder.", callback=expanded)
    ],
    output: Annotated[
        Path, typer.Option(help="The folder to write; it appears when it is checked.", callback=expanded)
    ],
    format: Annotated[
        str, typer.Option(help="sentence-transformers (vLLM and TEI read it too), or transformers.")
    ] = "sentence-transformers",
    dtype: Annotated[str, typer.Option(help="auto (as the encoder is stored), fp32, bf16 or fp16.")] = "auto",
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEXT",
            help="An instruction under a name, such as 'query=Find passages'; repeatable.",
        ),
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="Of the base model, where its card lacks it.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload it to this hub repository.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export; what others put beside it stays.")
    ] = False,
) -> None:
    """Write an encoder as a folder that other tools load without this package's code, and check it.

    Flags, pooling, prompts, model card and licence are written beside the merged weights; then the folder is
    loaded afresh by transformers and sentence-transformers and must give the encoder's vectors. What a reader
    cannot express is said here.
    """
    pairs = [text.partition("=") for text in prompt or []]
    if wrong := [name for name, equals, text in pairs if not (name and equals and text)]:
        raise UserError(f"--prompt {wrong[0]!r} is not NAME=TEXT, such as query=Find passages that answer")
    quiet_libraries()
    from llm2vec_ds.export import ExportOptions, push_folder
    from llm2vec_ds.export import export as run

    options = ExportOptions(format, dtype, licence, {name: text for name, _, text in pairs}, overwrite)
    with kept("nothing is left behind, run the same command again"):
        run(source, output, options)
    if push is not None:
        with kept(f"{output} is written but not uploaded, run the same command with --overwrite"):
            print(push_folder(output, push))
