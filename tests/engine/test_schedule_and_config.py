"""Learning rate, and what DeepSpeed is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm2vec_ds.engine.deepspeed_engine import OWNED_BY_RECIPE, deepspeed_config
from llm2vec_ds.engine.trainer import learning_rate
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.recipe import parse_recipe
from llm2vec_ds.recipe.sections import OptimizerConfig

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = {"stage": "mntp", "model": {"path": "m"}, "data": {"path": "t.txt"}, "output_dir": "o"}


def test_warm_up_then_linear_decay() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="linear")
    assert [learning_rate(step, 6, config) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_warm_up_then_constant() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(step, 4, config) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_warm_up_then_half_a_cosine() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=2, schedule="cosine")
    expected = [1.0, 2.0, 2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5]
    assert [learning_rate(step, 6, config) for step in range(6)] == pytest.approx(expected)


def test_warm_up_then_constant_then_decay() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="wsd", decay_share=0.4)
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [learning_rate(step, 10, config) for step in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_hold_zero_and_communication_only(path: Path) -> None:
    shipped = json.loads(path.read_text())
    assert not set(shipped) & set(OWNED_BY_RECIPE)
    config = deepspeed_config(parse_recipe({**MINIMAL, "deepspeed": str(path)}), 2, torch.float32)
    assert config["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero")[0])
    assert config["gradient_clipping"] == 1.0


def test_the_recipe_beats_the_json_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 9.0}))
    config = deepspeed_config(parse_recipe({**MINIMAL, "deepspeed": str(path)}), 2, torch.bfloat16)
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": True}
    assert "train_micro_batch_size_per_gpu, gradient_clipping" in caplog.text


def test_keys_that_the_recipe_sets_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in the JSON that most people have from the Hugging Face Trainer."""
    path = tmp_path / "ds.json"
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}
    given = {"fp16": {"enabled": True}, "scheduler": scheduler, "optimizer": {"type": "Lamb"}}
    path.write_text(json.dumps({**given, "zero_optimization": {"stage": 2}}))
    config = deepspeed_config(parse_recipe({**MINIMAL, "deepspeed": str(path)}), 1, torch.float32)
    assert not {"fp16", "scheduler"} & set(config)
    assert config["optimizer"]["type"] == "AdamW"
    assert config["zero_optimization"] == {"stage": 2}
    assert "the recipe sets optimizer, scheduler, fp16; these keys are not used" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be a JSON object: Invalid JSON"),
        ("[]", "must be a JSON object"),
        (
            '{"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"}}',
            'prefetch_bucket_size` is "auto"',
        ),
        ('{"zero_optimization": {"stage": "2"}}', "stage` is '2': write 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 5}}', "stage` is 5: write 0, 1, 2 or 3"),
    ],
)
def test_unusable_configs(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        deepspeed_config(parse_recipe({**MINIMAL, "deepspeed": str(path)}), 1, torch.float32)
