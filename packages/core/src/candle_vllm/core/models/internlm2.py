# SPDX-License-Identifier: MIT
"""InternLM 2 and 2.5: a Llama (`llama.py`) with other names, and queries, keys and values in one matrix.

Rows of that matrix are grouped by key-value head: the query heads that share it, then its key and its value.
Source: Cai et al., 2024, arXiv:2403.17297.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import View, half_split
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, gguf_has_bias, gguf_projection
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of internlm2, a model with remote code."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    bias = fields.get("bias", bool, True)
    return LlamaConfig(**shared_from_hf(fields, model_type), qkv_bias=bias, output_bias=bias)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of internlm2."""
    return LlamaConfig(
        **shared_from_gguf(fields, checkpoint),
        qkv_bias=gguf_has_bias(checkpoint),
        output_bias="blk.0.attn_output.bias" in checkpoint.tensors,
        interleaved_rotary=True,
    )


# ---- weight names ----------------------------------------------------------------------------------------------------


def _grouped(part: str) -> View:
    """View of the rows of "q", "k" or "v" in a matrix or bias whose rows are grouped by key-value head."""

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        groups, dim = config.num_kv_heads, config.head_dim
        each = config.num_heads // groups * dim  # rows of queries in a group
        if stored.shape[:1] != (groups * (each + 2 * dim),):
            raise WeightsError(
                f"{stored.path}: tensor {stored.name} has shape {list(stored.shape)}; the model's config asks for "
                f"{groups} groups of {each + 2 * dim} rows"
            )
        first, last = {"q": (0, each), "k": (each, each + dim), "v": (each + dim, each + 2 * dim)}[part]
        starts = np.arange(groups)[:, None] * (each + 2 * dim)
        return stored.select((starts + np.arange(first, last)).reshape(-1))

    return view


def _line(target: str, hf: str, gguf: str) -> WeightName:
    return WeightName(f"layers.{{i}}.{target}", HF + hf, GG + gguf)


_TURNED = {"q": half_split("num_heads"), "k": half_split("num_kv_heads")}

WEIGHTS = [
    WeightName("embed:weight", "model.tok_embeddings.weight", "token_embd.weight"),
    WeightName("rotary:factors", None, "rope_freqs.weight"),
    _line("attention_norm:weight", "attention_norm.weight", "attn_norm.weight"),
    *(
        WeightName(
            f"layers.{{i}}.attention.qkv:{part}.{kind}",
            f"{HF}attention.wqkv.{kind}",
            gguf_projection(part, kind, _TURNED.get(part)),
            _grouped(part),
        )
        for part in "qkv"
        for kind in ("weight", "bias")
    ),
    *(_line(f"attention.output:{kind}", f"attention.wo.{kind}", f"attn_output.{kind}") for kind in ("weight", "bias")),
    _line("mlp_norm:weight", "ffn_norm.weight", "ffn_norm.weight"),
    _line("mlp.gate_up:gate.weight", "feed_forward.w1.weight", "ffn_gate.weight"),
    _line("mlp.gate_up:up.weight", "feed_forward.w3.weight", "ffn_up.weight"),
    _line("mlp.down:weight", "feed_forward.w2.weight", "ffn_down.weight"),
    WeightName("norm:weight", "model.norm.weight", "output_norm.weight"),
    WeightName("head:weight", "output.weight", "output.weight"),
]


def ignored(config: LlamaConfig) -> list[str]:
    """Names that Llama ignores, and the copy of a tied head."""
    return [*llama.ignored(config), *[r"output\.weight"] * config.tie_embeddings]


FAMILY = Family(
    hf={"InternLM2ForCausalLM": "internlm2"},
    gguf=("internlm2",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={"internlm2": Architecture(name="internlm2", reordered=True, square=True)},
)
