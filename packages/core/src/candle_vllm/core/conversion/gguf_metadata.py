"""A model's description as GGUF metadata: one row for each architecture that files are written for.

What has been written is read again by the family, and must give the model that was described: what GGUF has no key for
is found by that, and refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.layers.rotary import attention_scale, inverse_frequencies
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.registry import family_from_gguf

Keys = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How a family is described in GGUF metadata.

    Attributes:
        name: `general.architecture`.
        more: keys beyond those that all have, without the architecture's prefix.
        interleaved: q and k rows are stored in pairs of neighbours.
        fused: of a tensor's alternative names, the ones that files of this kind have.
    """

    name: str
    more: Callable[[Any], Keys] = lambda _: {}
    interleaved: bool = False
    fused: tuple[str, ...] = ()


def _window(config: ModelConfig) -> Keys:
    """One window for all layers; models with other patterns are refused when the keys are read again."""
    windows = [window for window in config.sliding_windows if window is not None]
    return {"attention.sliding_window": windows[0]} if windows else {}


def _gemma2(config: Any) -> Keys:
    caps = {"attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.final_softcap}
    return _window(config) | {key: 0.0 if cap is None else float(cap) for key, cap in caps.items()}


def _gemma3(config: Any) -> Keys:
    pattern = [window is not None for window in config.sliding_windows]
    keys = _window(config) | {"attention.sliding_window_pattern": pattern}
    keys["rope.freq_base_swa"] = float(config.local_rope.theta)
    if config.final_softcap is not None:
        keys["final_logit_softcapping"] = float(config.final_softcap)
    return keys


def _experts(config: Any) -> Keys:
    mixture = config.mixture
    keys = _window(config) | {
        "expert_count": mixture.experts,
        "expert_used_count": mixture.top_k,
        "expert_feed_forward_length": mixture.inner_size,
        "expert_weights_norm": mixture.renormalise,
    }
    if mixture.shared_size:
        keys["expert_shared_feed_forward_length"] = mixture.shared_size
    return keys


def _phi3(config: Any) -> Keys:
    """Without a window, llama.cpp wants a 0: it takes the file for an old one otherwise."""
    keys: Keys = {"attention.sliding_window": 0} | _window(config)
    keys["rope.scaling.original_context_length"] = config.rope.original_max_position
    if config.rope.kind == "longrope":
        keys["rope.scaling.attn_factor"] = attention_scale(config.rope)
    return keys


def _mixtral(config: Any) -> Keys:
    return _window(config) | {"expert_count": config.mixture.experts, "expert_used_count": config.mixture.top_k}


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("llama", _window, interleaved=True),
        "mistral": Architecture("llama", _window, interleaved=True),
        "mixtral": Architecture("llama", _mixtral, interleaved=True),
        "qwen2": Architecture("qwen2", _window),
        "qwen3": Architecture("qwen3", _window),
        "qwen2_moe": Architecture("qwen2moe", _experts),
        "qwen3_moe": Architecture("qwen3moe", _experts),
        "gemma": Architecture("gemma"),
        "gemma2": Architecture("gemma2", _gemma2),
        "gemma3_text": Architecture("gemma3", _gemma3),
        "phi3": Architecture("phi3", _phi3, fused=("attn_qkv",)),
    }
)
"""By Hugging Face's model_type."""


def architecture(config: ModelConfig, path: Path) -> Architecture:
    """The row of a model.

    Raises:
        UnsupportedModelError: there is none.
    """
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise UnsupportedModelError(
            f"{path}: GGUF files are not written for {config.model_type} yet, but for {', '.join(ARCHITECTURES)}; "
            "such a model can be quantised while it is loaded, with --isq"
        )
    return row


def describe(config: ModelConfig, row: Architecture) -> Keys:
    """The model's keys, the architecture's prefix included."""
    keys: Keys = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        **_rope(config.rope),
        **row.more(config),
    }
    return {"general.architecture": row.name} | {f"{row.name}.{key}": value for key, value in keys.items()}


def _rope(rope: RopeConfig) -> Keys:
    """The scalings of Llama 3 and of longrope are tensors (`rope_tensors`)."""
    keys: Keys = {"rope.freq_base": float(rope.theta), "rope.dimension_count": rope.dim}
    if rope.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind == "yarn":
        keys |= {
            "rope.scaling.original_context_length": rope.original_max_position,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
        usual = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
        if not math.isclose(scale := attention_scale(rope), usual, rel_tol=1e-6):
            keys["rope.scaling.attn_factor"] = scale / usual  # it multiplies what yarn gives
    return keys


def rope_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """By what each frequency is divided, [R/2], where GGUF has tensors for it: Llama 3's scaling, longrope's two."""
    if config.rope.kind == "llama3":
        plain = _frequencies(dataclasses.replace(config.rope, kind="default"), config)
        return {_DIVISORS: plain / _frequencies(config.rope, config)}
    if config.rope.kind == "longrope":
        kinds = {"short": config.rope.short_factor, "long": config.rope.long_factor}
        return {f"rope_factors_{kind}.weight": torch.tensor(factors) for kind, factors in kinds.items()}
    return {}


# ---- read again ------------------------------------------------------------------------------------------------------

_DIVISORS = "rope_freqs.weight"
_ELSEWHERE = ("model_type", "eos_token_ids", "interleaved_rotary")  # what has another word, or is no description
_ROUGH = ("embedding_scale",)  # some models round it to their own type; GGUF's readers do not


def check_description(config: ModelConfig, written: Checkpoint) -> ModelConfig:
    """What a file's metadata and tensors say, which must be the model itself.

    Raises:
        UnsupportedModelError: they say another one; the message names the settings.
    """
    _, found = family_from_gguf(written.metadata, written)
    divisors = rope_tensors(config).get(_DIVISORS)
    different = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in _ELSEWHERE and not _same(config, found, field.name, divisors)
    ]
    if different:
        raise UnsupportedModelError(
            f"GGUF's {written.metadata['general.architecture']} has no way to say this model's {', '.join(different)}"
        )
    return found


def _same(config: ModelConfig, found: ModelConfig, name: str, divisors: torch.Tensor | None) -> bool:
    ours, theirs = getattr(config, name), getattr(found, name, None)
    if isinstance(ours, RopeConfig) and isinstance(theirs, RopeConfig):
        read = _frequencies(theirs, found)
        read = read / divisors if divisors is not None and name == "rope" else read
        scales = attention_scale(ours), attention_scale(theirs)
        return torch.allclose(_frequencies(ours, config), read, rtol=1e-5) and math.isclose(*scales, rel_tol=1e-5)
    return _alike(ours, theirs, 1e-2 if name in _ROUGH else 1e-6)


def _alike(ours: Any, theirs: Any, tolerance: float) -> bool:
    """Equal, numbers as float32 holds them."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        names = [field.name for field in dataclasses.fields(ours)]
        return all(_alike(getattr(ours, name), getattr(theirs, name), tolerance) for name in names)
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=tolerance)
    return ours == theirs


def _frequencies(rope: RopeConfig, config: ModelConfig) -> torch.Tensor:
    return inverse_frequencies(rope, config.max_position)
