# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
"""Adding up the stretches of a sum that was cut along K, in their order (step 6 of a request's life).

The second launch of linear layers with few rows. It adds as a program does that takes all stretches itself: 0, and
then one stretch after the other, in fp32, so that a result has the same bits either way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.triton_build import OPTIONS, Build, cdiv

_COLUMNS = 256  # outputs of a program; not measured yet


@triton.jit(do_not_specialize=["T"])
def merge_kernel(
    partial,  # [SPLITS, T, N] fp32
    bias,  # [N]
    out,  # [T, N], rows contiguous
    T,
    N,
    out_stride,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1).to(tl.int64)
    inside = column < N
    total = tl.zeros((COLUMNS,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + (token + tl.cast(split, tl.int64) * T) * N + column, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=inside)


def merge(partial: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out [T, N] = the sum of partial [S, T, N] over S, plus bias, rounded once. T is at most 65,535."""
    splits, tokens, width = partial.shape
    merge_kernel[(cdiv(width, _COLUMNS), tokens)](
        partial,
        bias,
        out,
        tokens,
        width,
        out.stride(0),
        SPLITS=splits,
        BIAS=bias is not None,
        COLUMNS=_COLUMNS,
        num_warps=4,
        **OPTIONS,
    )


def _build(dtype: str, splits: int, bias: bool) -> Build:
    arguments = {"partial": "*fp32", "out": f"*{dtype}", "T": "i32", "N": "i32", "out_stride": "i32"}
    return Build(
        merge_kernel,
        arguments | ({"bias": f"*{dtype}"} if bias else {}),
        {"SPLITS": splits, "BIAS": bias, "COLUMNS": _COLUMNS} | ({} if bias else {"bias": None}),
        aligned=("N", "out_stride"),
        label=f"{dtype}-{splits}",
    )


AOT = (_build("bf16", 5, False), _build("fp16", 32, True), _build("fp32", 2, True))
