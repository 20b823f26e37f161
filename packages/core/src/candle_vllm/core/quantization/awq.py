# SPDX-License-Identifier: MIT
"""AWQ in its "gemm" layout: codes of 4 bits packed along the outputs, shuffled.

For a layer [N, K] with G groups of inputs:

    qweight  int32 [K, N / 8]   8 outputs in an int32: the code at bit 4 * i belongs to output 8 j + ORDER[i]
    qzeros   int32 [G, N / 8]   the zeros, packed in the same way
    scales   float [G, N]

With `zero_point` false (AutoRound's symmetric checkpoints), all zeros are 8, and are stored too.
Source: Lin et al., 2023, arXiv:2306.00978; AutoAWQ's `WQLinear_GEMM`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.quantization.finding import Found, StoredTensors, group_size, layers_with
from candle_vllm.core.quantization.group_codes import GroupCodes, nibbles, zeros_or_middle
from candle_vllm.core.quantization.stored import FLOATS, LayerTensors, QuantisedTensor, WeightSource, floats, numbers
from candle_vllm.core.quantization.tensors import StoredTensor

METHODS = ("awq", "awq_marlin")
FILES = ("quant_config.json",)
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""For each of the 8 codes of an int32, from the lowest bits on, the output that it belongs to."""

PER = 8


@dataclass(eq=False)
class AwqSource(WeightSource[GroupCodes]):
    """Source of a layer's rows; see the module docstring."""

    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    align = PER

    def read(self, first: int, last: int) -> GroupCodes:
        zeros = zeros_or_middle(_unpacked(self.qzeros, first, last), BITS)
        scales = floats(self.scales, np.s_[:, first:last]).T
        return GroupCodes(_unpacked(self.qweight, first, last), scales, zeros, BITS, self.scales.type_name)


def _unpacked(part: StoredTensor, first: int, last: int) -> np.ndarray:
    """Return the codes of some outputs, uint8 [outputs, rows of the part]."""
    words = np.ascontiguousarray(numbers(part, np.int32)[:, first // PER : last // PER].T)
    found = nibbles(words.view(np.uint8).reshape(*words.shape, 4))  # [outputs / 8, rows, 8]
    codes = np.empty((words.shape[0], PER, words.shape[1]), np.uint8)
    for place, output in enumerate(ORDER):
        codes[:, output] = found[:, :, place]
    return codes.reshape(-1, words.shape[1])


def _tensor(parts: LayerTensors, group: int) -> QuantisedTensor:
    qweight, qzeros = parts.get(".qweight", "I32"), parts.get(".qzeros", "I32")
    scales = parts.get(".scales", *FLOATS)
    columns, words = parts.matrix_shape(qweight, "[inputs, outputs / 8]", "each int32 has 8 codes of one input")
    rows, groups = words * PER, 1 if group < 0 else columns // group
    why = f"{rows} outputs, {columns} inputs and group_size {group}"
    if group > 0 and columns % group:
        raise parts.shape_error(qweight, f"[a multiple of {group}, outputs / 8]", "groups of inputs are whole")
    parts.check_shape(scales, (groups, rows), why)
    parts.check_shape(qzeros, (groups, words), why)
    return parts.tensor("AWQ-4", (rows, columns), AwqSource(qweight, qzeros, scales))


def layers(config: Fields, stored: StoredTensors) -> Found:
    """Read the AWQ layers of a checkpoint."""
    bits = config.get("bits", int, config.get("w_bit", int, 4))
    if bits != 4:
        raise UnsupportedModelError(f"{config.path}: AWQ with bits {bits} is not implemented; implemented: 4")
    config.choice("version", "gemm", "gemm", "GEMM")
    group = group_size(config, 128, "q_group_size" if "q_group_size" in config else "group_size")
    for parts in layers_with(stored, ".qweight"):
        yield parts, _tensor(parts, group)
