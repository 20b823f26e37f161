# SPDX-License-Identifier: MIT
"""Forms of the kernels of `rms_norm/triton` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.rms_norm.triton import _form, rms_norm_kernel
from packages.core.tests.kernels.triton.building import Build


def _build(dtype: str, heads: int, size: int, add: bool) -> Build:
    constants, num_warps = _form(heads, size, add)
    strides = ("x_token", "x_head", "residual_token", "residual_head")
    arguments = {"x": f"*{dtype}", "weight": "*fp32", "y": f"*{dtype}"}
    arguments |= dict.fromkeys((*strides, "rows"), "i32") | {"eps": "fp32"}
    sums = ("residual", "total")
    return Build(
        rms_norm_kernel,
        arguments | (dict.fromkeys(sums, f"*{dtype}") if add else {}),
        {**constants, **({} if add else dict.fromkeys(sums))},
        num_warps=num_warps,
        aligned=strides,
        label=f"{dtype}-{heads}x{size}{'-add' if add else ''}",
    )


FORMS = (
    _build("bf16", 1, 4096, True),
    _build("fp16", 1, 1024, False),
    _build("bf16", 32, 128, False),
    _build("bf16", 1, 8192, True),
    _build("bf16", 1, 16384, True),
    _build("fp32", 1, 576, True),
    _build("bf16", 1, 20480, True),
)
