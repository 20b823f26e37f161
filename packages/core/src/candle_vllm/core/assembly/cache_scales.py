# SPDX-License-Identifier: MIT
"""Calibrated scales of a KV cache with `kv_cache_dtype` "fp8": find them in a checkpoint, and set them in the layers.

A layer stores keys divided by its key scale, and values divided by its value scale (`kernels/kv_write`). The names are
those that vLLM accepts: `k_scale` and `v_scale` of a layer's attention, or of `attn` or the projections in it
(ModelOpt), `output_scale` of the key and value projections (older compressed-tensors), and `kv_scale` for both (oldest
form). If a layer has only one of the two scales, it is used for both.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.layers.attention import PagedAttention
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import Counted, layer_at
from candle_vllm.core.quantization.tensors import StoredTensor

logger = logging.getLogger(__name__)

_NAME = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.self_attn\."
    r"(?:(?:(?:attn|qkv_proj|k_proj)\.)?(?P<k>k)_scale|(?:(?:attn|qkv_proj|v_proj)\.)?(?P<v>v)_scale"
    r"|(?P<of>[kv])_proj\.output_scale|(?:attn\.)?kv_scale)"
)


def split_cache_scales(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, StoredTensor]]:
    """Return the checkpoint without cache scales, and the cache scales by name."""
    scales = {name: tensor for name, tensor in checkpoint.tensors.items() if _NAME.fullmatch(name)}
    if not scales:
        return checkpoint, {}
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in scales}
    return checkpoint.with_tensors(rest), scales


def give_cache_scales(
    decoder: object, scales: Mapping[str, StoredTensor], config: Counted, placement: Placement
) -> None:
    """Set the stored scales in the layers of `decoder`; layers without stored scales use 1.

    Raises InvalidFileError if a scale is not a single finite number above 0.
    """
    found: dict[int, dict[str, float]] = {}
    for layer, kind, value in _values(scales):
        found.setdefault(layer, {}).setdefault(kind, value)
    given = 0
    for layer, values in found.items():
        # Layers after the last one are for multi-token prediction, and are not loaded.
        attend = layer_at(decoder, f"layers.{layer}.attention.attend") if layer < config.num_layers else None
        if isinstance(attend, PagedAttention):
            either = next(iter(values.values()))
            attend.scale_cache(values.get("k", either), values.get("v", either), placement)
            given += 1
    if given:
        logger.info("the KV cache of %d layers uses the scales of the checkpoint", given)


def _values(scales: Mapping[str, StoredTensor]) -> Iterator[tuple[int, str, float]]:
    """Yield layer, "k" or "v", and the scale; older names come last, so that the caller prefers newer ones."""
    for name, tensor in sorted(scales.items(), key=lambda item: item[0].endswith((".output_scale", ".kv_scale"))):
        value = tensor.load().flatten().tolist() if math.prod(tensor.shape) == 1 else []
        if not value or not math.isfinite(value[0]) or value[0] <= 0:
            said = f"it is {value[0]}" if value else f"it has shape {list(tensor.shape)}"
            raise InvalidFileError(
                f"{tensor.path}: tensor {name}: the scale of a layer's KV cache must be one finite number above 0, but "
                f"{said}: leave out kv_cache_dtype='fp8'"
            )
        match = _NAME.fullmatch(name)
        assert match is not None
        kind = match["k"] or match["v"] or match["of"]
        for one in (kind,) if kind else ("k", "v"):
            yield int(match["layer"]), one, value[0]
