# SPDX-License-Identifier: MIT
"""Integers of compressed-tensors: codes of 4 or 8 bits packed in int32, or single int8 codes.

For a layer [N, K] with G groups of inputs (G = 1 for one scale per row or tensor):

    weight_packed      int32 [N, K * bits / 32, rounded up]   code of (n, k) at bit bits * (k % (32 / bits))
    weight             int8 [N, K]                            alternative: code - 128
    weight_scale       float [N, G]; if G = 1, also [N] or one element
    weight_zero_point  int32 [N * bits / 32, rounded up, G], packed along N; or int8 as the scale, less 2^(bits - 1)
    weight_shape       int [2]: N and K, only with packed codes
    weight_g_idx       int32 [K], the group of each input (actorder "group")

Source: the compressors of vllm-project/compressed-tensors.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from candle_vllm.core.quantization.gptq import column_groups
from candle_vllm.core.quantization.group_codes import GroupCodes, fields
from candle_vllm.core.quantization.stored import FLOATS, CodeSource, LayerTensors, QuantisedTensor, floats, numbers
from candle_vllm.core.quantization.tensors import StoredTensor


class CtIntSource(CodeSource):
    """Source of a layer's rows; see the module docstring.

    Args:
        stored: `weight_packed`, or `weight` of int8.
        shape: [N, K].
        bits: bits of a packed code; an int8 is read as 8.
        scales, zeros: stored tensors of scales and zeros.
        group_of: the group of each column; None for G groups of K / G adjacent columns.
    """

    def __init__(
        self,
        stored: StoredTensor,
        shape: tuple[int, int],
        bits: int,
        scales: StoredTensor,
        zeros: StoredTensor | None,
        group_of: np.ndarray | None,
    ) -> None:
        self._stored, self._shape, self._bits = stored, shape, bits
        self._scales, self._zeros, self._group_of = scales, zeros, group_of
        self.align = 32 // bits if zeros is not None and zeros.type_name == "I32" else 1

    def read(self, first: int, last: int) -> GroupCodes:
        rows, columns = self._shape
        last = min(last, rows)
        if self._stored.type_name == "I8":
            codes = numbers(self._stored, np.uint8)[first:last] ^ np.uint8(128)
        else:
            codes = fields(numbers(self._stored, np.int32)[first:last], self._bits)[:, :columns]
        scales = _by_row(floats(self._scales), rows)[first:last]
        zeros = self._zero_codes(first, last)
        return GroupCodes(codes, scales, zeros, self._bits, self._scales.type_name, self._group_of)

    def _zero_codes(self, first: int, last: int) -> np.ndarray | None:
        """Return zeros as int32 [rows, G]; None if all are the middle code."""
        part, rows, middle = self._zeros, self._shape[0], 1 << (self._bits - 1)
        if part is None:
            return None
        if part.type_name == "I32":
            words = numbers(part, np.int32)[first // self.align : -(-last // self.align)]
            found = fields(words.T, self._bits).T[: last - first].astype(np.int32)
        else:
            found = _by_row(numbers(part, np.int8), rows)[first:last].astype(np.int32) + middle
        return None if (found == middle).all() else found


def _by_row(found: np.ndarray, rows: int) -> np.ndarray:
    """Expand elements per row and group [N, G], or a single element, to [N, G]."""
    table = found.reshape(1 if found.size == 1 else rows, -1)
    return np.broadcast_to(table, (rows, table.shape[1]))


def packed_ints(parts: LayerTensors, bits: int, group: int) -> QuantisedTensor:
    """Return the weight of a layer whose codes are packed in int32.

    Args:
        parts: stored tensors of the layer.
        bits: bits of a code, 4 or 8.
        group: inputs in a group; -1 for whole rows or the whole tensor.

    Raises:
        InvalidFileError: parts are missing or do not fit together.
    """
    packed = parts.get(".weight_packed", "I32")
    stored_shape = parts.get(".weight_shape", "I64", "I32")
    if stored_shape.shape != (2,):
        raise parts.shape_error(stored_shape, [2], "the rows and columns of the layer")
    rows, columns = stored_shape.load(None).tolist()
    wanted = [rows, -(-columns * bits // 32)]
    if min(rows, columns) < 1 or list(packed.shape) != wanted:
        why = f"{bits} bits and {stored_shape.name} says {[rows, columns]}"
        raise parts.shape_error(packed, wanted, why)
    return _tensor(parts, packed, (rows, columns), bits, group)


def plain_ints(parts: LayerTensors, bits: int, group: int) -> QuantisedTensor:
    """Return the weight of a layer with int8 codes, however many of the bits are used."""
    weight = parts.get(".weight", "I8")
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise parts.shape_error(weight, "[outputs, inputs]", "int8 tensors of other shapes are not read")
    found = _tensor(parts, weight, (weight.shape[0], weight.shape[1]), 8, group)
    return dataclasses.replace(found, type_name=f"INT{bits}")


def _tensor(
    parts: LayerTensors, stored: StoredTensor, shape: tuple[int, int], bits: int, group: int
) -> QuantisedTensor:
    """Check scales, zeros and groups, and make the tensor."""
    rows, columns = shape
    groups = 1 if group < 0 else -(-columns // group)
    scales, zeros = parts.get(".weight_scale", *FLOATS), parts.find(".weight_zero_point", "I32", "I8")
    why = f"{rows} outputs, {columns} inputs" + (f" and groups of {group}" if group > 0 else "")
    one = groups == 1
    if scales.shape != (rows, groups) and not (one and (scales.numel == 1 or scales.shape == (rows,))):
        raise parts.shape_error(scales, [rows, groups], why)
    if zeros is not None:
        packed = zeros.type_name == "I32"
        wanted = (-(-rows * bits // 32), groups) if packed else (rows, groups)
        if zeros.shape != wanted and not (one and not packed and (zeros.numel == 1 or zeros.shape == (rows,))):
            raise parts.shape_error(zeros, list(wanted), why)
    g_idx = parts.find(".weight_g_idx", "I32")
    if g_idx is not None:
        group_of = column_groups(parts, g_idx, columns, groups)
    else:
        group_of = np.arange(columns) // group if group > 0 and columns % group else None
    source = CtIntSource(stored, shape, bits, scales, zeros, group_of)
    return parts.tensor(f"INT{bits}", shape, source)
