"""The benchmark scripts run, say what they need, and draw the lengths that they claim."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / arguments[0]), *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_smoke_run_prints_a_line_a_case_and_pass() -> None:
    outcome = run("attention.py", "--smoke")
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    lines = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert {(line["case"], line["dropout_p"]) for line in lines} == {
        ("sts", 0.0),
        ("sts", 0.3),
        ("dense", 0.0),
    }
    assert [line["pass"] for line in lines[:3]] == ["forward", "backward", "both"]
    for line in lines:
        assert set(line["ms"]) == {"triton", "torch"}
        assert not line["refused"]
        ratio = line["ms"]["torch"] / line["ms"]["triton"]
        assert line["ratio_to_best_rival"] == pytest.approx(ratio, abs=2e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
@pytest.mark.parametrize(
    "name", ["attention.py", "gpu_check.py", "mntp_gpu.py", "qlora_memory.py recipe.yaml"]
)
def test_without_a_gpu_they_say_so_in_a_line(name: str) -> None:
    outcome = run(*name.split())
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: ")
    assert "CUDA" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("mix", "mean", "longest"), [("sts", 13.4, 72), ("wiki", 140.8, 587), ("blocks", 485, 512)]
)
def test_length_mixes_are_those_measured(mix: str, mean: float, longest: int) -> None:
    lengths = script("attention").length_mix(mix, 400_000)
    assert sum(lengths) == 400_000
    assert abs(statistics.mean(lengths) / mean - 1) < 0.05
    assert 0.9 * longest <= max(lengths) <= longest
    assert list(lengths) == sorted(lengths, reverse=True)


def gpu_check(
    monkeypatch: pytest.MonkeyPatch, root: Path, said: str, status: int = 0
) -> tuple[ModuleType, list[str]]:
    """All of it but the GPU: numbers from the interpreter, parts replaced by what they print."""
    check = script("gpu_check")
    monkeypatch.setattr(check, "ROOT", root)
    monkeypatch.setattr(check, "LENGTHS", {"mixed": (3, 0, 17)})
    monkeypatch.setattr(check, "CHECKS", (("float32", 2, 1, 16, {"window": 4}),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "hardware", lambda torch: {"gpu": "NVIDIA H100 80GB HBM3"})
    numbers = check.check_numbers
    monkeypatch.setattr(check, "check_numbers", lambda torch: numbers(torch, "cpu"))
    started: list[str] = []

    def run_script(arguments: list[str], limit_s: float) -> tuple[int, list[str]]:
        started.append(arguments[0])
        return status, ["a warning", said, "9 passed"]

    monkeypatch.setattr(check, "run_script", run_script)
    return check, started


def test_gpu_check_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"operation": "swiglu", "relative_difference": 1e-3}
    check, started = gpu_check(monkeypatch, tmp_path, json.dumps(line))
    assert check.main() == 0
    (path,) = (tmp_path / "benchmarks" / "results").iterdir()
    assert path.name.endswith("_nvidia-h100-80gb-hbm3.json")
    result: dict[str, Any] = json.loads(path.read_text())
    assert [line["ok"] for line in result["checks"]] == [True]
    assert result["tests"]["summary"] == "9 passed"
    assert result["attention"] == result["row_ops"] == [line]
    assert result["info_nce"] == [line] * 5
    parts = ["row_ops.py", "attention.py", *["info_nce.py"] * 5]
    assert started == [*(f"benchmarks/{part}" for part in parts), "-m"]


@pytest.mark.parametrize(
    ("said", "status", "failure"),
    [
        ("it said nothing", 0, "attention: no figures"),
        ('{"operation": "swiglu", "relative_difference": 0.5}', 0, "swiglu: off by 0.5"),
        ('{"operation": "swiglu", "relative_difference": NaN}', 0, "swiglu: off by nan"),
        ('{"operation": "swiglu", "relative_difference": 0}', 1, "benchmarks/row_ops.py: exit status 1"),
    ],
)
def test_gpu_check_fails_where_a_part_does(
    said: str,
    status: int,
    failure: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check, _ = gpu_check(monkeypatch, tmp_path, said, status)
    assert check.main() == 1
    assert failure in capsys.readouterr().out


def test_row_operations_in_a_tiny_shape() -> None:
    outcome = run("row_ops.py", *"--tokens 8 --width 32 --inner 48 --head-dim 8 --repeats 1".split())
    assert outcome.returncode == 0, outcome.stderr
    lines = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [line["operation"] for line in lines] == ["rms_norm", "rotate", "swiglu"]
    for line in lines:
        assert line["relative_difference"] < 1e-6
        assert line["ratio"] == pytest.approx(line["transformers_ms"] / line["ms"], rel=0.01)


def test_mntp_in_a_tiny_shape() -> None:
    shape = "--layers 2 --width 32 --inner 64 --heads 2 --vocab 100 --texts 2 --length 16 --steps 1"
    outcome = run("mntp_gpu.py", "--cpu", *shape.split())
    assert outcome.returncode == 0, outcome.stderr
    lines = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [line["activation_checkpointing"] for line in lines] == ["selective", "none", "full"]
    for line in lines:
        assert line["tokens"] == 32
        assert line["tokens_per_s"] > 0
        assert 0 <= line["share_of_peak"] < 1


def test_qlora_steps_beside_the_plan(tmp_path: Path) -> None:
    """On a CPU, in the shape of a tiny model."""
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=400, **shape).save_pretrained(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: none, config_file: {tmp_path}/config.json, quantization: nf4}}\n"
        "output_dir: none\ndata: {max_tokens: 16, path: none}\nbatch: {global_batch_size: 4}\n"
        "stages: {mntp: {}, simcse: {}}\n"
    )
    outcome = run("qlora_memory.py", str(tmp_path / "recipe.yaml"), "--cpu", "--steps", "2")
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    lines = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [line["stage"] for line in lines] == ["mntp", "simcse"]
    assert all(line["tokens_per_s"] > 0 and line["measured_peak_mib"] > 0 for line in lines)
    assert all(line["planned_parts_mib"]["adapters"] > 0 for line in lines)


@pytest.mark.parametrize("work", ["mntp", "encode"])
def test_the_speed_of_a_work_alone(work: str, tiny_model_dir: Path) -> None:
    """Rivals have environments of their own from the package index, which no test makes."""
    outcome = run(
        "run.py", "--work", work, "--model", str(tiny_model_dir), "--steps", "1", "--rounds", "2", "--json"
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    result = json.loads(outcome.stdout.splitlines()[-1])
    assert result["ours"]["seconds_median"] > 0
    assert result["ours"]["peak_mib"] > 100
    assert 0 < result["share_of_peak"] < 1
    assert result["units"] == {"mntp": 4 * 512, "encode": 1000}[work]


def test_a_rival_without_the_work_is_refused() -> None:
    outcome = run("run.py", "--work", "mntp", "--against", "sentence-transformers")
    assert outcome.returncode == 2
    assert "has no MNTP: compare with llm2vec" in outcome.stderr
