# SPDX-License-Identifier: MIT
"""`METHODS`: for each `quant_method`, a function that finds quantised layers and yields their parts and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.quantization.awq import awq_tensor
from candle_vllm.core.quantization.compressed_tensors import block_shape, ct_tensor, read_schemes
from candle_vllm.core.quantization.fp4 import mxfp4_experts, nvfp4_tensor
from candle_vllm.core.quantization.fp8 import NUMBERS, fp8_experts, fp8_tensor
from candle_vllm.core.quantization.gptq import GptqScheme, gptq_tensor
from candle_vllm.core.quantization.marlin import marlin_tensor
from candle_vllm.core.quantization.stored import FLOATS, LayerTensors, QuantisedTensor

Found: TypeAlias = Iterator[tuple[LayerTensors, QuantisedTensor]]  # the parts of each layer, and its weight


def _layers(checkpoint: Checkpoint, *ends: str) -> Iterator[str]:
    """Yield the names of layers that have a tensor whose name ends with one of these suffixes."""
    seen: set[str] = set()
    for name in checkpoint.tensors:
        end = next((end for end in ends if name.endswith(end)), None)
        if end is not None and (layer := name.removesuffix(end)) not in seen:
            seen.add(layer)
            yield layer


def _parts(checkpoint: Checkpoint, layer: str) -> LayerTensors:
    return LayerTensors(checkpoint.tensors, layer, checkpoint.path)


# ---- the methods -----------------------------------------------------------------------------------------------------


def _group(fields: Fields, default: int | None = None, key: str = "group_size") -> int:
    """Read the number of inputs in a group; -1 means all inputs."""
    known = () if default is None else (default,)
    return -1 if fields.get(key, int, *known) == -1 else fields.count(key, *known)


def _gptq(fields: Fields, checkpoint: Checkpoint) -> Found:
    layout = fields.choice("checkpoint_format", "gptq", "gptq", "gptq_v2", "marlin")
    fields.choice("pack_dtype", "int32", "int32", "torch.int32")
    if layout == "marlin" or fields.get("is_marlin_format", bool, False):
        yield from _marlin(fields, checkpoint)
        return
    # The layers of a pattern that begins with "-:" are not quantised.
    own = [value for pattern, value in fields.section("dynamic").values.items() if not pattern.startswith("-:")]
    yield from _gptq_layers(fields, checkpoint, own, zeros_less_one=layout == "gptq")


def _gptq_layers(fields: Fields, checkpoint: Checkpoint, own: Sequence[Any], *, zeros_less_one: bool) -> Found:
    """Read each layer by the first scheme its parts fit: the main one, then those in `own`; names are not matched."""
    bits, group = _gptq_bits(fields, None), _group(fields)
    schemes = [GptqScheme(bits, group, zeros_less_one)]
    for values in own:
        some = Fields(values if isinstance(values, dict) else {}, fields.path)
        schemes.append(GptqScheme(_gptq_bits(some, bits), _group(some, group), zeros_less_one))
    for layer in _layers(checkpoint, ".qweight"):
        yield _first_fitting(checkpoint, layer, list(dict.fromkeys(schemes)))


def _auto_round(fields: Fields, checkpoint: Checkpoint) -> Found:
    """Read AutoRound's checkpoints, which use the layouts of other methods."""
    layout = fields.choice("packing_format", "auto_round:auto_gptq", "auto_round:auto_gptq", "auto_round:auto_awq")
    fields.choice("data_type", "int", "int")
    if layout == "auto_round:auto_awq":
        yield from _awq(fields, checkpoint)
        return
    # Layers of 16 or 32 bits are not quantised.
    own = [
        value
        for value in fields.section("extra_config").values.values()
        if not isinstance(value, dict) or value.get("bits") not in (16, 32)
    ]
    yield from _gptq_layers(fields, checkpoint, own, zeros_less_one=True)


def _gptq_bits(fields: Fields, default: int | None) -> int:
    bits = fields.get("bits", int, *(() if default is None else (default,)))
    if bits not in (4, 8):
        raise UnsupportedModelError(f"{fields.path}: GPTQ with bits {bits} is not implemented; implemented: 4, 8")
    return bits


def _first_fitting(
    checkpoint: Checkpoint, layer: str, schemes: Sequence[GptqScheme]
) -> tuple[LayerTensors, QuantisedTensor]:
    """Read a layer by the first scheme that its parts fit; if no scheme fits, raise the first scheme's error."""
    errors: list[InvalidFileError] = []
    for scheme in schemes:
        parts = _parts(checkpoint, layer)
        try:
            return parts, gptq_tensor(parts, scheme)
        except InvalidFileError as error:
            errors.append(error)
    raise errors[0]


def _marlin(fields: Fields, checkpoint: Checkpoint) -> Found:
    if (bits := fields.get("bits", int, 4)) != 4:
        raise UnsupportedModelError(f"{fields.path}: Marlin with bits {bits} is not implemented; implemented: 4")
    for layer in _layers(checkpoint, ".B"):
        parts = _parts(checkpoint, layer)
        yield parts, marlin_tensor(parts, _group(fields, -1))


def _awq(fields: Fields, checkpoint: Checkpoint) -> Found:
    bits = fields.get("bits", int, fields.get("w_bit", int, 4))
    if bits != 4:
        raise UnsupportedModelError(f"{fields.path}: AWQ with bits {bits} is not implemented; implemented: 4")
    fields.choice("version", "gemm", "gemm", "GEMM")
    if not fields.get("zero_point", bool, True):
        raise UnsupportedModelError(f"{fields.path}: AWQ with zero_point false is not implemented; implemented: true")
    group = _group(fields, 128, "q_group_size" if "q_group_size" in fields else "group_size")
    for layer in _layers(checkpoint, ".qweight"):
        parts = _parts(checkpoint, layer)
        yield parts, awq_tensor(parts, group)


def _compressed_tensors(fields: Fields, checkpoint: Checkpoint) -> Found:
    schemes = read_schemes(fields)
    for layer in _layers(checkpoint, ".weight_packed", ".weight_scale"):
        if not is_dense(checkpoint, layer):
            yield ct_tensor(lambda layer=layer: _parts(checkpoint, layer), schemes)


def is_dense(checkpoint: Checkpoint, layer: str) -> bool:
    """Whether a layer with scales is stored unquantised nevertheless."""
    weight = checkpoint.tensors.get(f"{layer}.weight")
    return weight is not None and weight.type_name in FLOATS


def _fp8(fields: Fields, checkpoint: Checkpoint) -> Found:
    block = block_shape(fields, "weight_block_size") if "weight_block_size" in fields else None
    fields.choice("fmt", "e4m3", "e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2")
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(".weight") and tensor.type_name in NUMBERS:
            parts = _parts(checkpoint, name.removesuffix(".weight"))
            yield parts, fp8_tensor(parts, block)
        elif tensor.type_name in NUMBERS and name + "_scale_inv" in checkpoint.tensors:
            parts = _parts(checkpoint, name)
            yield parts, fp8_experts(parts, block)


def _mxfp4(_: Fields, checkpoint: Checkpoint) -> Found:
    for layer in _layers(checkpoint, "_blocks"):
        parts = _parts(checkpoint, layer)
        yield parts, mxfp4_experts(parts)


def _modelopt(fields: Fields, checkpoint: Checkpoint) -> Found:
    if "quant_algo" not in fields and "kv_cache_quant_algo" in fields:
        return
    algorithm = fields.choice("quant_algo", "", "NVFP4", "FP8")
    if algorithm == "FP8":
        yield from _fp8(Fields({}, fields.path), checkpoint)
        return
    for layer in _layers(checkpoint, ".weight_scale_2"):
        parts = _parts(checkpoint, layer)
        yield parts, nvfp4_tensor(parts, divided=False)


METHODS: Mapping[str, Callable[[Fields, Checkpoint], Found]] = MappingProxyType(
    {
        "gptq": _gptq,
        "gptq_marlin": _gptq,
        "marlin": _marlin,
        "awq": _awq,
        "awq_marlin": _awq,
        "auto-round": _auto_round,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "fbgemm_fp8": _fp8,
        "mxfp4": _mxfp4,
        "modelopt": _modelopt,
        "modelopt_fp4": _modelopt,
    }
)
"""The function of each `quant_method`, which yields the parts and the weight of each quantised layer."""
