"""Compiles kernels for GPUs that are not there, in a process where kernels are not interpreted.

Reads a JSON list of cases from stdin, writes a line for each: `shared_bytes`, what one program needs, and
`two_byte_accesses`, loads and stores of global memory that move no more (16 bytes are moved at once where the
compiler knows that it can).
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
import triton.language as tl
from llm2vec_kernels.attention.triton_backward import dkdv_kernel, dq_kernel
from llm2vec_kernels.attention.triton_forward import forward_kernel
from llm2vec_kernels.info_nce import triton as info_nce_triton
from llm2vec_kernels.row_ops import kernels as rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = {
    "forward": forward_kernel,
    "dq": dq_kernel,
    "dkdv": dkdv_kernel,
    "rms_norm": rows.rms_norm_kernel,
    "rms_norm_backward": rows.rms_norm_backward_kernel,
    "gated_unit": rows.gated_unit_kernel,
    "gated_unit_backward": rows.gated_unit_backward_kernel,
    "rotate": rows.rotate_kernel,
    "drop": rows.drop_kernel,
    "statistics": info_nce_triton.statistics_kernel,
    "coefficients": info_nce_triton.coefficients_kernel,
}
TYPES = {
    **dict.fromkeys(("first_ptr", "past_ptr"), "*i32"),
    **dict.fromkeys(("positive_ptr", "query_id_ptr", "document_id_ptr", "seed_ptr"), "*i64"),
    **dict.fromkeys(("lse_ptr", "delta_ptr", "inverse_ptr", "sums_ptr"), "*fp32"),
    **dict.fromkeys(
        ("score_ptr", "positive_score_ptr", "best_negative_ptr", "limit_ptr", "row_weight_ptr"), "*fp32"
    ),
}


def argument_type(name: str, dtype: str) -> str:
    """Triton's name of an argument's type, as a launch would find it."""
    if name in TYPES:
        return TYPES[name].replace("fp32", "fp64") if dtype == "fp64" else TYPES[name]
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "i32" if "_stride_" in name or name.startswith("n_") else "fp32"


def compiled(case: dict[str, Any]) -> dict[str, int]:
    """Compiles one case down to machine code, its sizes being multiples of 16."""
    kernel = KERNELS[case["kernel"]]
    constants = case["constants"]
    if "WIDE" in constants:
        constants["WIDE"] = getattr(tl, constants["WIDE"])
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else argument_type(n, case["dtype"]) for n in names}
    known = [p.name for p in kernel.params if not (p.do_not_specialize or p.do_not_specialize_on_alignment)]
    aligned = [
        names.index(n)
        for n in known
        if n.endswith("_ptr") or "_stride_" in n or n in ("n_columns", "n_elements")
    ]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {name: case[name] for name in ("num_warps", "num_stages") if name in case}
    found = triton.compile(source, target=GPUTarget("cuda", case["sm"], 32), options=options)
    assert found.asm["cubin"]
    accesses = re.findall(r"(?:ld|st)\.global\S*\.[bu]16\b", found.asm["ptx"])
    return {"shared_bytes": int(found.metadata.shared), "two_byte_accesses": len(accesses)}


for case in json.load(sys.stdin):
    print(json.dumps(compiled(case)), flush=True)
