"""The benchmark scripts run, say what they need, and draw the lengths that they claim."""

from __future__ import annotations

import importlib.util
import json
import select
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llm2vec_ds import Encoder
from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.evaluate.sts import load_graded_pairs, sts_spearman
from tests.support.teachers import save_teacher

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


def figures(outcome: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What a benchmark that must succeed printed as JSON; DeepSpeed warns on stdout too."""
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    return [json.loads(line) for line in outcome.stdout.splitlines() if line.startswith("{")]


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
    "name",
    [
        "attention.py",
        "encode_gpu.py",
        "gpu_check.py",
        "kernel_checks.py",
        "mntp_gpu.py",
        "qlora_memory.py recipe.yaml",
        "train_gpu.py mntp",
    ],
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
    lengths = script("length_mixes").length_mix(mix, 400_000)
    assert sum(lengths) == 400_000
    assert abs(statistics.mean(lengths) / mean - 1) < 0.05
    assert 0.9 * longest <= max(lengths) <= longest
    assert list(lengths) == sorted(lengths, reverse=True)


def gpu_check(monkeypatch: pytest.MonkeyPatch, rows: dict[str, str]) -> ModuleType:
    """All of it but the GPU: rows that print what they are given."""
    check = script("gpu_check")
    monkeypatch.setattr(check, "PARTS", {"kernels": rows})
    monkeypatch.setattr(check, "ROW_S", 10.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "hardware", lambda torch: {"gpu": "NVIDIA H100 80GB HBM3"})
    return check


def says(line: str, status: int = 0) -> str:
    return "-c " + shlex.quote(f"print('a warning'); print({line!r}, flush=True); raise SystemExit({status})")


def written(folder: Path) -> dict[str, Any]:
    (path,) = folder.iterdir()
    assert path.name.endswith("_nvidia-h100-80gb-hbm3_kernels.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_gpu_check_writes_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"operation": "swiglu", "relative_difference": 1e-3}
    check = gpu_check(monkeypatch, {"one": says(json.dumps(line)), "other": says('{"ms": 2}')})
    assert check.main(["--part", "kernels", "--output", str(tmp_path), "--commit", "abc"]) == 0
    rows = written(tmp_path)["rows"]
    assert rows["one"]["lines"] == [line]
    assert rows["other"]["lines"] == [{"ms": 2}]
    assert {row["commit"] for row in rows.values()} == {"abc"}


def test_gpu_check_keeps_the_rows_that_do_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--part", "kernels", "--output", str(tmp_path)]
    check = gpu_check(monkeypatch, {"one": says('{"ms": 1}'), "other": says('{"ms": 2}')})
    assert check.main(options) == 0
    again = gpu_check(monkeypatch, {"one": says('{"ms": 3}'), "other": says('{"ms": 4}')})
    assert again.main([*options, "--rows", "other"]) == 0
    lines = [row["lines"] for row in written(tmp_path)["rows"].values()]
    assert lines == [[{"ms": 1}], [{"ms": 4}]]


def test_a_row_that_its_limit_ends_keeps_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limit is over when it has spoken, and the next row's never is: however busy the machine."""
    endless = shlex.quote("import time; print('{\"ms\": 1}', flush=True); time.sleep(600)")
    check = gpu_check(monkeypatch, {"endless": f"-c {endless}", "next": says('{"ms": 2}')})
    monkeypatch.setattr(check, "ROW_S", 2.0)
    limits: list[float] = []

    class Limited(subprocess.Popen[str]):
        def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
            if timeout is not None:
                limits.append(timeout)
                if len(limits) == 1:
                    select.select([self.stdout], [], [])
                    raise subprocess.TimeoutExpired(self.args, timeout)
            return super().communicate(input)

    monkeypatch.setattr(subprocess, "Popen", Limited)
    assert check.main(["--part", "kernels", "--output", str(tmp_path)]) == 0
    rows = written(tmp_path)["rows"]
    assert limits == [2.0, 2.0]
    assert rows["endless"]["cut"]
    assert rows["endless"]["lines"] == [{"ms": 1}]
    assert not rows["next"]["cut"]


@pytest.mark.parametrize(
    ("said", "status", "failure"),
    [
        ("it said nothing", 0, "row: no figures"),
        ('{"operation": "swiglu", "relative_difference": 0.5}', 0, "swiglu off by 0.5"),
        ('{"operation": "swiglu", "relative_difference": NaN}', 0, "swiglu off by nan"),
        ('{"check": "head dim 64", "ok": false}', 0, "head dim 64 is off"),
        ('{"operation": "swiglu", "relative_difference": 0}', 1, "row: exit status 1"),
    ],
)
def test_gpu_check_fails_where_a_row_does(
    said: str,
    status: int,
    failure: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check = gpu_check(monkeypatch, {"row": says(said, status)})
    assert check.main(["--part", "kernels", "--output", str(tmp_path)]) == 1
    assert failure in capsys.readouterr().out


def test_tests_that_their_limit_ends_are_a_failure() -> None:
    cut = {"exit_status": -9, "cut": True, "lines": []}
    problems = script("gpu_check").problems
    assert list(problems("tests", cut)) == ["tests: not finished within the limit"]
    assert list(problems("tests", {**cut, "exit_status": 0, "cut": False})) == []
    assert list(problems("row", {**cut, "lines": [{"ms": 1}]})) == []


def test_gpu_check_leaves_out_what_its_part_has_no_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = gpu_check(monkeypatch, {"row": says('{"ms": 1}')})
    monkeypatch.setattr(check, "PART_S", 1.0)
    assert check.main(["--part", "kernels", "--output", str(tmp_path)]) == 1
    assert "row: left out" in capsys.readouterr().out


def test_every_row_is_a_script_that_is_there() -> None:
    for rows in script("gpu_check").PARTS.values():
        for command in rows.values():
            words = shlex.split(command)
            if words[0] == "-m":
                assert importlib.util.find_spec(words[1])
            else:
                assert (BENCHMARKS.parent / words[0]).is_file()


def test_kernel_checks_meet_their_bound_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = script("kernel_checks")
    monkeypatch.setattr(checks, "CHECKS", (("float32", 2, 1, 16, {"window": 4}),))
    (line,) = checks.check((3, 0, 17), "cpu")
    assert line["ok"]
    assert len(line["error_out_dq_dk_dv"]) == 4


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
        assert line["adapter_dropout"] == 0.05
        assert line["tokens_per_s"] > 0
        assert 0 <= line["share_of_peak"] < 1


def test_the_contrastive_loss_is_that_of_the_full_matrix() -> None:
    few = "--n 48 --dim 8 --repeats 1".split()
    lines = {line["case"]: line for line in figures(run("contrastive_loss.py", *few))}
    assert set(lines) == {"full_fp32", "full_tf32", "full_bf16", "ours", "ours_tf32", "ours_bf16"}
    assert lines["ours"]["loss_difference"] < 1e-5
    assert lines["ours"]["gradient_difference"] < 1e-4
    assert 1e-6 < lines["ours_bf16"]["gradient_difference"] < 2e-2
    assert lines["ours"]["ms"] > 0


@pytest.fixture(scope="module")
def tiny_shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("shape")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=200, eos_token_id=1, pad_token_id=1, **shape).save_pretrained(folder)
    return str(folder / "config.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "cases"),
    [("mntp --tokens 200", ["none", "plain_fp32"]), ("cached", ["default", "plain"])],
)
def test_training_steps_beside_plain_ones(work: str, cases: list[str], tiny_shape: str) -> None:
    """Their first losses agree, or it ends with 1."""
    few = "--cpu --steps 1 --warm-up 1 --cases".split()
    lines = figures(run("train_gpu.py", *work.split(), "--config", tiny_shape, *few, *cases))
    assert [line["case"] for line in lines] == cases
    assert lines[0]["first_losses"][0] == pytest.approx(lines[1]["first_losses"][0], rel=1e-3)
    assert lines[0]["tokens"] == {"mntp": 200, "cached": 15 * 21}[work.split()[0]]
    assert all(line["wall_ms"] > 0 and line["processor_ms"] > 0 for line in lines)


@pytest.mark.slow
def test_host_overhead_in_a_tiny_shape() -> None:
    few = "--layers 1 --vocab 100 --steps 1 --warm-up 1 --engines zero2 --parts train cached model encode"
    (line,) = figures(run("host_overhead.py", *few.split()))
    assert set(line["train"]["zero2"]) == {"none", "default", "full"}
    assert set(line["train"]["zero2"]["full"]["ratio"]) == {"plain", "plain_full"}
    ours, plain = line["encode"]["ours"]["processor_ms"], line["encode"]["plain"]["processor_ms"]
    assert line["encode"]["ratio"]["plain"] == pytest.approx(ours / plain, rel=0.01)
    assert line["cached"]["zero2"]["ratio"]["plain"] > 0
    assert line["model"]["none"]["ratio"]["plain"] > 0


@pytest.mark.slow
def test_encoding_beside_sentence_transformers(tiny_shape: str) -> None:
    pytest.importorskip("sentence_transformers")
    few = "--cpu --divide 64 --rounds 1 --micro-batch-tokens 512 --batch-sizes 16".split()
    lines = figures(run("encode_gpu.py", "--config", tiny_shape, *few))
    assert [line["texts"] for line in lines] == ["sts", "wiki"] * 2
    assert all(line["least_cosine"] > 0.9999 for line in lines)


def meter_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("steps.meter")


def test_the_meter_takes_the_median_of_the_timed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = meter_module(monkeypatch)
    clock = Clock(meter, monkeypatch)
    steps = iter([9.0, 1.0, 3.0, 2.0])
    measured = meter.StepMeter(torch.device("cpu"), warm_up=1, timed=3).measure(
        lambda: clock.take(next(steps))
    )
    assert measured["wall_ms"] == 2000
    assert (measured["wall_ms_least"], measured["wall_ms_most"]) == (1000, 3000)


def test_two_ways_take_turns_and_count_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = meter_module(monkeypatch)
    clock, device = Clock(meter, monkeypatch), torch.device("cpu")
    other = meter.StepMeter(device, warm_up=1, timed=2)
    turns = meter.StepMeter(device, warm_up=1, timed=2, between=lambda: other.alone(lambda: clock.take(5.0)))
    assert turns.measure(lambda: clock.take(2.0))["wall_ms_most"] == 2000
    assert other.figures()["wall_ms_least"] == 5000


class Clock:
    """Moves by hand."""

    def __init__(self, meter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(meter.time, "perf_counter", lambda: self.now_s)

    def take(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_profile_counts_work_that_overlaps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = meter_module(monkeypatch)
    events = [
        {"cat": "kernel", "name": "a", "ts": 0, "dur": 2000},
        {"cat": "gpu_memcpy", "name": "b", "ts": 1000, "dur": 2000},
        {"cat": "kernel", "name": "c", "ts": 5000, "dur": 1000},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx"},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"},
        {"cat": "cuda_runtime", "name": "cudaDeviceSynchronize"},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9000},
        {"name": "no category"},
    ]
    measured = meter.profile_figures(events, n_steps=2)
    assert measured == {"gpu_ms": 2.0, "waits": 0.5, "launches": 1.0, "copies": 0.0}


def test_lengths_are_stretched_to_the_tokens_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    mixes = script("length_mixes")
    lengths = mixes.scaled(mixes.drawn_lengths("wiki", 32), 4670, 512)
    assert sum(lengths) == 4670
    assert len(lengths) == 32
    assert 1 <= min(lengths) < max(lengths) <= 512


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_ablation_of_pairs_leaves_out_what_it_has(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = BENCHMARKS.parent / "recipes" / "data"
    questions = str(data / "smoke_pairs" / "questions.jsonl")
    options = {
        "model": tiny_model_dir,
        "guide": save_teacher(tmp_path),
        "dev": data / "smoke_sts.csv",
        "questions": questions,
        "output": tmp_path / "out",
        "steps": 2,
        "batch": 8,
    }
    line = ["pairs_ablation.py", *(f"--{name}={value}" for name, value in options.items())]
    line += ["--pairs", questions, str(data / "smoke_pairs" / "paraphrases.jsonl")]
    rows = figures(run(*line, "--seeds", "1"))[:-1]
    assert [row["variant"] for row in rows] == ["before", "plain", "guide", "stored"]
    (out, negatives), *_ = rows[2]["left_out"].values()
    assert 0 < out < negatives
    assert len({json.dumps(row["sts"]) for row in rows}) == 4
    again = run(*line, "--seeds", "1", "2", "--variants", "plain")
    assert [row["seed"] for row in figures(again)[:-1]] == [2]
    assert "retrieval plain     n=2" in again.stdout


def test_a_rival_without_the_work_is_refused() -> None:
    outcome = run("run.py", "--work", "mntp", "--against", "sentence-transformers")
    assert outcome.returncode == 2
    assert "has no MNTP: compare with llm2vec" in outcome.stderr


@pytest.mark.parametrize("attention", ["uni", "bi"])
def test_the_last_layer_scores_as_the_encoder_does(
    attention: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """And a token with a large norm is found, in its text only."""
    layers = script("layer_scores")
    pairs = load_graded_pairs(BENCHMARKS.parent / "recipes" / "data" / "smoke_sts.csv")
    encoder = Encoder.from_pretrained(tiny_model_dir, causal=attention == "uni")
    found = layers.scores(encoder, pairs, whiten_by=pairs.first, power=0.0)
    assert {len(values) for values in found.values()} == {1 + len(encoder.trunk.layers)}
    assert found["spearman"][-1] == pytest.approx(sts_spearman(encoder, pairs), abs=2e-4)
    assert found["spearman_whitened"] != found["spearman"]  # it centres
    batch = pack([TokenizedText([1, 2, 3], 0, 3, 0), TokenizedText([4, 5, 6], 0, 3, 1)])
    hidden = torch.ones(6, 4)
    hidden[4] *= 6
    assert layers.has_massive_token(hidden, batch).tolist() == [False, True]
