"""`export` and `merge`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds.cli.common import examples, expanded, quiet_libraries
from llm2vec_ds.errors import UserError
from llm2vec_ds.process.interrupts import kept


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(
        epilog=examples(
            "export runs/smoke_simcse --output exported",
            "export demo-output --output exported --dtype bf16 --push owner/name",
            "export runs/my_run --output exported --prompt 'query=Find passages that answer'",
        )
    )(export)
    app.command(epilog=examples("merge runs/qlora_7b_24gb/mntp/encoder --output merged"))(merge)


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
    from llm2vec_ds.export.export import ExportOptions, push_folder
    from llm2vec_ds.export.export import export as run

    options = ExportOptions(format, dtype, licence, {name: text for name, _, text in pairs}, overwrite)
    with kept("nothing is left behind, run the same command again"):
        run(source, output, options)
    if push is not None:
        with kept(f"{output} is written but not uploaded, run the same command with --overwrite"):
            print(push_folder(output, push))


@kept("nothing is left behind, run the same command again")
def merge(
    encoder: Annotated[Path, typer.Argument(help="The encoder/ of a run over NF4.", callback=expanded)],
    output: Annotated[Path, typer.Option(help="Folder of the new encoder.", callback=expanded)],
    original: Annotated[
        str | None,
        typer.Option(help="The original model, folder or hub id; default: training's.", callback=expanded),
    ] = None,
) -> None:
    """Put the adapters of a run over NF4 into the original weights, and say how much vectors move by it.

    `encoder/` itself holds the dequantised NF4 weights that the adapters were trained on.
    """
    quiet_libraries()
    from llm2vec_ds.export.merge import merge_into_original

    difference = merge_into_original(encoder, output, original)
    print(
        f"{output}: against {encoder}, cosine of a text's vectors {difference.mean_cosine:.4f} on average, "
        f"{difference.least_cosine:.4f} at least ({difference.n_texts} texts)"
    )
