# SPDX-License-Identifier: MIT
"""Step 3.5 and 3.7 Flash: Llama's layers (`llama.py`) with a sigmoid gate for each head, windows, and experts.

Layers with a window have more query heads and their own rotary settings. Experts are Laguna's (`laguna.py`). Some
layers clamp both factors of SwiGLU. Multi-token prediction layers, which follow the last layer, are not loaded.
Source: StepFun, 2026, the model cards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import layer_windows, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import plus_one
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import hy_v3, laguna, llama
from candle_vllm.core.models.attention_names import HF, also_named, local_keys
from candle_vllm.core.models.experts import expert_count, sigmoids_from_gguf, sigmoids_from_hf, sparse_in_gguf
from candle_vllm.core.models.family import BIASES, Architecture, Family
from candle_vllm.core.models.glm4_moe import later_layers
from candle_vllm.core.models.llama import Llama, LlamaConfig, MLPGate
from candle_vllm.core.models.local_layers import (
    heads_by_layer,
    listed,
    local_from_gguf,
    refuse_others,
    ropes_by_kind,
    with_ropes,
)
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- config ----------------------------------------------------------------------------------------------------------

_GATES: dict[float | None, MLPGate] = {None: "silu", 0: "silu", 7: "silu_7", 16: "silu_16"}


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of step3p5, in transformers' form or with the keys and lists of published files."""
    layers, prefix = fields.count("num_hidden_layers"), fields.prefix
    kinds = listed(fields, "layer_types", layers, "full_attention")
    changed = {"layer_types": kinds, "rope_parameters": {}, "rope_theta": None}
    values = {prefix + "rms_norm_eps": 1e-5, **fields.values, **{prefix + key: changed[key] for key in changed}}
    plain = Fields(values, fields.path, prefix)
    names = {"num_key_value_heads": "num_attention_groups"} if "num_attention_groups" in fields else {}
    shared, other = shared_from_hf(plain, model_type, names=names), fields.section("attention_other_setting")
    dim, bias = shared["head_dim"], fields.get("attention_bias", bool, False)
    usual = dict.fromkeys(("use_head_wise_attn_gate", "use_moe_router_bias", "norm_expert_weight"), True)
    usual |= {"mlp_bias": False, "moe_router_activation": "sigmoid", "query_pre_attn_scalar": float(dim)}
    usual |= {"use_rope_layers": [], "yarn_only_types": ["full_attention"]}
    refuse_others(fields, usual)
    refuse_others(other, {"num_attention_groups": shared["num_kv_heads"], "head_dim": dim})
    windows = layer_windows(plain, layers, fields.get("sliding_window", int, None)) or ()
    more = fields.count("num_sliding_attention_heads", other.count("num_attention_heads", shared["num_heads"]))
    heads = [shared["num_heads"] if window is None else more for window in windows]
    own = {"sliding_windows": windows, "sparse_layers": _sparse(fields, layers), "qkv_bias": bias, "output_bias": bias}
    own |= ropes_by_kind(with_ropes(fields, windows), dim, windows, (1e4, 1.0), (1e4, 1.0))
    shared_size = expert_count(fields, "share_expert_dim", "share_expert_dims")
    mixture = sigmoids_from_hf(fields, shared_size=shared_size, scale="moe_router_scaling_factor")
    return _step(shared | own, heads, mixture, fields, "swiglu_limits", "swiglu_limits_shared")


def _sparse(fields: Fields, layers: int) -> frozenset[int]:
    """The layers with experts; by default all but the first three."""
    if "mlp_layer_types" in fields:
        return frozenset(n for n, kind in enumerate(listed(fields, "mlp_layer_types", layers, "")) if kind == "sparse")
    named = fields.get("moe_layers_enum", str, ",".join(map(str, range(3, layers)))).split(",")
    if not all(number.strip().isdecimal() for number in named):
        raise InvalidFileError(f"{fields.path}: {fields.prefix}moe_layers_enum is {','.join(named)!r:.80}, not numbers")
    return frozenset(map(int, named)) & frozenset(range(layers))


def _step(shared: dict[str, Any], heads: Sequence[int], mixture: Mixture, fields: Fields, *limits: str) -> LlamaConfig:
    """Make the config; `limits` are the keys of SwiGLU's limits in routed experts and in other feed-forward layers."""
    listed_limits = [listed(fields, key, len(heads), 0) for key in limits]
    for key, found in zip(limits, listed_limits, strict=True):
        if not all(limit in (*_GATES,) for limit in found):
            raise UnsupportedModelError(f"{fields.path}: {fields.prefix}{key} is {found!r:.80}; implemented: 7 and 16")
    gates = tuple((_GATES[routed], _GATES[other]) for routed, other in zip(*listed_limits, strict=True))
    own = heads_by_layer(heads, shared["num_kv_heads"]) | {"gate": "sigmoid", "qk_norm": True, "mlp_gates": gates}
    return LlamaConfig(**shared | own, mixture=mixture, num_experts=mixture.experts)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of step35; layers without a window rotate half of the stored number of elements."""
    shared, heads = local_from_gguf(fields, checkpoint)
    rope, sparse = shared["rope"], sparse_in_gguf(checkpoint, len(heads))
    shared |= {"rope": dataclasses.replace(rope, dim=rope.dim // 2), "sparse_layers": sparse}
    mixture = sigmoids_from_gguf(fields, shared_size=fields.count("expert_shared_feed_forward_length"))
    return _step(shared, heads, mixture, fields, "swiglu_clamp_exp", "swiglu_clamp_shexp")


# ---- weight names ----------------------------------------------------------------------------------------------------


def _of_full_layers(stored: StoredTensor, config: LlamaConfig) -> StoredTensor:
    """GGUF's divisors of frequencies, cut to the length for layers without a window; only these use divisors."""
    return stored.rows(0, min(config.rope.dim // 2, stored.shape[0]))


def _line(line: WeightName) -> WeightName:
    if line.target == "rotary:factors":
        return dataclasses.replace(line, gguf_view=_of_full_layers)
    return dataclasses.replace(line, hf_view=plus_one) if line.target.endswith("norm:weight") else line


_PUBLISHED = {"mlp.router:weight": HF + "moe.gate.weight", "mlp.router:correction": HF + "moe.router_bias"}
_PUBLISHED |= {f"mlp.experts:{part}.{{e}}.weight": f"{HF}moe.{part}_proj.weight" for part in ("gate", "up", "down")}
for _part, _target in ("gate", "gate_up:gate."), ("up", "gate_up:up."), ("down", "down:"):
    _PUBLISHED[f"mlp.shared.{_target}weight"] = f"{HF}share_expert.{_part}_proj.weight"
WEIGHTS = also_named(map(_line, laguna.WEIGHTS), _PUBLISHED)


def ignored(config: LlamaConfig) -> list[str]:
    """Names that Llama ignores, and multi-token prediction layers."""
    return [*llama.ignored(config), *later_layers(config.num_layers)]


def gguf_keys(config: LlamaConfig) -> dict[str, Any]:
    """The GGUF metadata: Hy3's, lists by layer, and twice the rotated elements of layers without a window."""
    heads, kv_heads = zip(*map(config.heads, range(config.num_layers)), strict=True)
    limits = ([float(gate.removeprefix("silu").strip("_") or 0) for gate in gates] for gates in zip(*config.mlp_gates))
    return {
        **hy_v3.gguf_keys(config),
        "attention.sliding_window": 0,
        "attention.sliding_window_pattern": [window is not None for window in config.sliding_windows],
        **local_keys(config),
        "attention.head_count": [*heads],
        "attention.head_count_kv": [*kv_heads],
        "rope.dimension_count": 2 * config.rope.dim,
        "rope.dimension_count_swa": (config.local_rope or config.rope).dim,
        **dict(zip(("swiglu_clamp_exp", "swiglu_clamp_shexp"), limits, strict=True)),
    }


FAMILY = Family(
    hf={"Step3p5ForCausalLM": "step3p5"},
    gguf=("step35",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={"step3p5": Architecture(name="step35", more=gguf_keys, head=True, unread=BIASES)},
)
