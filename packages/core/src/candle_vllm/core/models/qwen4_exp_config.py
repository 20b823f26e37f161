# SPDX-License-Identifier: MIT
"""Configuration of Qwen4 (Qwen3.8-Flash-Next): Qwen3.5's with residual streams, an indexer, and hashed n-grams."""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import GateKind
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec, SharedKVSpec
from candle_vllm.core.loading.config import LatentSizes
from candle_vllm.core.models import qwen3_next_config
from candle_vllm.core.models.ngram_hash import NGrams, ngrams_from_hf
from candle_vllm.core.models.qwen3_next_config import Qwen3NextConfig
from candle_vllm.core.models.residual_streams import MOST_STREAMS

_POOLS = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_HEADS = 1024
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
    def stream_count(self) -> int:
        return self.streams

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
    values = dict(fields.values) | {f"{fields.prefix}{key}": None for key in ("decoder_sparse_step", "mlp_only_layers")}
    kinds = fields.get("layer_types", list, None)
    if kinds is not None:
        named = ["full_attention" if kind == "indexed_attention" else kind for kind in kinds]
        values[f"{fields.prefix}layer_types"] = named
    base = qwen3_next_config.config_from_hf(Fields(values, fields.path, fields.prefix), "qwen4_exp_text")
    assert base.mixture is not None
    mixture = dataclasses.replace(base.mixture, renormalise=fields.get("norm_topk_prob", bool, True))
    base = dataclasses.replace(base, mixture=mixture, model_type=model_type)
    if fields.count("indexer_kv_heads") != 1:
        raise UnsupportedModelError(f"{fields.path}: indexer_kv_heads other than 1 is not implemented")
    ends = fields.token_ids("text_eos_token_id") or base.eos_token_ids
    eos, sizes = next(iter(ends), None), (base.hidden_size, base.vocab_size)
    return qwen4_config(
        fields,
        base,
        index=tuple(fields.count(f"indexer_{key}") for key in ("n_heads", "head_dim", "budget", "compress_ratio")),
        streams=fields.count("hc_count", 4),
        mix_rank=fields.count("hc_lowrank", 320),
        gate=_GATES[fields.choice("output_gate_type", fields.get("hidden_act", str, "silu"), *_GATES)],
        ngrams=ngrams_from_hf(fields, base.delta_layers, *sizes, eos),
    )


def qwen4_config(
    fields: Fields, base: Qwen3NextConfig, *, index: tuple[int, ...], streams: int, **own: Any
) -> Qwen4ExpConfig:
    """Make the config from that of Qwen3.5.

    Args:
        fields: the file, for errors.
        base: Qwen3.5's config.
        index: heads of the indexer, their size, positions that are chosen, and positions of a group.
        streams, own: the further fields.
    """
    flags: dict[str, Any] = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    heads, size, top, pool = index
    if not 2 <= streams <= MOST_STREAMS:
        raise InvalidFileError(f"{fields.path}: there are {streams} residual streams; 2 to {MOST_STREAMS} are possible")
    if pool not in _POOLS:
        raise UnsupportedModelError(f"{fields.path}: groups of {pool} positions are not implemented, but {_POOLS}")
    if top % pool or not base.rope.dim <= size <= _MOST_HEADS or heads > _MOST_HEADS:
        raise InvalidFileError(
            f"{fields.path}: an indexer of {heads} heads of {size} elements, which chooses {top} positions in groups "
            f"of {pool}, is not possible: whole groups, and {base.rope.dim} to {_MOST_HEADS} elements are"
        )
    latent = LatentSizes(heads=heads, nope=size, rope=0, latent=size, value=0)
    flags |= {"index": latent, "index_top": top + pool - 1, "index_pool": pool}
    return Qwen4ExpConfig(**flags, streams=streams, **own)
