"""Mixtures of encoders and means of checkpoints equal an independent computation; mistakes cost one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.engine.run import train
from llm2vec_ds.export.mix import mix, mixed
from llm2vec_ds.recipe.recipe import parse_recipe
from llm2vec_ds.report.data import read_folders
from tests.support.in_process import assert_reads, error_line, run
from tests.support.runs import recipe
from tests.support.tiny import save_tiny_llama

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An encoder that pools the last token, two LLMs of its shape, and a wider one."""
    folder = tmp_path_factory.mktemp("models")
    llms = [save_tiny_llama(folder / f"llm{seed}", seed=seed) for seed in (1, 2, 3)]
    Encoder.from_pretrained(llms[0], settings={"pooling": "last"}).save(folder / "encoder")
    return [folder / "encoder", *llms[1:], save_tiny_llama(folder / "wide", hidden_size=64)]


def weights_of(folder: Path) -> Tensors:
    """Of a trunk, or of an LLM's trunk."""
    found = {name.removeprefix("model."): t for name, t in load_file(folder / "model.safetensors").items()}
    return {name: tensor.double() for name, tensor in found.items() if name != "lm_head.weight"}


def test_a_line_through_three(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("merge", *models[:3], "--weights", "0.5,0.3,0.2", "--output", tmp_path / "mixed")
    assert run(monkeypatch, *arguments) == 0
    parts, found = [weights_of(model) for model in models[:3]], weights_of(tmp_path / "mixed")
    assert found.keys() == parts[0].keys()
    for name, tensor in found.items():
        expected = 0.5 * parts[0][name] + 0.3 * parts[1][name] + 0.2 * parts[2][name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8)
    encoder = Encoder.from_pretrained(tmp_path / "mixed")
    assert (encoder.settings.pooling, encoder.causal) == ("last", False)
    assert json.loads((tmp_path / "mixed" / "merge.json").read_text())["weights"] == [0.5, 0.3, 0.2]


def test_an_arc_keeps_length_and_turns_evenly() -> None:
    """Between vectors of one length; parallel ones are mixed in a line."""
    generator = np.random.default_rng(0)
    a, b = (x / np.linalg.norm(x) for x in generator.normal(size=(2, 30)))
    whole = np.arccos(a @ b)
    for share in (0.0, 0.25, 0.7, 1.0):
        states = [{"w": torch.tensor(x).reshape(5, 6)} for x in (a, b)]
        found = mixed(states, [1 - share, share], "slerp")["w"].flatten().numpy()
        assert np.linalg.norm(found) == pytest.approx(1.0, abs=1e-9)
        assert np.arccos(np.clip(found @ a, -1, 1)) == pytest.approx(share * whole, abs=1e-6)
    states = [{"w": torch.tensor(a)}, {"w": torch.tensor(3 * a)}]
    np.testing.assert_allclose(mixed(states, [0.5, 0.5], "slerp")["w"], 2 * a)


def test_the_best_of_a_curve_is_kept(models: list[Path], tmp_path: Path) -> None:
    """Measured on each mixture itself: the score is a known function of one weight."""
    name = "layers.0.mlp.up_proj.weight"
    a, b = (weights_of(models[i])[name] for i in (0, 1))
    wanted = 0.7 * a + 0.3 * b

    def measure(encoder: Encoder) -> tuple[str, float]:
        return "nearness", -float((encoder.trunk.state_dict()[name].double() - wanted).norm())

    points = mix([*map(str, models[:2])], tmp_path / "best", measure=measure)
    assert [point.weights[1] for point in points] == pytest.approx([i / 10 for i in range(11)])
    best = max(points, key=lambda point: point.score)
    assert best.weights == pytest.approx([0.7, 0.3])
    torch.testing.assert_close(weights_of(tmp_path / "best")[name], wanted, rtol=1e-6, atol=1e-8)
    noted = json.loads((tmp_path / "best" / "merge.json").read_text())
    assert noted["weights"] == best.weights
    assert len(noted["curve"]) == 11
    assert noted["measured"] == "nearness"
    (curve,) = read_folders([tmp_path / "best"]).curves
    assert (curve.name, curve.measured) == (f"{models[0].parent.name} → {models[1].name}", "nearness")
    assert (curve.weights, curve.scores) == ([p.weights[1] for p in points], [p.score for p in points])


def test_a_curve_over_a_task(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"the mill {i},a train {i},{i % 5}" for i in range(12)]
    (tmp_path / "dev.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]) + "\n")
    out, task = tmp_path / "out", f"sts:{tmp_path / 'dev.csv'}"
    assert run(monkeypatch, "merge", *models[:2], "--output", out, "--evaluate", task) == 0
    curve = json.loads((out / "merge.json").read_text())["curve"]
    said = [line.split() for line in capsys.readouterr().out.splitlines()[:-1]]
    assert [float(line[2]) for line in said] == pytest.approx([p["score"] for p in curve], abs=5e-5)
    assert len({point["score"] for point in curve}) > 3


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_mean_of_the_last_checkpoints(
    trains: str, tiny_model_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the tensors of each checkpoint: W, or W + α / r · B·A. Their moving averages take no part."""
    adapter = {"rank": 4, "alpha": 8} if trains == "lora" else None
    values = recipe("simcse", tiny_model_dir, texts_file, tmp_path / "run", adapter=adapter)
    values |= {"checkpoint": {"every_steps": 1, "keep_last": 9}, "max_steps": 4}
    values["optimizer"] = {"lr": 1e-2, "schedule": "constant", "ema": 0.9}
    train(parse_recipe(values))
    Encoder.from_pretrained(tiny_model_dir).save(tmp_path / "soup")
    (tmp_path / "soup" / "merge.json").write_text("{}")  # of another mixture
    arguments = ("merge", tmp_path / "run", "--last", 3, "--output", tmp_path / "soup", "--overwrite")
    assert run(monkeypatch, *arguments) == 0
    assert not (tmp_path / "soup" / "merge.json").exists()
    found, start = weights_of(tmp_path / "soup"), weights_of(tiny_model_dir)
    for name in ("layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"):
        parts = []
        for step in (2, 3, 4):
            file = tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "part-00000.safetensors"
            tensors, place = load_file(file), f"encoder.trunk.{name}"
            if trains == "full":
                parts.append(tensors[f"{place}.weight/value"].double())
                continue
            a, b = (tensors[f"{place}.lora_{x}.default.weight/value"].double() for x in "AB")
            parts.append(start[f"{name}.weight"] + 2 * b @ a)
        torch.testing.assert_close(found[f"{name}.weight"], sum(parts) / 3, rtol=1e-5, atol=1e-7)
        assert (parts[0] - parts[2]).abs().max() > 1e-3


def test_checkpoints_of_a_model_that_has_changed_are_refused(
    tiny_model_dir: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    values = recipe("simcse", model, texts_file, tmp_path / "run", adapter={"rank": 4}, max_steps=2)
    train(parse_recipe({**values, "checkpoint": {"every_steps": 1, "keep_last": 2}}))
    save_tiny_llama(model, seed=5)
    out = tmp_path / "soup"
    assert run(monkeypatch, "merge", tmp_path / "run", "--last", 2, "--output", out) == 2
    assert f"{model}, from which {tmp_path / 'run'} started, has changed since" in error_line(capsys)
    assert not out.exists()


def test_overwrite_replaces_an_earlier_mixture_and_its_note(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "merge", *models[:2], "--output", out) == 0
    again = ("merge", *models[1:3], "--output", out)
    assert run(monkeypatch, *again) == 2
    assert f"--output {out} exists: choose another, or give --overwrite" in error_line(capsys)
    (out / "notes.txt").write_text("mine")
    assert run(monkeypatch, *again, "--overwrite") == 0
    assert json.loads((out / "merge.json").read_text())["sources"] == [str(model) for model in models[1:3]]
    assert (out / "notes.txt").read_text() == "mine"
    before = weights_of(out)
    assert run(monkeypatch, "merge", out, models[1], "--output", out, "--overwrite") == 2
    assert f"--output {out} holds {out}, which is an input" in error_line(capsys)
    assert all(tensor.equal(before[name]) for name, tensor in weights_of(out).items())


MISTAKES = {
    (
        "A",
        "WIDE",
    ): "… and … have different shapes (… is [400, 32] and [400, 64]): mix encoders of one base model",
    ("A", "B", "--method", "cubic"): "--method 'cubic' is unknown: choose linear or slerp",
    ("A", "B", "C", "--method", "slerp"): "--method slerp mixes two encoders, not 3: use linear",
    ("A", "B", "--weights", "0.5,0.6"): "--weights add up to 1.1: make them add up to 1",
    ("A", "B", "--weights", "1"): "--weights has 1 number(s) for 2 encoders: give one for each encoder",
    ("A", "B", "--weights", "a,b"): "--weights 'a,b' must be numbers separated by commas, e.g. 0.6,0.4",
    ("A", "B", "--last", "2"): "--last has no effect here: leave it out, or see llm2vec-ds merge --help",
    ("A", "--last", "2"): "… is not a run, it has no recipe.yaml: give the folder of a run",
    ("A", "--weights", "1"): "--weights has no effect here: leave it out, or see llm2vec-ds merge --help",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_cost_one_line(
    arguments: tuple[str, ...],
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = dict(zip(("A", "B", "C", "WIDE"), models, strict=True))
    given = [places.get(word, word) for word in arguments]
    assert run(monkeypatch, "merge", *given, "--output", tmp_path / "out") == 2
    assert_reads(error_line(capsys), MISTAKES[arguments])
    assert not (tmp_path / "out").exists()
