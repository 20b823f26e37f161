# SPDX-License-Identifier: MIT
"""Names of Inkling's tensors: those of transformers' modules, and those of published files, which begin with model.llm.

Published files have the rows of gate and up alternately.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.loading.views import View, chain, computed, entry, every_other, flattened, row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models.inkling_config import MOST_SHARED, InklingConfig
from candle_vllm.core.quantization.tensors import StoredTensor


def _tokens(stored: StoredTensor, config: Any) -> StoredTensor:
    """The rows of tokens with logits."""
    return stored.rows(0, config.tokens) if stored.shape and stored.shape[0] > config.tokens else stored


def _for_all(stored: StoredTensor, config: Any) -> StoredTensor:
    """The correction bias of the routed experts, and a larger one with which the shared experts are always chosen."""

    def fill(values: np.ndarray, more: int) -> np.ndarray:
        return np.append(values, [2 * np.abs(values).max(initial=1) + 1] * more)  # scores are at most 1

    return _of_experts(stored, config, config.num_experts, fill)


def _repeated(stored: StoredTensor, config: Any) -> StoredTensor:
    """A factor [1] of all experts as the factor of each."""
    return _of_experts(stored, config, 1, lambda values, more: np.repeat(values, 1 + more))


def _of_experts(stored: StoredTensor, config: InklingConfig, count: int, fill: Any) -> StoredTensor:
    assert config.mixture is not None
    if stored.shape != (count,):
        return stored  # the loader reports a wrong shape
    every = config.mixture.experts
    return computed(stored, (every,), lambda values: fill(values, every - count).astype(np.float32), "F32")


def _shared(number: int, then: View) -> View:
    """View of one of the shared experts' matrices [S, R, C]."""

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        common = config.mixture.experts - config.num_experts
        if stored.shape[:1] != (common,):
            raise WeightsError(
                f"{stored.path}: tensor {stored.name} has shape {list(stored.shape)}, not {common} experts"
            )
        return then(entry(stored, number), config)

    return view


def _line(target: str, hf: str, own: str, view: View | None = None) -> WeightName:
    """A line with a layer's name in transformers' modules and in published files."""
    return WeightName(
        f"layers.{{i}}.{target}", (f"model.layers.{{i}}.{hf}", f"model.llm.layers.{{i}}.{own}"), None, view
    )


_PLAIN = {
    "attention_norm:weight": ("input_layernorm.weight", "attn_norm.weight"),
    **{
        f"attention.qkv:{part}.weight": (f"self_attn.{part}_proj.weight", f"attn.w{part}_d{end}.weight")
        for part, end in zip("qkvr", "uvvu", strict=True)
    },
    "attention.q_norm:weight": ("self_attn.q_norm.weight", "attn.q_norm.weight"),
    "attention.k_norm:weight": ("self_attn.k_norm.weight", "attn.k_norm.weight"),
    "attention:profiles": ("self_attn.rel_logits_proj.proj", "attn.rel_logits_proj.proj"),
    "attention.output:weight": ("self_attn.o_proj.weight", "attn.wo_ud.weight"),
    "mlp_norm:weight": ("post_attention_layernorm.weight", "mlp_norm.weight"),
    "mlp.router:weight": ("mlp.gate.weight", "mlp.gate.weight"),
    "mlp.down:weight": ("mlp.down_proj.weight", "mlp.w2_md.weight"),
    "mlp.scale:factor": ("mlp.global_scale", "mlp.global_scale"),
}
_CONVOLUTIONS = {
    "attention.conv:k": ("self_attn.k_sconv", "attn.k_sconv"),
    "attention.conv:v": ("self_attn.v_sconv", "attn.v_sconv"),
    "attention_conv:x": ("attn_sconv", "attn_sconv"),
    "mlp_conv:x": ("mlp_sconv", "mlp_sconv"),
}
_STACKS = {  # experts: a stack of transformers, its view; a stack of published files, its view
    "gate": ("gate_up_proj", row_part(0, 2), "w13_weight", every_other(0)),
    "up": ("gate_up_proj", row_part(1, 2), "w13_weight", every_other(1)),
    "down": ("down_proj", chain(), "w2_weight", chain()),
}


def _experts(part: str) -> list[WeightName]:
    """The lines of gate, up or down of routed and shared experts."""
    name, view, own, own_view = _STACKS[part]
    to, hf, llm = f"layers.{{i}}.mlp.experts:{part}.", "model.layers.{i}.mlp.", "model.llm.layers.{i}.mlp."
    lines = [
        WeightName(
            f"{to}{{e}}.weight", (Seen(f"{hf}experts.{name}", view), Seen(f"{llm}experts.{own}", own_view)), None
        )
    ]
    for number in range(MOST_SHARED):
        names = (
            Seen(f"{hf}shared_experts.{part}_proj", _shared(number, chain())),
            Seen(f"{llm}shared_experts.shared_{own}", _shared(number, own_view)),
        )
        lines.append(WeightName(f"{to}shared{number}.weight", names, None))
    return lines


WEIGHTS = [
    WeightName("embed:weight", ("model.embed_tokens.weight", "model.llm.embed.weight"), None, _tokens),
    WeightName("embed_norm:weight", ("model.embed_tokens.embed_norm.weight", "model.llm.embed_norm.weight"), None),
    WeightName("norm:weight", ("model.norm.weight", "model.llm.norm.weight"), None),
    WeightName("head:weight", ("lm_head.weight", "model.llm.unembed.weight"), None, _tokens),
    *(_line(to, *names) for to, names in _PLAIN.items()),
    *(_line(to, f"{hf}.conv1d.weight", f"{own}.weight", flattened) for to, (hf, own) in _CONVOLUTIONS.items()),
    _line("mlp.router:correction", "mlp.gate.e_score_correction_bias", "mlp.gate.bias", _for_all),
    _line("mlp.router:expert_scale", "mlp.gate.global_scale", "mlp.gate.global_scale", _repeated),
    *(
        WeightName(
            f"layers.{{i}}.mlp.gate_up:{part}.weight",
            (
                f"model.layers.{{i}}.mlp.{part}_proj.weight",
                Seen("model.llm.layers.{i}.mlp.w13_dn.weight", every_other(number)),
            ),
            None,
        )
        for number, part in enumerate(("gate", "up"))
    ),
    *(line for part in _STACKS for line in _experts(part)),
]


def ignored(config: InklingConfig) -> list[str]:
    """Names of tensors that are not loaded: layers for multi-token prediction, and the embeddings of audio."""
    del config
    return [r"(model\.)?(mtp|audio)\..*"]
