"""The commands `export` and `merge`: wiring only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm2vec_ds.cli.common import check_installed, examples, expanded, quiet_libraries
from llm2vec_ds.cli.evaluate import evaluation_of
from llm2vec_ds.errors import UserError
from llm2vec_ds.process.interrupts import kept
from llm2vec_ds.recipe.sections import EvaluationConfig

if TYPE_CHECKING:
    from llm2vec_ds.encoder.encoder import Encoder
    from llm2vec_ds.export.export import ExportOptions


Format = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="sentence-transformers (also for vLLM, infinity and text-embeddings-inference), transformers, "
        "onnx (for onnxruntime and transformers.js), or gguf (for llama.cpp, Ollama, LM Studio).",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto (as the encoder is stored), fp32, bf16 or fp16. gguf also has q8_0. onnx has only "
        "fp32 (its auto), fp16 and int8.",
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=TEXT",
        help="Store an instruction under a name, such as 'query=Find passages'. Repeat it for more.",
    ),
]
Push = Annotated[
    str | None, typer.Option(metavar="OWNER/NAME", help="Also upload the export to this hub repository.")
]
Private = Annotated[bool, typer.Option(help="If --push creates the repository: only you can see it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what --push would upload. Upload nothing.")]
Scores = Annotated[
    Path | None,
    typer.Option(help="scores.json of `evaluate mteb`, to put into the model card.", callback=expanded),
]
TaskOfMixture = Annotated[
    str | None,
    typer.Option(
        metavar="TASK",
        help="Try weights from 0 to 1 for two encoders and keep the best on this task. With --weights: "
        "measure only that mixture. TASK is as for `evaluate mteb --task`, e.g. sts:dev.csv.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(
        epilog=examples(
            "export runs/smoke_simcse --output exported",
            "export demo-output --output exported --dtype bf16 --push owner/name --dry-run",
            "export demo-output --output encoder.gguf --format gguf --dtype q8_0",
            "export demo-output --output exported --format onnx --dtype int8",
            "export runs/my_run --output exported --prompt 'query=Find passages that answer'",
        )
    )(export)
    app.command(
        epilog=examples(
            "merge runs/distil runs/supervised --output merged --weights 0.6,0.4",
            "merge runs/distil my/llm --output merged --evaluate sts:dev.csv",
            "merge runs/distil --last 3 --output soup",
            "merge runs/qlora_7b_24gb/mntp/encoder --output merged",
        )
    )(merge)


def export(
    source: Annotated[
        Path, typer.Argument(help="Folder of a run, of a demo or of an encoder.", callback=expanded)
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="The folder to write, or the file for gguf. It appears after all checks have passed.",
            callback=expanded,
        ),
    ],
    format: Format = "sentence-transformers",
    dtype: Dtype = "auto",
    prompt: Prompts = None,
    licence: Annotated[
        str | None,
        typer.Option("--licence", "--license", help="Licence of the base model, if its card lacks it."),
    ] = None,
    push: Push = None,
    private: Private = True,
    dry_run: DryRun = False,
    scores: Scores = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export. Other files in its folder stay.")
    ] = False,
) -> None:
    """Write an encoder for other tools, and check it there.

    The export holds the merged weights, the attention flags, pooling, prompts, a model card and the licence.
    Tools load it without this package's code.

    The check loads the export with transformers and sentence-transformers (gguf: llama.cpp, onnx:
    onnxruntime). It must give the encoder's vectors. If a tool cannot express a setting, a line says so.
    """
    prompts = _named(prompt or [])
    quiet_libraries()
    from llm2vec_ds.export.card import CardOptions
    from llm2vec_ds.export.export import ExportOptions
    from llm2vec_ds.export.scores import mteb_scores

    card = CardOptions(mteb_scores(scores) if scores else (), push)
    options = ExportOptions(dtype, licence, prompts, overwrite, format, card)
    if push is not None:
        _write_and_push(source, output, options, push, private=private, dry_run=dry_run)
    elif dry_run:
        raise UserError("--dry-run shows what --push would upload: add --push OWNER/NAME")
    else:
        _write(source, output, options)


def _named(prompts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in prompts]
    if wrong := [name for name, equals, text in pairs if not (name and equals and text)]:
        raise UserError(f"--prompt {wrong[0]!r} is not NAME=TEXT, such as query=Find passages that answer")
    return {name: text for name, _, text in pairs}


def _write_and_push(
    source: Path, output: Path, options: ExportOptions, repository: str, *, private: bool, dry_run: bool
) -> None:
    from llm2vec_ds.export.push import Upload, check_repository, described, files_of, push

    check_repository(repository)
    with TemporaryDirectory() as beside:
        _write(source, output, options, Path(beside))
        upload = Upload(repository, private, files_of(output, Path(beside)))
        if dry_run:
            print(described(upload))
            return
        with kept(f"{output} is written but not uploaded; run the same command with --overwrite"):
            print(push(upload))


def _write(source: Path, output: Path, options: ExportOptions, card_folder: Path | None = None) -> None:
    with kept("nothing is left behind; run the same command again"):
        _exporter(options.format, card_folder)(source, output, options)


def _exporter(format: str, card_folder: Path | None) -> Callable[[Path, Path, Any], list[str]]:
    """Returns the function that writes a format. For a single file it writes the card into `card_folder`.

    Raises:
        UserError: a package for this format is missing.
    """
    needed = {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime")}.get(format, ())
    check_installed(format, *needed)
    if format == "gguf":
        from llm2vec_ds.export.gguf.export import export_gguf

        return partial(export_gguf, card_folder=card_folder)
    if format == "onnx":
        from llm2vec_ds.export.onnx.export import export_onnx

        return export_onnx
    from llm2vec_ds.export.export import export

    return export


@kept("nothing is left behind; run the same command again")
def merge(
    encoders: Annotated[
        list[str],
        typer.Argument(
            metavar="ENCODER",
            help="Two or more encoders, runs or LLMs of one shape. Or, with --last, one run. Or the encoder/ "
            "of one run over NF4.",
            callback=expanded,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the new encoder.", callback=expanded)],
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W", help="A weight for each encoder. Their sum is 1. Default: equal weights."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="linear|slerp",
            help="linear: a weighted mean. slerp: a point on the arc between two encoders.",
        ),
    ] = "linear",
    evaluate: TaskOfMixture = None,
    last: Annotated[
        int | None, typer.Option(metavar="N", help="Average a run's last N checkpoints.", min=1)
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            help="For a run over NF4: folder or hub id of the original model. Default: the run's own base.",
            callback=expanded,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier encoder. Other files in its folder stay.")
    ] = False,
) -> None:
    """Merge several encoders of one shape, or a run's last checkpoints, into one encoder.

    For one encoder of a run over NF4, it puts the adapters into the original weights and reports how much the
    vectors change. The run's own `encoder/` holds the dequantised NF4 weights that the adapters were trained
    on.
    """
    quiet_libraries()
    several = len(encoders) > 1
    given = {"--weights": weights, "--evaluate": evaluate, "--last": last, "--original": original}
    allowed = {"--weights", "--evaluate"} if several else {"--last"} if last else {"--original"}
    if wrong := [name for name, value in given.items() if value is not None and name not in allowed]:
        raise UserError(f"{wrong[0]} has no effect here: leave it out, or see llm2vec-ds merge --help")
    if several:
        _mix(encoders, output, weights, method, evaluate, overwrite)
    elif last:
        from llm2vec_ds.export.soup import soup

        steps = ", ".join(map(str, soup(Path(encoders[0]), last, output, overwrite=overwrite)))
        print(f"{output}: the mean of the checkpoints of steps {steps}")
    else:
        _into_original(encoders[0], output, original, overwrite)


def _into_original(encoder: str, output: Path, original: str | None, overwrite: bool) -> None:
    from llm2vec_ds.export.merge import merge_into_original

    difference = merge_into_original(Path(encoder), output, original, overwrite=overwrite)
    print(
        f"{output}: cosine with the vectors of {encoder}: mean {difference.mean_cosine:.4f}, "
        f"lowest {difference.least_cosine:.4f} ({difference.n_texts} texts)"
    )


def _mix(
    sources: list[str],
    output: Path,
    weights: str | None,
    method: str,
    evaluate: str | None,
    overwrite: bool,
) -> None:
    from llm2vec_ds.export.mix import mix

    try:
        parsed = [float(weight) for weight in weights.split(",")] if weights else None
    except ValueError:
        raise UserError(f"--weights {weights!r} must be numbers separated by commas, e.g. 0.6,0.4") from None
    measured = evaluation_of(EvaluationConfig(tasks=[evaluate])) if evaluate else None

    def measure(encoder: Encoder) -> tuple[str, float]:
        assert measured is not None
        (found,) = measured(encoder).items()
        return found

    points = mix(
        sources,
        output,
        weights=parsed,
        method=method,
        measure=measure if measured else None,
        overwrite=overwrite,
    )
    for point in points:
        print(f"{'  '.join(f'{weight:.2f}' for weight in point.weights)}  {point.score:.4f}")
    picture = f". To draw the curve: llm2vec-ds report {output}" if len(points) > 1 else ""
    print(f"{output}: {method} mixture. Weights and curve are in {output / 'merge.json'}{picture}")
