# SPDX-License-Identifier: MIT
"""Forms of the kernels of `sampling/triton_chain` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.sampling.triton_chain import _WARPS, chain_kernel
from packages.core.tests.kernels.triton.building import Build

FORMS = (
    Build(
        chain_kernel,
        {"logits": "*fp32", "rows": "*i64", "links": "*fp64", "rooms": "*fp32", "row_stride": "i32", "V": "i32"},
        {},
        num_warps=_WARPS,
        aligned=("row_stride", "V"),
    ),
)
