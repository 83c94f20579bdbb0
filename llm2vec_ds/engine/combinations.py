"""Checks that a recipe and a DeepSpeed JSON work together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.quantization import check_bitsandbytes
from llm2vec_ds.recipe.deepspeed_json import optimizer_is_offloaded, parameters_are_offloaded
from llm2vec_ds.recipe.recipe import Recipe


def check_combination(recipe: Recipe, config: Mapping[str, Any], *, on_cuda: bool) -> None:
    """Refuses a combination that does not work, before anything is loaded.

    Raises:
        UserError: names both settings and the fix.
    """
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if recipe.adapter is not None and recipe.adapter.variant == "pissa" and stage == 3:
        raise UserError(
            f"adapter.variant: pissa needs whole weights for its start, and {recipe.deepspeed} splits them "
            "(ZeRO-3): use deepspeed=ds_configs/zero2.json, or another variant"
        )
    if recipe.model.quantization is not None and parameters_are_offloaded(config):
        raise UserError(
            f"model.quantization: nf4 keeps its weights on the GPU, and {recipe.deepspeed} keeps parameters "
            "on the host (offload_param): use deepspeed=ds_configs/zero3.json, or quantization=null"
        )
    if recipe.optimizer.name != "paged_adamw_8bit":
        return
    check_bitsandbytes("optimizer.name: paged_adamw_8bit")
    if not on_cuda:
        raise UserError(
            "optimizer.name: paged_adamw_8bit needs a CUDA GPU (its kernels page GPU memory): use "
            "optimizer.name=adamw here"
        )
    if optimizer_is_offloaded(config):
        raise UserError(
            f"optimizer.name: paged_adamw_8bit lives on the GPU, and {recipe.deepspeed} keeps the optimizer "
            "on the host: use optimizer.name=adamw, or a JSON without offload_optimizer"
        )
