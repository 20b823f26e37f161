# SPDX-License-Identifier: MIT
"""Convert codes, scales and zeros to the GPU's layout, once, when a model is loaded."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from candle_vllm.core.kernels.group_linear.layout import PART, WORDS, GroupMatrix
from candle_vllm.core.kernels.torch_numbers import DTYPES
from candle_vllm.core.quantization.group_codes import GroupCodes

CHUNK = 1 << 24
"""Number of weights that are converted at a time, but at least a row: it limits the scratch memory."""


def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    device: torch.device | str,
) -> GroupMatrix:
    """Copy a quantised matrix to a device; codes, scales and zeros stay exact.

    Args:
        codes: uint8 [N, K], one in each element.
        scales: float16 or bfloat16 [N, groups]; K / groups is a multiple of 32, or groups is 1.
        zeros: the code of weight 0, integers [N, groups] from 0 to 65,535, or None for the middle of the codes.
        bits: 4 or 8.
        device: device of the result.

    Raises:
        ValueError: no kernel multiplies such a matrix, or the tensors do not fit each other.
    """
    _check(codes, scales, zeros, bits)
    (rows, columns), groups, device = codes.shape, scales.shape[1], torch.device(device)
    kind = torch.int16 if zeros is None else torch.int32
    empty = torch.empty(0, device=device)
    matrix = GroupMatrix(rows, columns, bits, columns // groups, scales.dtype, empty, empty)
    plane = torch.empty((matrix.steps, rows, WORDS), dtype=torch.int32, device=device)
    words = torch.zeros((max(matrix.groups, groups), rows), dtype=kind, device=device)
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        plane[:, part] = plane_of(codes[part].to(device), matrix).transpose(0, 1)
        found = scales[part].to(device).contiguous().view(torch.int16)
        if zeros is not None:
            found = (found.to(torch.int32) & 0xFFFF) | zeros[part].to(device).to(torch.int32) << 16
        words[:groups, part] = found.transpose(0, 1)
    return GroupMatrix(rows, columns, bits, matrix.group, scales.dtype, plane, words)


def from_codes(found: GroupCodes, device: torch.device | str) -> GroupMatrix | None:
    """Copy a file's codes to a device; return None if no kernel multiplies them without conversion."""
    codes, groups, order = found.codes, found.scales.shape[1], None
    group = found.columns // groups
    if found.bits not in (4, 8) or found.scale_dtype not in ("F16", "BF16") or (groups > 1 and group % PART):
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


def plane_of(codes: torch.Tensor, matrix: GroupMatrix) -> torch.Tensor:
    """Pack codes uint8 [R, K] to int32 [R, steps, 16]."""
    missing = matrix.steps * matrix.step - matrix.columns
    codes = torch.nn.functional.pad(codes, (0, missing)).view(len(codes), matrix.steps, matrix.parts, WORDS, 2)
    plane = torch.zeros((len(codes), matrix.steps, WORDS), dtype=torch.int32, device=codes.device)
    for half in range(2):
        for part in range(matrix.parts):
            plane |= codes[:, :, part, :, half].to(torch.int32) << matrix.bits * (part + matrix.parts * half)
    return plane
