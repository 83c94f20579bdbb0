"""Keys of other tools, and what a recipe has instead.

The tools are transformers' Trainer, peft, sentence-transformers, upstream `llm2vec`, and the trainers around
them. The error for an unknown key shows the answer. docs/recipe_keys.md has the table.
"""

from __future__ import annotations

import difflib

GLOBAL_BATCH = "`batch.global_batch_size`, the texts of one step over all GPUs and accumulation steps"
WARMUP = "`optimizer.warmup_steps`, in steps (the ratio × `max_steps`)"
PACKED = "nothing (texts are always packed, without padding)"
LONGEST = "`data.max_tokens`"
MODEL = "`model.path`"
TEXTS = "`data.path`, a file, a folder or `hub:owner/name`"
HELD_OUT = "`data.held_out_path`"
SCALE = "`simcse.scale` or `supervised.scale`, 1 / temperature"
MEASURE = "`held_out_every_steps`, or `evaluation.every_steps` for tasks"
FOUR_BITS = "`model.quantization: nf4`"
PRECISION = "`model.precision`, bf16 or fp32"
CHECKPOINT_STEPS = "`checkpoint.every_steps`"
BEST = "`checkpoint.best_by`, a held-out metric such as loss"
EVERY_STEP = "nothing (metrics.jsonl has every step)"
WANDB = "the environment variable WANDB_PROJECT, with `monitor: wandb`"

HABITS: dict[str, str] = {
    # the model
    "model_name_or_path": MODEL,
    "model_name": MODEL,
    "base_model": MODEL,
    "pretrained_model_name_or_path": MODEL,
    "attn_implementation": "`model.attention`",
    "torch_dtype": PRECISION,
    "dtype": PRECISION,
    "bf16": "`model.precision: bf16`",
    "fp16": "`model.precision: bf16` or fp32 (fp16 is not supported)",
    "load_in_4bit": FOUR_BITS,
    "load_in_8bit": f"{FOUR_BITS} (8 bits are not supported)",
    "gradient_checkpointing": "`model.activation_checkpointing`: none, selective or full",
    "bidirectional": "`model.causal`, which is the opposite (default: false)",
    "pooling_mode": "`pooling`",
    "torch_compile": "nothing (`model.fused_layers` is auto)",
    # LoRA
    "lora_r": "`adapter.rank`",
    "r": "`adapter.rank`",
    "lora_rank": "`adapter.rank`",
    "lora_alpha": "`adapter.alpha`",
    "lora_dropout": "`adapter.dropout`",
    "lora_target_modules": "`adapter.target_modules`",
    "use_rslora": "`adapter.variant: rslora`",
    "use_dora": "`adapter.variant: dora`",
    "init_lora_weights": "`adapter.variant`, such as pissa",
    "lora": "`adapter`",
    "lora_config": "`adapter`",
    "peft_config": "`adapter`",
    "use_lora": "`adapter`, which is LoRA by default; `adapter: null` trains every weight",
    "use_peft": "`adapter`, which is LoRA by default; `adapter: null` trains every weight",
    # batches and steps
    "per_device_train_batch_size": GLOBAL_BATCH,
    "train_batch_size": GLOBAL_BATCH,
    "batch_size": GLOBAL_BATCH,
    "micro_batch_size": "`batch.micro_batch_tokens`, in tokens",
    "mini_batch_size": "`batch.micro_batch_tokens`, in tokens",
    "train_micro_batch_size_per_gpu": "`batch.micro_batch_tokens`, in tokens",
    "per_device_eval_batch_size": "`batch.micro_batch_tokens`, in tokens",
    "gradient_accumulation_steps": "nothing (`batch.global_batch_size` texts run in parts of "
    "`batch.micro_batch_tokens`)",
    "num_train_epochs": "`epochs`",
    "num_epochs": "`epochs`",
    "stop_after_n_steps": "`max_steps`",
    "auto_find_batch_size": "`batch.halve_if_out_of_memory`",
    "group_by_length": PACKED,
    "packing": PACKED,
    "sample_packing": PACKED,
    "dataloader_num_workers": "nothing (texts are tokenised once, and batches are made ahead)",
    # the optimizer
    "learning_rate": "`optimizer.lr`",
    "optim": "`optimizer.name`",
    "adam_beta1": "`optimizer.betas`, two numbers",
    "adam_beta2": "`optimizer.betas`, two numbers",
    "adam_epsilon": "`optimizer.eps`",
    "gradient_clipping": "`optimizer.max_grad_norm`",
    "warmup_ratio": WARMUP,
    "lr_scheduler_type": "`optimizer.schedule`",
    "lr_scheduler": "`optimizer.schedule`",
    # texts
    "max_seq_length": LONGEST,
    "max_seq_len": LONGEST,
    "max_length": LONGEST,
    "model_max_length": LONGEST,
    "cutoff_len": LONGEST,
    "sequence_len": LONGEST,
    "train_file": TEXTS,
    "dataset": TEXTS,
    "datasets": TEXTS,
    "dataset_name": TEXTS,
    "dataset_config_name": "`data.path`, as `hub:owner/name:config@split`",
    "validation_file": HELD_OUT,
    "eval_dataset": HELD_OUT,
    # objectives
    "mlm_probability": "`mntp.mask_rate`",
    "mask_token_type": "`mntp.mask_token`",
    "data_collator_type": "`mntp.masking`",
    "simcse_dropout": "`simcse.attention_dropout`",
    "loss_scale": "`simcse.scale` or `supervised.scale`",
    "temperature": SCALE,
    # what is measured and kept
    "report_to": "`monitor`: tensorboard, wandb or csv",
    "run_name": "the environment variable WANDB_NAME, with `monitor: wandb` (default: the run folder's name)",
    "wandb_project": WANDB,
    "project": WANDB,
    "logging_steps": EVERY_STEP,
    "logging_strategy": EVERY_STEP,
    "logging_dir": "nothing (it is `monitor/` in `output_dir`)",
    "eval_steps": MEASURE,
    "eval_strategy": MEASURE,
    "evaluation_strategy": MEASURE,
    "save_steps": CHECKPOINT_STEPS,
    "save_strategy": CHECKPOINT_STEPS,
    "save_total_limit": "`checkpoint.keep_last`",
    "load_best_model_at_end": BEST,
    "metric_for_best_model": BEST,
    "greater_is_better": "`checkpoint.lowest_is_best`, which is the opposite",
    "resume_from_checkpoint": "`resume: true`, which finds the newest checkpoint in `output_dir`",
    "overwrite_output_dir": "`overwrite`",
    "data_seed": "`seed`",
    "full_determinism": "`deterministic`",
    "ddp_timeout": "`step_timeout_s`",
    "deepspeed_config": "`deepspeed`",
    "fsdp": "`deepspeed: ds_configs/zero3.json`, which splits the weights too",
}
"""Answer by the key's name. The key may be typed at any depth of a recipe."""


def answer_to(name: str) -> str | None:
    """Returns what a recipe has instead of another tool's key, or None for an unknown name.

    `-` equals `_`, and capitals equal small letters. One or two wrong letters in a long name do not matter.
    """
    near = difflib.get_close_matches(name.lower().replace("-", "_"), HABITS, n=1, cutoff=0.92)
    return HABITS[near[0]] if near else None
