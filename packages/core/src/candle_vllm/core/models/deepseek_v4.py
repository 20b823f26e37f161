# SPDX-License-Identifier: MIT
"""DeepSeek V4: several residual streams, attention to compressed entries, experts in every layer.

A block reads its streams, computes attention or experts of their norm, and writes the result to all streams
(`models/residual_streams.py`). The first layers choose experts by token id. Multi-token prediction layers are not
loaded. Source: DeepSeek-AI, 2026, DeepSeek-V4. Shapes: T tokens, E hidden, N streams, X experts, k of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.kernels import moe
from candle_vllm.core.kernels.recorded import RecordedTokens, Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.models.deepseek_v4_attention import Attention
from candle_vllm.core.models.deepseek_v4_config import DeepseekV4Config, config_from_hf
from candle_vllm.core.models.deepseek_v4_names import WEIGHTS
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.residual_streams import HyperConnection, StreamCopies, StreamHead
from candle_vllm.core.models.stack import DecoderStack


class ExpertTable:
    """The experts of each token id; its parameter "chosen" is [V, k]."""

    def __init__(self, config: DeepseekV4Config, placement: Placement) -> None:
        self._experts = config.mixture.experts
        self._given = placement.empty(config.vocab_size, config.mixture.top_k)
        self.rows: Any = None  # int64, or a tensor int32

    def finish(self) -> None:
        """See `Finishes`; check that a token's experts are distinct."""
        table = on_host(self._given).astype(np.int64)
        rows = np.sort(table, 1)
        if rows[:, 0].min() < 0 or rows[:, -1].max() >= self._experts or (rows[:, 1:] == rows[:, :-1]).any():
            raise WeightsError(f"a table of experts by token id does not name {rows.shape[1]} distinct experts a token")
        self.rows = table if isinstance(self._given, np.ndarray) else self._given.int()

    def parameters(self) -> Mapping[str, Parameter]:
        """Return every parameter that must be loaded."""
        return {"chosen": TensorParameter(self._given)}


class HashMLP(SparseMLP):
    """Experts that a table gives for each token id; the router weights them."""

    def __init__(self, config: DeepseekV4Config, placement: Placement) -> None:
        super().__init__(config.hidden_size, config.mixture, placement)
        self.router.correction = self._token_ids = None
        self.table = ExpertTable(config, placement)

    def by_token(self, x: Value, token_ids: Value) -> Value:
        """Compute y [T, E] of x [T, E] for tokens with these ids [T]."""
        self._token_ids = token_ids
        made = self(x)
        self._token_ids = None  # every tensor of a layer counts as a weight when the engine sleeps
        return made

    def _routing(self) -> moe.Routing:
        ids, chosen = self._token_ids, self.table.rows
        if ids is not None and not isinstance(ids, RecordedTokens):
            chosen = chosen[ids.long()]
        return dataclasses.replace(super()._routing(), chosen=chosen)


class Block:
    """One decoder layer. Its input x [T, N * E] is the streams side by side, without a separate residual."""

    def __init__(self, config: DeepseekV4Config, layer: int, rotary: Rotary, placement: Placement) -> None:
        size, eps = config.hidden_size, config.norm_eps
        self.attention_streams, self.mlp_streams = (HyperConnection(config.streams, placement) for _ in range(2))
        self.attention_norm, self.mlp_norm = (RMSNorm(size, eps, placement) for _ in range(2))
        self.attention = Attention(config, layer, rotary, placement)
        hashes = layer in config.hash_layers
        self.mlp = HashMLP(config, placement) if hashes else SparseMLP(size, config.mixture, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value | None]:
        assert residual is None
        read, weights = self.attention_streams(x)
        x = self.attention_streams.write(x, self.attention(self.attention_norm(read), step), weights)
        read, weights = self.mlp_streams(x)
        normed, mlp = self.mlp_norm(read), self.mlp
        made = mlp.by_token(normed, step.shared["token_ids"]) if isinstance(mlp, HashMLP) else mlp(normed)
        return self.mlp_streams.write(x, made, weights), None


class DeepseekV4(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: DeepseekV4Config, placement: Placement) -> None:
        self.config = config
        self.embed, head = (Embedding(config.vocab_size, config.hidden_size, placement) for _ in range(2))
        self.head = None if config.tie_embeddings else head
        self.copies, self.stream_head = (
            StreamCopies(config.streams.count, placement),
            StreamHead(config.streams, placement),
        )
        rotaries = self.make_rotaries(config, placement)
        self.layers = [Block(config, layer, rotary, placement) for layer, rotary in enumerate(rotaries)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)

    def start(self, token_ids: Value, step: StepInput) -> Value:
        """See `DecoderStack.start`; the result is the streams side by side, [T, N * E]."""
        return self.copies(super().start(token_ids, step))

    def begun(self, token_ids: Value, x: Value, step: StepInput) -> StepInput:
        """See `DecoderStack.begun`."""
        step.shared["token_ids"] = token_ids
        return super().begun(token_ids, x, step)

    def _normed(self, x: Value, residual: Value | None) -> Value:
        return super()._normed(self.stream_head(x), residual)


def ignored(config: DeepseekV4Config) -> list[str]:
    """Names of tensors that are not loaded: multi-token prediction layers, buffers, a copy of the embedding table."""
    buffers = [r"(model\.)?mtp\..*", r".*rotary_emb\.[a-z_]*inv_freq"]
    return [*buffers, r"(lm_)?head\.weight"] if config.tie_embeddings else buffers


FAMILY = Family(
    hf={"DeepseekV4ForCausalLM": "deepseek_v4"},
    config_from_hf=config_from_hf,
    build=lambda config, placement, _: DeepseekV4(config, placement),
    weights=WEIGHTS,
    ignored=ignored,
)
