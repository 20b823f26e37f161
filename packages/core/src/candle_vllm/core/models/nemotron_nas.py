# SPDX-License-Identifier: MIT
"""Llama Nemotron Super and Ultra: a Llama (`llama.py`) some of whose layers lack attention or the MLP, or both.

MLPs differ in size. Attention that is replaced by a matrix, as in Nemotron 51B, is not implemented.
Sources: Bercovich et al., 2024, arXiv:2411.19146 (Puzzle); `modeling_decilm.py` of the repositories.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, ClassVar

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.cache_specs import CacheSpec, SharedKVSpec
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import llama
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import LlamaConfig
from candle_vllm.core.models.local_layers import listed

# ---- config ----------------------------------------------------------------------------------------------------------

_KEYS = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")  # lists in GGUF files


@dataclasses.dataclass(frozen=True, kw_only=True)
class NasConfig(LlamaConfig):
    """Config of Llama; the layers with attention; each layer's factor of `intermediate_size`, 0 without an MLP."""

    attending: frozenset[int]
    widths: tuple[int, ...]

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig`; a layer without attention stores nothing, as if it shared an earlier layer's cache."""
        own = [*itertools.accumulate(range(self.num_layers), lambda last, n: n if n in self.attending else last)]
        return tuple(spec if n == own[n] else SharedKVSpec(own[n]) for n, spec in enumerate(super().cache_specs))


def config_from_hf(fields: Fields, model_type: str) -> NasConfig:
    """Read `config.json` of nemotron-nas, a model with remote code."""
    layers, heads = fields.count("num_hidden_layers", most=MAX_LAYERS), fields.count("num_attention_heads")
    blocks = listed(fields, "block_configs", layers, None)
    whole = [Fields({"block_configs": block}, fields.path).section("block_configs") for block in blocks]
    attention, ffn = ([block.section(part) for block in whole] for part in ("attention", "ffn"))
    groups = [block.count("n_heads_in_group") if _is_there(block, "n_heads_in_group") else 0 for block in attention]
    if not (group := max(groups)) or heads % group or {*groups} - {0, group}:
        raise UnsupportedModelError(f"{fields.path}: n_heads_in_group is {groups!r:.40}, not one divisor of {heads}")
    sizes = [_inner(block, fields.count("hidden_size")) for block in ffn]
    own = {"num_key_value_heads": heads // group, "intermediate_size": math.gcd(*sizes)}
    plain = llama.config_from_hf(Fields({**fields.values, **own}, fields.path), "llama")
    return _config(plain, groups, sizes, fields, model_type=model_type)


def _is_there(block: Fields, *known: str) -> bool:
    """Whether a block is there; settings that are not `known` are refused."""
    if other := {key for key, value in block.values.items() if value not in (None, False)} - {*known, "no_op"}:
        raise UnsupportedModelError(f"{block.path}: {min(other)} in block_configs is not implemented")
    return not block.get("no_op", bool, False)


def _inner(block: Fields, size: int) -> int:
    """The size of a layer's MLP: a number, or a factor of two thirds of E, rounded up to a multiple of 256."""
    there = _is_there(block, "ffn_mult", "intermediate_size", "hidden_act")
    block.choice("hidden_act", "silu", "silu")
    if not there or "ffn_mult" not in block:
        return block.count("intermediate_size") if there else 0
    if not 1 <= (inner := 2 * block.get("ffn_mult", float) * size / 3) <= MAX_COUNT:
        raise InvalidFileError(f"{block.path}: block_configs has an MLP of {inner!r:.40} elements")
    return int(inner) + -int(inner) % 256


def _config(plain: LlamaConfig, heads: list[int], sizes: list[int], fields: Fields, **own: Any) -> NasConfig:
    """A Llama's config with layers that lack attention, where `heads` are 0, or an MLP, where `sizes` are 0."""
    if not heads[0]:
        raise UnsupportedModelError(f"{fields.path}: a first layer without attention is not implemented")
    own["attending"] = frozenset(layer for layer, count in enumerate(heads) if count)
    return NasConfig(**vars(plain) | own, widths=tuple(each // plain.intermediate_size for each in sizes))


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> NasConfig:
    """Read GGUF metadata of deci."""
    heads, kv, sizes = said = [listed(fields, key, fields.count("block_count", most=MAX_LAYERS), None) for key in _KEYS]
    if not all(type(each) is int and 0 <= each <= MAX_COUNT for some in said for each in some):
        raise InvalidFileError(f"{fields.path}: {', '.join(_KEYS)} are {said!r:.80}, not counts")
    if len({*zip(heads, kv)} - {(0, 0)}) != 1:
        raise UnsupportedModelError(f"{fields.path}: different {' and '.join(_KEYS[:2])} in layers are not implemented")
    own = dict(zip((fields.prefix + key for key in _KEYS), (max(heads), max(kv), math.gcd(*sizes))))
    plain = llama.config_from_gguf(Fields({**fields.values, **own}, fields.path, fields.prefix), checkpoint)
    return _config(plain, heads, sizes, fields, interleaved_rotary=True)


# ---- block and model -------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in its first norm; residual is None in layer 0."""

    def __init__(self, config: NasConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.attention = self.mlp = None
        if layer in config.attending:
            self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
            self.attention = llama.Attention(config, layer, rotary, placement)
        if inner := config.intermediate_size * config.widths[layer]:
            self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
            self.mlp = GatedMLP(config.hidden_size, inner, placement, bias=config.mlp_bias)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value | None]:
        if self.attention is not None:
            normed, residual = self.attention_norm.add(x, residual)
            x = self.attention(normed, step)
        if self.mlp is not None:
            normed, residual = self.mlp_norm.add(x, residual)
            x = self.mlp(normed)
        return x, residual


class NemotronNas(llama.Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block: ClassVar[Any] = Block


def gguf_keys(config: NasConfig) -> dict[str, Any]:
    """The numbers of heads, and the sizes of MLPs, as lists with an entry for each layer."""
    has = [layer in config.attending for layer in range(config.num_layers)]
    heads, kv_heads = ([count * each for each in has] for count in (config.num_heads, config.num_kv_heads))
    return dict(zip(_KEYS, (heads, kv_heads, [width * config.intermediate_size for width in config.widths])))


FAMILY = Family(
    hf={"DeciLMForCausalLM": "nemotron-nas"},
    gguf=("deci",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=NemotronNas,
    weights=llama.WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"nemotron-nas": Architecture(name="deci", more=gguf_keys, reordered=True, unread=())},
)
