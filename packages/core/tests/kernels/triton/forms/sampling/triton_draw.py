# SPDX-License-Identifier: MIT
"""Forms of the kernels of `sampling/triton_draw` that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

from candle_vllm.core.kernels.sampling.triton_draw import (
    _WARPS,
    finish_kernel,
    gather_kernel,
    plan_kernel,
    weigh_kernel,
)
from candle_vllm.core.kernels.sampling.triton_rows import survey_kernel
from candle_vllm.core.kernels.triton_build import next_power_of_2
from packages.core.tests.kernels.triton.building import Build

_TYPES = {
    **dict.fromkeys(("logits", "group_maxima", "maxima", "largest_in", "largest_out", "values"), "*fp32"),
    **dict.fromkeys(("firsts", "plans", "counts", "names"), "*i32"),
    **dict.fromkeys(("ids", "masses"), "*i64"),
    **dict.fromkeys(("row_stride", "V", "C"), "i32"),
    "controls": "*fp64",
}


def _build(kernel: Any, chunks: int, **constants: Any) -> Build:
    """Return a build of a kernel; arguments without a type are constants."""
    names = [name for name in kernel.arg_names if name not in constants]
    label = "-".join([str(chunks), *(name for name, value in constants.items() if value is True)])
    arguments = {name: _TYPES[name] for name in names if name in _TYPES}
    if "CB" in kernel.arg_names:
        constants["CB"] = next_power_of_2(chunks)
    aligned = tuple(name for name in ("row_stride", "V") if name in names)
    return Build(kernel, arguments, constants, num_warps=_WARPS, aligned=aligned, label=label)


_NO_LISTS = {"values": None, "names": None, "counts": None}

FORMS = (
    _build(survey_kernel, 32),
    _build(plan_kernel, 32, RANDOM=False, SEARCH=False),
    _build(plan_kernel, 32, RANDOM=True, SEARCH=False),
    _build(plan_kernel, 64, RANDOM=True, SEARCH=True),
    _build(weigh_kernel, 32, SEARCH=False, counts=None),
    _build(weigh_kernel, 32, SEARCH=True),
    _build(gather_kernel, 64),
    _build(finish_kernel, 38, SEARCH=False, **_NO_LISTS),
    _build(finish_kernel, 64, SEARCH=True),
)
