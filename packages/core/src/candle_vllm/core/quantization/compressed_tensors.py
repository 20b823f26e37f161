# SPDX-License-Identifier: MIT
"""compressed-tensors: read the schemes of a config's groups, and read a layer's weight by its scheme.

Floats are read by `fp8.py` and `fp4.py`. Integers are codes of 4 or 8 bits packed in int32, or single int8 codes. For a
layer [N, K] with G groups of inputs (G = 1 for one scale per row or tensor):

    weight_packed      int32 [N, K * bits / 32, rounded up]   code of (n, k) at bit bits * (k % (32 / bits))
    weight             int8 [N, K]                            alternative: code - 128
    weight_scale       float [N, G]; if G = 1, also [N] or one element
    weight_zero_point  int32 [N * bits / 32, rounded up, G], packed along N; or int8 as the scale, less 2^(bits - 1)
    weight_shape       int [2]: N and K, only with packed codes
    weight_g_idx       int32 [K], the group of each input (actorder "group")

A config's `targets` and `ignore` are not matched with names: the stored tensors show which layers are quantised, and
the scheme of each. Source: the compressors of vllm-project/compressed-tensors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.quantization.finding import Found, StoredTensors, is_dense, layers_with
from candle_vllm.core.quantization.fp4 import mxfp4_tensor, nvfp4_tensor
from candle_vllm.core.quantization.fp8 import block_shape, fp8_tensor
from candle_vllm.core.quantization.gptq import column_groups
from candle_vllm.core.quantization.group_codes import GroupCodes, fields, zeros_or_middle
from candle_vllm.core.quantization.stored import FLOATS, LayerTensors, QuantisedTensor, WeightSource, floats, numbers
from candle_vllm.core.quantization.tensors import StoredTensor

METHODS = ("compressed-tensors",)
PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4, DENSE = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "dense"
_WHOLE = (("int", 4), ("int", 8))
_KINDS = MappingProxyType(
    {
        PACKED: _WHOLE,
        INT: _WHOLE,
        FLOAT: (("float", 8),),
        NAIVE: (*_WHOLE, ("float", 8)),
        NVFP4: (("float", 4),),
        MXFP4: (("float", 4),),
    }
)
FORMATS = (*_KINDS, DENSE)
"""The formats that are implemented."""


@dataclass(frozen=True)
class CtScheme:
    """How the weights of a config group are stored.

    Attributes:
        bits: bits of a code, 4 or 8.
        kind: "int" or "float".
        group: inputs in a group, for strategy "group" except in NVFP4 and MXFP4; otherwise -1.
        block: rows and columns that share a scale, for strategy "block", and for floats in groups; otherwise None.
    """

    format: str
    bits: int
    kind: str
    group: int
    block: tuple[int, int] | None


def _schemes(config: Fields) -> list[CtScheme]:
    """Return the schemes of a `quantization_config`; the list is empty for a dense config."""
    whole = config.get("format", str, DENSE)
    config.section("sparsity_config").choice("format", DENSE, DENSE)
    transforms = config.section("transform_config")
    if "config_groups" in transforms and transforms.section("config_groups").values:
        raise UnsupportedModelError(
            f"{config.path}: transform_config asks for transforms (rotations), which are not implemented: take a "
            "checkpoint without them"
        )
    found = []
    groups = config.section("config_groups")
    for name in groups.values:
        group = groups.section(name)
        if "weights" in group:
            own = group.choice("format", whole, *FORMATS)
            if own != DENSE:
                found.append(_scheme(group.section("weights"), own))
    if whole != "mixed-precision":
        config.choice("format", DENSE, *FORMATS)
    return found


def _scheme(weights: Fields, format: str) -> CtScheme:
    bits, kind = weights.get("num_bits", int), weights.choice("type", "int", "int", "float")
    size = weights.get("group_size", int, None)
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.choice("strategy", default, "tensor", "channel", "group", "block", "tensor_group")
    if (kind, bits) not in _KINDS[format]:
        allowed = ", ".join(f"{name} of {size} bits" for name, size in _KINDS[format])
        raise UnsupportedModelError(
            f"{weights.path}: {format} weights of type {kind} with num_bits {bits} are not implemented; implemented: "
            f"{allowed}"
        )
    group = weights.count("group_size") if strategy == "group" and format not in (NVFP4, MXFP4) else -1
    block = None
    if strategy == "block":
        block = block_shape(weights, "block_structure")
    elif kind == "float" and group > 0:
        block = (1, group)
    return CtScheme(format, bits, kind, group, block)


def _tensor(parts: LayerTensors, scheme: CtScheme) -> QuantisedTensor:
    """Return the weight of a layer by a scheme."""
    if scheme.format == NVFP4:
        return nvfp4_tensor(parts, divided=True)
    if scheme.format == MXFP4:
        return mxfp4_tensor(parts)
    if scheme.kind == "float":
        return fp8_tensor(parts, scheme.block)
    return _packed_ints(parts, scheme) if scheme.format == PACKED else _plain_ints(parts, scheme)


# ---- integers --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class CtIntSource(WeightSource[GroupCodes]):
    """Source of a layer's rows; see the module docstring.

    Attributes:
        stored: `weight_packed`, or `weight` of int8.
        shape: [N, K].
        bits: bits of a packed code; an int8 is read as 8.
        group_of: the group of each column; None for G groups of K / G adjacent columns.
    """

    stored: StoredTensor
    shape: tuple[int, int]
    bits: int
    scales: StoredTensor
    zeros: StoredTensor | None
    group_of: np.ndarray | None

    def __post_init__(self) -> None:
        self.align = 32 // self.bits if self.zeros is not None and self.zeros.type_name == "I32" else 1

    def read(self, first: int, last: int) -> GroupCodes:
        rows, columns = self.shape
        last = min(last, rows)
        if self.stored.type_name == "I8":
            codes = numbers(self.stored, np.uint8)[first:last] ^ np.uint8(128)
        else:
            codes = fields(numbers(self.stored, np.int32)[first:last], self.bits)[:, :columns]
        scales = _by_row(floats(self.scales), rows)[first:last]
        zeros = self._zero_codes(first, last)
        return GroupCodes(codes, scales, zeros, self.bits, self.scales.type_name, self.group_of)

    def _zero_codes(self, first: int, last: int) -> np.ndarray | None:
        """Return zeros as int32 [rows, G]; None if all are the middle code."""
        part, rows, middle = self.zeros, self.shape[0], 1 << (self.bits - 1)
        if part is None:
            return None
        if part.type_name == "I32":
            words = numbers(part, np.int32)[first // self.align : -(-last // self.align)]
            found = fields(words.T, self.bits).T[: last - first]
        else:
            found = _by_row(numbers(part, np.int8), rows)[first:last].astype(np.int32) + middle
        return zeros_or_middle(found, self.bits)


def _by_row(found: np.ndarray, rows: int) -> np.ndarray:
    """Expand elements per row and group [N, G], or a single element, to [N, G]."""
    table = found.reshape(1 if found.size == 1 else rows, -1)
    return np.broadcast_to(table, (rows, table.shape[1]))


def _packed_ints(parts: LayerTensors, scheme: CtScheme) -> QuantisedTensor:
    packed = parts.get(".weight_packed", "I32")
    stored_shape = parts.get(".weight_shape", "I64", "I32")
    parts.check_shape(stored_shape, (2,), "the rows and columns of the layer")
    rows, columns = stored_shape.load(None).tolist()
    wanted = (rows, -(-columns * scheme.bits // 32))
    if min(rows, columns) < 1 or packed.shape != wanted:
        why = f"{scheme.bits} bits and {stored_shape.name} says {[rows, columns]}"
        raise parts.shape_error(packed, list(wanted), why)
    return _ints(parts, packed, (rows, columns), scheme.bits, scheme.group)


def _plain_ints(parts: LayerTensors, scheme: CtScheme) -> QuantisedTensor:
    """Return the weight of a layer with int8 codes, however many of the bits are used."""
    weight = parts.get(".weight", "I8")
    shape = parts.matrix_shape(weight, "[outputs, inputs]", "int8 tensors of other shapes are not read")
    found = _ints(parts, weight, shape, 8, scheme.group)
    return dataclasses.replace(found, type_name=f"INT{scheme.bits}")


def _ints(parts: LayerTensors, stored: StoredTensor, shape: tuple[int, int], bits: int, group: int) -> QuantisedTensor:
    """Check scales, zeros and groups, and make the tensor."""
    rows, columns = shape
    groups = 1 if group < 0 else -(-columns // group)
    scales, zeros = parts.get(".weight_scale", *FLOATS), parts.find(".weight_zero_point", "I32", "I8")
    why = f"{rows} outputs, {columns} inputs" + (f" and groups of {group}" if group > 0 else "")

    def check(part: StoredTensor) -> None:
        """Check scales, or zeros that are stored like them."""
        if groups != 1 or (part.numel != 1 and part.shape != (rows,)):
            parts.check_shape(part, (rows, groups), why)

    check(scales)
    if zeros is not None and zeros.type_name == "I32":
        parts.check_shape(zeros, (-(-rows * bits // 32), groups), why)
    elif zeros is not None:
        check(zeros)
    group_of = column_groups(parts, parts.find(".weight_g_idx", "I32"), columns, groups, group)
    return parts.tensor(f"INT{bits}", shape, CtIntSource(stored, shape, bits, scales, zeros, group_of))


# ---- the layers of a checkpoint --------------------------------------------------------------------------------------


def layers(config: Fields, stored: StoredTensors) -> Found:
    """Read the quantised layers of a checkpoint; layers whose weight is stored unquantised are skipped."""
    schemes = _schemes(config)
    for parts in layers_with(stored, ".weight_packed", ".weight_scale"):
        if is_dense(stored, parts.layer):
            continue
        if not schemes:
            raise InvalidFileError(
                f"{parts.path}: layer {parts.layer} is stored quantised, but quantization_config has no config_groups "
                "that say how: take another checkpoint"
            )
        yield parts.read_by_first(schemes, _tensor)
