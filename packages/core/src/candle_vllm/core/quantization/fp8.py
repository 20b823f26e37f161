# SPDX-License-Identifier: MIT
"""FP8: an 8-bit float for each weight, and a scale per tensor, row or block.

A weight is scale * element in fp32. Elements are e4m3 (without infinities) or e5m2; a matrix [N, K] has one scale,
scales [N] or [N, 1], or scales [N / block, K / block] rounded up, with smaller blocks at the edges. Hugging Face calls
scales of blocks `weight_scale_inv`, although the elements are multiplied by them; DeepSeek V4 calls them `scale`, and
its experts are MXFP4 (`fp4.py`), a `weight` of bytes. MiMo V2.6 and Ling 3.0 name MXFP4 by `store_dtype` and by
`routed_experts_quant_method`.
Source: Micikevicius et al., 2022, arXiv:2209.05433; DeepSeek-V3's `weight_dequant`, 2024, arXiv:2412.19437.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.quantization.finding import Found, StoredTensors
from candle_vllm.core.quantization.fp4 import mxfp4_tensor
from candle_vllm.core.quantization.scaled_codes import ScaledCodes
from candle_vllm.core.quantization.stored import FLOATS, LayerTensors, QuantisedTensor, WeightSource, floats
from candle_vllm.core.quantization.tensors import StoredTensor

METHODS = ("fp8", "fbgemm_fp8")
NUMBERS = ("F8_E4M3", "F8_E5M2")
SCALES = (*FLOATS, "F8_E8M0")

_PARTED = (".qkv_proj", ".k_proj")  # the matrices of MiMo V2 in which blocks of scales may begin anew
_NAMES: Mapping[str, Literal["e4m3", "e5m2"]] = MappingProxyType({"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"})


class Fp8Source(WeightSource[ScaledCodes]):
    """Source of a layer's rows; see the module docstring.

    Args:
        weight: the elements [N, K].
        scales: stored scales of the blocks of rows and columns, row by row.
        block: rows and columns of a block.
        height: rows of each of several matrices in `weight`, whose last blocks may be smaller; None for one matrix.

    Attributes:
        refused: the error for scales that are too many for one matrix; None if they fit, or after `parted`.
    """

    refused: InvalidFileError | None = None

    def __init__(
        self, weight: StoredTensor, scales: StoredTensor, block: tuple[int, int], height: int | None = None
    ) -> None:
        self._weight, self._scales, self._block = weight, scales, block
        self._height = height or weight.shape[0]
        self.span = min(block[1], weight.shape[1])

    def parted(self, count: int) -> Fp8Source | None:
        """The source whose blocks begin anew in each of `count` equal parts of the rows; None if scales do not fit."""
        if self._scales.numel == 1:
            return self
        made, (height, rest) = copy.copy(self), divmod(self._weight.shape[0], count)
        made._height, made.refused = height, None
        return made if not rest and count * -(-height // self._block[0]) == self._scales.shape[0] else None

    def read(self, first: int, last: int) -> ScaledCodes:
        if self.refused is not None:
            raise self.refused
        rows, columns = self._block
        matrix, row = np.divmod(np.arange(first, last), self._height)
        at = matrix * -(-self._height // rows) + row // rows
        scales = floats(self._scales).reshape(-1, -(-self._weight.shape[1] // columns))[at]
        return ScaledCodes(_NAMES[self._weight.type_name], self._weight.raw()[first:last], scales, columns)


def fp8_tensor(parts: LayerTensors, block: tuple[int, int] | None) -> QuantisedTensor:
    """Return the weight of a layer whose `weight` is FP8.

    Args:
        block: rows and columns that share a scale, by the config; None if the scale's shape determines it.

    Raises:
        InvalidFileError: the weight is no FP8 matrix, or its scale is missing or does not fit.
    """
    weight = parts.get(".weight", *NUMBERS)
    usual = ".weight_scale" if block is None else ".weight_scale_inv"
    others = ".weight_scale_inv" if block is None else ".weight_scale"
    scale = parts.find(others, *SCALES) or parts.find(".scale", *SCALES) or parts.get(usual, *SCALES)
    rows, columns = parts.matrix_shape(weight, "[outputs, inputs]", "FP8 tensors of other shapes are not read")
    if block is not None:
        wanted = (-(-rows // block[0]), -(-columns // block[1]))
        if scale.shape == wanted:
            return parts.tensor("FP8", (rows, columns), Fp8Source(weight, scale, block))
        allowed = f"{list(wanted)} for blocks of {block[0]} x {block[1]}"
        if parts.layer.endswith(_PARTED) and scale.shape[1:] == wanted[1:] and wanted[0] < scale.shape[0] <= rows:
            source = Fp8Source(weight, scale, block)
            source.refused = parts.shape_error(scale, allowed, f"tensor {weight.name} has shape {[rows, columns]}")
            return parts.tensor("FP8", (rows, columns), source)
    elif scale.numel == 1:
        return parts.tensor("FP8", (rows, columns), Fp8Source(weight, scale, (rows, columns)))
    elif scale.shape in ((rows, 1), (rows,)):
        return parts.tensor("FP8", (rows, columns), Fp8Source(weight, scale, (1, columns)))
    else:
        allowed = f"one number or [{rows}, 1], where the config has no weight_block_size"
    raise parts.shape_error(scale, allowed, f"tensor {weight.name} has shape {[rows, columns]}")


def _experts(parts: LayerTensors, block: tuple[int, int] | None) -> QuantisedTensor:
    """Return the FP8 matrices of all experts, [X, N, K], with a scale for each expert or, with `block`, its blocks."""
    weight, scale = parts.get("", *NUMBERS), parts.get("_scale_inv", *SCALES)
    if len(weight.shape) != 3 or 0 in weight.shape:
        raise parts.shape_error(weight, "[experts, outputs, inputs]", f"{scale.name} has the scales of all experts")
    experts, rows, columns = weight.shape
    block = block or (rows, columns)
    wanted = (experts, -(-rows // block[0]), -(-columns // block[1]))
    if scale.shape != wanted and (block != (rows, columns) or scale.shape != (experts,)):
        raise parts.shape_error(scale, list(wanted), f"tensor {weight.name} has shape {list(weight.shape)}")
    matrix = dataclasses.replace(weight, shape=(experts * rows, columns))
    return parts.tensor("FP8", weight.shape, Fp8Source(matrix, scale, block, rows), parts.layer)


# ---- the layers of a checkpoint --------------------------------------------------------------------------------------


def layers(config: Fields, stored: StoredTensors) -> Found:
    """Read the FP8 layers of a checkpoint; `modelopt` calls this too, without a config."""
    block = block_shape(config, "weight_block_size") if "weight_block_size" in config else None
    config.choice("fmt", "e4m3", "e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2")
    experts = config.choice("routed_experts_quant_method", "fp8", "fp8", "mxfp4")
    mixed = "mxfp4" in (experts, config.get("store_dtype", str, ""))
    for name, tensor in stored.tensors.items():
        parts = LayerTensors(stored.tensors, name.removesuffix(".weight"), stored.path)
        if name.endswith(".weight") and tensor.type_name in NUMBERS:
            yield parts, fp8_tensor(parts, block)
        elif tensor.type_name in NUMBERS and name + "_scale_inv" in stored.tensors:
            yield parts, _experts(parts, block)
        elif name.endswith(".weight") and tensor.type_name in ("I8", *["U8"] * mixed):
            ends = (end for end in (".weight_scale", ".weight_scale_inv") if parts.layer + end in stored.tensors)
            yield parts, mxfp4_tensor(parts, ".weight", next(ends, ".scale"))


def block_shape(fields: Fields, key: str) -> tuple[int, int]:
    """Return the rows and columns of a block.

    Raises:
        InvalidFileError: the value is not two sizes from 1 to 2^24.
    """
    sizes = fields.get(key, list)
    if len(sizes) != 2 or not all(isinstance(size, int) and 0 < size <= 1 << 24 for size in sizes):
        raise InvalidFileError(f"{fields.path}: {key} is {sizes!r:.80}; it must be two sizes such as [128, 128]")
    return sizes[0], sizes[1]
