"""The report: what it shows, that it needs nothing else, and what a real browser makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from llm2vec_ds import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.report.data import read_folders
from llm2vec_ds.report.example_sentences import SENTENCES, TOPIC_OF, examples_of
from llm2vec_ds.report.page import write_report
from tests.support.browser import opened


def run_folder(folder: Path, stage: str, n_steps: int = 5) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"step": i, "loss": 3.0 / i, "lr": 1e-4, "tokens_per_s": 100.0 + i, "peak_mib": 900.0}
        for i in range(1, n_steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
    held_out = [{"step": s, "loss": 4.0 - s / 5} for s in (0, n_steps)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    (folder / "recipe.yaml").write_text(f"stage: {stage}\nmodel:\n  path: <my & model>\n")
    return folder


@pytest.fixture
def ablation(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """An ablation's folder as `llm2vec-ds ablate` leaves it."""
    folder = tmp_path / "ablation"
    for seed in (1, 2):
        run_folder(folder / "runs" / f"seed-{seed}" / "bi+mntp", "mntp")
        run_folder(folder / "runs" / f"seed-{seed}" / "bi+simcse", "simcse")
    Encoder.from_pretrained(tiny_model_dir).save(folder / "runs" / "seed-1" / "bi+mntp" / "encoder")
    scores = {
        variant: {
            str(s): {"STS-x": 0.3 + s / 10, "pos": 0.9 - s / 50, "pos, same_token": 0.5, "chunks": 0.7}
            for s in (1, 2)
        }
        for variant in ("uni", "bi+mntp", "bi+simcse")
    }
    results = {
        "budget": "quick",
        "model": str(tiny_model_dir),
        "scores": scores,
        "versions": {"torch": "2.0"},
        "hardware": "two cores",
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_page_holds_scores_runs_recipes_and_facts_and_nothing_from_elsewhere(
    ablation: Path, tmp_path: Path
) -> None:
    other = run_folder(tmp_path / "another", "mntp")
    output = tmp_path / "out" / "report.html"
    figures = write_report([ablation, other], output, with_examples=False)
    text = output.read_text()
    names = {figure.name for figure in figures}
    assert {
        "overview",
        "score_sts_x",
        "mntp_loss",
        "mntp_tokens_per_s",
        "mntp_peak_mib",
        "mntp_lr",
        "simcse_loss",
    } <= names
    assert "mntp_held_out_loss" in names
    assert {p.stem for p in (tmp_path / "out" / "report").glob("*.png")} == names
    assert all(figure.n_marks > 0 for figure in figures)
    for shown in ("0.450 ± 0.071", "two cores", "torch", "ablation: bi+mntp, seed 1", "another"):
        assert shown in text
    assert "&lt;my &amp; model&gt;" in text
    loaded = re.findall(r'(?:src|href)="([^#"][^"]*)"', text)
    assert [target for target in loaded if not target.startswith("data:")] == []
    assert not re.search(r"@import|url\(['\"]?http", text)


def test_the_overview_has_a_row_a_variant_and_leaves_second_readings_out(
    ablation: Path, tmp_path: Path
) -> None:
    figures = write_report([ablation], tmp_path / "report.html", with_examples=False)
    (found,) = [figure for figure in figures if figure.name == "overview"]
    assert found.n_marks == 9
    for shown in ("STS-x", "chunks", "bi+simcse", "0.450", "0.870"):
        assert f">{shown}<" in found.svg
    assert "same_token" not in found.svg
    results = json.loads((ablation / "results.json").read_text())
    for by_seed in results["scores"].values():
        for scores in by_seed.values():
            del scores["chunks"]
    (ablation / "results.json").write_text(json.dumps(results))
    figures = write_report([ablation], tmp_path / "report.html", with_examples=False)
    assert "overview" not in {figure.name for figure in figures}


def test_curves_of_merged_encoders(tmp_path: Path) -> None:
    for name, bend in (("one", 0.2), ("two", 0.1)):
        (tmp_path / name).mkdir()
        points = [{"weights": [1 - i / 10, i / 10], "score": 0.7 + bend * i / 10} for i in range(11)]
        merged = {"sources": ["runs/distilled/encoder", f"runs/{name}_other"], "method": "linear"}
        merged |= {"weights": [0.3, 0.7], "measured": "STS-dev", "curve": points}
        (tmp_path / name / "merge.json").write_text(json.dumps(merged))
    output = tmp_path / "report.html"
    (figure,) = write_report([tmp_path / "one", tmp_path / "two"], output, with_examples=False)
    assert (figure.name, figure.n_marks) == ("merge_sts_dev", 22)
    assert "distilled → one_other" in figure.svg
    text = output.read_text()
    assert "<h2>Merged encoders</h2>" in text
    assert "0.3 × distilled + 0.7 × two_other" in text


def test_example_sentences_are_placed_by_their_vectors(tiny_model_dir: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_model_dir)
    found = examples_of(encoder)
    assert len(SENTENCES) == len(TOPIC_OF) == len(set(SENTENCES)) == 24
    vectors = encoder.encode(SENTENCES, normalize=True).astype(np.float64)
    np.testing.assert_allclose(found.cosines, vectors @ vectors.T, atol=1e-5)
    values = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    np.testing.assert_allclose((found.places**2).sum(0) / 23, values[:2], rtol=1e-3)


def test_report_in_a_browser(ablation: Path, tmp_path: Path) -> None:
    """No console error, every plot non-empty, nothing wider than a phone, light and dark."""
    output = tmp_path / "report.html"
    figures = write_report([ablation], output)
    assert {"map_bi_mntp", "similarity_bi_mntp", "map_uni"} <= {figure.name for figure in figures}
    colours = set()
    for width, dark in ((1200, False), (500, True)):
        page, said = opened(output, width=width, dark=dark)
        assert said == []
        assert [figure["id"] for figure in page["figures"]] == [figure.name for figure in figures]
        for shown, figure in zip(page["figures"], figures, strict=True):
            assert shown["width"] > 200
            assert shown["height"] > 100
            assert shown["marks"] > 5, figure.name
            assert any(shown["words"]), figure.name
        assert not page["wide"]
        colours.add(page["colour"])
    assert len(colours) == 2


def test_a_report_without_a_model_does_not_load_one(ablation: Path, tmp_path: Path) -> None:
    results = json.loads((ablation / "results.json").read_text())
    (ablation / "results.json").write_text(json.dumps({**results, "model": "no/such"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        write_report([ablation], tmp_path / "a.html")
    assert write_report([ablation], tmp_path / "a.html", with_examples=False)


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Else two models would be taken for two seeds of one."""
    for name, score in (("x", 0.2), ("y", 0.8)):
        (tmp_path / name / "scores").mkdir(parents=True)
        task = {"type": "STS", "metric": "spearman", "main_score": score}
        scores = {"model": "m", "tasks": {"STSB": task}}
        (tmp_path / name / "scores" / "scores.json").write_text(json.dumps(scores))
        run_folder(tmp_path / name / "run", "mntp")
    folders = [tmp_path / name / part for name in "xy" for part in ("scores", "run")]
    data = read_folders(folders)
    assert data.scores == {"STSB": {"x/scores": [0.2], "y/scores": [0.8]}}
    assert [run.name for run in data.runs] == ["x/run", "y/run"]


def test_any_name_can_be_drawn(ablation: Path, tmp_path: Path) -> None:
    """Dollar signs, names that differ in signs alone, and a run whose recipe is gone."""
    results = json.loads((ablation / "results.json").read_text())
    results["scores"] = {"cost $a_{$": {"1": {"F1-a": 0.5, "F1 a": 0.6}}}
    (ablation / "results.json").write_text(json.dumps(results))
    (run_folder(tmp_path / "bare", "mntp") / "recipe.yaml").unlink()
    output = tmp_path / "report.html"
    names = [f.name for f in write_report([ablation, tmp_path / "bare"], output, with_examples=False)]
    assert {"score_f1_a", "score_f1_a_2", "run_loss"} <= set(names)
    assert 'id="run_loss"' in output.read_text()
    assert "cost $a_{$" in output.read_text()


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        read_folders([tmp_path / "missing"])
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        read_folders([tmp_path])
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json is damaged \(Invalid JSON"):
        read_folders([tmp_path])
