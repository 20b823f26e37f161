# SPDX-License-Identifier: MIT
"""Forms of the kernels of `delta_rule/triton` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.delta_rule.triton import _PART, _ROWS, keep_kernel
from candle_vllm.core.kernels.delta_rule.triton_scan import CACHE_STRIDES, STRIDES, Form
from candle_vllm.core.kernels.states import TABLES
from packages.core.tests.kernels.triton.building import Build
from packages.core.tests.kernels.triton.forms.delta_rule.triton_scan import build_arguments


def _build(dtype: str, key_heads: int, heads: int, dim: int) -> Build:
    names = ("k", "v", "a", "b", "kept", "query_start", "slots", *STRIDES[2:], *CACHE_STRIDES[1:])
    arguments = build_arguments(dtype)
    return Build(
        keep_kernel,
        {name: arguments[name] for name in names} | {"keeps": "*i32", "sequences": "i32"},
        {"FORM": Form(key_heads, heads, dim, dim, NORMED=True, CORRECTS=True, EACH=1), "ROWS": _ROWS, "PART": _PART},
        aligned=(*STRIDES[2:], *CACHE_STRIDES[1:]),
        unaligned=TABLES,
        label=f"{dtype}-{key_heads}x{heads}x{dim}",
    )


FORMS = (_build("bf16", 16, 32, 128),)
