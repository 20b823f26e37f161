# SPDX-License-Identifier: MIT
"""TII Falcon-H1: Mamba 2 and attention in parallel in each layer, and multipliers of the projections.

In GGUF files the matrices already contain these multipliers. Source: TII, 2025, arXiv:2507.22448.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from candle_vllm.core.errors import AdapterError, InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.cache_specs import CacheSpec
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import computed
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.llama import Attention, Llama, LlamaConfig, times
from candle_vllm.core.models.mamba2 import (
    HYBRID_KEYS,
    Mamba2Mixer,
    MambaSizes,
    mamba_keys,
    mixer_names,
    sizes_from_gguf,
    sizes_from_hf,
)
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- config ----------------------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """Factor of each matrix's result and of the last norm's; `inputs` has the factors of z, x, B, C and dt."""

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
        factors: factors of the matrices, from which the scales of `LlamaConfig` and of `mamba` are computed. None if
            the stored matrices already contain them.
        folded: factors that are multiplied into the matrices while a GGUF file is written; None otherwise.
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
        raise UnsupportedModelError(f"{fields.path}: multipliers of sizes that 16 does not divide are not implemented")
    return FalconH1Config(**shared | _scales(every, dataclasses.replace(sizes, gate_last=last), shared["head_dim"]))


def _factors(fields: Fields) -> Factors:
    """The product of the multipliers for each matrix."""

    def several(key: str, count: int) -> list[float]:
        given = fields.values.get(key)
        values = [1.0] * count if given is None else given if isinstance(given, list) else [given]
        if len(values) != count or not all(type(each) in (int, float) and 0 < each <= 1e6 for each in values):
            raise InvalidFileError(f"{fields.path}: {key} is {given!r:.80}; it must be above 0 and at most 1e6")
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


def _scales(given: Factors | None, mamba: MambaSizes, head_dim: int) -> dict[str, Any]:
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
    return FalconH1Config(**shared | _scales(None, mamba, shared["head_dim"]))


# ---- block and model -------------------------------------------------------------------------------------------------


class SideBySide(Attention):
    """The sum of attention and Mamba 2: x [T, E] -> [T, E]."""

    def __init__(self, config: FalconH1Config, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        cache = config.num_layers + layer
        self.mamba = Mamba2Mixer(cache, config.hidden_size, config.mamba, config.norm_eps, placement)

    def __call__(self, x: Value, step: StepInput) -> Value:
        return super().__call__(x, step) + self.mamba(x, step)


class ScaledMLP(GatedMLP):
    """down(silu(gate(x) * g) * up(x) * d)."""

    def __init__(self, config: FalconH1Config, placement: Placement) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, placement)
        self._factors = config.factors or Factors()

    def __call__(self, x: Value) -> Value:
        factors = self._factors
        if factors.gate == factors.down == 1:
            return super().__call__(x)
        gate, up = self.gate_up(x).split([self.down.in_features] * 2, dim=-1)
        return self.down(times(gated(up, times(gate, factors.gate), "silu"), factors.down))


class Block(llama.Block):
    """One decoder layer: Llama's, with Mamba 2 in parallel to attention."""

    def mixer(self, config: FalconH1Config, layer: int, rotary: Rotary, placement: Placement) -> SideBySide:
        return SideBySide(config, layer, rotary, placement)

    def feed_forward(self, config: FalconH1Config, layer: int, placement: Placement) -> ScaledMLP:
        del layer
        return ScaledMLP(config, placement)


class FalconH1(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block

    def __init__(self, config: FalconH1Config, placement: Placement, checkpoint: Checkpoint) -> None:
        super().__init__(config, placement, checkpoint)
        self.narrows = False  # the last layer's states read all tokens


# ---- weight names ----------------------------------------------------------------------------------------------------


class Multiplied:
    """View of a matrix that GGUF files store times a factor, and other checkpoints (`plain`) without the factor."""

    def __init__(self, part: str, *, plain: bool) -> None:
        self._part, self._plain = part, plain

    def __call__(self, stored: StoredTensor, config: FalconH1Config) -> StoredTensor:
        if (config.factors is None) == self._plain:
            raise AdapterError(
                f"{stored.path}: GGUF files have multipliers in their matrices, and others have them apart: an adapter "
                "of one kind does not fit the other"
            )
        return stored

    def undone(self, stored: StoredTensor, config: FalconH1Config) -> StoredTensor:
        """Multiply the matrix by its factor, in its own type."""
        factor, mamba = getattr(config.folded, self._part), config.mamba
        if isinstance(factor, tuple):
            factor = np.repeat(factor, (mamba.inner, *mamba.parts, mamba.heads))[:, None]
        made = computed(stored, stored.shape, lambda values: (values * factor).astype(np.float32), "F32")
        return computed(made, made.shape, lambda values: values, stored.dtype)


def otherwise(config: Any) -> dict[str, Any]:
    """Config for GGUF: factors are in the matrices; with a tied head, the rest of its factor is in the last norm."""
    folded = config.factors
    if config.tie_embeddings:
        folded = folded._replace(norm=folded.head / folded.embed)
    return _scales(None, config.mamba, config.head_dim) | {"folded": folded}


def gguf_keys(config: Any) -> dict[str, Any]:
    """Shapes of Mamba 2."""
    return mamba_keys(config.mamba)


_RENAMED = {"mlp.": "feed_forward.", "post_attention_layernorm": "pre_ff_layernorm", "l.norm": "l.final_layernorm"}
_FOLDED = {f"{part}:weight": part for part in ("embed", "norm", "head")}
_FOLDED |= {f"layers.{{i}}.mlp.{end}weight": part for part, end in (("gate", "gate_up:gate."), ("down", "down:"))}
_FOLDED |= {f"layers.{{i}}.attention.mamba.{part}:weight": part for part in ("inputs", "result")}
_FOLDED |= {"layers.{i}.attention.output:weight": "output"}
_FOLDED |= {f"layers.{{i}}.attention.qkv:{part}.weight": part for part in "qkv"}


def _line(line: WeightName) -> WeightName:
    """A row of Llama's or Mamba 2's table, with the names of these models and with factors."""
    (hf, *_), names = (each if isinstance(each, tuple) else (each,) for each in (line.hf, line.gguf))
    view, part = line.hf_view, _FOLDED.get(line.target)
    if isinstance(hf, str):
        hf = functools.reduce(lambda name, pair: name.replace(*pair), _RENAMED.items(), hf)
    if line.target.endswith("mlp_norm:weight"):
        names = (GG + "ffn_norm", *names)  # llama.cpp's name has no suffix
    if part is not None:
        first = names[0].name if isinstance(names[0], Seen) else str(names[0])
        view, names = Multiplied(part, plain=True), (Seen(first, Multiplied(part, plain=False)), *names[1:])
    return dataclasses.replace(line, hf=hf, gguf=names, hf_view=view)


FAMILY = Family(
    hf={"FalconH1ForCausalLM": "falcon_h1"},
    gguf=("falcon-h1",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=FalconH1,
    weights=[_line(line) for line in (*llama.WEIGHTS, *mixer_names("attention.mamba", HF + "mamba"))],
    ignored=llama.ignored,
)
