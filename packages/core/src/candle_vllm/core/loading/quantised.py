# SPDX-License-Identifier: MIT
"""Quantised safetensors: read a config's `quantization_config`, and combine the parts of a matrix into one tensor.

The module of a format finds its quantised layers (see `quantization/finding.py`). The stored tensors determine which
layers are quantised, so a config's lists of exceptions need not be read. A layer may have its own bits or groups
(GPTQModel's `dynamic`, several `config_groups`): of all schemes in the config, the first that fits its tensors is used,
and layers are not matched with a config's patterns. Unused scales, zero points and group indices are removed and
logged; other unused parts stay in the checkpoint, where the loader reports them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from candle_vllm.core import quantization
from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import spare
from candle_vllm.core.quantization.finding import is_dense
from candle_vllm.core.quantization.scaled_codes import FLOAT_NAMES
from candle_vllm.core.quantization.stored import FLOATS, LayerTensors
from candle_vllm.core.quantization.tensors import StoredTensor

logger = logging.getLogger(__name__)

ACTIVATION_SCALES = re.compile(
    r".*\.(input_scale|input_scale_inv|input_zero_point|input_global_scale|input_scale_ub|output_scale"
    r"|output_zero_point|(\w+_)?activation_scale|[qkv]_scale|[qkv]_zero_point|kv_scale|prob_scale)"
)
"""Names of scales that are not used: activations are not quantised with the checkpoint's scales, and
`assembly/cache_scales.py` has already removed those scales of a float8 KV cache that are used."""

BESIDE = "*quant*.json"  # the names in `FILES` of all formats match this pattern
_CODES = (*FLOAT_NAMES.values(), "I8", "U8", "I32")  # a tensor `....weight` of one of these types holds quantised codes


@cache
def collected(names: str) -> Mapping[str, Any]:
    """Return the modules of `quantization` by their `METHODS` or `FILES`; only quantised checkpoints import them."""
    modules = [import_module(f"{quantization.__name__}.{each.name}") for each in iter_modules(quantization.__path__)]
    return {name: module for module in modules for name in getattr(module, names, ())}


def read_quantised(checkpoint: Checkpoint, config: Mapping[str, Any], path: Path) -> Checkpoint:
    """Combine the parts of quantised layers of safetensors files; an unquantised checkpoint is returned as is.

    `config` is the content of `config.json`, at `path`; one of `FILES` may be in the same folder.

    Raises:
        UnsupportedModelError: a method, format or bit count is not implemented; the message lists the implemented ones.
        InvalidFileError: the config is damaged, or a layer's parts do not fit together.
    """
    plain = all(tensor.type_name in FLOATS for name, tensor in checkpoint.tensors.items() if name.endswith("weight"))
    settings = _settings(config, path, plain)
    if settings is None:
        return checkpoint
    method, fields = settings
    taken: set[str] = set()
    logical: dict[str, StoredTensor] = {}
    for parts, tensor in collected("METHODS")[method].layers(fields, checkpoint):
        if tensor.name in logical or (tensor.name in checkpoint.tensors and tensor.name not in _names(parts)):
            raise InvalidFileError(f"{tensor.path}: tensor {tensor.name} is stored both quantised and unquantised")
        taken |= _names(parts)
        logical[tensor.name] = tensor
    groups = fields.section("config_groups")
    of_groups = any("input_activations" in groups.section(name) for name in groups.values)
    if of_groups or "activation_scheme" in fields:  # static or dynamic scales
        logger.info("%s asks for quantised activations; activations have at least that precision here", path)
    if not logical:
        logger.warning("%s names the method %s, but no weight is quantised", path, method)
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in taken}
    for name, tensor in rest.items():  # codes without a scale would be loaded as unquantised weights of an unusual type
        if name.endswith(".weight") and tensor.type_name in _CODES:
            raise InvalidFileError(
                f"{tensor.path}: tensor {name} is {tensor.type_name}, and the checkpoint has no scales for it: the "
                "file is incomplete, or its format is not implemented"
            )
    scales = {name for name in rest if ACTIVATION_SCALES.fullmatch(name)}
    if scales:
        logger.info("%s: %d scales of activations or of a quantised cache are not used", path, len(scales))
    idle = set[str]()
    if method == "compressed-tensors":
        ends = ("weight_scale", "weight_zero_point", "weight_g_idx")
        layers = ((name, *name.rpartition(".")[::2]) for name in rest)
        idle = {name for name, layer, end in layers if end in ends and is_dense(checkpoint, layer)}
    if idle:
        logger.info("%s: %d scales, zero points or group indices of unquantised weights are unused", path, len(idle))
    kept = {name: tensor for name, tensor in rest.items() if name not in scales | idle}
    # Old AutoGPTQ stored a bias of zeros for every layer of a model without biases: the loader may ignore it.
    biases = {f"{name.removesuffix('.weight')}.bias" for name in logical} & kept.keys()
    idle_biases = {name: spare(kept[name]) for name in biases if not kept[name].load().any()}
    return checkpoint.with_tensors(kept | idle_biases | logical)


def _names(parts: LayerTensors) -> set[str]:
    return {part.name for part in parts.taken}


def _settings(config: Mapping[str, Any], path: Path, plain: bool) -> tuple[str, Fields] | None:
    """Return the method and its settings, from config.json, its text_config, or one of `FILES`; None if unquantised."""
    whole = Fields(config, path)
    for fields, key in product((whole, whole.section("text_config")), ("quantization_config", "compression_config")):
        if fields.get(key, dict, {}):
            own = fields.section(key)
            nested = "quantization" in own  # the whole hf_quant_config.json, not only its section
            default = "modelopt" if nested or "quant_algo" in own else "mlx" if "quantization" in whole else ""
            method = own.get("quant_method", str, default or ("compressed-tensors" if "config_groups" in own else ""))
            method = method.lower().replace("compressed_tensors", "compressed-tensors")
            own = own.section("quantization") if nested else own
            if plain and method == "bitsandbytes":  # left from the training of a merged model (QLoRA)
                logger.warning("%s names the method %s, but no weight is quantised", path, method)
                return None
            if method not in collected("METHODS"):
                raise UnsupportedModelError(
                    f"{path}: {key} asks for the method {method!r:.60}, which is not implemented; implemented: "
                    f"{', '.join(collected('METHODS'))}: take a checkpoint in one of these, or a GGUF file"
                )
            return method, own
    for beside in sorted(path.parent.glob(BESIDE)):
        if (reader := collected("FILES").get(beside.name)) is not None:
            own, method = Fields(read_json(beside), beside), reader.METHODS[0]
            return method, own.section("quantization") if method == "modelopt" else own
    return None
