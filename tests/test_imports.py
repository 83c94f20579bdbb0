"""Imports point one way, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llm2vec_ds"

# Earlier entries know nothing of later ones.
FLOW = [
    "errors",
    "reading",
    "interrupts",
    "child_command",
    "full_memory",
    "network",
    "durable",
    "storage.lock",
    "storage.output_folder",
    "batch",
    "config",
    "recipe",
    "recipe_file",
    "distributed",
    "data.sources",
    "data.text_rows",
    "data.prompts",
    "data.prepared_folder",
    "data.prepare",
    "data.pairs",
    "data.corpus",
    "data.batches",
    "data.packing",
    "data.prefetch",
    "data.masking",
    "data.tagged",
    "model.bidirectional",
    "model.attention",
    "model.cpu_linear",
    "model.fused_layers",
    "model.quantization",
    "model.damage",
    "model.loading",
    "model.pooling",
    "model.lora_linear",
    "model.recomputation",
    "model.adapters",
    "model.imported",
    "streaming",
    "encoder_settings",
    "model.adapter_stack",
    "encoder",
    "loss.mntp",
    "loss.ring",
    "loss.contrastive",
    "loss.embedding_cache",
    "stages.base",
    "stages.mntp",
    "stages.contrastive",
    "stages.simcse",
    "stages.supervised",
    "engine.comm_bytes",
    "engine.deepspeed_json",
    "engine.checkpoint",
    "engine.trainable_state",
    "engine.host_heap",
    "engine.deepspeed_engine",
    "planner.flash_shapes",
    "planner.meta_model",
    "planner.simulate",
    "planner.states",
    "planner.workload",
    "planner.traffic",
    "planner.step_time",
    "planner.plan",
    "planner.measured",
    "planner.table",
    "engine.monitor",
    "engine.identity",
    "engine.preemption",
    "engine.run_folder",
    "engine.progress_check",
    "engine.watchdog",
    "engine.memory",
    "engine.trainer",
    "engine.run",
    "engine.run_stages",
    "work_folder",
    "vector_files",
    "encode_files",
    "vector_search",
    "evaluate.identity",
    "evaluate.shards",
    "search",
    "mine_options",
    "mine",
    "evaluate.sts",
    "evaluate.retrieval",
    "evaluate.word_features",
    "evaluate.word_level",
    "evaluate.word_task",
    "evaluate.mteb_tasks",
    "evaluate.mteb",
    "evaluate.in_training",
    "export_files",
    "export_card",
    "export",
    "merge",
    "report",
    "doctor",
    "demo_model",
    "demo_text",
    "example_sentences",
    "report_data",
    "report_figures",
    "report_page",
    "ablation_recipe",
    "ablate",
    "demo",
    "cli_common",
    "cli_evaluate",
    "cli_ablate",
    "cli_vectors",
    "cli_memory",
    "cli",
    "__main__",
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def test_every_module_has_its_place_in_the_flow() -> None:
    assert sorted(map(module_name, MODULES)) == sorted(FLOW)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_back_to_nothing(path: Path) -> None:
    place = FLOW.index(module_name(path))
    own = [name.removeprefix("llm2vec_ds.") for name in imported(path) if name.startswith("llm2vec_ds.")]
    later = [name for name in own if name in FLOW and FLOW.index(name) >= place]
    assert not later
    folder = module_name(path).partition(".")[0]
    other = {"data": "model.", "model": "data."}.get(folder)
    assert not [name for name in own if other and name.startswith(other)]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_engine_imports_deepspeed(path: Path) -> None:
    if "deepspeed" in {name.partition(".")[0] for name in imported(path)}:
        assert path.parent.name == "engine"


def test_kernels_know_nothing_of_the_toolkit() -> None:
    for path in (ROOT / "kernels" / "llm2vec_kernels").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith(("llm2vec_ds", "transformers"))]


def test_import_is_quick_and_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys, time; t = time.process_time(); import llm2vec_ds; s = time.process_time() - t;"
        "heavy = ('torch', 'transformers', 'deepspeed', 'mteb', 'bitsandbytes');"
        "print(s, [m for m in heavy if m in sys.modules])"
    )
    seconds, loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split(maxsplit=1)
    assert float(seconds) < 0.5
    assert loaded.strip() == "[]"


def test_planning_needs_neither_deepspeed_nor_mteb_nor_datasets() -> None:
    """Imports are most of its time."""
    code = (
        "import atexit, sys; from llm2vec_ds.__main__ import main;"
        "sys.argv[1:] = ['plan', 'recipes/smoke_mntp.yaml'];"
        "atexit.register(lambda: print([m for m in ('deepspeed', 'mteb', 'datasets') if m in sys.modules]));"
        "main()"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert said.splitlines()[-1] == "[]"


def test_encoder_needs_neither_deepspeed_nor_mteb_nor_bitsandbytes() -> None:
    code = (
        "import sys; from llm2vec_ds import Encoder;"
        "print([m for m in ('deepspeed', 'mteb', 'bitsandbytes') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
