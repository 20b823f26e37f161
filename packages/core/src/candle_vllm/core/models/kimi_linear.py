# SPDX-License-Identifier: MIT
"""Kimi Linear: DeepSeek's block (`deepseek.py`) with Kimi delta attention in most layers, and without positions.

Kimi delta attention is the gated delta rule with a decay for each channel, which two small matrices compute from x.
Source: Kimi Team, 2025, arXiv:2510.26692. Shapes: H heads of D channels, C = H * D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.delta_rule import delta_rule
from candle_vllm.core.kernels.delta_rule.layout import DeltaGates
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.short_conv import short_conv
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.delta_net import DeltaSizes
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.cache_specs import CacheSpec
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import computed
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models import deepseek, deepseek_config
from candle_vllm.core.models.attention_names import GG, HF, kv_heads_by_layer
from candle_vllm.core.models.deepseek_config import DeepseekConfig
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.qwen3_next_config import convolution_taps, decay_of_log
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- config ----------------------------------------------------------------------------------------------------------

_NAMES = {  # names of DeepSeek's config keys in these models
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiLinearConfig(DeepseekConfig):
    """Config of these models: the fields in addition to those of DeepSeek.

    Attributes:
        delta: shapes of Kimi delta attention.
        delta_layers: the layers with Kimi delta attention; the others have latent attention.
    """

    delta: DeltaSizes
    delta_layers: frozenset[int]

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig`."""
        return tuple(self.delta.state if n in self.delta_layers else s for n, s in enumerate(super().cache_specs))


def config_from_hf(fields: Fields, model_type: str) -> KimiLinearConfig:
    """Read `config.json` of kimi_linear, in the published form or in that of transformers."""
    if not fields.get("mla_use_nope", bool, True):
        raise UnsupportedModelError(f"{fields.path}: mla_use_nope is false, which is not implemented")
    own = {usual: fields.values[name] for usual, name in _NAMES.items() if name in fields}
    given = {"first_k_dense_replace": 1} | dict(fields.values) | own
    config = deepseek_config.config_from_hf(Fields(given, fields.path), "deepseek_v3")
    nested = fields.section("linear_attn_config")
    layers, full = config.num_layers, nested.get("full_attn_layers", list, [])
    kinds = fields.get(
        "layer_types", list, [("full" if n + 1 in full else "linear") + "_attention" for n in range(layers)]
    )
    if len(kinds) != layers or not all(kind in ("full_attention", "linear_attention") for kind in kinds):
        raise UnsupportedModelError(f"{fields.path}: layer_types must name full or linear attention per layer")
    if nested.values:
        heads, dim, taps = (nested.count(key) for key in ("num_heads", "head_dim", "short_conv_kernel_size"))
    else:
        heads, dim = fields.count("linear_num_heads"), fields.count("linear_head_dim")
        taps = convolution_taps(fields, "linear_conv_kernel_dim")
    return _config(config, model_type, (heads, dim, taps), [kind == "linear_attention" for kind in kinds])


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> KimiLinearConfig:
    """Read GGUF metadata of kimi-linear, in which layers with delta attention have 0 key-value heads."""
    plain, counts = kv_heads_by_layer(fields)
    config = deepseek_config.config_from_gguf(plain, checkpoint)
    if config.mixture is not None:
        config = dataclasses.replace(config, mixture=dataclasses.replace(config.mixture, renormalise=True))
    sizes = config.num_heads, fields.count("kda.head_dim"), convolution_taps(fields, "ssm.conv_kernel")
    return _config(config, config.model_type, sizes, [not count for count in counts])


def _config(
    config: DeepseekConfig, model_type: str, sizes: tuple[int, int, int], delta: list[bool]
) -> KimiLinearConfig:
    flags = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    flags |= {"model_type": model_type, "interleaved_rotary": False}
    flags["rope"] = RopeConfig(kind="proportional", dim=config.rope_dim)  # the frequencies are 0, so nothing rotates
    heads, dim, taps = sizes
    shapes = DeltaSizes(key_heads=heads, heads=heads, key_dim=dim, value_dim=dim, taps=taps, by_channel=True)
    return KimiLinearConfig(**flags, delta=shapes, delta_layers=frozenset(n for n, has in enumerate(delta) if has))


# ---- attention -------------------------------------------------------------------------------------------------------


class KimiDeltaAttention:
    """Linear attention with a state: x [T, E] -> [T, E]."""

    def __init__(self, layer: int, config: KimiLinearConfig, placement: Placement) -> None:
        self.layer, self.sizes = layer, config.delta
        heads, dim, size = self.sizes.heads, self.sizes.key_dim, config.hidden_size
        channels = heads * dim
        self.widths = (3 * channels, dim, dim, heads)
        shards = {**dict.fromkeys("qkv", channels), "f": dim, "g": dim, "b": heads}
        self.inputs = Linear(size, shards, placement)
        self.decays, self.gate = Linear(dim, channels, placement), Linear(dim, channels, placement)
        self.norm, self.result = RMSNorm(dim, config.norm_eps, placement), Linear(channels, size, placement)
        self.taps = placement.empty(3 * channels, self.sizes.taps)
        self.gates = DeltaGates(placement.empty(channels), placement.empty(channels))

    def __call__(self, x: Value, step: StepInput) -> Value:
        tail, state = step.caches[self.layer]
        qkv, f, g, b = self.inputs(x).split(self.widths, dim=-1)
        parts = short_conv(qkv, self.taps, None, tail, step.states, silu=True).split(self.sizes.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.sizes.key_dim)) for part in parts)
        scale = self.sizes.key_dim**-0.5
        y = delta_rule(q, k, v, self.decays(f), b, self.gates, state, step.states, scale=scale)  # [T, H, D]
        return self.result(gated(self.norm(y).flatten(1), self.gate(g), "sigmoid"))

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        size = self.sizes.parts[0]
        taps = {f"{part}.taps": self.taps[n * size : (n + 1) * size] for n, part in enumerate("qkv")}
        plain = {"decay": self.gates.decay, "bias": self.gates.bias, **taps}
        return {name: TensorParameter(value) for name, value in plain.items()}


# ---- block and model -------------------------------------------------------------------------------------------------


class Block(deepseek.Block):
    """One decoder layer: DeepSeek's, with latent attention or with Kimi delta attention."""

    def __init__(self, config: KimiLinearConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        if layer in config.delta_layers:
            self.attention = KimiDeltaAttention(layer, config, placement)


class KimiLinear(deepseek.Deepseek):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, vocabulary]."""

    block = Block


# ---- weight names ----------------------------------------------------------------------------------------------------


class _OfChannels:
    """View of a decay for each head as a decay for each channel."""

    def __init__(self, *, logs: bool) -> None:
        self._logs = logs

    def __call__(self, stored: StoredTensor, config: KimiLinearConfig) -> StoredTensor:
        heads, dim = config.delta.heads, config.delta.key_dim
        if stored.numel != heads:
            return stored  # the loader reports the wrong shape
        decays = decay_of_log(stored, config) if self._logs else stored
        return computed(decays, (heads * dim,), lambda values: values.reshape(-1).repeat(dim))

    def undone(self, stored: StoredTensor, config: KimiLinearConfig) -> StoredTensor:
        """The decay for each head, as in GGUF files."""
        dim = config.delta.key_dim
        return computed(stored, (config.delta.heads, 1), lambda values: values[::dim, None])


class _Taps:
    """View of a convolution's kernels [.., C, .., taps] as [C, taps]."""

    def __call__(self, stored: StoredTensor, config: KimiLinearConfig) -> StoredTensor:
        shape = (config.delta.parts[0], config.delta.taps)
        return dataclasses.replace(stored, shape=shape) if stored.numel == shape[0] * shape[1] else stored

    def undone(self, stored: StoredTensor, config: KimiLinearConfig) -> StoredTensor:
        """The kernels in the shape of GGUF files."""
        del config
        return dataclasses.replace(stored, shape=(stored.shape[0], 1, stored.shape[1]))


_TO, _SELF = "layers.{i}.attention", HF + "self_attn."
_MATRICES = {"inputs:f.": "f_a", "decays:": "f_b", "inputs:b.": "beta", "inputs:g.": "g_a", "gate:": "g_b"}


def _names(part: str) -> tuple[str, str]:
    """A tensor's name in published files, and its name in transformers' forget gate."""
    return _SELF + part, f"{_SELF}forget_gate.{part}"


def _line(line: WeightName) -> WeightName:
    """A row of DeepSeek's table; rows of experts also get the names in published files of Kimi Linear."""
    if not line.target.startswith("layers.{i}.mlp."):
        return line
    names = line.hf if isinstance(line.hf, tuple) else (line.hf,)
    own = [name.replace("mlp.", "block_sparse_moe.") for name in names if isinstance(name, str)]
    for usual, short in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        own = [name.replace(f".{{e}}.{usual}_proj", f".{{e}}.{short}") for name in own]
    return dataclasses.replace(line, hf=(*own, *names))


WEIGHTS = [
    *map(_line, deepseek.WEIGHTS),
    *[
        WeightName(f"{_TO}.inputs:{part}.weight", f"{_SELF}{part}_proj.weight", f"{GG}attn_{part}.weight")
        for part in "qkv"
    ],
    *[
        WeightName(f"{_TO}.{to}weight", _names(f"{name.replace('beta', 'b')}_proj.weight"), f"{GG}ssm_{name}.weight")
        for to, name in _MATRICES.items()
    ],
    *[
        WeightName(
            f"{_TO}:{part}.taps", f"{_SELF}{part}_conv1d.weight", f"{GG}ssm_conv1d_{part}.weight", _Taps(), _Taps()
        )
        for part in "qkv"
    ],
    WeightName(_TO + ":decay", _names("A_log"), GG + "ssm_a", _OfChannels(logs=True), _OfChannels(logs=False)),
    WeightName(_TO + ":bias", _names("dt_bias"), GG + "ssm_dt.bias"),
    WeightName(_TO + ".norm:weight", _SELF + "o_norm.weight", GG + "ssm_norm.weight"),
    WeightName(_TO + ".result:weight", _SELF + "o_proj.weight", GG + "attn_output.weight"),
]


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata; layers with delta attention have 0 key-value heads."""
    heads = [0 if layer in config.delta_layers else 1 for layer in range(config.num_layers)]
    own = {"attention.head_count_kv": heads, "kda.head_dim": config.delta.key_dim, "ssm.conv_kernel": config.delta.taps}
    return deepseek_config.gguf_keys(config) | own


FAMILY = Family(
    hf={"KimiLinearForCausalLM": "kimi_linear"},
    gguf=("kimi-linear",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=lambda config, placement, _: KimiLinear(config, placement),
    weights=WEIGHTS,
    ignored=deepseek.ignored,
)
