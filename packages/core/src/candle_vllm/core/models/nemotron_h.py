# SPDX-License-Identifier: MIT
"""NVIDIA Nemotron-H, Nemotron Nano 2 and the dense models of Nemotron 3: each layer is one thing alone.

A layer is Mamba 2, attention without positions, or a feed-forward layer with a squared ReLU; x + layer(norm(x)).
Source: NVIDIA, 2025, arXiv:2504.03624.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.mlp import MLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.cache_specs import CacheSpec, StateSpec
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, gguf_projection, pair
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.gpt import with_defaults
from candle_vllm.core.models.llama import Attention, LlamaConfig
from candle_vllm.core.models.mamba2 import Mamba2Mixer, MambaSizes, mixer_names, sizes_from_gguf, sizes_from_hf
from candle_vllm.core.models.stack import DecoderStack

# ---- config ----------------------------------------------------------------------------------------------------------

Kind: TypeAlias = Literal["mamba", "attention", "mlp"]
_KINDS: dict[str, Kind] = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "M": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "*": "attention",
    "mlp": "mlp",
    "-": "mlp",
}
_KEYS = {
    "heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "groups": "n_groups",
    "state": "ssm_state_size",
    "taps": "conv_kernel",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
}
_DEFAULTS = {"n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "layer_norm_epsilon": 1e-5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NemotronHConfig(LlamaConfig):
    """What these models have beside a Llama.

    Attributes:
        kinds: what each layer is.
        mamba: shapes of Mamba 2.
        mamba_layers: the layers that are Mamba 2.
    """

    kinds: tuple[Kind, ...]
    mamba: MambaSizes
    mamba_layers: frozenset[int]

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig`; a feed-forward layer keeps a state of no parts."""
        other = {"mamba": self.mamba.spec, "mlp": StateSpec(())}
        return tuple(other.get(kind, spec) for kind, spec in zip(self.kinds, super().cache_specs, strict=True))


def config_from_hf(fields: Fields, model_type: str) -> NemotronHConfig:
    """Reads `config.json` of nemotron_h, whose layers are named, or the letters of a pattern."""
    fields = with_defaults(fields, **_DEFAULTS)
    key = next((key for key in ("layers_block_type", "layer_types") if key in fields), "hybrid_override_pattern")
    named = [*fields.get(key, str)] if key == "hybrid_override_pattern" else fields.get(key, list)
    if not named or any(kind not in _KINDS for kind in named):
        raise UnsupportedModelError(f"{fields.path}: {key} has layers other than mamba, attention and mlp: {named!r:.80}")
    fields.choice("mlp_hidden_act", "relu2", "relu2")
    fields.choice("mamba_hidden_act", "silu", "silu")
    shared = shared_from_hf(with_defaults(fields, num_hidden_layers=len(named)), model_type, eps="layer_norm_epsilon")
    layers, inner = shared["num_layers"], fields.count("expand", 2) * shared["hidden_size"]
    if len(named) != layers:
        raise InvalidFileError(f"{fields.path}: {key} has {len(named)} layers, num_hidden_layers is {layers}")
    own = {"mlp_bias": fields.get("mlp_bias", bool, False), "qkv_bias": False, "output_bias": False}
    return _config(shared | own, tuple(_KINDS[kind] for kind in named), sizes_from_hf(fields, _KEYS, inner=inner))


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> NemotronHConfig:
    """Reads GGUF metadata of nemotron_h: Mamba layers have neither key-value heads nor a feed-forward length."""
    lists = {name: fields.get(name, list) for name in ("attention.head_count_kv", "feed_forward_length")}
    one = {}
    for name, counts in lists.items():
        found = {count for count in counts if type(count) is int and count > 0}
        if len(found) != 1 or not all(type(count) is int and count in (0, *found) for count in counts):
            raise UnsupportedModelError(f"{fields.path}: {fields.prefix}{name} is {counts!r:.80}, not one number and 0")
        one[fields.prefix + name] = found.pop()
    shared = shared_from_gguf(Fields({**fields.values, **one}, fields.path, fields.prefix), checkpoint)
    heads, widths = lists.values()
    if not len(heads) == len(widths) == shared["num_layers"]:
        raise InvalidFileError(f"{fields.path}: {' and '.join(one)} must have an entry for each layer")
    kinds: list[Kind] = ["mlp" if width else "attention" if count else "mamba" for count, width in zip(heads, widths)]
    layers = [layer for layer, kind in enumerate(kinds) if kind == "mamba"]
    biases = any(f"blk.{layer}.ffn_up.bias" in checkpoint.tensors for layer in range(len(kinds)))
    return _config(shared | {"mlp_bias": biases}, tuple(kinds), sizes_from_gguf(fields, checkpoint.tensors, layers))


def _config(shared: dict[str, object], kinds: tuple[Kind, ...], mamba: MambaSizes) -> NemotronHConfig:
    layers = frozenset(layer for layer, kind in enumerate(kinds) if kind == "mamba")
    own = {"kinds": kinds, "mamba": mamba, "mamba_layers": layers, "unrotated_layers": frozenset(range(len(kinds)))}
    return NemotronHConfig(**shared | own)  # type: ignore[arg-type]


# ---- model -----------------------------------------------------------------------------------------------------------


class Block:
    """One layer. x [T, E] comes as two summands, for a norm takes a sum: the second is None at first."""

    def __init__(self, config: NemotronHConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        size, eps, kind = config.hidden_size, config.norm_eps, config.kinds[layer]
        self.norm = RMSNorm(size, eps, placement)
        self.mlp = self.attention = None
        if kind == "mlp":
            inner = config.intermediate_size
            self.mlp = MLP(size, inner, placement, bias=config.mlp_bias, activation="relu2")
        elif kind == "mamba":
            self.attention = Mamba2Mixer(layer, size, config.mamba, eps, placement)
        else:
            self.attention = Attention(config, layer, rotary, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.norm.add(x, residual)
        if self.mlp is not None:
            return self.mlp(normed), residual
        assert self.attention is not None
        return self.attention(normed, step), residual


class NemotronH(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: NemotronHConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config, size = config, (config.vocab_size, config.hidden_size)
        self.embed = Embedding(*size, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(*size, placement)


# ---- weight names ----------------------------------------------------------------------------------------------------

_TO = "layers.{i}."
_HF = tuple(f"{stem}.layers.{{i}}." for stem in ("backbone", "model"))


def _mixer(part: str) -> tuple[str, ...]:
    return tuple(f"{stem}mixer.{part}" for stem in _HF)


WEIGHTS = [
    WeightName("embed:weight", ("backbone.embeddings.weight", "model.embeddings.weight"), "token_embd.weight"),
    WeightName(_TO + "norm:weight", tuple(stem + "norm.weight" for stem in _HF), GG + "attn_norm.weight"),
    *[
        WeightName(f"{_TO}attention.qkv:{part}.weight", _mixer(f"{part}_proj.weight"), gguf_projection(part, "weight"))
        for part in "qkv"
    ],
    *pair(_TO + "attention.output:", _mixer("o_proj"), GG + "attn_output"),
    *mixer_names("attention", *(f"{stem}.layers.{{i}}.mixer" for stem in ("backbone", "model"))),
    *pair(_TO + "mlp.up:", _mixer("up_proj"), GG + "ffn_up"),
    *pair(_TO + "mlp.down:", _mixer("down_proj"), GG + "ffn_down"),
    WeightName("norm:weight", ("backbone.norm_f.weight", "model.norm_f.weight"), "output_norm.weight"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]

FAMILY = Family(
    hf={"NemotronHForCausalLM": "nemotron_h"},
    gguf=("nemotron_h",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=NemotronH,
    weights=WEIGHTS,
    ignored=llama.ignored,
)
