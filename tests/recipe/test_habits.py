"""Keys that people know from other tools are answered by the key that says the same."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.files import apply_override
from llm2vec_ds.recipe.habits import HABITS
from llm2vec_ds.recipe.recipe import documented_keys, parse_recipe
from tests.support.in_process import error_line, run

MINIMAL: dict[str, Any] = {
    "stage": "simcse",
    "model": {"path": "m"},
    "data": {"path": "t.txt"},
    "output_dir": "o",
}

ANSWERS = [
    ("model_name_or_path", "`model.path`"),
    ("model_name", "`model.path`"),
    ("base_model", "`model.path`"),
    ("pretrained_model_name_or_path", "`model.path`"),
    ("attn_implementation", "`model.attention`"),
    ("torch_dtype", "`model.precision`, bf16 or fp32"),
    ("dtype", "`model.precision`, bf16 or fp32"),
    ("bf16", "`model.precision: bf16`"),
    ("fp16", "`model.precision: bf16` or fp32 (fp16 is not supported)"),
    ("load_in_4bit", "`model.quantization: nf4`"),
    ("load_in_8bit", "`model.quantization: nf4` (8 bits are not supported)"),
    ("gradient_checkpointing", "`model.activation_checkpointing`: none, selective or full"),
    ("bidirectional", "`model.causal`, which is the opposite (default: false)"),
    ("pooling_mode", "`pooling`"),
    ("torch_compile", "nothing (`model.fused_layers` is auto)"),
    ("lora_r", "`adapter.rank`"),
    ("r", "`adapter.rank`"),
    ("lora_rank", "`adapter.rank`"),
    ("lora_alpha", "`adapter.alpha`"),
    ("lora_dropout", "`adapter.dropout`"),
    ("lora_target_modules", "`adapter.target_modules`"),
    ("use_rslora", "`adapter.variant: rslora`"),
    ("use_dora", "`adapter.variant: dora`"),
    ("init_lora_weights", "`adapter.variant`, such as pissa"),
    ("lora", "`adapter`"),
    ("lora_config", "`adapter`"),
    ("peft_config", "`adapter`"),
    ("use_lora", "`adapter`, which is LoRA by default; `adapter: null` trains every weight"),
    ("use_peft", "`adapter`, which is LoRA by default; `adapter: null` trains every weight"),
    (
        "per_device_train_batch_size",
        "`batch.global_batch_size`, the texts of one step over all GPUs and accumulation steps",
    ),
    (
        "train_batch_size",
        "`batch.global_batch_size`, the texts of one step over all GPUs and accumulation steps",
    ),
    (
        "batch_size",
        "`batch.global_batch_size`, the texts of one step over all GPUs and accumulation steps",
    ),
    ("micro_batch_size", "`batch.micro_batch_tokens`, in tokens"),
    ("mini_batch_size", "`batch.micro_batch_tokens`, in tokens"),
    ("train_micro_batch_size_per_gpu", "`batch.micro_batch_tokens`, in tokens"),
    ("per_device_eval_batch_size", "`batch.micro_batch_tokens`, in tokens"),
    (
        "gradient_accumulation_steps",
        "nothing (`batch.global_batch_size` texts run in parts of `batch.micro_batch_tokens`)",
    ),
    ("num_train_epochs", "`epochs`"),
    ("num_epochs", "`epochs`"),
    ("stop_after_n_steps", "`max_steps`"),
    ("auto_find_batch_size", "`batch.halve_if_out_of_memory`"),
    ("group_by_length", "nothing (texts are always packed, without padding)"),
    ("packing", "nothing (texts are always packed, without padding)"),
    ("sample_packing", "nothing (texts are always packed, without padding)"),
    ("dataloader_num_workers", "nothing (texts are tokenised once, and batches are made ahead)"),
    ("learning_rate", "`optimizer.lr`"),
    ("optim", "`optimizer.name`"),
    ("adam_beta1", "`optimizer.betas`, two numbers"),
    ("adam_beta2", "`optimizer.betas`, two numbers"),
    ("adam_epsilon", "`optimizer.eps`"),
    ("gradient_clipping", "`optimizer.max_grad_norm`"),
    ("warmup_ratio", "`optimizer.warmup_steps`, in steps (the ratio × `max_steps`)"),
    ("lr_scheduler_type", "`optimizer.schedule`"),
    ("lr_scheduler", "`optimizer.schedule`"),
    ("max_seq_length", "`data.max_tokens`"),
    ("max_seq_len", "`data.max_tokens`"),
    ("max_length", "`data.max_tokens`"),
    ("model_max_length", "`data.max_tokens`"),
    ("cutoff_len", "`data.max_tokens`"),
    ("sequence_len", "`data.max_tokens`"),
    ("train_file", "`data.path`, a file, a folder or `hub:owner/name`"),
    ("dataset", "`data.path`, a file, a folder or `hub:owner/name`"),
    ("datasets", "`data.path`, a file, a folder or `hub:owner/name`"),
    ("dataset_name", "`data.path`, a file, a folder or `hub:owner/name`"),
    ("dataset_config_name", "`data.path`, as `hub:owner/name:config@split`"),
    ("validation_file", "`data.held_out_path`"),
    ("eval_dataset", "`data.held_out_path`"),
    ("mlm_probability", "`mntp.mask_rate`"),
    ("mask_token_type", "`mntp.mask_token`"),
    ("data_collator_type", "`mntp.masking`"),
    ("simcse_dropout", "`simcse.attention_dropout`"),
    ("loss_scale", "`simcse.scale` or `supervised.scale`"),
    ("temperature", "`simcse.scale` or `supervised.scale`, 1 / temperature"),
    ("report_to", "`monitor`: tensorboard, wandb or csv"),
    (
        "run_name",
        "the environment variable WANDB_NAME, with `monitor: wandb` (default: the run folder's name)",
    ),
    ("wandb_project", "the environment variable WANDB_PROJECT, with `monitor: wandb`"),
    ("project", "the environment variable WANDB_PROJECT, with `monitor: wandb`"),
    ("logging_steps", "nothing (metrics.jsonl has every step)"),
    ("logging_strategy", "nothing (metrics.jsonl has every step)"),
    ("logging_dir", "nothing (it is `monitor/` in `output_dir`)"),
    ("eval_steps", "`held_out_every_steps`, or `evaluation.every_steps` for tasks"),
    ("eval_strategy", "`held_out_every_steps`, or `evaluation.every_steps` for tasks"),
    ("evaluation_strategy", "`held_out_every_steps`, or `evaluation.every_steps` for tasks"),
    ("save_steps", "`checkpoint.every_steps`"),
    ("save_strategy", "`checkpoint.every_steps`"),
    ("save_total_limit", "`checkpoint.keep_last`"),
    ("load_best_model_at_end", "`checkpoint.best_by`, a held-out metric such as loss"),
    ("metric_for_best_model", "`checkpoint.best_by`, a held-out metric such as loss"),
    ("greater_is_better", "`checkpoint.lowest_is_best`, which is the opposite"),
    ("resume_from_checkpoint", "`resume: true`, which finds the newest checkpoint in `output_dir`"),
    ("overwrite_output_dir", "`overwrite`"),
    ("data_seed", "`seed`"),
    ("full_determinism", "`deterministic`"),
    ("ddp_timeout", "`step_timeout_s`"),
    ("deepspeed_config", "`deepspeed`"),
    ("fsdp", "`deepspeed: ds_configs/zero3.json`, which splits the weights too"),
]


def refused(override: str) -> str:
    values = copy.deepcopy(MINIMAL)
    apply_override(values, override)
    with pytest.raises(UserError) as caught:
        parse_recipe(values)
    return str(caught.value)


@pytest.mark.parametrize(("name", "answer"), ANSWERS, ids=[name for name, _ in ANSWERS])
def test_a_habit_is_answered(name: str, answer: str) -> None:
    assert refused(f"{name}=1") == f"recipe: unknown key `{name}`: set {answer}"


def test_every_habit_is_listed_here() -> None:
    assert dict(ANSWERS) == HABITS
    assert len(HABITS) >= 25


@pytest.mark.parametrize("answer", sorted(set(HABITS.values())))
def test_an_answer_names_keys_that_exist(answer: str) -> None:
    """And no habit is a key itself, which nobody would ever be told."""
    keys = {key for key, _, _ in documented_keys()} | {"adapter"}
    for quoted in re.findall(r"`([^`]+)`", answer):
        key = quoted.partition(":")[0]
        assert key in keys or key in ("hub", "monitor/"), quoted
    assert not keys & HABITS.keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1", "unknown key `lr`: did you mean `optimizer.lr`?"),
        ("path=x", "unknown key `path`: did you mean `model.path` or `data.path`?"),
        ("keep_last=1", "unknown key `keep_last`: did you mean `checkpoint.keep_last`?"),
        ("warmup_step=1", "unknown key `warmup_step`: did you mean `optimizer.warmup_steps`?"),
        ("data.query_column=q", "unknown key `data.query_column`: did you mean `data.pairs.query_column`?"),
        ("adapter.r=1", "unknown key `adapter.r`: set `adapter.rank`"),
        ("optimizer.learning_rat=1", "unknown key `optimizer.learning_rat`: set `optimizer.lr`"),
        ("lora.r=16", "unknown key `lora`: set `adapter`"),
        ("model=m", "`model` is a section: set its keys, such as `model.path` (got 'm')"),
        ("batch=32", "`batch` is a section: set its keys, such as `batch.global_batch_size` (got 32)"),
    ],
)
def test_a_key_of_another_place_is_answered_by_its_place(override: str, message: str) -> None:
    assert refused(override) == f"recipe: {message}"


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["--learning_rate", "1e-4"], "--learning_rate…; set `optimizer.lr`"),
        (["--num-train-epochs=3"], "--num-train-epochs…; set `epochs`"),
        (["--resume"], "--resume: write recipe keys as key=value, e.g. optimizer.lr=1e-4"),
    ],
)
def test_an_option_of_other_trainers_is_answered_by_the_key(
    typed: list[str],
    answer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "r.yaml").write_text("stage: mntp\n")
    assert run(monkeypatch, "train", tmp_path / "r.yaml", *typed) == 2
    start, _, end = answer.partition("…")
    line = error_line(capsys)
    assert line.startswith(f"there is no option {start}")
    assert line.endswith(end)
