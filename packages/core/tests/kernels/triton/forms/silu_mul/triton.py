# SPDX-License-Identifier: MIT
"""Forms of the kernels of `silu_mul/triton` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.silu_mul.triton import _constants, gate_mul_kernel
from packages.core.tests.kernels.triton.building import Build


def _build(dtype: str, size: int, kind: str, span: int = 1) -> Build:
    strides = ("gate_stride", "up_stride")
    arguments: dict[str, str] = dict.fromkeys(("gate", "up", "y"), f"*{dtype}")
    arguments |= dict.fromkeys(strides, "i32")
    return Build(
        gate_mul_kernel, arguments, _constants(size, kind, span), aligned=strides, label=f"{dtype}-{size}-{kind}"
    )


FORMS = (
    _build("bf16", 14336, "silu"),
    _build("fp16", 1536, "gelu_tanh"),
    _build("fp32", 123, "silu"),
    _build("bf16", 4096, "sigmoid"),
    _build("bf16", 6144, "softplus", 128),
    _build("bf16", 1280, "silu_16"),
    _build("bf16", 3072, "swiglu_oai"),
)
