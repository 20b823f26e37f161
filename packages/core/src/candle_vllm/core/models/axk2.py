# SPDX-License-Identifier: MIT
"""A.X K2: DeepSeek-V3.2 (`deepseek.py`) with gates on attention's result and on the norms.

The result of attention is multiplied by sigmoid(W [norm(c), c]), c the latent vector of queries, and queries are
another part of that product. Norms before attention and before experts are y * sigmoid(U silu(D y)), y = RMSNorm(x),
with D and U of a small rank. With groups, experts of other groups are never chosen, as in DeepSeek-V3.2. transformers
scores those experts 0, and chooses among them, by the order of its sort, where a negative correction leaves fewer
experts of the chosen groups above 0 than a token has. Published corrections have not been examined.
Source: SK Telecom, 2026, `AXK2ForCausalLM` of transformers. Shapes: T tokens, R rank of the gates of norms, E hidden.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.models import deepseek, deepseek_config
from candle_vllm.core.models.axk2_names import WEIGHTS
from candle_vllm.core.models.deepseek_config import DeepseekConfig
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.local_layers import refuse_others

# ---- config ----------------------------------------------------------------------------------------------------------

_USUAL: dict[str, Any] = {
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "n_shared_experts": 1, "n_routed_experts": 128,
    "index_n_heads": 16, "index_head_dim": 128, "index_topk": 2048,
}  # fmt: skip
"""Defaults of transformers' config class."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxConfig(DeepseekConfig):
    """Config of this model; `gate_rank` is R."""

    gate_rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_rank > 1 << 12:
            raise InvalidFileError(f"gated_norm_rank is {self.gate_rank}; it must be at most {1 << 12}")


def config_from_hf(fields: Fields, model_type: str) -> AxConfig:
    """Read `config.json` of axk2."""
    refuse_others(fields, {"gated_norm": True, "rope_interleave": True})
    base = deepseek_config.config_from_hf(fields.with_absent(**_USUAL), model_type)
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return AxConfig(**values, gate_rank=fields.count("gated_norm_rank", 16))


# ---- attention, block and model --------------------------------------------------------------------------------------


class Attention(deepseek.Attention):
    """Latent attention to chosen positions, with a gate on its result: x [T, E] -> [T, E]."""

    def __init__(self, config: AxConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        self.up_sizes = config.num_heads * config.head_dim, config.num_heads * config.value_dim
        shards = dict[str, int](zip(("q", "gate"), self.up_sizes, strict=True))
        self.q_up = Linear(2 * config.q_rank, shards, placement)

    def __call__(self, x: Value, step: StepInput) -> Value:
        low, kv = self.down(x).split(self.sizes, dim=-1)
        assert self.q_norm is not None
        assert self.q_up is not None
        assert self.index is not None
        normed = self.q_norm(low)
        step.shared.pop("positions", None)  # so that their memory is used again
        step.shared["positions"] = self.index(x, normed, step)
        q, gate = self.q_up(side_by_side(normed, low)).split(self.up_sizes, dim=-1)
        y = self.attend(q, kv, step, step.shared["positions"])
        return self.output(gated(y, gate, "sigmoid"))


class NormGate:
    """y * sigmoid(U silu(D y)): y [T, E] -> [T, E], where silu(a) is a sigmoid(a)."""

    def __init__(self, config: AxConfig, placement: Placement) -> None:
        self.down = Linear(config.hidden_size, config.gate_rank, placement)
        self.up = Linear(config.gate_rank, config.hidden_size, placement)

    def __call__(self, y: Value) -> Value:
        y = side_by_side(y)
        low = self.down(y)
        return gated(y, self.up(gated(low, side_by_side(low), "sigmoid")), "sigmoid")


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: AxConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        size, eps = config.hidden_size, config.norm_eps
        self.attention_norm, self.mlp_norm = (RMSNorm(size, eps, placement) for _ in range(2))
        self.attention_gate = NormGate(config, placement)
        self.attention = Attention(config, layer, rotary, placement)
        self.mlp_gate: NormGate | None = None
        self.mlp: GatedMLP | SparseMLP
        if config.mixture is None or layer < config.dense_layers:
            self.mlp = GatedMLP(size, config.intermediate_size, placement)
        else:
            self.mlp_gate, self.mlp = NormGate(config, placement), SparseMLP(size, config.mixture, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(self.attention(self.attention_gate(normed), step), residual)
        return self.mlp(normed if self.mlp_gate is None else self.mlp_gate(normed)), residual


class AxK2(deepseek.Deepseek):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, vocabulary]."""

    block = Block


# ---- family ----------------------------------------------------------------------------------------------------------

FAMILY = Family(
    hf={"AXK2ForCausalLM": "axk2"},
    config_from_hf=config_from_hf,
    build=lambda config, placement, _: AxK2(config, placement),
    weights=WEIGHTS,
    ignored=deepseek.ignored,
)
