# SPDX-License-Identifier: MIT
"""Forms of the kernels of `moe/triton_route` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.moe.triton_route import _constants, _warps, route_kernel
from packages.core.tests.kernels.triton.building import Build


def _build(
    dtype: str, experts: int, top_k: int, groups: tuple[int, int], scoring: int, *, factors: bool = False
) -> Build:
    constants = _constants(experts, top_k, groups, scoring, scoring > 0, True)
    types = {"logits": f"*{dtype}", "weights": "*fp32", "experts": "*i32", "stride": "i32", "scale": "fp32"}
    return Build(
        route_kernel,
        types | ({"bias": "*fp32"} if scoring else {}) | ({"expert_scale": "*fp32"} if factors else {}),
        constants | ({} if scoring else {"bias": None}) | ({} if factors else {"expert_scale": None}),
        num_warps=_warps(constants),
        aligned=("stride",),
        label=f"{dtype}-{experts}x{top_k}-{groups[1]}of{groups[0]}" + "-factors" * factors,
    )


FORMS = (
    _build("bf16", 128, 8, (1, 1), 0),
    _build("fp32", 128, 8, (1, 1), 0, factors=True),  # Gemma 4
    _build("fp32", 256, 8, (8, 4), 1),
    _build("bf16", 512, 10, (1, 1), 0),
    _build("bf16", 160, 6, (8, 3), 0),
    _build("fp32", 384, 8, (1, 1), 1),
    _build("fp32", 256, 6, (1, 1), 3),  # DeepSeek V4
)
