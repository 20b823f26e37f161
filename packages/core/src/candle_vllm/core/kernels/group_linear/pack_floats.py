# SPDX-License-Identifier: MIT
"""Convert small floats with scales to the GPU's layout, once, when a model is loaded."""

from __future__ import annotations

import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.group_linear.layout import PART, WORDS, GroupMatrix
from candle_vllm.core.kernels.group_linear.pack import CHUNK, owned, plane_of
from candle_vllm.core.quantization.scaled_codes import GROUP, ScaledCodes

MOST_SCALE = 2.0**119
"""Largest finite scale that `pack_floats` accepts, because the kernels multiply most of them by 256."""


def pack_floats(found: ScaledCodes, device: torch.device | str) -> GroupMatrix:
    """Copy a matrix of small floats to a device.

    Weights stay exact, except that a group with a NaN code of e4m3 becomes all NaN, which gives the same products.

    Raises:
        UnsupportedModelError: no kernel multiplies such a matrix.
        ValueError: the shapes of the arrays do not fit each other.
    """
    group = _group(found)
    (rows, columns), bits = (len(found.codes), found.columns), 4 if found.numbers == "e2m1" else 8
    device, empty = torch.device(device), torch.empty(0, device=device)
    matrix = GroupMatrix(rows, columns, bits, group, torch.float32, empty, empty, numbers=found.numbers)
    codes = torch.empty((matrix.steps, rows, WORDS), dtype=torch.int32, device=device)
    count = found.scales.shape[1]
    scales = torch.zeros((max(matrix.groups, count), rows), device=device)
    inner = torch.zeros((matrix.steps, rows, 2), dtype=torch.int32, device=device) if bits == 4 else None
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        numbers, own = owned(found.codes[part]).to(device), owned(found.scales[part]).to(device, copy=True)
        shared = None if found.groups is None else owned(found.groups[part]).to(device)
        if inner is not None and shared is not None:
            numbers = torch.stack([numbers & 15, numbers >> 4], -1).flatten(1)
            inner[:, part] = _inner(shared, matrix).transpose(0, 1)
        strange = numbers if found.numbers == "e4m3" else shared
        if strange is not None:
            row, column = ((strange & 0x7F) == 0x7F).nonzero(as_tuple=True)
            own[row, column * (1 if shared is None else GROUP) // group] = torch.nan
        codes[:, part] = plane_of(numbers, matrix).transpose(0, 1)
        scales[:count, part] = own.transpose(0, 1)
    return GroupMatrix(rows, columns, bits, group, torch.float32, codes, scales, numbers=found.numbers, inner=inner)


def check_span(span: int, columns: int) -> None:
    """Raise `UnsupportedModelError` if no kernel supports a scale for `span` of a matrix's columns."""
    if span < columns and span % PART:
        raise UnsupportedModelError(
            f"a scale for {span} columns has no kernel on a GPU: a scale must have a multiple of {PART} columns, or all"
        )


def _inner(shared: torch.Tensor, matrix: GroupMatrix) -> torch.Tensor:
    """Pack inner scales, uint8 [R, K / 16], to int32 [R, steps, 2]."""
    whole = matrix.steps * matrix.step // GROUP
    shared = torch.nn.functional.pad(shared, (0, whole - shared.shape[1]))
    return shared.contiguous().view(torch.int32).view(len(shared), matrix.steps, 2)


def _group(found: ScaledCodes) -> int:
    """Check the arrays; return the number of weights of a row that share a scale, at most K."""
    rows, columns = len(found.codes), found.columns
    grouped = found.numbers == "e2m1"
    wanted = {"scales": (rows, -(-columns // max(1, found.span)))} | (
        {"groups": (rows, columns // GROUP)} if grouped else {}
    )
    shapes = {"scales": found.scales.shape} | ({} if found.groups is None else {"groups": found.groups.shape})
    if shapes != wanted or not found.codes.size or found.span < 1 or (grouped and columns % GROUP):
        raise ValueError(f"parts of shapes {shapes} do not fit {rows} x {columns} floats with spans of {found.span}")
    check_span(found.span, columns)
    scales = abs(found.scales)
    if ((scales > MOST_SCALE) & (scales < float("inf"))).any():
        raise UnsupportedModelError("a scale beyond 2^119 has no kernel on a GPU")
    return min(found.span, columns)
