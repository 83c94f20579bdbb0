"""`llm2vec-ds evaluate …`: wiring only."""

from __future__ import annotations

import importlib
import importlib.util
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
    examples,
    expanded,
    quiet_libraries,
)
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.process.interrupts import kept

if TYPE_CHECKING:
    from llm2vec_ds.recipe.sections import EvaluationConfig

evaluate = typer.Typer(
    name="evaluate",
    help="Measure an encoder: MTEB, local data in its task classes, word-level tasks.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.add_typer(evaluate)


Causal = Annotated[
    bool | None, typer.Option(help="Causal or bidirectional attention; default: what the folder says.")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK",
        help="sts:FILE, retrieval:FOLDER, clustering:FILE, classification:FILE, or mteb's name of a task, "
        "with one subset if wanted (STS17:en-en). Again for more.",
    ),
]
InstructionsOfTasks = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|none",
        help="JSON or YAML {task: instruction} over those of mteb's metadata; none: no instruction.",
        callback=expanded,
    ),
]


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed: pip install 'llm2vec-ds[eval]'")


def _needs_mteb() -> None:
    """Imports it, too: it makes its own cache folder then."""
    _needs("mteb")
    with writing("mteb's cache (the folder MTEB_CACHE, else ~/.cache/mteb)"):
        importlib.import_module("mteb")


def evaluation_of(config: EvaluationConfig | None) -> Callable[[Any], dict[str, float]] | None:
    """What a recipe's `evaluation` measures during training."""
    if config is None:
        return None
    _needs_mteb()
    from llm2vec_ds.evaluate.in_training import in_training_evaluation

    return in_training_evaluation(config)


ExcludeSelf = Annotated[
    bool,
    typer.Option(help="Of retrieval:FOLDER: a query's own document is not ranked."),
]


@evaluate.command(
    epilog=examples(
        "evaluate mteb --model runs/simcse/encoder --task sts:pairs.csv",
        'evaluate mteb --model runs/simcse/encoder --benchmark "MTEB(eng, v1)" --output results',
        "evaluate mteb --model my/llm --causal --task retrieval:beir/scifact --task STS17:en-en",
    )
)
@kept("finished tasks are kept, run the same command to go on")
def mteb(
    model: Model,
    task: Tasks = None,
    benchmark: Annotated[str | None, typer.Option(help='mteb\'s name, such as "MTEB(eng, v1)".')] = None,
    subset: Annotated[str | None, typer.Option(help="paper15: the paper's 15 tasks (unconfirmed).")] = None,
    output: Annotated[
        Path,
        typer.Option(help="Folder for results; what it holds already is not run again.", callback=expanded),
    ] = Path("mteb-results"),
    exclude_self: ExcludeSelf = False,
    causal: Causal = None,
    instructions: InstructionsOfTasks = None,
    as_json: AsJson = False,
    attention: Attention = "auto",
    precision: Precision = "auto",
    micro_batch_tokens: MicroBatchTokens = None,
) -> None:
    """Run MTEB tasks, or local data as MTEB tasks. Queries get the task's instruction, documents stay bare.

    Under a launcher with several ranks each encodes its share of the texts.
    """
    _needs_mteb()
    quiet_libraries()
    from llm2vec_ds.distributed import rank
    from llm2vec_ds.encoder.encoder import Encoder
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
    from llm2vec_ds.evaluate.shards import ShardedEncoder, process_group
    from llm2vec_ds.process.full_memory import enough_memory

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
@kept("vectors of a finished file are kept, run the same command to go on")
def words(
    model: Model,
    train: Annotated[
        str,
        typer.Option(
            metavar="FILE", help=".conllu, a CoNLL column file, or hub:owner/name@split.", callback=expanded
        ),
    ],
    test: Annotated[str, typer.Option(metavar="FILE", help="The same, to measure on.", callback=expanded)],
    column: Annotated[
        str,
        typer.Option(help="Labels: upos, xpos, a column's number (-1: the last), or a hub column's name."),
    ] = "upos",
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for scores.json and, under features/, the encoder's vectors.", callback=expanded
        ),
    ] = Path("word-results"),
    causal: Causal = None,
    max_sentences: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N sentences of each file.", min=1)
    ] = None,
    max_steps: Annotated[int, typer.Option(metavar="N", help="Steps of the linear layer.", min=1)] = 4000,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of the linear layer; again for more. [default: 42]")
    ] = None,
    as_json: AsJson = False,
    attention: Attention = "auto",
    precision: Precision = "auto",
    micro_batch_tokens: MicroBatchTokens = None,
) -> None:
    """Train a linear layer on the frozen encoder's word vectors, as the paper does for POS, chunks and NER.

    Two results: each word from its own tokens (same_token), and from the tokens one before (next_token),
    which is the paper's choice for models that MNTP has trained.
    """
    _needs("seqeval")
    quiet_libraries()
    from llm2vec_ds.encoder.encoder import Encoder
    from llm2vec_ds.encoder.passes import lower_pass
    from llm2vec_ds.evaluate.word_level import ProbeOptions
    from llm2vec_ds.evaluate.word_task import WordTask, run_word_task, table, write_scores
    from llm2vec_ds.process.full_memory import enough_memory

    task = WordTask(train, test, column, max_sentences)
    task.check()
    encoder = Encoder.from_pretrained(model, causal=causal, attention=attention, precision=precision)
    probes = [ProbeOptions(max_steps=max_steps, seed=s) for s in seed or [42]]
    features = output / "features"
    with enough_memory(lower_pass(micro_batch_tokens)):
        result = run_word_task(encoder, model, task, probes, features, micro_batch_tokens=micro_batch_tokens)
    write_scores(result, output)
    print(json.dumps(result, indent=1) if as_json else table(result))
