# SPDX-License-Identifier: MIT
"""Edits of logits on a GPU (step 7 of a request's life): bias, then masks and penalties in one pass.

A mask commutes with a bias, so this order gives the same result as the order of vLLM's processors. The edits of each
row are read from tables that stay on the device: a captured step serves any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.sampling.contract import DeviceEdits
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv

_PART = tl.constexpr(1024)  # biases or logits that a program loads at a time; not measured yet
_ROWS = tl.constexpr(256)  # rows of a program that counts tokens


@triton.jit(do_not_specialize=["N"])
def bias_kernel(
    logits,  # [R, V] fp32, rows contiguous
    bias_ids,  # [R, N] int32, -1 where unused
    bias,  # [R, N] fp32
    row_stride,
    N,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * _PART + tl.arange(0, _PART)
    token = tl.load(bias_ids + row * N + at, mask=at < N, other=-1)
    place = logits + row * row_stride + token
    x = tl.load(place, mask=token >= 0, other=0.0)
    tl.store(place, x + tl.load(bias + row * N + at, mask=token >= 0, other=0.0), mask=token >= 0)


@triton.jit
def _penalised(x, count, penalties):
    """Return logits after the three penalties, in float64; `count` as in `DeviceEdits`."""
    repetition, frequency, presence = tl.load(penalties), tl.load(penalties + 1), tl.load(penalties + 2)
    occurrences, wide = tl.maximum(count - 1, 0).to(tl.float64), x.to(tl.float64)
    result = tl.where(wide > 0, wide / repetition, wide * repetition) - frequency * occurrences
    result -= tl.where(occurrences > 0, presence, 0.0)
    # A finite logit must not become +inf.
    result = tl.where(result > 3.4028234663852886e38, 3.4028234663852886e38, result)
    return tl.where((count > 0) & (x < float("inf")), result.to(tl.float32), x)


@triton.jit
def mask_and_penalise_kernel(
    logits,  # [R, V] fp32, rows contiguous
    mask_rows,  # [R] int32
    masks,  # [M, W] int32
    count_rows,  # [R] int32
    counts,  # [S, V] int32
    penalties,  # [R, 3] fp64
    row_stride,
    V,
    W,
    MASKS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mask_row, count_row = tl.full([], -1, tl.int64), tl.full([], -1, tl.int64)
    if MASKS:
        mask_row = tl.load(mask_rows + row).to(tl.int64)
    if COUNTS:
        count_row = tl.load(count_rows + row).to(tl.int64)
    if (mask_row >= 0) | (count_row >= 0):
        at = tl.program_id(1) * _PART + tl.arange(0, _PART)
        place = logits + row * row_stride + at
        x = tl.load(place, mask=at < V, other=0.0)
        if MASKS:
            word = tl.load(masks + mask_row * W + at // 32, mask=at < tl.where(mask_row >= 0, V, 0), other=-1)
            # A masked NaN or +inf shows that the model is broken, so it becomes NaN.
            hidden = tl.where(x < float("inf"), float("-inf"), float("nan"))
            x = tl.where(((word >> (at % 32)) & 1) != 0, x, hidden)
        if COUNTS:
            count = tl.load(counts + count_row * V + at, mask=at < tl.where(count_row >= 0, V, 0), other=0)
            x = _penalised(x, count, penalties + row * 3)
        tl.store(place, x, mask=at < V)


@triton.jit(do_not_specialize=["R"])
def note_kernel(
    counts,  # [S, V] int32
    count_rows,  # [R] int32
    token_ids,  # [R] int64
    R,
    V,
):
    row = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    slot = tl.load(count_rows + row, mask=row < R, other=-1).to(tl.int64)
    token = tl.load(token_ids + row, mask=row < R, other=-1)
    there = (slot >= 0) & (token >= 0) & (token < V)
    place = counts + slot * V + token
    tl.store(place, tl.maximum(tl.load(place, mask=there, other=0), 1) + 1, mask=there)


def edit(logits: torch.Tensor, edits: DeviceEdits) -> None:
    """See `edit_tensors` in the package."""
    number, vocabulary = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1 or vocabulary == 1, "each row is contiguous"
    _check(logits, edits)
    if not number:
        return
    if edits.bias_ids is not None and edits.bias_ids.shape[1]:
        entries = edits.bias_ids.shape[1]
        grid = (number, cdiv(entries, _PART.value))
        bias_kernel[grid](logits, edits.bias_ids, edits.bias, logits.stride(0), entries, num_warps=4, **OPTIONS)
    if edits.masks is None and edits.counts is None:
        return
    tables = (edits.mask_rows, edits.masks, edits.count_rows, edits.counts, edits.penalties)
    words = 0 if edits.masks is None else edits.masks.shape[1]
    constants = {"MASKS": edits.masks is not None, "COUNTS": edits.counts is not None}
    grid = (number, cdiv(vocabulary, _PART.value))
    sizes = (logits.stride(0), vocabulary, words)
    mask_and_penalise_kernel[grid](logits, *tables, *sizes, **constants, num_warps=4, **OPTIONS)


def note(counts: torch.Tensor, count_rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """See `note_tokens` in the package."""
    assert counts.dtype == count_rows.dtype == torch.int32
    assert token_ids.dtype == torch.int64
    assert count_rows.shape == token_ids.shape
    assert len({x.device for x in (counts, count_rows, token_ids)}) == 1
    assert all(x.is_contiguous() for x in (counts, count_rows, token_ids))
    number = len(token_ids)
    if number:
        grid = (cdiv(number, _ROWS.value),)
        note_kernel[grid](counts, count_rows, token_ids, number, counts.shape[1], num_warps=4, **OPTIONS)


def _check(logits: torch.Tensor, edits: DeviceEdits) -> None:
    number, vocabulary = logits.shape
    wanted = {
        "bias_ids": (torch.int32, (number, None)),
        "bias": (torch.float32, (number, None)),
        "mask_rows": (torch.int32, (number,)),
        "masks": (torch.int32, (None, cdiv(vocabulary, 32))),
        "count_rows": (torch.int32, (number,)),
        "counts": (torch.int32, (None, vocabulary)),
        "penalties": (torch.float64, (number, 3)),
    }
    for name, (kind, shape) in wanted.items():
        given = getattr(edits, name)
        if given is not None:
            assert given.dtype == kind, name
            assert given.is_contiguous(), name
            assert given.device == logits.device, name
            assert len(given.shape) == len(shape), name
            assert all(size in (None, has) for size, has in zip(shape, given.shape)), name
    for group in (("bias_ids", "bias"), ("mask_rows", "masks"), ("count_rows", "counts", "penalties")):
        assert len({getattr(edits, name) is None for name in group}) == 1, f"{group} must be given together"
    assert edits.bias is None or edits.bias_ids is None or edits.bias.shape == edits.bias_ids.shape
