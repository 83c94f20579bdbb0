"""A NaN stops every rank before the step, and the error says where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llm2vec_ds.engine.finite_check import FiniteCheck, NonFiniteError
from tests.support.runs import command, recipe, write_recipe
from tests.support.tiny import save_tiny_llama, sentences, tiny_tokenizer

POISON = "zzz"


@pytest.fixture(scope="module")
def poisoned_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding of `z` is NaN: only a text with that letter breaks."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("poisoned"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny_tokenizer().convert_tokens_to_ids("z")] = float("nan")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_a_bad_text_stops_the_run_by_name(
    stage: str, ranks: int, tmp_path: Path, poisoned_model_dir: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join([*sentences(31), f"bread {POISON}"]) + "\n")
    values = recipe(stage, poisoned_model_dir, texts, tmp_path / "run", max_steps=4)
    values["batch"]["global_batch_size"] = 32
    outcome = command(["train", str(write_recipe(values, tmp_path / "r.yaml"))], ranks)
    assert outcome.returncode != 0
    message = next(line for line in outcome.stderr.splitlines() if "not finite" in line)
    assert "llm2vec-ds: error: step 1:" in message
    assert f"text 31 ('bread {POISON}')" in message
    assert "rank " in message
    assert message.count("text ") == 1
    assert "Traceback" not in outcome.stderr.replace("torch.distributed", "")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "run" / "encoder").exists()


def test_a_bad_gradient_behind_a_finite_loss_is_seen() -> None:
    layer = nn.Linear(2, 1, bias=False)
    check = FiniteCheck(layer.parameters())
    for rows, x in (([4, 5], 1.0), ([6], 0.0)):
        loss = (
            (layer(torch.full((1, 2), x)) * 0).abs().sqrt().sum() if x == 0 else layer(torch.ones(1, 2)).sum()
        )
        assert loss.isfinite()
        loss.backward()
        check.end_of_backward(loss, rows)
    with pytest.raises(NonFiniteError, match=r"step 3: .*rank 0, text 6 \('words of 6'\)"):
        check.stop_if_not_finite(3, list, lambda row: f"'words of {row}'")


def test_finite_steps_pass() -> None:
    layer = nn.Linear(2, 1)
    check = FiniteCheck(layer.parameters())
    loss = layer(torch.ones(1, 2)).sum()
    loss.backward()
    check.end_of_backward(loss, [0])
    check.stop_if_not_finite(1, list, str)


@pytest.mark.parametrize("held", [1, 5, 2**22])
def test_one_bad_gradient_among_many_is_seen(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are looked at one by one, some at a time, or all at once."""
    monkeypatch.setattr("llm2vec_ds.engine.finite_check.ELEMENTS_HELD", held)
    model = nn.ModuleList(nn.Linear(2, 1, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float32))
    check = FiniteCheck(model.parameters())
    for rows, bad in (([0, 1], None), ([2], 1)):
        for number, layer in enumerate(model):
            factor = float("inf") if number == bad else 1.0
            x = torch.ones(1, 2, dtype=layer.weight.dtype)
            out = layer(x).sum()
            out.register_hook(lambda d, factor=factor: d * factor)
            out.backward()
        check.end_of_backward(torch.zeros(()), rows)
    with pytest.raises(NonFiniteError, match="text 2 "):
        check.stop_if_not_finite(1, list, str)


def test_what_was_forgotten_is_not_looked_at() -> None:
    layer = nn.Linear(2, 1)
    check = FiniteCheck(layer.parameters())
    layer(torch.full((1, 2), float("inf"))).sum().backward()
    check.forget()
    layer(torch.ones(1, 2)).sum().backward()
    check.end_of_backward(torch.zeros(()), [0])
    check.stop_if_not_finite(1, list, str)
