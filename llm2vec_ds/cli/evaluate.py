"""The commands `evaluate mteb` and `evaluate words`: wiring only."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm2vec_ds.cli.common import (
    AsJson,
    Attention,
    MicroBatchTokens,
    Model,
    Precision,
    check_installed,
    examples,
    expanded,
    quiet_libraries,
)
from llm2vec_ds.errors import writing
from llm2vec_ds.process.interrupts import kept

if TYPE_CHECKING:
    from llm2vec_ds.recipe.sections import EvaluationConfig

evaluate = typer.Typer(
    name="evaluate",
    help="Measure an encoder: on MTEB, on your own data as MTEB tasks, and on word-level tasks.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.add_typer(evaluate)


Causal = Annotated[
    bool | None,
    typer.Option(help="Use causal or bidirectional attention. Default: as the encoder's folder says."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK",
        help="Your own data: sts:FILE; retrieval:FILE (pairs) or retrieval:FOLDER (as BEIR); clustering: or "
        "classification: with a FILE (text, label) or a FOLDER whose file names are the labels. Or the name "
        "of an mteb task, with a subset if you like (STS17:en-en). Repeat it for more tasks.",
    ),
]
ExcludeSelf = Annotated[
    bool,
    typer.Option(help="For retrieval:FOLDER: do not rank the document that has the query's own id."),
]
Benchmark = Annotated[str | None, typer.Option(help='Name of a benchmark in mteb, such as "MTEB(eng, v1)".')]
Subset = Annotated[
    str | None, typer.Option(help="paper15: the 15 tasks of the paper. The list is not confirmed.")
]
ResultsFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder for results. Tasks that it already holds do not run again. Default: mteb-results/NAME.",
        callback=expanded,
    ),
]
InstructionsOfTasks = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|none",
        help="A JSON or YAML file {task: instruction} that replaces those of mteb's metadata. Or `none` for "
        "no instructions.",
        callback=expanded,
    ),
]
TrainFile = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="Data to train on: a .conllu file, a CoNLL column file, or hub:owner/name@split.",
        callback=expanded,
    ),
]
TestFile = Annotated[
    str, typer.Option(metavar="FILE", help="Data to measure on, in the same formats.", callback=expanded)
]
Column = Annotated[
    str,
    typer.Option(
        help="Column of the labels: upos, xpos, a number (-1 is the last), or a name in a hub data set."
    ),
]
ScoresFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder for scores.json. The encoder's vectors go into its folder features/. Default: "
        "word-results/NAME.",
        callback=expanded,
    ),
]


def _needs_mteb() -> None:
    """Checks that mteb is installed and imports it. On import, mteb creates its cache folder."""
    check_installed("eval", "mteb")
    with writing("mteb's cache (the folder MTEB_CACHE, else ~/.cache/mteb)"):
        importlib.import_module("mteb")


def evaluation_of(config: EvaluationConfig | None) -> Callable[[Any], dict[str, float]] | None:
    """Returns the function that measures during training, as the recipe's `evaluation` says."""
    if config is None:
        return None
    _needs_mteb()
    from llm2vec_ds.evaluate.in_training import in_training_evaluation

    return in_training_evaluation(config)


@evaluate.command(
    epilog=examples(
        "evaluate mteb --model runs/simcse/encoder --task sts:pairs.csv",
        'evaluate mteb --model runs/simcse/encoder --benchmark "MTEB(eng, v1)" --output results',
        "evaluate mteb --model my/llm --causal --task retrieval:beir/scifact --task STS17:en-en",
    )
)
@kept("finished tasks are kept; run the same command to go on")
def mteb(
    model: Model,
    task: Tasks = None,
    benchmark: Benchmark = None,
    subset: Subset = None,
    output: ResultsFolder = None,
    exclude_self: ExcludeSelf = False,
    causal: Causal = None,
    instructions: InstructionsOfTasks = None,
    as_json: AsJson = False,
    attention: Attention = "auto",
    precision: Precision = "auto",
    micro_batch_tokens: MicroBatchTokens = None,
) -> None:
    """Run MTEB tasks, or your own data as MTEB tasks.

    Queries get the task's instruction, documents get none. Under a launcher with several ranks, each rank
    encodes its share of the texts.
    """
    _needs_mteb()
    quiet_libraries()
    from llm2vec_ds.distributed import rank
    from llm2vec_ds.encoder.encoder import Encoder
    from llm2vec_ds.encoder.of_run import short_name
    from llm2vec_ds.encoder.passes import lower_pass
    from llm2vec_ds.evaluate.mteb import (
        MtebEncoder,
        evaluate_mteb,
        model_meta,
        read_instructions,
        summary,
        table,
        write_summary,
    )
    from llm2vec_ds.evaluate.mteb_tasks import tasks_for
    from llm2vec_ds.evaluate.scores_file import OF_MTEB, read_scores
    from llm2vec_ds.evaluate.shards import ShardedEncoder, process_group
    from llm2vec_ds.process.full_memory import enough_memory

    output = output or Path("mteb-results") / short_name(model)
    read_scores(output, OF_MTEB)
    given = read_instructions(instructions)
    tasks = tasks_for(task or [], benchmark, subset, exclude_self=exclude_self)
    with process_group() as device:
        loaded = Encoder.from_pretrained(
            model, causal=causal, attention=attention, precision=precision, device=device
        )
        encoder = ShardedEncoder(loaded, micro_batch_tokens)
        if rank() != 0:
            encoder.serve()
            return
        try:
            meta = model_meta(model, encoder, given)
            with enough_memory(lower_pass(micro_batch_tokens)):
                scores = evaluate_mteb(MtebEncoder(encoder, meta, given), tasks, output)
        finally:
            encoder.done()
    result = summary(model, meta, scores)
    write_summary(result, output)
    print(json.dumps(result, indent=1) if as_json else table(result))


@evaluate.command(
    epilog=examples(
        "evaluate words --model my/llm --train en-dev.conllu --test en-test.conllu",
        "evaluate words --model runs/mntp/encoder --train ner.train --test ner.test --column -1",
        "evaluate words --model my/llm --train hub:eriktks/conll2003@train "
        "--test hub:eriktks/conll2003@test --column ner_tags",
    )
)
@kept("vectors of a finished file are kept; run the same command to go on")
def words(
    model: Model,
    train: TrainFile,
    test: TestFile,
    column: Column = "upos",
    output: ScoresFolder = None,
    causal: Causal = None,
    max_sentences: Annotated[
        int | None, typer.Option(metavar="N", help="Read only the first N sentences of each file.", min=1)
    ] = None,
    max_steps: Annotated[
        int, typer.Option(metavar="N", help="Training steps of the linear layer.", min=1)
    ] = 4000,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Seed of the linear layer. Repeat it for several runs. [default: 42]", min=0),
    ] = None,
    as_json: AsJson = False,
    attention: Attention = "auto",
    precision: Precision = "auto",
    micro_batch_tokens: MicroBatchTokens = None,
) -> None:
    """Measure word vectors on tagging: part of speech, chunks, named entities.

    This is the paper's protocol: a linear layer learns the labels from the frozen encoder's word vectors.

    There are two results. For same_token, a word's vector comes from its own tokens. For next_token, it comes
    from the tokens one position before. The paper uses next_token for models trained with MNTP.
    """
    check_installed("eval", "seqeval", "sklearn")
    quiet_libraries()
    from llm2vec_ds.encoder.encoder import Encoder
    from llm2vec_ds.encoder.of_run import short_name
    from llm2vec_ds.encoder.passes import lower_pass
    from llm2vec_ds.evaluate.scores_file import OF_WORDS, read_scores
    from llm2vec_ds.evaluate.word_level import ProbeOptions
    from llm2vec_ds.evaluate.word_task import WordTask, run_word_task, table, write_scores
    from llm2vec_ds.process.full_memory import enough_memory

    task = WordTask(train, test, column, max_sentences)
    task.check()
    output = output or Path("word-results") / short_name(model)
    read_scores(output, OF_WORDS)
    encoder = Encoder.from_pretrained(model, causal=causal, attention=attention, precision=precision)
    probes = [ProbeOptions(max_steps=max_steps, seed=s) for s in seed or [42]]
    with enough_memory(lower_pass(micro_batch_tokens)):
        result = run_word_task(
            encoder, model, task, probes, output / "features", micro_batch_tokens=micro_batch_tokens
        )
    write_scores(result, output)
    print(json.dumps(result, indent=1) if as_json else table(result))
