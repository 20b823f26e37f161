# SPDX-License-Identifier: MIT
"""Names of DeepSeek V4's tensors: those of transformers' modules, and those of published files."""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.deepseek_v4_config import MOST_GROUPS, DeepseekV4Config
from candle_vllm.core.models.experts import expert_names
from candle_vllm.core.quantization.tensors import StoredTensor


def _group(number: int) -> Any:
    """View of the rows of an output group."""

    def view(stored: StoredTensor, config: DeepseekV4Config) -> StoredTensor:
        return stored.rows(number * config.output_rank, (number + 1) * config.output_rank)

    return view


_ATTENTION = {
    "down:q.weight": ("q_a_proj.weight", "wq_a.weight"),
    "down:kv.weight": ("kv_proj.weight", "wkv.weight"),
    "q_norm:weight": ("q_a_norm.weight", "q_norm.weight"),
    "kv_norm:weight": ("kv_norm.weight", "kv_norm.weight"),  # transformers writes it as `norm.weight`
    "q_up:weight": ("q_b_proj.weight", "wq_b.weight"),
    "output:weight": ("o_b_proj.weight", "wo_b.weight"),
    ":sinks": ("sinks", "attn_sink"),
    "index.queries:weight": ("compressor.indexer.q_b_proj.weight", "indexer.wq_b.weight"),
    "index.weights:weight": ("compressor.indexer.scorer.weights_proj.weight", "indexer.weights_proj.weight"),
}
for _to, _hf, _own in (
    ("compressor", "compressor", "compressor"),
    ("index", "compressor.indexer", "indexer.compressor"),
):
    _ATTENTION |= {
        f"{_to}.inputs:kv.weight": (f"{_hf}.kv_proj.weight", f"{_own}.wkv.weight"),
        f"{_to}.inputs:gate.weight": (f"{_hf}.gate_proj.weight", f"{_own}.wgate.weight"),
        f"{_to}.norm:weight": (f"{_hf}.kv_norm.weight", f"{_own}.norm.weight"),
        f"{_to}:bias": (f"{_hf}.position_bias", f"{_own}.ape"),
    }
_LAYER = {
    "attention_norm:weight": ("input_layernorm.weight", "attn_norm.weight"),
    "mlp_norm:weight": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "mlp.router:weight": ("mlp.gate.weight", "ffn.gate.weight"),
    "mlp.router:correction": ("mlp.gate.e_score_correction_bias", "ffn.gate.bias"),
    "mlp.table:chosen": ("mlp.gate.tid2eid", "ffn.gate.tid2eid"),
}
for _to, (_hf, _own) in _ATTENTION.items():
    _LAYER[f"attention{'' if _to.startswith(':') else '.'}{_to}"] = f"self_attn.{_hf}", f"attn.{_own}"
for _to, _name in ("attention_streams", "attn"), ("mlp_streams", "ffn"):
    for _part, _end in ("fn", ".fn:weight"), ("base", ":base"), ("scale", ":scale"):
        _LAYER[_to + _end] = f"{_name}_hc.{_part}", f"hc_{_name}_{_part}"
for _end, _hf, _own in ("gate_up:gate.", "gate", "w1"), ("gate_up:up.", "up", "w3"), ("down:", "down", "w2"):
    _LAYER[f"mlp.shared.{_end}weight"] = f"mlp.shared_experts.{_hf}_proj.weight", f"ffn.shared_experts.{_own}.weight"


def _line(target: str, hf: str, own: str, view: Any = None) -> WeightName:
    short = own.replace(".attn.kv_norm.", ".attn.norm.")
    return WeightName(target, (f"model.{hf}", own, f"model.{own}", f"model.{short}"), None, *([view] if view else []))


def _each(names: Any) -> tuple[Any, ...]:
    return names if isinstance(names, tuple) else (names,)


WEIGHTS = [
    WeightName("embed:weight", ("model.embed_tokens.weight", "embed.weight", "model.embed.weight"), None),
    WeightName("head:weight", ("lm_head.weight", "head.weight"), None),
    WeightName("norm:weight", ("model.norm.weight", "norm.weight"), None),
    *(
        _line(f"stream_head{end}", f"hc_head.hc_{part}", f"hc_head_{part}")
        for part, end in (("fn", ".fn:weight"), ("base", ":base"), ("scale", ":scale"))
    ),
    *(_line(f"layers.{{i}}.{to}", f"layers.{{i}}.{hf}", f"layers.{{i}}.{own}") for to, (hf, own) in _LAYER.items()),
    *(
        _line(
            f"layers.{{i}}.attention.output_down.{n}:weight",
            "layers.{i}.self_attn.o_a_proj.weight",
            "layers.{i}.attn.wo_a.weight",
            _group(n),
        )
        for n in range(MOST_GROUPS)
    ),
    *(
        dataclasses.replace(line, hf=(str(line.hf_names[0]).removeprefix("model."), *_each(line.hf)))
        for line in expert_names("ffn.experts", "w1", "w3", "w2")
    ),
]
