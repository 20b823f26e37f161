# SPDX-License-Identifier: MIT
"""compressed-tensors: read the schemes of a config's groups, and read a layer's weight by its scheme.

Integers are in `compressed_ints.py`, the other formats in `fp8.py` and `fp4.py`. A config's `targets` and `ignore` are
not matched with names: the stored tensors show which layers are quantised, and the scheme of each.
Source: the compressors of vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.quantization.compressed_ints import packed_ints, plain_ints
from candle_vllm.core.quantization.finding import Found, StoredTensors, is_dense, layers_with
from candle_vllm.core.quantization.fp4 import mxfp4_tensor, nvfp4_tensor
from candle_vllm.core.quantization.fp8 import block_shape, fp8_tensor
from candle_vllm.core.quantization.stored import LayerTensors, QuantisedTensor

METHODS = ("compressed-tensors",)
PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4, DENSE = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "dense"
FORMATS = (PACKED, INT, FLOAT, NAIVE, NVFP4, MXFP4, DENSE)
"""The formats that are implemented."""

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


def read_schemes(config: Fields) -> list[CtScheme]:
    """Return the schemes of a `quantization_config`; the list is empty for a dense config.

    Raises:
        UnsupportedModelError: a format, sparsity, transform, type, strategy or number of bits is not implemented.
        InvalidFileError: a value is missing, of the wrong type or out of range.
    """
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


def ct_tensor(parts: LayerTensors, schemes: list[CtScheme]) -> tuple[LayerTensors, QuantisedTensor]:
    """Return the parts that were read, and the weight, of a quantised layer, by the first scheme that its parts fit.

    Args:
        parts: stored tensors of the layer.
        schemes: schemes of the config.

    Raises:
        InvalidFileError: the parts fit no scheme, the message has the first scheme's reason; or `schemes` is empty.
    """
    errors = [
        InvalidFileError(
            f"{parts.path}: layer {parts.layer} is stored quantised, but quantization_config has no config_groups that "
            "say how: take another checkpoint"
        )
    ]
    for scheme in schemes:
        own = parts.afresh()
        try:
            return own, _READERS[scheme.format](own, scheme)
        except InvalidFileError as error:
            errors.append(error)
    raise errors[1 if schemes else 0]


def _naive(parts: LayerTensors, scheme: CtScheme) -> QuantisedTensor:
    return fp8_tensor(parts, scheme.block) if scheme.kind == "float" else plain_ints(parts, scheme.bits, scheme.group)


_READERS: Mapping[str, Callable[[LayerTensors, CtScheme], QuantisedTensor]] = MappingProxyType(
    {
        PACKED: lambda parts, scheme: packed_ints(parts, scheme.bits, scheme.group),
        INT: _naive,
        FLOAT: _naive,
        NAIVE: _naive,
        NVFP4: lambda parts, _: nvfp4_tensor(parts, divided=True),
        MXFP4: lambda parts, _: mxfp4_tensor(parts),
    }
)


# ---- the layers of a checkpoint --------------------------------------------------------------------------------------


def layers(config: Fields, stored: StoredTensors) -> Found:
    """Read the quantised layers of a checkpoint; layers whose weight is stored unquantised are skipped."""
    schemes = read_schemes(config)
    for parts in layers_with(stored, ".weight_packed", ".weight_scale"):
        if not is_dense(stored, parts.layer):
            yield ct_tensor(parts, schemes)
