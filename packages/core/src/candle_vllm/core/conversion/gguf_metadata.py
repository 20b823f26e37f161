# SPDX-License-Identifier: MIT
"""Convert a model's config to GGUF metadata.

The model family reads the written metadata again, and must get the same config: this check finds the settings that GGUF
has no key for, and the error names them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.loading.config import EncoderConfig, ModelConfig
from candle_vllm.core.loading.pooling import read_pooling
from candle_vllm.core.loading.rope import ROPE_KINDS, RopeConfig, attention_scale, inverse_frequencies, yarn_scale
from candle_vllm.core.loading.source import ModelFiles
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.family import DIVISORS, Architecture, Family
from candle_vllm.core.models.registry import HF_FAMILIES, encoder_from_gguf, family_from_gguf
from candle_vllm.core.pooling import POOLING_METHODS, PoolingKind

Keys = dict[str, Any]
_Config = ModelConfig | EncoderConfig

logger = logging.getLogger(__name__)


def architecture(family: Family, config: ModelConfig, path: Path) -> Architecture:
    """Return the GGUF architecture of a config's model_type, from the model's own family or another one that lists it.

    Raises UnsupportedModelError if no family says how models of this type are written.
    """
    rows = {name: row for each in (*HF_FAMILIES.values(), family) for name, row in each.as_gguf.items()}
    row = rows.get(config.model_type)
    if row is None:
        raise UnsupportedModelError(
            f"{path}: {config.model_type} cannot be converted to GGUF yet (supported: {', '.join(rows)}); `isq` "
            "quantises the model while it is loaded from its folder"
        )
    return row


def describe(config: ModelConfig, row: Architecture) -> Keys:
    """Return `general.architecture`, and the model's keys with this name as prefix; xIELU's keys have no prefix."""
    keys: Keys = {
        **sizes(config),
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        row.eps: float(config.norm_eps),
        **_rope(config.rope, row.log_multiplier),
        **row.more(config),
    }
    prefixed = {key if key.startswith("xielu.") else f"{row.name}.{key}": value for key, value in keys.items()}
    return {"general.architecture": row.name} | prefixed


def sizes(config: _Config) -> Keys:
    """Return the sizes that decoders and encoders have; the keys have no prefix."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
    }


def _rope(rope: RopeConfig, log_multiplier: float | None) -> Keys:
    """Return the keys of the rotary embedding; the factors of some scalings are tensors (`computed_tensors`)."""
    keys: Keys = {"rope.freq_base": float(rope.theta), "rope.dimension_count": rope.dim}
    if rope.kind != "default" and ROPE_KINDS[rope.kind].in_gguf:
        keys |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind == "yarn":
        keys |= {
            "rope.scaling.original_context_length": rope.original_max_position,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
        if log_multiplier is not None and rope.mscale_all_dim:
            return keys | {"rope.scaling.yarn_log_multiplier": log_multiplier * rope.mscale_all_dim}
        usual = yarn_scale(rope.factor)
        if not math.isclose(scale := attention_scale(rope), usual, rel_tol=1e-6):
            keys["rope.scaling.attn_factor"] = scale / usual  # this key is a factor of yarn's own scale
    return keys


def computed_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the tensors, by name, that GGUF needs and the checkpoint lacks.

    These are divisors of the rotary frequencies, one for each pair of elements (Llama 3, longrope, Gemma 4); or weights
    [D] of query norms, all equal to a number of the config, and of key norms, all 1 (Muse Glimmer).
    """
    if factor := getattr(config, "query_norm", 0.0):
        norms = {"q": np.full(config.head_dim, factor, np.float32), "k": np.ones(config.head_dim, np.float32)}
        return {f"blk.{n}.attn_{part}_norm.weight": norms[part] for n in range(config.num_layers) for part in norms}
    if config.rope.rotated:  # a divisor of 1e30 gives a frequency of 0
        turns = np.arange(config.rope.dim // 2) < config.rope.rotated // 2
        return {DIVISORS: np.where(turns, config.rope.factor, 1e30).astype(np.float32)}
    if config.rope.kind == "llama3":
        plain = _frequencies(dataclasses.replace(config.rope, kind="default"), config)
        local = getattr(config, "local_rope", None) or config.rope  # a divisor per pair of the widest head
        more = max(0, (local.dim - config.rope.dim) // 2)
        return {DIVISORS: np.pad(plain / _frequencies(config.rope, config), (0, more), constant_values=1)}
    if config.rope.kind == "longrope":
        kinds = {"short": config.rope.short_factor, "long": config.rope.long_factor}
        return {f"rope_factors_{kind}.weight": np.array(factors, np.float32) for kind, factors in kinds.items()}
    return {}


def pooling_keys(files: ModelFiles, size: int, default: PoolingKind) -> Keys:
    """Return the pooling of a folder, or the `default`, as metadata, keys without the architecture's prefix.

    `size` is the size of a hidden state. Raises UnsupportedModelError for a pooling that GGUF lacks, and for Dense
    layers.
    """
    config = None if files.config is None else Fields(read_json(files.config), files.config)
    pooling = read_pooling(files, {}, size, default, config)
    if (files.folder / "modules.json").is_file() and "Dense" in (files.folder / "modules.json").read_text():
        raise UnsupportedModelError(
            f"{files.folder}: GGUF files are not written for embedding models with Dense layers"
        )
    if not pooling.normalize:
        logger.warning(
            "GGUF cannot express that this model's vectors are not normalised: programs that read the file would "
            "normalise them"
        )
    if (number := POOLING_METHODS[pooling.pooling].gguf) is None:
        raise UnsupportedModelError(f"{files.folder}: GGUF has no pooling_type for pooling {pooling.pooling!r}")
    return {"pooling_type": number}


# ---- read again ------------------------------------------------------------------------------------------------------

_ELSEWHERE = ("model_type", "eos_token_ids", "folded")  # described by other keys, or not part of the description
_ROUGH = ("embedding_scale", "input_scale")  # some models round these to their own type; readers of GGUF do not


def check_description(config: _Config, written: Checkpoint) -> None:
    """Raise UnsupportedModelError if planned metadata and tensors do not give `config`, as GGUF describes it."""
    name = written.metadata["general.architecture"]
    try:
        found = (encoder_from_gguf(written.metadata, written) or family_from_gguf(written.metadata, written))[1]
    except InvalidFileError as error:  # a required key has no value
        raise UnsupportedModelError(f"GGUF's {name} cannot express this model: {error}") from error
    divisors = computed_tensors(config).get(DIVISORS) if isinstance(config, ModelConfig) else None
    different = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in _ELSEWHERE and not _same(config, found, field.name, divisors)
    ]
    if different:
        raise UnsupportedModelError(f"GGUF's {name} cannot express this model's {', '.join(different)}")


def _same(config: _Config, found: _Config, name: str, divisors: np.ndarray | None) -> bool:
    ours, theirs = getattr(config, name), getattr(found, name, getattr(type(config), name, None))
    if isinstance(ours, RopeConfig) and isinstance(theirs, RopeConfig):
        read = _frequencies(theirs, found)
        read = read / divisors[: len(read)] if divisors is not None and name == "rope" else read
        scales = all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(_scales(config, ours), _scales(found, theirs)))
        return scales and np.allclose(_frequencies(ours, config), read, rtol=1e-5)
    return _alike(ours, theirs, 1e-2 if name in _ROUGH else 1e-6)


def _scales(config: _Config, rope: RopeConfig) -> tuple[float, ...]:
    """Return the scales of cos and sin and of scores, and how queries grow beyond the original context."""
    growth = (rope.query_scale, float(rope.original_max_position)) if rope.query_scale else (0.0, 0.0)
    return attention_scale(rope), getattr(config, "score_scale", 1.0), *growth


def _alike(ours: Any, theirs: Any, tolerance: float) -> bool:
    """Whether two values are equal; floats may differ by the relative `tolerance`."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        names = [field.name for field in dataclasses.fields(ours)]
        return all(_alike(getattr(ours, name), getattr(theirs, name), tolerance) for name in names)
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=tolerance)
    return ours == theirs


def _frequencies(rope: RopeConfig, config: _Config) -> np.ndarray:
    return inverse_frequencies(rope, config.max_position)
