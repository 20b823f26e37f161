# SPDX-License-Identifier: MIT
"""DeepSeek-V2 to V3.2, GLM-4.7-Flash, GLM-5, Mistral Small 4 and Youtu: latent attention, experts in most layers.

Each block is x + attention(norm(x)), then x + mlp(norm(x)). Queries come from x or from a latent vector.
Source: DeepSeek-AI, 2024, arXiv:2405.04434 and arXiv:2412.19437.
Shapes: T tokens, H heads, L latent, R rotary dimensions, V elements of a value head, E hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.latent_attention import LatentAttention
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.views import computed
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models import sparse_index
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.deepseek_config import (
    DeepseekConfig,
    config_from_gguf,
    config_from_hf,
    gguf_keys,
    without_further_layers,
)
from candle_vllm.core.models.experts import routed_names
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Mixer, mistral3_keys
from candle_vllm.core.models.sparse_index import Index
from candle_vllm.core.models.stack import DecoderStack
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """Latent attention: x [T, E] -> [T, E]. `indexer` is the class of indexers."""

    indexer: ClassVar[type[Index]] = Index

    def __init__(self, config: DeepseekConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        hidden, queries, eps = config.hidden_size, config.num_heads * config.head_dim, config.latent_eps
        self.sizes = (config.q_rank or queries, config.kv_rank + config.rope_dim)
        shards: dict[str, int] = dict(zip(("q", "kv"), self.sizes, strict=True))
        self.down = Linear(hidden, shards, placement, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.q_rank, eps, placement) if config.q_rank else None
        self.q_up = Linear(config.q_rank, queries, placement) if config.q_rank else None
        how = {"scale": config.score_scale, "pool": config.index_pool}
        self.attend = LatentAttention(layer, config.latent, rotary, eps, placement, **how)
        results = config.num_heads * config.value_dim
        self.output = Linear(results, hidden, placement, bias=config.attention_bias)
        self.index = self.indexer(config, layer, rotary, placement) if layer in config.index_layers else None

    def __call__(self, x: Value, step: StepInput) -> Value:
        q, kv = self.down(x).split(self.sizes, dim=-1)
        if self.q_norm is not None and self.q_up is not None:
            normed = self.q_norm(q)
            q = self.q_up(normed)
            if self.index is not None:
                step.shared.pop("positions", None)  # so that their memory is used again
                step.shared["positions"] = self.index(x, normed, step)
        return self.output(self.attend(q, kv, step, step.shared.get("positions")))

    def parameters(self) -> Mapping[str, Parameter]:
        """Return no parameters: the parts have them all."""
        return {}


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: DeepseekConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.attention: Mixer = Attention(config, layer, rotary, placement)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        if config.mixture is None or layer < config.dense_layers:
            self.mlp: GatedMLP | SparseMLP = GatedMLP(config.hidden_size, config.intermediate_size, placement)
        else:
            self.mlp = SparseMLP(config.hidden_size, config.mixture, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(self.attention(normed, step), residual)
        return self.mlp(normed), residual


# ---- model -----------------------------------------------------------------------------------------------------------


class Deepseek(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, vocabulary]. `block` is the class of layers."""

    block: ClassVar[type[Any]] = Block

    def __init__(self, config: DeepseekConfig, placement: Placement) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [self.block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        tied = config.tie_embeddings
        self.head = None if tied else Embedding(config.vocab_size, config.hidden_size, placement)


# ---- weight names ----------------------------------------------------------------------------------------------------


def _half_split(first: int, config: DeepseekConfig) -> np.ndarray:
    """Indices of rows 0 .. first + R - 1; the last R are reordered from interleaved pairs to half-split order."""
    rotated = np.arange(first, first + config.rope_dim)
    return np.concatenate([np.arange(first), rotated[::2], rotated[1::2]])


def query_rows(stored: StoredTensor, config: DeepseekConfig) -> StoredTensor:
    """Rows of heads [nope | rope], in half-split rotary order even if they are stored in interleaved pairs."""
    if not config.interleaved_rotary or stored.shape[:1] != (config.num_heads * config.head_dim,):
        return stored  # the loader reports the wrong shape
    head = _half_split(config.latent.nope, config)
    return stored.select((np.arange(config.num_heads)[:, None] * config.head_dim + head).reshape(-1))


def _first_query_rows(stored: StoredTensor, config: DeepseekConfig) -> StoredTensor:
    """As `query_rows` if queries are projected from x; otherwise these rows do not rotate and stay as they are."""
    return stored if config.q_rank else query_rows(stored, config)


def _key_rows(stored: StoredTensor, config: DeepseekConfig) -> StoredTensor:
    """Rows [latent | rope] in half-split rotary order."""
    if not config.interleaved_rotary or stored.shape[:1] != (config.kv_rank + config.rope_dim,):
        return stored
    return stored.select(_half_split(config.kv_rank, config))


def _key_matrices(stored: StoredTensor, config: DeepseekConfig) -> StoredTensor:
    """The key matrices [H, L, nope], as in newer GGUF files, from the rows [H * (nope + V), L] of keys and values."""
    sizes = config.latent
    each = sizes.nope + sizes.value
    if stored.shape != (sizes.heads * each, sizes.latent):
        return stored

    def keys(matrix: np.ndarray) -> np.ndarray:
        return matrix.reshape(sizes.heads, each, sizes.latent)[:, : sizes.nope].swapaxes(1, 2)

    return computed(stored, (sizes.heads, sizes.latent, sizes.nope), keys)


def _value_matrices(stored: StoredTensor, config: DeepseekConfig) -> StoredTensor:
    """The value matrices [H, V, L] from the rows that `_key_matrices` reads."""
    sizes = config.latent
    each = sizes.nope + sizes.value
    if stored.shape != (sizes.heads * each, sizes.latent):
        return stored

    def values(matrix: np.ndarray) -> np.ndarray:
        return matrix.reshape(sizes.heads, each, sizes.latent)[:, sizes.nope :]

    return computed(stored, (sizes.heads, sizes.value, sizes.latent), values)


_AT, _TO = HF + "self_attn.", "layers.{i}.attention."


def _down(part: str, hf: tuple[str, ...], gguf: tuple[str, ...], view: Any) -> list[WeightName]:
    """The table rows of a projection of x and of its optional bias."""
    return [
        WeightName(
            f"{_TO}down:{part}.{kind}",
            tuple(f"{_AT}{name}.{kind}" for name in hf),
            tuple(f"{GG}{name}.{kind}" for name in gguf),
            view,
            view,
        )
        for kind in ("weight", "bias")
    ]


WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    WeightName("layers.{i}.attention_norm:weight", HF + "input_layernorm.weight", GG + "attn_norm.weight"),
    *_down("q", ("q_a_proj", "q_proj"), ("attn_q_a", "attn_q"), _first_query_rows),
    *_down("kv", ("kv_a_proj_with_mqa",), ("attn_kv_a_mqa",), _key_rows),
    WeightName(_TO + "q_norm:weight", _AT + "q_a_layernorm.weight", GG + "attn_q_a_norm.weight"),
    WeightName(_TO + "q_up:weight", _AT + "q_b_proj.weight", GG + "attn_q_b.weight", query_rows, query_rows),
    WeightName(_TO + "attend.norm:weight", _AT + "kv_a_layernorm.weight", GG + "attn_kv_a_norm.weight"),
    WeightName(
        _TO + "attend.keys:weight",
        _AT + "kv_b_proj.weight",
        (GG + "attn_k_b.weight", GG + "attn_kv_b.weight"),
        _key_matrices,
        _key_matrices,
    ),
    WeightName(
        _TO + "attend.values:weight",
        _AT + "kv_b_proj.weight",
        (GG + "attn_v_b.weight", GG + "attn_kv_b.weight"),
        _value_matrices,
        _value_matrices,
    ),
    WeightName(_TO + "output:weight", _AT + "o_proj.weight", GG + "attn_output.weight"),
    WeightName(_TO + "output:bias", _AT + "o_proj.bias", GG + "attn_output.bias"),
    WeightName("layers.{i}.mlp_norm:weight", HF + "post_attention_layernorm.weight", GG + "ffn_norm.weight"),
    WeightName("layers.{i}.mlp.gate_up:gate.weight", HF + "mlp.gate_proj.weight", GG + "ffn_gate.weight"),
    WeightName("layers.{i}.mlp.gate_up:up.weight", HF + "mlp.up_proj.weight", GG + "ffn_up.weight"),
    WeightName("layers.{i}.mlp.down:weight", HF + "mlp.down_proj.weight", GG + "ffn_down.weight"),
    *routed_names("mlp.gate.e_score_correction_bias"),
    *sparse_index.WEIGHTS,
    WeightName("norm:weight", "model.norm.weight", "output_norm.weight"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def ignored(config: DeepseekConfig) -> list[str]:
    """Names of tensors that are not loaded: multi-token prediction layers, buffers, copies, unused indexers."""
    last = range(config.num_layers, config.num_layers + config.extra_layers)
    extra = [rf"(model\.layers|blk)\.{layer}\..*" for layer in last]
    extra += [rf"(model\.layers|blk)\.{layer}\.(self_attn\.)?indexer[._].*" for layer in config.shared_choices]
    buffers = [r".*rotary_emb\.inv_freq", r"blk\.\d+\.attn_kv_b\.weight", r".*\.attn_rot_embd\.weight", *extra]
    return [*buffers, r"lm_head\.weight"] if config.tie_embeddings else buffers


GGUF = Architecture(
    name="deepseek2",
    more=gguf_keys,
    otherwise=without_further_layers,
    interleaved=True,
    names=lambda config: () if config.q_rank else (".attn_q.",),
    log_multiplier=0.1,
)

FAMILY = Family(
    hf={
        "DeepseekV2ForCausalLM": "deepseek_v2",
        "DeepseekV3ForCausalLM": "deepseek_v3",
        "DeepseekV32ForCausalLM": "deepseek_v32",
        "GlmMoeDsaForCausalLM": "glm_moe_dsa",
        "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
        "Mistral4ForCausalLM": "mistral4",
        "YoutuForCausalLM": "youtu",
    },
    gguf=("deepseek2", "deepseek32", "glm-dsa", "mistral4"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=lambda config, placement, _: Deepseek(config, placement),
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={
        **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), GGUF),
        "deepseek_v32": dataclasses.replace(GGUF, name="deepseek32"),
        "glm_moe_dsa": dataclasses.replace(GGUF, name="glm-dsa"),
        "mistral4": dataclasses.replace(
            GGUF,
            name="mistral4",
            more=lambda config: gguf_keys(config) | mistral3_keys(config),
            names=lambda config: (*GGUF.names(config), "gate_up_exps"),
        ),
    },
)
