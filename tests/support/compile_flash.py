"""Compiles attention kernels for GPUs that are not there, in a process where kernels are not interpreted.

Reads a JSON list of cases from stdin, writes `{"shared_bytes": …}` a line: what one program needs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from llm2vec_kernels.flash_attention_backward import dkdv_kernel, dq_kernel
from llm2vec_kernels.flash_attention_forward import forward_kernel
from llm2vec_kernels.flash_configs import padded_head_dim
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}
INT32_TENSORS, FLOAT32_TENSORS = ("first_ptr", "past_ptr"), ("lse_ptr", "delta_ptr")


def argument_type(name: str, dtype: str) -> str:
    """Triton's name of an argument's type, as a launch would find it."""
    if name.endswith("_ptr"):
        return "*i32" if name in INT32_TENSORS else "*fp32" if name in FLOAT32_TENSORS else f"*{dtype}"
    if "_stride_" in name or name == "n_tokens":
        return "i32"
    return "i64" if name == "seed" else "fp32"


def shared_bytes(case: dict[str, Any]) -> int:
    """Compiles one case down to machine code."""
    kernel = KERNELS[case["kernel"]]
    constants = {
        "D": case["head_dim"],
        "GROUP": 4,
        "HAS_SOFTCAP": case["options"],
        "HAS_DROPOUT": case["options"],
        "BLOCK_M": case["columns"] if case["kernel"] == "dkdv" else case["rows"],
        "BLOCK_N": case["rows"] if case["kernel"] == "dkdv" else case["columns"],
        "BLOCK_D": padded_head_dim(case["head_dim"]),
    }
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else argument_type(n, case["dtype"]) for n in names}
    aligned = [i for i, n in enumerate(names) if n.endswith("_ptr") or "_stride_" in n]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"], "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", case["sm"], 32), options=options)
    assert compiled.asm["cubin"]
    return int(compiled.metadata.shared)


for case in json.load(sys.stdin):
    print(json.dumps({"shared_bytes": shared_bytes(case)}), flush=True)
