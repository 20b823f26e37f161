# SPDX-License-Identifier: MIT
"""Laguna: Llama's layers (`llama.py`) with a gate on attention's output, windows in most layers, and experts.

The gate is softplus of a projection of attention's input, for each head (XS.2) or each element (M.1). Layers with a
window have more query heads and their own rotary settings. Experts are scored by sigmoids and chosen with a
correction bias, as in DeepSeek-V3; a shared expert is added. Source: Poolside, 2026, the model cards.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import layer_windows, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import hy_v3, llama
from candle_vllm.core.models.attention_names import GG, HF, local_keys
from candle_vllm.core.models.experts import (
    dense_layers,
    expert_names,
    shared_names,
    sigmoids_from_gguf,
    sigmoids_from_hf,
)
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig
from candle_vllm.core.models.local_layers import by_layer, heads_by_layer, local_from_gguf, ropes_by_kind

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of laguna."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    for key in ("moe_apply_router_weight_on_input", "moe_router_logit_softcapping"):
        if fields.values.get(key):
            raise UnsupportedModelError(f"{fields.path}: {key} is {fields.values[key]!r:.20}, which is not implemented")
    shared = shared_from_hf(Fields(dict(fields.values) | {"rope_parameters": {}}, fields.path), model_type)
    layers, bias = shared["num_layers"], fields.get("attention_bias", bool, False)
    window = fields.with_absent(sliding_window=512).get("sliding_window", int, None)
    windows = layer_windows(fields, layers, window) or (None,) * layers
    shared_size = fields.count("shared_expert_intermediate_size")
    mixture = sigmoids_from_hf(fields, shared_size=shared_size, scale="moe_routed_scaling_factor")
    own = {
        "sliding_windows": windows,
        "qkv_bias": bias,
        "output_bias": bias,
        "wide_gate": _is_wide(fields),
        "sparse_layers": frozenset(range(dense_layers(fields, layers, 1), layers)),
    }
    own |= ropes_by_kind(_by_kind(fields), shared["head_dim"], windows, (5e5, 0.5), (1e4, 1.0))
    heads = by_layer(fields, "num_attention_heads_per_layer", layers, shared["num_heads"], further=True)
    return _laguna(shared | own, heads, mixture)


def _by_kind(fields: Fields) -> Fields:
    """The config with `rope_parameters` by kind of layer; earlier files have one for all, and `swa_rope_parameters`."""
    given = fields.section("rope_parameters").values
    if not given or any(isinstance(value, dict) for value in given.values()):
        return fields
    share = {"partial_rotary_factor": fields.get("partial_rotary_factor", float, 1.0)}
    local = fields.section("swa_rope_parameters").values or given
    kinds = {"full_attention": share | dict(given), "sliding_attention": share | dict(local)}
    return Fields({**fields.values, "rope_parameters": kinds}, fields.path)


def _is_wide(fields: Fields) -> bool:
    """Whether the gate has a value for each element, not for each head."""
    kinds = {"True": False, "per-head": False, "per-element": True}
    stored = fields.get("gating_types", list, []) or [fields.values.get("gating", True)]
    stored = [str(kind).replace("_", "-") for kind in stored]
    if len(set(stored)) != 1 or stored[0] not in kinds:
        raise UnsupportedModelError(f"{fields.path}: gating is {stored!r:.80}; implemented: per-head and per-element")
    return kinds[stored[0]]


def _laguna(shared: dict[str, Any], heads: tuple[int, ...], mixture: Mixture) -> LlamaConfig:
    own: dict[str, Any] = heads_by_layer(heads, shared["num_kv_heads"]) | {"gate": "softplus"}
    return LlamaConfig(**shared | own, qk_norm=True, mixture=mixture, num_experts=mixture.experts)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of laguna."""
    shared, heads = local_from_gguf(fields, checkpoint)
    gate, dense = checkpoint.tensors.get("blk.0.attn_gate.weight"), fields.get("leading_dense_block_count", int, 0)
    own = {
        "wide_gate": gate is not None and gate.shape[0] != heads[0],
        "sparse_layers": frozenset(range(dense, shared["num_layers"])),
    }
    mixture = sigmoids_from_gguf(fields, shared_size=fields.count("expert_shared_feed_forward_length"))
    return _laguna(shared | own, heads, mixture)


# ---- weight names ----------------------------------------------------------------------------------------------------

_CORRECTIONS = tuple(f"{HF}mlp.{part}.e_score_correction_bias" for part in ("gate", "experts"))
_SHARED = zip(shared_names("mlp.shared_expert"), shared_names("mlp.shared_experts"), strict=True)
WEIGHTS = [
    *llama.WEIGHTS,
    WeightName("layers.{i}.mlp.router:weight", HF + "mlp.gate.weight", GG + "ffn_gate_inp.weight"),
    WeightName("layers.{i}.mlp.router:correction", _CORRECTIONS, GG + "exp_probs_b.bias"),
    *expert_names("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    *(WeightName(old.target, (str(old.hf), str(new.hf)), old.gguf) for old, new in _SHARED),
]


def gguf_keys(config: LlamaConfig) -> dict[str, Any]:
    """The GGUF metadata of a Laguna in addition to the keys of every model; the numbers of heads are a list."""
    heads, local = [config.heads(layer)[0] for layer in range(config.num_layers)], config.local_rope
    keys = hy_v3.gguf_keys(config) | local_keys(config) | {"attention.head_count": heads}
    return keys | ({} if local is None else {"rope.dimension_count_swa": local.dim})


FAMILY = Family(
    hf={"LagunaForCausalLM": "laguna"},
    gguf=("laguna",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"laguna": Architecture(name="laguna", more=gguf_keys)},
)
