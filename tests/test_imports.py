"""Imports point one way, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, KERNELS = ROOT / "llm2vec_ds", ROOT / "kernels" / "llm2vec_kernels"

# A folder, or a file of the top level, imports from those above it only.
ORDER = [
    "errors",
    "network",
    "process",
    "storage",
    "start",
    "batch",
    "recipe",
    "distributed",
    "data",
    "model",
    "encoder",
    "vectors",
    "objectives",
    "planner",
    "engine",
    "mining",
    "evaluate",
    "export",
    "report",
    "demo",
    "ablation",
    "doctor",
    "cli",
    "__main__",
]
STRANGERS = [("data", "model")]
"""They meet in `batch` alone."""
KERNEL_ORDER = ["devices", "operation", "products", "seeds", "attention", "info_nce", "row_ops"]


def module_name(path: Path, root: Path = PACKAGE) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """All modules that a file names in an import, also `b` of `from a import b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


def own_imports(path: Path, root: Path = PACKAGE) -> set[str]:
    prefix = f"{root.name}."
    return {name.removeprefix(prefix) for name in imported(path) if name.startswith(prefix)}


def modules(root: Path) -> list[Path]:
    return [path for path in sorted(root.rglob("*.py")) if path.name != "__init__.py"]


MODULES, KERNEL_MODULES = modules(PACKAGE), modules(KERNELS)


def place(module: str) -> str:
    """Its folder, or itself at the top level."""
    return module.partition(".")[0]


def test_every_folder_has_its_place() -> None:
    assert {place(module_name(path)) for path in MODULES} == set(ORDER)
    assert {place(module_name(path, KERNELS)) for path in KERNEL_MODULES} == set(KERNEL_ORDER)


@pytest.mark.parametrize(
    ("path", "root", "order"),
    [(path, PACKAGE, ORDER) for path in MODULES] + [(path, KERNELS, KERNEL_ORDER) for path in KERNEL_MODULES],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_a_folder_imports_from_those_above_it(path: Path, root: Path, order: list[str]) -> None:
    own = place(module_name(path, root))
    others = {place(name) for name in own_imports(path, root)} & set(order) - {own}
    assert not [other for other in others if order.index(other) > order.index(own)]
    assert not [other for other in others if (own, other) in STRANGERS or (other, own) in STRANGERS]


def test_no_files_import_each_other_in_a_circle() -> None:
    for root, paths in ((PACKAGE, MODULES), (KERNELS, KERNEL_MODULES)):
        names = {module_name(path, root) for path in paths}
        graph = {module_name(path, root): own_imports(path, root) & names for path in paths}
        list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_top_level_is_small() -> None:
    """One breath: a file there is of no subject, or of all."""
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_engine_imports_deepspeed(path: Path) -> None:
    if "deepspeed" in {name.partition(".")[0] for name in imported(path)}:
        assert path.parent.name == "engine"


def test_kernels_know_nothing_of_the_toolkit() -> None:
    for path in KERNEL_MODULES:
        assert not [name for name in imported(path) if name.startswith(("llm2vec_ds", "transformers"))]


def test_no_test_file_is_imported() -> None:
    """What tests share is in `tests/support` or in a `conftest.py`; imports start at the top."""
    files = {module_name(path, ROOT): path for path in (ROOT / "tests").rglob("*.py")}
    test_files = {name for name in files if name.rpartition(".")[2].startswith("test_")}
    found = {
        f"{name} imports {other}"
        for name, path in files.items()
        for other in imported(path)
        if other in test_files or other.startswith(".")
    }
    assert test_files
    assert not found


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


def test_files_and_functions_stay_short() -> None:
    """At most 400 lines in a file and 60 in a function."""
    long = []
    for path in sorted([*(ROOT / "llm2vec_ds").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        text = path.read_text()
        if (n_lines := text.count("\n")) > 400:
            long.append(f"{path.name}: {n_lines}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                if (n_lines := node.end_lineno - node.lineno + 1) > 60:
                    long.append(f"{path.name}, {node.name}: {n_lines}")
    assert not long
