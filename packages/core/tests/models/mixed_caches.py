# SPDX-License-Identifier: MIT
"""A family for tests, whose layers differ in heads, head sizes and windows, and read each other's keys and values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec, SharedKVSpec
from candle_vllm.core.loading.config import ModelConfig, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.stack import DecoderStack
from candle_vllm.core.testing.toy_model import TOY_VOCAB_SIZE, write_toy_tokenizer


class Shape(NamedTuple):
    """A layer's attention; `reads` is the number of the layer whose keys and values it attends to, if not its own."""

    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    reads: int | None = None

    @property
    def spec(self) -> CacheSpec:
        if self.reads is not None:
            return SharedKVSpec(self.reads)
        return PagedSpec(self.kv_heads, self.dim, self.dim, self.window)


SHAPES = (
    Shape(4, 2, 32),
    Shape(8, 1, 64, window=24),
    Shape(2, 2, 16, window=24),
    Shape(8, 2, 32, reads=0),
    Shape(2, 1, 64, window=24, reads=1),
)
HIDDEN, INNER, CONTEXT, EPS, THETA = 64, 96, 512, 1e-5, 10000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        return tuple(each.spec for each in SHAPES)


def config_from_hf(fields: Fields, model_type: str) -> Config:
    windows = tuple(each.window for each in SHAPES)
    return Config(**shared_from_hf(fields, model_type) | {"sliding_windows": windows})


class Attention:
    def __init__(self, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.shape = shape = SHAPES[layer]
        self.sizes = (shape.heads * shape.dim, *[shape.kv_heads * shape.dim] * 2)[: 1 if shape.reads is not None else 3]
        self.qkv = Linear(HIDDEN, dict(zip("qkv", self.sizes)), placement)
        self.output = Linear(shape.heads * shape.dim, HIDDEN, placement)
        self.q_norm = RMSNorm(shape.dim, EPS, placement)
        self.k_norm = RMSNorm(shape.dim, EPS, placement) if shape.reads is None else None
        source = layer if shape.reads is None else shape.reads
        self.attend = PagedAttention(source, shape.dim, rotary, self.q_norm, self.k_norm, window=shape.window)

    def __call__(self, x: Value, step: StepInput) -> Value:
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (*(part.unflatten(-1, (-1, self.shape.dim)) for part in parts), None, None)[:3]
        return self.output(self.attend(q, k, v, step).flatten(1))


class Block:
    def __init__(self, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.attention_norm, self.mlp_norm = (RMSNorm(HIDDEN, EPS, placement) for _ in range(2))
        self.attention = Attention(layer, rotary, placement)
        self.mlp = GatedMLP(HIDDEN, INNER, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(self.attention(normed, step), residual)
        return self.mlp(normed), residual


class Mixed(DecoderStack):
    narrows = True

    def __init__(self, config: Config, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config = config
        self.embed = Embedding(config.vocab_size, HIDDEN, placement)
        self.rotaries = {
            dim: Rotary(dataclasses.replace(config.rope, dim=dim), config.max_position, placement)
            for dim in {shape.dim for shape in SHAPES}
        }
        self.rotary = self.rotaries[SHAPES[0].dim]
        self.layers = [Block(layer, self.rotaries[each.dim], placement) for layer, each in enumerate(SHAPES)]
        self.norm = RMSNorm(HIDDEN, EPS, placement)
        self.head = Embedding(config.vocab_size, HIDDEN, placement)

    def prepare(self, positions: int) -> None:
        for rotary in self.rotaries.values():
            rotary.prepare(positions)


_LAYER = ["attention_norm", "attention.q_norm", "attention.k_norm", "attention.output", "mlp_norm", "mlp.down"]
_PARTS = [*(("attention.qkv", part) for part in "qkv"), ("mlp.gate_up", "gate"), ("mlp.gate_up", "up")]
FAMILY = Family(
    hf={"MixedForCausalLM": "mixed"},
    gguf=(),
    config_from_hf=config_from_hf,
    config_from_gguf=lambda *_: None,  # type: ignore[arg-type,return-value]
    build=Mixed,
    weights=[
        *(WeightName(f"{name}:weight", f"{name}.weight", None) for name in ("embed", "norm", "head")),
        *(WeightName(f"layers.{{i}}.{name}:weight", f"layers.{{i}}.{name}.weight", None) for name in _LAYER),
        *(WeightName(f"layers.{{i}}.{a}:{b}.weight", f"layers.{{i}}.{a}.{b}.weight", None) for a, b in _PARTS),
    ],
    ignored=lambda _: [],
)


def write_mixed(folder: Path) -> Path:
    """A model of the family with random weights."""
    torch.manual_seed(3)
    weights = {"norm.weight": 1 + 0.1 * torch.randn(HIDDEN)}
    for name in ("embed", "head"):
        weights[f"{name}.weight"] = torch.randn(TOY_VOCAB_SIZE, HIDDEN) * 3 * HIDDEN**-0.5
    for layer, each in enumerate(SHAPES):
        wide, narrow = each.heads * each.dim, each.kv_heads * each.dim
        sizes = {"qkv.q": (wide, HIDDEN), "output": (HIDDEN, wide)}
        norms = {"attention_norm": HIDDEN, "mlp_norm": HIDDEN, "attention.q_norm": each.dim}
        if each.reads is None:
            sizes |= {"qkv.k": (narrow, HIDDEN), "qkv.v": (narrow, HIDDEN)}
            norms["attention.k_norm"] = each.dim
        shapes = {f"attention.{name}": size for name, size in sizes.items()}
        shapes |= {"mlp.gate_up.gate": (INNER, HIDDEN), "mlp.gate_up.up": (INNER, HIDDEN), "mlp.down": (HIDDEN, INNER)}
        at = f"layers.{layer}."
        weights |= {f"{at}{name}.weight": torch.randn(size) * size[1] ** -0.5 for name, size in shapes.items()}
        weights |= {f"{at}{name}.weight": 1 + 0.1 * torch.randn(size) for name, size in norms.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    config = {
        "architectures": ["MixedForCausalLM"],
        "model_type": "mixed",
        "vocab_size": TOY_VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": len(SHAPES),
        "num_attention_heads": SHAPES[0].heads,
        "num_key_value_heads": SHAPES[0].kv_heads,
        "head_dim": SHAPES[0].dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "eos_token_id": 258,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_toy_tokenizer(folder)
    return folder


def plain_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """What the model is by its definition: logits [T, V] of a whole text, in fp32 and without a cache."""
    w, count = load_file(folder / "model.safetensors"), len(tokens)
    positions = torch.arange(count)
    back = positions[:, None] - positions[None, :]  # how far behind a query a key stands

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w[f"{name}.weight"]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        angles = positions[:, None, None] * THETA ** (-torch.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    x, kept = w["embed.weight"][tokens], dict[int, tuple[torch.Tensor, torch.Tensor]]()
    for layer, each in enumerate(SHAPES):
        at = f"layers.{layer}."

        def heads(y: torch.Tensor, part: str, at: str = at, dim: int = each.dim) -> torch.Tensor:
            return (y @ w[f"{at}attention.qkv.{part}.weight"].T).unflatten(-1, (-1, dim))

        y = norm(x, at + "attention_norm")
        q = rotated(norm(heads(y, "q"), at + "attention.q_norm"))
        if each.reads is None:
            kept[layer] = rotated(norm(heads(y, "k"), at + "attention.k_norm")), heads(y, "v")
        read = kept[layer if each.reads is None else each.reads]
        k, v = (part.repeat_interleave(each.heads // each.kv_heads, 1) for part in read)
        scores = torch.einsum("qhd,khd->hqk", q, k) * each.dim**-0.5
        hidden = (back < 0) | (back >= (each.window or count))
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        x = x + mixed.flatten(1) @ w[at + "attention.output.weight"].T
        y = norm(x, at + "mlp_norm")
        gate, up = (y @ w[f"{at}mlp.gate_up.{part}.weight"].T for part in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[at + "mlp.down.weight"].T
    return norm(x, "norm") @ w["head.weight"].T
