# SPDX-License-Identifier: MIT
"""MXFP4 and NVFP4: 4-bit floats (e2m1) in small groups with 8-bit scales.

An element is one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 or their negatives; a byte has two, the first in its lower half.

    MXFP4   groups of 32, scale 2^(e - 127) from a byte e; 255 is NaN
    NVFP4   groups of 16, scale e4m3; multiplied by modelopt's `weight_scale_2` of the tensor or divided by
            compressed-tensors' `weight_global_scale`, in fp32, before it is multiplied by the element

GGUF's type MXFP4 has the same elements: a block is the byte of the scale and 16 bytes, whose low nibbles are the codes
of the first 16 weights and whose high nibbles are the codes of the last 16. Beside a tensor `NAME.weight` of GGUF's
type NVFP4, `NAME.scale` may hold the scale of the tensor, or one for each expert.
Source: OCP Microscaling Formats 1.0, 2023; NVIDIA's modelopt; gpt-oss's `convert_moe_packed_tensors`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.quantization.finding import Found, StoredTensors, layers_with
from candle_vllm.core.quantization.ggml_blocks import BlockParts, e4m3_codes, put_together, take_apart
from candle_vllm.core.quantization.ggml_types import CONTENTS, E2M1_VALUES, GGMLQuantizationType
from candle_vllm.core.quantization.group_codes import Blocks, GroupCodes, nibbles
from candle_vllm.core.quantization.scaled_codes import ScaledCodes
from candle_vllm.core.quantization.stored import LayerTensors, QuantisedTensor, WeightSource, floats, numbers
from candle_vllm.core.quantization.tensors import StoredTensor

METHODS = ("mxfp4",)
MX_GROUP, NV_GROUP = 32, 16
MIDDLE = 16
"""Code of weight 0 among the 5-bit codes that `_codes` returns."""


def _codes(packed: np.ndarray) -> np.ndarray:
    """Convert bytes [R, K / 2] to 5-bit codes, 2 * element + 16, which are integers: uint8 [R, K]."""
    return (np.array(E2M1_VALUES) + MIDDLE).astype(np.uint8)[nibbles(packed)]


class Mxfp4Codes(GroupCodes):
    """Rows of MXFP4: codes as `_codes` returns them, and the scales divided by 2, because codes count halves."""

    def _blocks(self) -> Blocks | None:
        """See `GroupCodes.blocks`: blocks of GGUF's MXFP4, unless a scale is NaN."""
        if not np.isfinite(self.scales).all():
            return None
        table = np.zeros(2 * MIDDLE, np.uint8)
        for code in reversed(range(len(E2M1_VALUES))):  # two codes mean 0; the first one, written last, is used
            table[MIDDLE + E2M1_VALUES[code]] = code
        exponents = (np.frexp(self.scales)[1] + 127).astype(np.uint8)
        parts = BlockParts(table[self.codes].reshape(*exponents.shape, MX_GROUP), exponents[..., None])
        raw = put_together(parts, CONTENTS[GGMLQuantizationType.MXFP4])
        return Blocks(GGMLQuantizationType.MXFP4, raw.reshape(len(raw), -1))


@dataclass(eq=False)
class Mxfp4Source(WeightSource[GroupCodes]):
    """Source of rows in MXFP4: their bytes, with any outer dimensions, and an exponent for 32 weights of a row."""

    blocks: StoredTensor
    scales: StoredTensor

    def read(self, first: int, last: int) -> GroupCodes:
        groups = self.scales.shape[-1]
        packed = numbers(self.blocks, np.uint8).reshape(-1, groups * MX_GROUP // 2)[first:last]
        exponents = numbers(self.scales, np.uint8).reshape(-1, groups)[first:last].astype(np.int32)
        scales = np.ldexp(np.float32(1), exponents - 128).astype(np.float32)
        scales[exponents == 255] = np.nan
        return Mxfp4Codes(_codes(packed), scales, None, 5, "F32")


@dataclass(eq=False)
class Nvfp4Source(WeightSource[ScaledCodes]):
    """Source of rows in NVFP4.

    Attributes:
        packed: codes [N, K / 2].
        scales: scales of groups [N, K / 16].
        whole: the tensor's own scale, one element, which multiplies the scales, or divides them if `divided`.
    """

    packed: StoredTensor
    scales: StoredTensor
    whole: StoredTensor
    divided: bool

    def __post_init__(self) -> None:
        self.span = 2 * self.packed.shape[1]

    def read(self, first: int, last: int) -> ScaledCodes:
        """See `WeightSource.read`; a scale `whole` that divides becomes its reciprocal, rounded to float32."""
        whole = floats(self.whole).reshape(1, 1)
        with np.errstate(all="ignore"):
            factor = np.float32(1) / whole if self.divided else whole
        columns = 2 * self.packed.shape[1]
        scales = np.repeat(factor.astype(np.float32), last - first, axis=0)
        return ScaledCodes("e2m1", self.packed.raw()[first:last], scales, columns, self.scales.raw()[first:last])

    def decode(self, first: int, last: int) -> np.ndarray:
        """See `WeightSource.decode`: the two scales are combined first, as the format demands."""
        scales = self.scales.rows(first, last).load()
        whole = floats(self.whole).reshape(-1)[0]
        with np.errstate(all="ignore"):  # a scale of 0 or NaN comes from the file and needs no warning
            scales = scales / whole if self.divided else scales * whole
            values = _codes(self.packed.raw()[first:last]).astype(np.float32)
            values -= MIDDLE
            values *= 0.5
            values *= np.repeat(scales, NV_GROUP, axis=1)
        return values


@dataclass(eq=False)
class GgufNvfp4Source(WeightSource[ScaledCodes]):
    """Source of the rows of a GGUF tensor [..., N, K] in NVFP4 with one scale, or one for each outermost entry."""

    blocks: StoredTensor
    whole: StoredTensor

    def __post_init__(self) -> None:
        self.span = self.blocks.shape[-1]

    def read(self, first: int, last: int) -> ScaledCodes:
        rows, whole = self.blocks.raw(), floats(self.whole).reshape(-1)
        contents = CONTENTS[GGMLQuantizationType.NVFP4]
        parts = take_apart(rows[first:last].reshape(last - first, -1, contents.block[1]), contents, np)
        codes, groups = (part.reshape(last - first, -1) for part in (parts.codes, e4m3_codes(parts.scale)))
        scales = whole[np.arange(first, last) // (len(rows) // len(whole)), None]
        return ScaledCodes("e2m1", codes[:, ::2] | codes[:, 1::2] << 4, scales, codes.shape[1], groups)


def _experts(parts: LayerTensors) -> QuantisedTensor:
    """Combine gpt-oss's `_blocks` [X, R, K / 32, 16] and `_scales` [X, R, K / 32] into [X, R, K]; rows are outputs."""
    blocks, scales = parts.get("_blocks", "U8"), parts.get("_scales", "U8")
    if len(blocks.shape) < 3 or 0 in blocks.shape or blocks.shape[-1] != MX_GROUP // 2:
        raise parts.shape_error(blocks, "[..., outputs, inputs / 32, 16]", "16 bytes are a group of 32 weights")
    parts.check_shape(scales, blocks.shape[:-1], f"{blocks.name} has shape {list(blocks.shape)}")
    shape = (*blocks.shape[:-2], blocks.shape[-2] * MX_GROUP)
    return parts.tensor("MXFP4", shape, Mxfp4Source(blocks, scales), parts.layer)


def mxfp4_tensor(parts: LayerTensors, code: str = ".weight_packed", scale: str = ".weight_scale") -> QuantisedTensor:
    """Read compressed-tensors' codes [N, K / 2] and scales [N, K / 32], by their names.

    Raises:
        InvalidFileError: parts are missing or do not fit together.
    """
    packed, scales = parts.get(code, "U8", "I8"), parts.get(scale, "U8", "F8_E8M0")
    rows, columns = _matrix(parts, packed, scales, MX_GROUP)
    return parts.tensor("MXFP4", (rows, columns), Mxfp4Source(packed, scales))


def mxfp4_blocks(stored: StoredTensor) -> np.ndarray:
    """Return the rows of an MXFP4 tensor [..., K] as GGUF's blocks, uint8 [rows, 17 K / 32].

    Raises:
        WeightsError: a scale is NaN.
    """
    assert isinstance(stored, QuantisedTensor)
    found = stored.blocks()
    if found is None:
        raise WeightsError(f"{stored.path}: tensor {stored.name} has a scale that is not a number")
    return found.raw


def nvfp4_tensor(parts: LayerTensors, *, divided: bool) -> QuantisedTensor:
    """Return a matrix of NVFP4; errors as `mxfp4_tensor`.

    divided: the parts have compressed-tensors' names; otherwise modelopt's.
    """
    packed = parts.get(".weight_packed" if divided else ".weight", "U8")
    scales = parts.get(".weight_scale", "F8_E4M3")
    whole = parts.get(".weight_global_scale" if divided else ".weight_scale_2", "F32", "F16", "BF16")
    rows, columns = _matrix(parts, packed, scales, NV_GROUP)
    if math.prod(whole.shape) != 1:
        raise parts.shape_error(whole, [1], "one number for the tensor")
    return parts.tensor("NVFP4", (rows, columns), Nvfp4Source(packed, scales, whole, divided))


def with_scales(stored: StoredTensors) -> dict[str, StoredTensor]:
    """Return a GGUF file's tensors, with each NVFP4 tensor and its scale combined; scales of activations are left out.

    Beside `ffn_gate_inp.scale` (Gemma 4), `ffn_down_exps.scale` has the router's scales of experts: it stays separate.
    """
    found = dict(stored.tensors)
    for parts in layers_with(stored, ".scale"):
        weight, router = found.get(f"{parts.layer}.weight"), parts.layer.replace("ffn_down_exps", "ffn_gate_inp")
        if weight is None or weight.type_name != "NVFP4" or (router != parts.layer and f"{router}.scale" in found):
            continue
        blocks, whole = parts.get(".weight", "NVFP4"), parts.get(".scale", "F32")
        if whole.numel not in (1, math.prod(blocks.shape[:-2])):
            raise parts.shape_error(whole, "[1] or one per matrix", f"{blocks.name} has shape {list(blocks.shape)}")
        found[blocks.name] = parts.tensor("NVFP4", blocks.shape, GgufNvfp4Source(blocks, whole))
        del found[whole.name]
    ends = {f"{name.removesuffix('.weight')}.input_scale" for name, each in found.items() if each.type_name == "NVFP4"}
    return {name: tensor for name, tensor in found.items() if name not in ends}


def _matrix(parts: LayerTensors, packed: StoredTensor, scales: StoredTensor, group: int) -> tuple[int, int]:
    if len(packed.shape) != 2 or 0 in packed.shape or packed.shape[1] * 2 % group:
        raise parts.shape_error(packed, "[outputs, inputs / 2]", f"rows are whole groups of {group} weights")
    rows, columns = packed.shape[0], packed.shape[1] * 2
    parts.check_shape(scales, (rows, columns // group), f"{rows} outputs and {columns} inputs")
    return rows, columns


# ---- the layers of a checkpoint --------------------------------------------------------------------------------------


def layers(_: Fields, stored: StoredTensors) -> Found:
    """Read the layers of `quant_method` mxfp4, the experts of gpt-oss."""
    for parts in layers_with(stored, "_blocks"):
        yield parts, _experts(parts)
