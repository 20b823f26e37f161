# SPDX-License-Identifier: MIT
"""Forms of the kernels of `moe/triton` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.moe.triton import _PART, sum_kernel
from packages.core.tests.kernels.triton.building import Build


def _build(dtype: str, top_k: int) -> Build:
    types = {"results": f"*{dtype}", "weights": "*fp32", "experts": "*i32", "y": f"*{dtype}", "X": "i32", "E": "i32"}
    return Build(sum_kernel, types, {"TOP": top_k, "BLOCK": _PART}, aligned=("E",), label=f"{dtype}-{top_k}")


FORMS = (_build("bf16", 8), _build("fp16", 2))
