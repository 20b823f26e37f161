# SPDX-License-Identifier: MIT
"""A family for tests, some of whose layers keep a state: the tail of a short convolution, and that of a delta rule."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from candle_vllm.core.kernels.delta_rule import delta_rule
from candle_vllm.core.kernels.delta_rule.layout import DeltaGates, kept_inputs
from candle_vllm.core.kernels.delta_rule.layout import state_shape as delta_shape
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.short_conv import short_conv
from candle_vllm.core.kernels.short_conv import state_shape as short_conv_shape
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec, StatePart, StateSpec
from candle_vllm.core.loading.config import ModelConfig, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.stack import DecoderStack
from candle_vllm.core.testing.toy_model import TOY_VOCAB_SIZE, write_toy_tokenizer

LAYERS = ("state", "attention", "state", "attention")
HIDDEN, INNER, CONTEXT, EPS, THETA, HEADS, DIM = 64, 96, 512, 1e-5, 10000.0, 4, 16
KEY_HEADS, VALUE_HEADS, KEY, VALUE, TAPS = 2, 4, 16, 20, 4
SIZES = (KEY_HEADS * KEY, KEY_HEADS * KEY, VALUE_HEADS * VALUE)
CHANNELS = sum(SIZES)
INPUTS = kept_inputs(KEY_HEADS, VALUE_HEADS, KEY, VALUE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        tail = StatePart(short_conv_shape(CHANNELS, TAPS), CHANNELS, exact=False)
        state = StateSpec((tail, StatePart(delta_shape(VALUE_HEADS, KEY, VALUE), INPUTS)))
        return tuple(state if kind == "state" else PagedSpec(2, DIM, DIM) for kind in LAYERS)


class StateLayer:
    def __init__(self, layer: int, placement: Placement) -> None:
        self.layer = layer
        self.inputs = Linear(HIDDEN, {"qkv": CHANNELS, "a": VALUE_HEADS, "b": VALUE_HEADS}, placement)
        self.output = Linear(VALUE_HEADS * VALUE, HIDDEN, placement)
        taps, decay, bias = (placement.empty(*shape) for shape in ((CHANNELS, TAPS), (VALUE_HEADS,), (VALUE_HEADS,)))
        self.taps, self.gates = taps, DeltaGates(decay, bias)

    def parameters(self) -> dict[str, Parameter]:
        parts = zip(_PLAIN, (self.taps, *self.gates))
        return {name: TensorParameter(each) for name, each in parts}

    def __call__(self, x: Value, step: StepInput) -> Value:
        tail, state = step.caches[self.layer]
        qkv, a, b = self.inputs(x).split((CHANNELS, VALUE_HEADS, VALUE_HEADS), dim=-1)
        q, k, v = short_conv(qkv, self.taps, None, tail, step.states, silu=True).split(SIZES, dim=-1)
        q, k, v = q.unflatten(-1, (-1, KEY)), k.unflatten(-1, (-1, KEY)), v.unflatten(-1, (-1, VALUE))
        mixed = delta_rule(q, k, v, a, b, self.gates, state, step.states, scale=KEY**-0.5)
        return self.output(mixed.flatten(1))


class Attention:
    def __init__(self, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.sizes = (HEADS * DIM, 2 * DIM, 2 * DIM)
        self.qkv = Linear(HIDDEN, dict(zip("qkv", self.sizes)), placement)
        self.output = Linear(HEADS * DIM, HIDDEN, placement)
        self.attend = PagedAttention(layer, DIM, rotary)

    def parameters(self) -> dict[str, Parameter]:
        return {}

    def __call__(self, x: Value, step: StepInput) -> Value:
        q, k, v = (part.unflatten(-1, (-1, DIM)) for part in self.qkv(x).split(self.sizes, dim=-1))
        return self.output(self.attend(q, k, v, step).flatten(1))


class Block:
    def __init__(self, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.mix_norm, self.mlp_norm = (RMSNorm(HIDDEN, EPS, placement) for _ in range(2))
        self.mix = StateLayer(layer, placement) if LAYERS[layer] == "state" else Attention(layer, rotary, placement)
        self.mlp = GatedMLP(HIDDEN, INNER, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.mix_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(self.mix(normed, step), residual)
        return self.mlp(normed), residual


class Hybrid(DecoderStack):
    def __init__(self, config: Config, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config = config
        self.embed = Embedding(config.vocab_size, HIDDEN, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [Block(layer, self.rotary, placement) for layer in range(len(LAYERS))]
        self.norm = RMSNorm(HIDDEN, EPS, placement)
        self.head = Embedding(config.vocab_size, HIDDEN, placement)


_LAYER = ["mix_norm", "mix.output", "mlp_norm", "mlp.down"]
_PARTS = [("mix.qkv", "q"), ("mix.qkv", "k"), ("mix.qkv", "v"), ("mlp.gate_up", "gate"), ("mlp.gate_up", "up")]
_PARTS += [("mix.inputs", part) for part in ("qkv", "a", "b")]
_PLAIN = ("taps", "decay", "bias")
FAMILY = Family(
    hf={"HybridForCausalLM": "hybrid"},
    gguf=(),
    config_from_hf=lambda fields, model_type: Config(**shared_from_hf(fields, model_type)),
    config_from_gguf=lambda *_: None,  # type: ignore[arg-type,return-value]
    build=Hybrid,
    weights=[
        *(WeightName(f"{name}:weight", f"{name}.weight", None) for name in ("embed", "norm", "head")),
        *(WeightName(f"layers.{{i}}.{name}:weight", f"layers.{{i}}.{name}.weight", None) for name in _LAYER),
        *(WeightName(f"layers.{{i}}.{a}:{b}.weight", f"layers.{{i}}.{a}.{b}.weight", None) for a, b in _PARTS),
        *(
            WeightName(f"layers.{{i}}.mix:{name}", f"layers.{{i}}.mix.{name}", None)
            for name in ("taps", "decay", "bias")
        ),
    ],
    ignored=lambda _: [],
)


def write_hybrid(folder: Path) -> Path:
    """A model of the family with random weights."""
    torch.manual_seed(5)
    weights = {"norm.weight": 1 + 0.1 * torch.randn(HIDDEN)}
    for name in ("embed", "head"):
        weights[f"{name}.weight"] = torch.randn(TOY_VOCAB_SIZE, HIDDEN) * 3 * HIDDEN**-0.5
    for layer, kind in enumerate(LAYERS):
        shapes = {"mlp.gate_up.gate": (INNER, HIDDEN), "mlp.gate_up.up": (INNER, HIDDEN), "mlp.down": (HIDDEN, INNER)}
        if kind == "state":
            shapes |= {"mix.inputs.qkv": (CHANNELS, HIDDEN), "mix.output": (HIDDEN, VALUE_HEADS * VALUE)}
            shapes |= {f"mix.inputs.{gate}": (VALUE_HEADS, HIDDEN) for gate in "ab"}
        else:
            shapes |= {f"mix.qkv.{part}": ((HEADS if part == "q" else 2) * DIM, HIDDEN) for part in "qkv"}
            shapes["mix.output"] = (HIDDEN, HEADS * DIM)
        at = f"layers.{layer}."
        if kind == "state":
            weights |= {
                at + "mix.taps": torch.randn(CHANNELS, TAPS) * TAPS**-0.5,
                at + "mix.bias": torch.randn(VALUE_HEADS),
            }
            weights[at + "mix.decay"] = -torch.rand(VALUE_HEADS)
        weights |= {f"{at}{name}.weight": torch.randn(size) * size[1] ** -0.5 for name, size in shapes.items()}
        weights |= {f"{at}{name}.weight": 1 + 0.1 * torch.randn(HIDDEN) for name in ("mix_norm", "mlp_norm")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    config = {
        "architectures": ["HybridForCausalLM"],
        "model_type": "hybrid",
        "vocab_size": TOY_VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": len(LAYERS),
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "eos_token_id": 258,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_toy_tokenizer(folder)
    return folder


def plain_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """What the model is by its definition: logits [T, V] of a whole text, in fp32, without caches and states."""
    w, count = load_file(folder / "model.safetensors"), len(tokens)
    positions = torch.arange(count)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w[f"{name}.weight"]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        angles = positions[:, None, None] * THETA ** (-torch.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    x = w["embed.weight"][tokens]
    for layer, kind in enumerate(LAYERS):
        at = f"layers.{layer}."
        y = norm(x, at + "mix_norm")
        if kind == "state":
            y, a, b = (y @ w[f"{at}mix.inputs.{part}.weight"].T for part in ("qkv", "a", "b"))
            seen = torch.cat([torch.zeros(TAPS - 1, CHANNELS), y]).unfold(0, TAPS, 1)
            q, k, v = functional.silu((seen * w[at + "mix.taps"]).sum(-1)).split(SIZES, -1)
            q, k = (functional.normalize(part.unflatten(-1, (-1, KEY)), dim=-1) for part in (q, k))
            q, k = (part.repeat_interleave(VALUE_HEADS // KEY_HEADS, 1) for part in (q * KEY**-0.5, k))
            v, decay = v.unflatten(-1, (-1, VALUE)), w[at + "mix.decay"] * functional.softplus(a + w[at + "mix.bias"])
            state, rows = torch.zeros(VALUE_HEADS, KEY, VALUE), list[torch.Tensor]()
            for t in range(count):
                state = state * decay[t].exp()[:, None, None]
                missing = b[t].sigmoid()[:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
                state = state + torch.einsum("hk,hv->hkv", k[t], missing)
                rows.append(torch.einsum("hk,hkv->hv", q[t], state).flatten())
            y = torch.stack(rows)
        else:
            q, k, v = ((y @ w[f"{at}mix.qkv.{part}.weight"].T).unflatten(-1, (-1, DIM)) for part in "qkv")
            k, v = (part.repeat_interleave(HEADS // 2, 1) for part in (rotated(k), v))
            scores = torch.einsum("qhd,khd->hqk", rotated(q), k) * DIM**-0.5
            later = positions[:, None] < positions[None, :]
            y = torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v).flatten(1)
        x = x + y @ w[at + "mix.output.weight"].T
        y = norm(x, at + "mlp_norm")
        gate, up = (y @ w[f"{at}mlp.gate_up.{part}.weight"].T for part in ("gate", "up"))
        x = x + (functional.silu(gate) * up) @ w[at + "mlp.down.weight"].T
    return norm(x, "norm") @ w["head.weight"].T
