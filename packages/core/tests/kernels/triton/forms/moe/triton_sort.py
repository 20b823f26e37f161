# SPDX-License-Identifier: MIT
"""Forms of the kernels of `moe/triton_sort` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.moe.triton_sort import _CHUNK, _WARPS, _constants, count_kernel, place_kernel
from packages.core.tests.kernels.triton.building import Build


def _build(experts: int, block: int, chunks: int) -> Build:
    constants = _constants(experts, block, chunks)
    types = dict.fromkeys(("experts", "counts", "order", "table"), "*i32")
    types |= dict.fromkeys(("pairs", "blocks", "X"), "i32")
    if constants["RECOUNT"]:
        del types["counts"]
        constants["counts"] = None
    return Build(place_kernel, types, constants, num_warps=_WARPS, label=f"{experts}-{block}-{chunks}")


FORMS = (
    Build(
        count_kernel,
        {"experts": "*i32", "counts": "*i32", "pairs": "i32", "X": "i32"},
        {"CHUNK": _CHUNK, "BINS": 128},
    ),
    _build(8, 128, 64),
    _build(128, 16, 2),
    _build(512, 128, 512),
)
