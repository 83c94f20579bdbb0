"""From an empty folder: the wheel, installed, writes recipes and scripts that train, here and by `sbatch`."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llm2vec_ds.start.files import shipped
from tests.support.slurm_cluster import Cluster
from tests.support.tiny import save_tiny_llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(*line: object, cwd: Path) -> str:
    """Without this checkout on the path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    outcome = subprocess.run(
        list(map(str, line)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout + outcome.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders beside its sources, and takes what an earlier one left."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("llm2vec_ds", "kernels", "recipes", "ds_configs", "slurm", "docs"):
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run(sys.executable, *build, folder / "source", cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A new environment's `bin`; what the wheel needs is that of this one."""
    environment = wheel.parent / "env"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    (packages / "shared.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    install = ["install", "--quiet", "--no-deps", "--ignore-installed", wheel]
    run(sys.executable, "-m", "pip", "--python", environment / "bin" / "python", *install, cwd=wheel.parent)
    return environment / "bin"


@pytest.fixture(scope="module")
def started(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `init` of the installed package wrote, with a model in it."""
    folder = tmp_path_factory.mktemp("empty")
    said = run(installed / "llm2vec-ds", "init", cwd=folder)
    assert f"wrote {len(shipped())} files" in said
    save_tiny_llama(folder / "model")
    return folder


def test_the_wheel_holds_what_the_checkout_ships(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name.removeprefix("llm2vec_ds/start/") for name in archive.namelist()}
        assert held >= shipped().keys()
        assert not [name for name in held if name.startswith("tests") or "__pycache__" in name]


def test_init_of_the_installed_package_writes_the_same(installed: Path, started: Path) -> None:
    code = "import llm2vec_ds; print(llm2vec_ds.__file__)"
    used = Path(run(installed / "python", "-c", code, cwd=started).strip())
    assert installed.parent in used.parents  # not the checkout
    for name, file in shipped().items():
        assert (started / name).read_bytes() == file.read_bytes()
        assert os.access(started / name, os.X_OK) == os.access(file, os.X_OK), name


def test_it_trains_there(installed: Path, started: Path) -> None:
    command = [installed / "llm2vec-ds", "train", "recipes/smoke_mntp.yaml"]
    run(*command, "model.path=model", "max_steps=2", cwd=started)
    assert (started / "runs" / "smoke_mntp" / "encoder" / "model.safetensors").is_file()


def test_sbatch_trains_there(cluster: Cluster, installed: Path, started: Path) -> None:
    """On two nodes, by the written scripts and the installed package alone."""
    job = cluster.submit(
        "slurm/train_7b.sh",
        "recipes/smoke_mntp.yaml",
        "model.path=model",
        "max_steps=2",
        "output_dir=runs/sbatch",
        options=("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"),
        cwd=started,
        LLM2VEC_DS_PYTHON=str(installed / "python"),
        PYTHONPATH="",
    )
    cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert cluster.job(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert (started / "runs" / "sbatch" / "encoder" / "model.safetensors").is_file()
