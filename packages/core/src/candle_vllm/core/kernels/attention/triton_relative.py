# SPDX-License-Identifier: MIT
"""Mix profiles to relative logits on a GPU, for the attention kernels (step 6 of a request's life).

A program computes some distances of some heads by one product, so a result does not depend on the rest of the step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2

ROWS, COLUMNS = 32, 128


@triton.jit(do_not_specialize=["rows"])
def mix_kernel(
    states,  # [T, H, P], the heads of a token contiguous
    profiles,  # [P, X] fp32
    out,  # [T, H, X] fp32
    token_stride,  # elements of `states` from a token to the next
    rows,  # T * H
    H: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,  # P rounded up to a power of two, at least 16, as products need
    X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns, each = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PP)
    at = states + (row // H * token_stride + row % H * P)[:, None] + each[None, :]
    given = tl.load(at, mask=(row < rows)[:, None] & (each < P)[None, :], other=0.0).to(tl.float32)
    there = (columns < X)[None, :]
    mixed = tl.load(profiles + each[:, None] * X + columns[None, :], mask=(each < P)[:, None] & there, other=0.0)
    made = tl.dot(given, mixed, input_precision="ieee")
    tl.store(out + row[:, None] * X + columns[None, :], made, mask=(row < rows)[:, None] & there)


def relative_logits(states: torch.Tensor, profiles: torch.Tensor) -> torch.Tensor:
    """Return the products [T, H, X] fp32 of states [T, H, P] and profiles [P, X] fp32."""
    tokens, heads, count = states.shape
    extent = profiles.shape[1]
    assert states.stride()[1:] == (count, 1), "the heads of a token must be contiguous"
    assert profiles.shape == (count, extent)
    assert profiles.dtype == torch.float32
    assert profiles.is_contiguous()
    out = torch.empty(tokens, heads, extent, dtype=torch.float32, device=states.device)
    grid = cdiv(tokens * heads, ROWS), cdiv(extent, COLUMNS)
    sizes = _constants(heads, count, extent)
    mix_kernel[grid](states, profiles, out, states.stride(0), tokens * heads, **sizes, num_warps=4, **OPTIONS)
    return out


def _constants(heads: int, count: int, extent: int) -> dict[str, Any]:
    sizes = {"H": heads, "P": count, "PP": max(16, next_power_of_2(count)), "X": extent}
    return {**sizes, "ROWS": ROWS, "COLUMNS": COLUMNS}
