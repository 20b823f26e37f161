# SPDX-License-Identifier: MIT
"""Forms of the kernels of `lora/triton` that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

from candle_vllm.core.kernels.lora.layout import GPU_RANKS
from candle_vllm.core.kernels.lora.triton import (
    _OUT_ROWS,
    _PRECISE,
    _STAGES,
    _STEP,
    _WARPS,
    _stretches,
    expand_kernel,
    shrink_kernel,
)
from packages.core.tests.kernels.triton.building import WITH_TENSOR_CORES, Build


def _builds(
    dtype: str, parts: int, columns: int, tokens: int, rank: int, bias: str | None, capabilities: tuple[int, ...]
) -> list[Build]:
    stretches, _ = _stretches(columns)
    shape = {"PARTS": parts, "RANK": rank, "TOKENS": tokens, **_PRECISE}
    types = {"addresses": "*i64", "ranks": "*i32", "table": "*i32", "rows": "*i32", "hidden": "*fp32"}
    types |= {"count": "i32", "blocks": "i32"}
    label = f"{dtype}-{parts}-{columns}x{tokens}"
    where = {"num_warps": _WARPS, "num_stages": _STAGES, "label": label, "capabilities": capabilities}
    shrink = {"x": f"*{dtype}", "K": "i32", "x_stride": "i32", "steps": "i32", **types}
    expand = {"y": f"*{dtype}", "like": f"*{dtype}", "scales": "*fp32", "columns": "*i32", "weights": "*fp32", **types}
    expand["y_stride"] = "i32"
    more: dict[str, Any] = {"ROWS": _OUT_ROWS, "DEPTH": GPU_RANKS, "STRETCHES": stretches, **shape}
    if bias is None:
        more["bias"] = None
    else:
        expand["bias"] = f"*{bias}"
    return [
        Build(shrink_kernel, shrink, {"ROWS": GPU_RANKS, "STEP": _STEP, **shape}, aligned=("K", "x_stride"), **where),
        Build(expand_kernel, expand, more, aligned=("y_stride",), **where),
    ]


FORMS = (
    *_builds("bf16", 3, 4096, 16, 16, None, WITH_TENSOR_CORES),
    *_builds("bf16", 3, 3584, 64, 64, "bf16", WITH_TENSOR_CORES),
    *_builds("bf16", 1, 14336, 16, 256, None, WITH_TENSOR_CORES),
    *_builds("fp16", 2, 4096, 64, 16, None, WITH_TENSOR_CORES),
    *_builds("fp16", 1, 4096, 16, 16, "fp16", (75,)),
    *_builds("fp16", 2, 4096, 32, 16, None, (75,)),
    *_builds("fp32", 2, 576, 16, 16, "fp32", (90,)),
)
