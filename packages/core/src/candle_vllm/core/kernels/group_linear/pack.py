# SPDX-License-Identifier: MIT
"""Convert codes in groups, and small floats with scales, to the GPU's layout, once, when a model is loaded."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.gguf_linear.pack import CHUNK, arranged, plane
from candle_vllm.core.kernels.group_linear.layout import PART, WORDS, GroupMatrix
from candle_vllm.core.kernels.torch_numbers import DTYPES
from candle_vllm.core.quantization.group_codes import GroupCodes
from candle_vllm.core.quantization.scaled_codes import GROUP, ScaledCodes

MOST_SCALE = 2.0**119
"""Largest finite scale that `pack_floats` accepts, because the kernels multiply most of them by 256."""


def pack(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, device: torch.device | str
) -> GroupMatrix:
    """Copy a quantised matrix to a device; codes, scales and zeros stay exact.

    Args:
        codes: uint8 [N, K], one in each element.
        scales: float16 or bfloat16 [N, groups]; K / groups is a multiple of 32, or groups is 1.
        zeros: the code of weight 0, integers [N, groups] from 0 to 65,535, or None for the middle of the codes.
        bits: 4 or 8.

    Raises:
        ValueError: no kernel multiplies such a matrix, or the tensors do not fit each other.
    """
    _check(codes, scales, zeros, bits)
    (rows, columns), groups, device = codes.shape, scales.shape[1], torch.device(device)
    kind = torch.int16 if zeros is None else torch.int32
    empty = torch.empty(0, device=device)
    matrix = GroupMatrix(rows, columns, bits, columns // groups, scales.dtype, empty, empty)
    packed = torch.empty((matrix.steps, rows, WORDS), dtype=torch.int32, device=device)
    words = torch.zeros((max(matrix.groups, groups), rows), dtype=kind, device=device)
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        packed[:, part] = plane(arranged(codes[part].to(device), matrix.parts), bits).transpose(0, 1)
        found = scales[part].to(device).contiguous().view(torch.int16)
        if zeros is not None:
            found = (found.to(torch.int32) & 0xFFFF) | zeros[part].to(device).to(torch.int32) << 16
        words[:groups, part] = found.transpose(0, 1)
    return GroupMatrix(rows, columns, bits, matrix.group, scales.dtype, packed, words)


def from_codes(found: GroupCodes, device: torch.device | str) -> GroupMatrix | None:
    """Copy a file's codes to a device; return None if no kernel multiplies them without conversion."""
    codes, groups, order = found.codes, found.scales.shape[1], None
    ragged = groups > 1 and found.columns % (groups * PART)
    if found.bits not in (4, 8) or found.scale_dtype not in ("F16", "BF16") or ragged:
        return None
    if found.zeros is not None and (found.zeros & 0xFFFF != found.zeros).any():
        return None
    if found.group_of is not None:
        if (np.bincount(found.group_of, minlength=groups) * groups != found.columns).any():
            return None
        order = np.argsort(found.group_of, kind="stable")
        codes = codes[:, order]
    scales = owned(found.scales).to(DTYPES[found.scale_dtype])
    zeros = None if found.zeros is None else owned(found.zeros)
    matrix = pack(owned(codes), scales, zeros, found.bits, device)
    return matrix if order is None else dataclasses.replace(matrix, order=torch.from_numpy(order).to(device))


def owned(array: np.ndarray) -> torch.Tensor:
    """Return a tensor of the array, which is copied if it is read-only (a view of a file) or not contiguous."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _check(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits; there are kernels for 4 and 8")
    if codes.dtype != torch.uint8 or codes.dim() != 2 or 0 in codes.shape:
        raise ValueError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}; they must be uint8 [rows, columns]")
    if scales.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"scales are {scales.dtype}; they must be float16 or bfloat16")
    rows, columns = codes.shape
    if scales.dim() != 2 or len(scales) != rows or scales.shape[1] < 1 or columns % scales.shape[1]:
        raise ValueError(f"scales of shape {tuple(scales.shape)} do not fit a matrix of {rows} x {columns}")
    group = columns // scales.shape[1]
    if group != columns and group % PART:
        raise ValueError(f"groups of {group} weights have no kernel: a multiple of {PART} or a whole row is needed")
    if bits < 8 and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code is {int(codes.max())}; {bits} bits hold less")
    if zeros is not None:
        if zeros.shape != scales.shape or zeros.is_floating_point():
            raise ValueError(
                f"zeros are {zeros.dtype} of shape {tuple(zeros.shape)}; they must be integers in the scales' shape"
            )
        if int(zeros.min()) < 0 or int(zeros.max()) > 0xFFFF:
            raise ValueError(f"zeros are {int(zeros.min())} to {int(zeros.max())}; they must be 0 to 65535")


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
        codes[:, part] = plane(arranged(numbers, matrix.parts), bits).transpose(0, 1)
        scales[:count, part] = own.transpose(0, 1)
    return GroupMatrix(rows, columns, bits, group, torch.float32, codes, scales, numbers=found.numbers, inner=inner)


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
