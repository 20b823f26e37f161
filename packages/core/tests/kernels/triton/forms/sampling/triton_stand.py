# SPDX-License-Identifier: MIT
"""Forms of the kernels of `sampling/triton_stand` that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

from candle_vllm.core.kernels.sampling.triton_stand import (
    _WARPS,
    edge_kernel,
    gather_top_kernel,
    measure_kernel,
    name_kernel,
)
from candle_vllm.core.kernels.triton_build import next_power_of_2
from packages.core.tests.kernels.triton.building import Build

_TYPES = {
    **dict.fromkeys(("logits", "group_maxima", "maxima", "largest_in", "largest_out", "values"), "*fp32"),
    **dict.fromkeys(("chosen", "top_logits"), "*fp32"),
    **dict.fromkeys(("edges", "befores", "counts", "names"), "*i32"),
    **dict.fromkeys(("token_ids", "tops", "masses", "ranks", "top_ids"), "*i64"),
    **dict.fromkeys(("row_stride", "V", "C", "MOST"), "i32"),
    "offsets": "*fp64",
}


def _build(kernel: Any, chunks: int) -> Build:
    arguments = {name: _TYPES[name] for name in kernel.arg_names if name in _TYPES}
    constants = {"CB": next_power_of_2(chunks)} if "CB" in kernel.arg_names else {}
    aligned = tuple(name for name in ("row_stride", "V") if name in arguments)
    return Build(kernel, arguments, constants, num_warps=_WARPS, aligned=aligned, label=str(chunks))


FORMS = tuple(_build(kernel, 38) for kernel in (edge_kernel, measure_kernel, gather_top_kernel, name_kernel))
