# SPDX-License-Identifier: MIT
"""Configuration of Qwen4 (Qwen3.8-Flash-Next): Qwen3.5's with residual streams, an indexer, and hashed n-grams."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.ngram import NGramHash
from candle_vllm.core.kernels.recorded import GateKind
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec, SharedKVSpec
from candle_vllm.core.loading.config import LatentSizes
from candle_vllm.core.models import qwen3_next_config
from candle_vllm.core.models.ngram_embeddings import NGrams
from candle_vllm.core.models.qwen3_next_config import Qwen3NextConfig
from candle_vllm.core.models.residual_streams import MOST_STREAMS

_POOLS = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_HEADS, _MOST_SPAN, _MOST_HASHED = 1024, 16, 1 << 28
_USUAL = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "head_dim": 256,
          "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 1.0}  # fmt: skip
_GATES: dict[str, GateKind] = {"silu": "silu", "sigmoid": "sigmoid"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen4ExpConfig(Qwen3NextConfig):
    """Config of these models: the fields in addition to those of Qwen3.5.

    Attributes:
        streams: residual streams.
        mix_rank: rank of the matrices that mix streams to a sublayer's input.
        gate: activation of the gate of delta nets.
        ngrams: sizes of the layers with n-grams; None without such layers.
    """

    streams: int
    mix_rank: int
    gate: GateKind
    ngrams: NGrams | None

    @property
    def compresses(self) -> bool:
        """See `ModelConfig.compresses`."""
        return True

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """Keys and values, or the state of a delta net, for each layer; then index keys, or the state of n-grams."""
        assert self.index is not None
        own, more = list(super().cache_specs), list[CacheSpec]()
        for layer in range(self.num_layers):
            if layer not in self.delta_layers:
                more.append(PagedSpec(1, self.index.nope + self.rope.dim, 0))
            elif self.ngrams is not None and layer in self.ngrams.hashes:
                more.append(self.ngrams.state(self.streams * self.hidden_size))
            else:
                more.append(SharedKVSpec(layer))
        return (*own, *more)


def config_from_hf(fields: Fields, model_type: str) -> Qwen4ExpConfig:
    """Read `config.json` of qwen4_exp_text."""
    fields = fields.with_defaults(**_USUAL)
    values = {
        **fields.values,
        **dict.fromkeys((f"{fields.prefix}decoder_sparse_step", f"{fields.prefix}mlp_only_layers")),
    }
    kinds = fields.get("layer_types", list, None)
    if kinds is not None:
        named = ["full_attention" if kind == "indexed_attention" else kind for kind in kinds]
        values[f"{fields.prefix}layer_types"] = named
    base = qwen3_next_config.config_from_hf(Fields(values, fields.path, fields.prefix), "qwen4_exp_text")
    assert base.mixture is not None
    flags = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)} | {"model_type": model_type}
    mixture = dataclasses.replace(base.mixture, renormalise=fields.get("norm_topk_prob", bool, True))
    streams = fields.count("hc_count", 4, most=MOST_STREAMS)
    if streams < 2:
        raise InvalidFileError(f"{fields.path}: {fields.prefix}hc_count is {streams}; it must be 2 to {MOST_STREAMS}")
    top, pool = fields.count("indexer_budget"), fields.count("indexer_compress_ratio")
    heads, size = fields.count("indexer_n_heads", most=_MOST_HEADS), fields.count("indexer_head_dim", most=_MOST_HEADS)
    if pool not in _POOLS:
        raise UnsupportedModelError(f"{fields.path}: indexer_compress_ratio {pool} is not implemented, but {_POOLS}")
    if top % pool:
        raise InvalidFileError(f"{fields.path}: indexer_budget {top} is not a multiple of {pool} tokens of a block")
    if size < base.rope.dim or fields.count("indexer_kv_heads") != 1:
        raise UnsupportedModelError(
            f"{fields.path}: the indexer needs one key head (indexer_kv_heads), of {base.rope.dim} elements or more"
        )
    gate = fields.choice("output_gate_type", fields.get("hidden_act", str, "silu"), *_GATES)
    return Qwen4ExpConfig(
        **flags
        | {
            "mixture": mixture,
            "index": LatentSizes(heads=heads, nope=size, rope=0, latent=size, value=0),
            "index_top": top + pool - 1,
            "index_pool": pool,
        },
        streams=streams,
        mix_rank=fields.count("hc_lowrank", 320),
        gate=_GATES[gate],
        ngrams=_ngrams(fields, base),
    )


# ---- n-grams ---------------------------------------------------------------------------------------------------------


def _ngrams(fields: Fields, config: Qwen3NextConfig) -> NGrams | None:
    """The layers with n-grams, which `ple_layer_ids` counts from 1; None without such layers."""
    ids = fields.get("ple_layer_ids", list, [])
    if not all(type(each) is int and each - 1 in config.delta_layers for each in ids):
        raise InvalidFileError(f"{fields.path}: ple_layer_ids is {ids!r:.80}, not layers with delta nets, from 1 on")
    if not ids:
        return None
    size, longest = fields.count("ple_embed_dim", config.hidden_size), fields.count("ngram_size", 3, most=_MOST_SPAN)
    heads, taps = fields.count("heads_per_ngram", 8), fields.count("ple_conv_kernel_size", 4, most=_MOST_SPAN)
    count = (longest - 1) * heads
    if not 0 < count * len(ids) <= _MOST_HEADS or size % count:
        raise InvalidFileError(f"{fields.path}: ple_embed_dim {size} cannot be divided into {count} heads of n-grams")
    if taps < 2 or (taps - 1) * longest >= _MOST_SPAN:
        raise UnsupportedModelError(
            f"{fields.path}: a convolution of {taps} taps (ple_conv_kernel_size), {longest} tokens apart (ngram_size), "
            f"is not implemented: 2 taps or more, within {_MOST_SPAN} tokens, are"
        )
    if not config.eos_token_ids or not 0 <= (eos := config.eos_token_ids[0]) < config.vocab_size:
        raise InvalidFileError(f"{fields.path}: eos_token_id is missing, by which n-grams begin")
    base, padding = fields.count("ngram_vocab_size_base", 20_000_000, most=_MOST_HASHED), 128
    padding = fields.count("make_ngram_vocab_size_divisible_by", padding)
    hashes, rows, prime = dict[int, NGramHash](), dict[int, int](), base - 1
    for number, layer in enumerate(sorted(set(ids))):
        sizes = list[int]()
        while len(sizes) < count:
            prime = next(each for each in itertools.count(prime + 1) if _is_prime(each))
            sizes.append(prime)
        factors = _factors(config.vocab_size, longest, number, fields.get("seed", int, 1234))
        offsets = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
        hashes[layer - 1] = NGramHash(np.array(factors, np.int64), np.array(sizes, np.int64), offsets, eos)
        rows[layer - 1] = -(-sum(sizes) // padding) * padding
    return NGrams(size, longest, heads, taps, hashes, rows)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _factors(vocabulary: int, count: int, layer: int, seed: int) -> list[int]:
    """The factors of a layer's hashes: odd numbers from SplitMix64 (Steele et al., 2014), by which no product overflows."""
    gamma, mask, found = 0x9E3779B97F4A7C15, (1 << 64) - 1, list[int]()
    bound = max(1, ((1 << 63) - 1) // vocabulary // 2)
    for index in range(count):
        value = (seed + 10007 * layer + gamma * (index + 2)) & mask
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = ((value ^ (value >> shift)) * factor) & mask
        found.append(2 * ((value ^ (value >> 31)) % bound) + 1)
    return found
