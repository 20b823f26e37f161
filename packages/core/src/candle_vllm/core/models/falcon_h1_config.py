# SPDX-License-Identifier: MIT
"""Configuration of Falcon-H1: Llama's, with the shapes of Mamba 2 and the factors of the weights."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.cache_specs import CacheSpec
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.llama import LlamaConfig
from candle_vllm.core.models.mamba2 import HYBRID_KEYS, MambaSizes, mamba_keys, sizes_from_gguf, sizes_from_hf


class Factors(NamedTuple):
    """Factors of the results of matrices and of the last norm; `inputs` has those of z, x, B, C and dt."""

    embed: float = 1.0
    head: float = 1.0
    q: float = 1.0
    k: float = 1.0
    v: float = 1.0
    output: float = 1.0
    gate: float = 1.0
    down: float = 1.0
    inputs: tuple[float, ...] = (1.0,) * 5
    result: float = 1.0
    norm: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconH1Config(LlamaConfig):
    """Config of these models: the fields in addition to those of Llama.

    Attributes:
        mamba: shapes of Mamba 2.
        factors: factors of the weights, from which the scales of `LlamaConfig` and of `mamba` are computed. None if
            the stored weights already contain them.
        folded: factors that are multiplied into the weights while a GGUF file is written; None otherwise.
    """

    mamba: MambaSizes
    factors: Factors | None
    folded: Factors | None = None

    @property
    def mamba_layers(self) -> frozenset[int]:
        """All layers."""
        return frozenset(range(self.num_layers))

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig`: the pages of all layers, then the states of all layers."""
        return (*super().cache_specs, *(self.mamba.spec,) * self.num_layers)


def config_from_hf(fields: Fields, model_type: str) -> FalconH1Config:
    """Read `config.json` of falcon_h1."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    for key in ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias"):
        if fields.get(key, bool, False):
            raise UnsupportedModelError(f"{fields.path}: {key} is not implemented for this model")
    shared, normed = shared_from_hf(fields, model_type), fields.get("mamba_rms_norm", bool, False)
    inner = fields.count("mamba_d_ssm", fields.count("mamba_expand", 2) * shared["hidden_size"])
    sizes = sizes_from_hf(fields, HYBRID_KEYS, inner=inner, normed=normed)
    last = normed and fields.get("mamba_norm_before_gate", bool, True)
    every = _factors(fields)
    if every != Factors() and any(size % 16 for size in (sizes.inner, sizes.parts[1], shared["intermediate_size"])):
        raise UnsupportedModelError(f"{fields.path}: with multipliers, 16 must divide Mamba's and feed-forward sizes")
    return FalconH1Config(**shared | scales(every, dataclasses.replace(sizes, gate_last=last), shared["head_dim"]))


def _factors(fields: Fields) -> Factors:
    """The factor of each matrix: the product of its multipliers in `config.json`."""

    def several(key: str, count: int) -> list[float]:
        given = fields.values.get(key)
        values = [1.0] * count if given is None else given if isinstance(given, list) else [given]
        if len(values) != count or not all(type(each) in (int, float) and 0 < each <= 1e6 for each in values):
            raise InvalidFileError(f"{fields.path}: {key} is {given!r:.80}, not {count} number(s) in (0, 1e6]")
        return values

    def one(name: str) -> float:
        return several(f"{name}_multiplier", 1)[0]

    attended, (gate, down) = one("attention_in"), several("mlp_multipliers", 2)
    return Factors(
        embed=one("embedding"),
        head=one("lm_head"),
        q=attended,
        k=attended * one("key"),
        v=attended,
        output=one("attention_out"),
        gate=gate,
        down=down,
        inputs=tuple(one("ssm_in") * each for each in several("ssm_multipliers", 5)),
        result=one("ssm_out"),
    )


def scales(given: Factors | None, mamba: MambaSizes, head_dim: int) -> dict[str, Any]:
    """The config fields that depend on factors."""
    factors = given or Factors()
    return {
        "factors": given,
        "embedding_scale": None if factors.embed == 1 else factors.embed,
        "logit_scale": factors.head,
        "attention_scale": factors.q * factors.k * head_dim**-0.5,
        "value_scale": factors.v * factors.output,
        "mamba": dataclasses.replace(mamba, factors=(*factors.inputs, factors.result)),
    }


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> FalconH1Config:
    """Read GGUF metadata of falcon-h1."""
    shared = shared_from_gguf(fields, checkpoint)
    mamba = sizes_from_gguf(fields, checkpoint.tensors, range(shared["num_layers"]))
    return FalconH1Config(**shared | scales(None, mamba, shared["head_dim"]))


def otherwise(config: Any) -> dict[str, Any]:
    """Config for GGUF: factors are in the weights; with a tied head, the last norm has the factor head / embed."""
    folded = config.factors
    if config.tie_embeddings:
        folded = folded._replace(norm=folded.head / folded.embed)
    return scales(None, config.mamba, config.head_dim) | {"folded": folded}


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of Mamba 2."""
    return mamba_keys(config.mamba)
