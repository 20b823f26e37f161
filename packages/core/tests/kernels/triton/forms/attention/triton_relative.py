# SPDX-License-Identifier: MIT
"""Forms of the kernels of `attention/triton_relative` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.attention.triton_relative import _constants, mix_kernel
from packages.core.tests.kernels.triton.building import Build
from packages.core.tests.kernels.triton.forms.kv_write.triton import build_types


def _build(dtype: str, heads: int, count: int, extent: int) -> Build:
    pointers = {"states": f"*{dtype}", "profiles": "*fp32", "out": "*fp32"}
    return Build(
        mix_kernel,
        pointers | {"token_stride": "i32", "rows": "i32"},
        _constants(heads, count, extent),
        unaligned=("states",),
        label=f"{dtype}-{heads}x{count}x{extent}",
        capabilities=build_types(dtype),
    )


FORMS = (_build("bf16", 64, 16, 1024), _build("fp32", 64, 16, 512), _build("fp16", 4, 8, 40))
