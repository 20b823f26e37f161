# SPDX-License-Identifier: MIT
"""Forms of the kernels of `rotary/triton` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.rotary.triton import _constants, rotary_kernel
from packages.core.tests.kernels.triton.building import Build


def _build(dtype: str, heads: int, kv_heads: int, dim: int, half: int) -> Build:
    strides = ("q_token", "q_head", "k_token", "k_head")
    arguments = {"q": f"*{dtype}", "q_out": f"*{dtype}", "positions": "*i64", "cos": "*fp32", "sin": "*fp32"}
    keys = ("k", "k_out")
    return Build(
        rotary_kernel,
        arguments | dict.fromkeys(strides, "i32") | (dict.fromkeys(keys, f"*{dtype}") if kv_heads else {}),
        {**_constants(heads, kv_heads, dim, half), **({} if kv_heads else dict.fromkeys(keys))},
        aligned=strides,
        label=f"{dtype}-{heads}-{kv_heads}-{dim}-{2 * half}",
    )


FORMS = (
    _build("bf16", 32, 8, 128, 64),
    _build("fp16", 9, 3, 64, 32),
    _build("fp32", 32, 0, 80, 16),
    _build("bf16", 24, 8, 96, 36),
)
