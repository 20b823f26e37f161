# SPDX-License-Identifier: MIT
"""Convert GPTQ checkpoints in the layout of the first Marlin kernel to plain codes.

Codes are symmetric, with 4 bits. A layer [N, K] has G = K / `group_size` groups, or one:

    B  int32 [K / 16, 2 N]   tiles of 16 inputs x 64 outputs: 1,024 codes in the order of `_code_order`
    s  float [G, N]          runs of 64 (with one group: 32) scales in the order of `_scale_order`

Source: Frantar et al., 2024, arXiv:2408.11743, and the layout in IST-DASLab's marlin, as AutoGPTQ stores it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.quantization.finding import Found, StoredTensors, group_size, layers_with
from candle_vllm.core.quantization.group_codes import GroupCodes, nibbles
from candle_vllm.core.quantization.stored import FLOATS, LayerTensors, QuantisedTensor, WeightSource, floats, numbers
from candle_vllm.core.quantization.tensors import StoredTensor

METHODS = ("marlin",)
TILE = 16
"""Inputs in a tile."""

WIDTH = 64
"""Outputs in a tile."""


def _code_order() -> np.ndarray:
    """Return where each stored code of a tile belongs: output block * 256 + input * 16 + output within the block.

    A warp's 32 lanes hold, for each of 4 blocks of 16 outputs, the operands of the tensor core's instruction: for each
    half of 8 outputs, inputs 2t, 2t + 1, 2t + 8 and 2t + 9 of output lane / 4, where t = lane % 4. The eight codes of
    an int32 are interleaved, even ones first.
    """
    lane, block, half, pair, odd = np.meshgrid(*(np.arange(size) for size in (32, 4, 2, 2, 2)), indexing="ij")
    source = 16 * (2 * (lane % 4) + 8 * pair + odd) + lane // 4 + 8 * half + 256 * block
    return source.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)


def _scale_order(groups: int) -> np.ndarray:
    """Return, for each stored scale of a run, the output that it belongs to."""
    if groups > 1:
        return np.arange(64).reshape(8, 8).T.reshape(-1)
    pairs = 2 * np.arange(4)[:, None, None] + 8 * np.arange(4)[None, :, None] + np.arange(2)
    return pairs.reshape(-1)


@dataclass(eq=False)
class MarlinSource(WeightSource[GroupCodes]):
    """Source of a layer's rows; see the module docstring."""

    packed: StoredTensor
    scales: StoredTensor
    align = WIDTH

    def read(self, first: int, last: int) -> GroupCodes:
        words = np.ascontiguousarray(numbers(self.packed, np.int32)[:, 2 * first : 2 * last])
        stored = nibbles(words.view(np.uint8)).reshape(len(words), -1, TILE * WIDTH)
        tiles = np.empty_like(stored)
        tiles[..., _code_order()] = stored
        tiles = tiles.reshape(len(words), -1, TILE, TILE)  # [K / 16, N / 16, 16 inputs, 16 outputs]
        codes = np.ascontiguousarray(tiles.transpose(1, 3, 0, 2)).reshape(last - first, -1)
        found = floats(self.scales, np.s_[:, first:last])
        order = _scale_order(len(found))
        scales = np.empty_like(found)
        scales.reshape(len(found), -1, len(order))[..., order] = found.reshape(len(found), -1, len(order))
        return GroupCodes(codes, np.ascontiguousarray(scales.T), None, 4, self.scales.type_name)


def _tensor(parts: LayerTensors, group: int) -> QuantisedTensor:
    packed, scales = parts.get(".B", "I32"), parts.get(".s", *FLOATS)
    parts.find(".workspace", "I32")
    if len(packed.shape) != 2 or 0 in packed.shape or packed.shape[1] % (2 * WIDTH):
        raise parts.shape_error(packed, "[inputs / 16, outputs * 2]", "outputs come in runs of 64")
    columns, rows = packed.shape[0] * TILE, packed.shape[1] // 2
    if group > 0 and columns % group:
        raise parts.shape_error(packed, f"[a multiple of {group / TILE:g}, outputs * 2]", "groups of inputs are whole")
    groups = 1 if group < 0 else columns // group
    parts.check_shape(scales, (groups, rows), f"{rows} outputs, {columns} inputs and group_size {group}")
    return parts.tensor("Marlin-4", (rows, columns), MarlinSource(packed, scales))


def layers(config: Fields, stored: StoredTensors) -> Found:
    """Read the layers in the layout of Marlin; `gptq` calls this too."""
    if (bits := config.get("bits", int, 4)) != 4:
        raise UnsupportedModelError(f"{config.path}: Marlin with bits {bits} is not implemented; implemented: 4")
    for parts in layers_with(stored, ".B"):
        yield parts, _tensor(parts, group_size(config, -1))
