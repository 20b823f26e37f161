# SPDX-License-Identifier: MIT
"""Names of experts' tensors, and config keys of experts, shared by the families that have them.

Hugging Face: one tensor per expert, or of all experts, with fused gate and up (`gate_up_proj` [X, 2F, E], gate first).
GGUF: one of all experts for each of gate, up and down, or with fused gate and up; in old files one per expert.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import View, chain, row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models.attention_names import GG, HF

_GATING = {"softmax": 1, "sigmoid": 2}


def expert_names(hf: str, *names: str, upright: View | None = None) -> list[WeightName]:
    """The table rows of the experts' matrices.

    Args:
        hf: prefix of the experts' names in a layer: "mlp.experts".
        names: names of gate, up and down: "gate_proj", "up_proj", "down_proj".
        upright: view applied first to one expert's part of a tensor of all experts.
    """
    lines = []
    for part, name in zip(("gate", "up", "down"), names, strict=True):
        hf_each, gguf_each = f"{HF}{hf}.{{e}}.{name}.weight", f"{GG}ffn_{part}.{{e}}.weight"
        gguf_all, starts = f"{GG}ffn_{part}_exps.weight", dict.fromkeys((f"{HF}{hf}.", f"{HF}mlp.experts."))
        target = f"layers.{{i}}.mlp.experts:{part}.{{e}}.weight"
        if part == "down":
            hf_all = tuple(
                start + "down_proj" if upright is None else Seen(start + "down_proj", upright) for start in starts
            )
            lines.append(WeightName(target, (hf_each, *hf_all), (gguf_all, gguf_each)))
            continue
        half = row_part(int(part == "up"), 2)
        first = half if upright is None else chain(upright, half)
        joined = tuple(Seen(start + "gate_up_proj", first) for start in starts)
        gguf_joined = Seen(f"{GG}ffn_gate_up_exps.weight", half)
        lines.append(WeightName(target, (hf_each, *joined), (gguf_all, gguf_each, gguf_joined)))
    return lines


def expert_count(fields: Fields, *keys: str) -> int:
    """The number of experts (or per token), by the first present key: transformers 5 renamed the keys."""
    return fields.count(next((key for key in keys if key in fields), keys[0]))


def in_all_layers(mixture: Mixture, layers: int) -> dict[str, Any]:
    """The fields of a `LlamaConfig` for experts in all layers."""
    return {"mixture": mixture, "num_experts": mixture.experts, "sparse_layers": frozenset(range(layers))}


def dense_layers(fields: Fields, layers: int, usual: int) -> int:
    """The number of first layers without experts: by mlp_layer_types, else first_k_dense_replace, else `usual`."""
    kinds = fields.get("mlp_layer_types", list, [])
    dense = [*kinds, "sparse"].index("sparse") if kinds else fields.get("first_k_dense_replace", int, usual)
    if kinds and kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise UnsupportedModelError(
            f"{fields.path}: mlp_layer_types must have one entry for each of the {layers} layers: dense for the first "
            "ones, then sparse"
        )
    return dense


def shared_names(hf: str) -> list[WeightName]:
    """The table rows of the shared expert; `hf` is its name in a layer: "mlp.shared_expert"."""
    return [
        WeightName(
            f"layers.{{i}}.mlp.shared.{target}weight", f"{HF}{hf}.{name}_proj.weight", f"{GG}ffn_{name}_shexp.weight"
        )
        for target, name in (("gate_up:gate.", "gate"), ("gate_up:up.", "up"), ("down:", "down"))
    ]


def routed_names(*corrections: str, router: str = "mlp.gate") -> list[WeightName]:
    """The table rows of a router, of its experts and of the shared expert.

    Args:
        corrections: possible names of the router's correction bias in a layer; empty for a router without it.
        router: the router's name in a layer.
    """
    to, hf = "layers.{i}.mlp.router:", tuple(HF + name for name in corrections)
    return [
        WeightName(f"{to}weight", f"{HF}{router}.weight", f"{GG}ffn_gate_inp.weight"),
        *([WeightName(f"{to}correction", hf if hf[1:] else hf[0], f"{GG}exp_probs_b.bias")] if hf else []),
        *expert_names("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *shared_names("mlp.shared_experts"),
    ]


def sigmoids_from_hf(fields: Fields, *, shared_size: int = 0, scale: str = "routed_scaling_factor") -> Mixture:
    """Experts scored by sigmoids and chosen in groups with a correction bias, from the config keys of GLM and Step.

    `scale` is the key of the factor of the experts' weights.
    """
    return Mixture(
        experts=expert_count(fields, "n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
        top_k=expert_count(fields, "num_experts_per_tok", "moe_top_k"),
        inner_size=fields.count("moe_intermediate_size"),
        scoring="sigmoid",
        renormalise=fields.get("norm_topk_prob", bool, True),
        groups=fields.count("n_group", 1),
        top_groups=fields.count("topk_group", 1),
        scale=fields.get(scale, float, 1.0),
        correction=True,
        shared_size=shared_size,
    )


def sigmoids_from_gguf(fields: Fields, *, shared_size: int = 0, correction: bool = True) -> Mixture:
    """Experts scored by sigmoids and chosen in groups, from GGUF metadata."""
    sigmoid = _GATING["sigmoid"]
    if (gating := fields.get("expert_gating_func", int, sigmoid)) != sigmoid:
        key = f"{fields.prefix}expert_gating_func"
        raise UnsupportedModelError(f"{fields.path}: {key} is {gating}; implemented: {sigmoid} (sigmoid)")
    return Mixture(
        experts=fields.count("expert_count"),
        top_k=fields.count("expert_used_count"),
        inner_size=fields.count("expert_feed_forward_length"),
        scoring="sigmoid",
        renormalise=fields.get("expert_weights_norm", bool, True),
        groups=fields.count("expert_group_count", 1),
        top_groups=fields.count("expert_group_used_count", 1),
        scale=fields.get("expert_weights_scale", float, 0.0) or 1.0,  # llama.cpp writes 0 for a model without a scale
        correction=correction,
        shared_size=shared_size,
    )


def sparse_in_gguf(checkpoint: Checkpoint, layers: int) -> frozenset[int]:
    """The layers with a router."""
    return frozenset(i for i in range(layers) if f"blk.{i}.ffn_gate_inp.weight" in checkpoint.tensors)


def without_next_tokens(fields: Fields, layers: int) -> int:
    """GGUF's number of layers without the multi-token prediction layers, which only a draft head runs."""
    count = fields.get("nextn_predict_layers", int, 0)
    if not 0 <= count < layers:
        raise InvalidFileError(
            f"{fields.path}: {fields.prefix}nextn_predict_layers is {count}; it must be below the {layers} layers"
        )
    return layers - count


# ---- what is written to GGUF -----------------------------------------------------------------------------------------


def count_keys(mixture: Mixture) -> dict[str, Any]:
    """The number of experts, and of experts per token."""
    return {"expert_count": mixture.experts, "expert_used_count": mixture.top_k}


def size_keys(mixture: Mixture) -> dict[str, Any]:
    """The keys of `count_keys`, and the size of an expert."""
    return count_keys(mixture) | {"expert_feed_forward_length": mixture.inner_size}


def sigmoid_keys(config: Any) -> dict[str, Any]:
    """The keys of `size_keys`, for experts scored by sigmoids."""
    return size_keys(config.mixture) | {"expert_gating_func": _GATING["sigmoid"]}


def routed_keys(mixture: Mixture) -> dict[str, Any]:
    """The metadata of experts in DeepSeek and in families that choose experts as it does."""
    keys: dict[str, Any] = size_keys(mixture) | {
        "expert_shared_count": mixture.shared_size // mixture.inner_size,
        "expert_gating_func": _GATING[mixture.scoring],
        "expert_weights_norm": mixture.renormalise,
        "expert_weights_scale": float(mixture.scale),
    }
    if is_grouped(mixture):
        keys |= {"expert_group_count": mixture.groups, "expert_group_used_count": mixture.top_groups}
    return keys


def is_grouped(mixture: Mixture) -> bool:
    """Whether groups limit the choice of experts: llama.cpp refuses a file in which all groups are chosen."""
    return mixture.top_groups < mixture.groups


def ungrouped(config: Any) -> dict[str, Any]:
    """The config field `mixture` with one group if all groups are chosen, which limits nothing; otherwise no fields."""
    mixture = config.mixture
    return (
        {}
        if mixture is None or is_grouped(mixture)
        else {"mixture": dataclasses.replace(mixture, groups=1, top_groups=1)}
    )
