# SPDX-License-Identifier: MIT
"""Forms of the kernels of `rotary_write/triton` that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

from candle_vllm.core.kernels.rotary_write.triton import _LARGEST, _constants, _row_constants, rotary_write_kernel
from packages.core.tests.kernels.triton.building import Build
from packages.core.tests.kernels.triton.forms.kv_write.triton import build_types


def _build(
    dtype: str,
    heads: int,
    kv_heads: int,
    dim: int,
    half: int,
    *,
    norm: bool = False,
    fp8: bool = False,
    rows: str = "",
) -> Build:
    cache = rows or ("fp8e4nv" if fp8 else dtype)
    strides = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")
    arguments = dict.fromkeys(("q", "k", "v", "q_out"), f"*{dtype}") | dict.fromkeys(("cos", "sin"), "*fp32")
    arguments |= dict.fromkeys(("key_cache", "value_cache"), f"*{cache}")
    arguments |= {"positions": "*i32", "slots": "*i32", "eps": "fp32"} | dict.fromkeys(strides, "i32")
    constants: dict[str, Any] = _constants(heads, kv_heads, dim, half, norm, fp8)
    constants |= _row_constants(kv_heads, 16 if rows else 0, 127.0 if rows == "i8" else _LARGEST)
    for names, there in ((("q_weight", "k_weight"), norm), (("key_scale", "value_scale"), fp8)):
        if there:
            arguments |= dict.fromkeys(names, "*fp32")
        else:
            constants |= dict.fromkeys(names)
    return Build(
        rotary_write_kernel,
        arguments,
        constants,
        aligned=strides,
        label=f"{dtype}-{heads}-{kv_heads}-{dim}-{2 * half}"
        + "-norm" * norm
        + "-fp8" * fp8
        + f"-{rows}-rows" * bool(rows),
        capabilities=build_types(cache),
    )


FORMS = (
    _build("bf16", 32, 8, 128, 64),
    _build("bf16", 16, 8, 128, 64, norm=True),
    _build("fp16", 9, 3, 64, 32),
    _build("fp32", 24, 8, 96, 36, norm=True),
    _build("bf16", 32, 8, 128, 64, fp8=True),
    _build("bf16", 32, 8, 128, 64, rows="i8"),
    _build("bf16", 16, 8, 128, 64, norm=True, rows="fp8e4nv"),
    _build("fp16", 32, 8, 128, 64, rows="u8"),
)
