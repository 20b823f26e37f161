# SPDX-License-Identifier: MIT
"""EmbeddingGemma: the layers of Gemma 3 with attention in both directions, in most layers within a window.

A `PooledHead` has the dense layers after the pooling. Source: Schechter Vera et al., 2025, arXiv:2509.20354.
Shapes: T tokens, E hidden, H heads, K key-value heads, D head size.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.encoder_stack import Attend, EncoderStack
from candle_vllm.core.models.family import EncoderFamily
from candle_vllm.core.models.gemma import WEIGHTS
from candle_vllm.core.models.gemma_config import GemmaConfig, config_from_gguf, config_from_hf

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaEncoderConfig(EncoderConfig):
    """Config of an encoder with the layers of `gemma`; half of a window is before a token, half after it."""

    gemma: GemmaConfig

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.gemma.num_kv_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.gemma.head_dim


def encoder_from_hf(fields: Fields, model_type: str, *, scores: bool) -> GemmaEncoderConfig:
    """Read `config.json` of gemma3_text with use_bidirectional_attention."""
    del scores
    plain = {key: value for key, value in fields.values.items() if key != "use_bidirectional_attention"}
    return _config(config_from_hf(Fields(plain, fields.path), model_type), fields)


def encoder_from_gguf(fields: Fields, checkpoint: Checkpoint) -> GemmaEncoderConfig:
    """Read GGUF metadata of gemma-embedding, whose window has the same meaning as in config.json."""
    said = {key.replace("gemma-embedding.", "gemma3."): value for key, value in fields.values.items()}
    said["general.architecture"] = "gemma3"
    return _config(config_from_gguf(Fields(said, fields.path, "gemma3."), checkpoint), fields)


def _config(gemma: GemmaConfig, fields: Fields) -> GemmaEncoderConfig:
    """Make the config; attention scores must be divided by the root of D, as in all encoders here."""
    if abs(gemma.query_scale - gemma.head_dim**-0.5) > 1e-6:
        raise UnsupportedModelError(f"{fields.path}: query_pre_attn_scalar must be head_dim, {gemma.head_dim}")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_position", "norm_eps")
    shared = {name: getattr(gemma, name) for name in same}
    return GemmaEncoderConfig(model_type="gemma3_text", **shared, tie_embeddings=True, gemma=gemma)


# ---- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """Grouped-query attention in both directions: x [T, E] -> [T, E]."""

    def __init__(self, config: GemmaConfig, placement: Placement) -> None:
        heads, kv_heads, self.dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes = (heads * self.dim, kv_heads * self.dim, kv_heads * self.dim)
        shards, bias = dict[str, int](zip("qkv", self.sizes, strict=True)), config.attention_bias
        self.qkv = Linear(config.hidden_size, shards, placement, bias=bias)
        self.output = Linear(heads * self.dim, config.hidden_size, placement, bias=bias)
        self.q_norm, self.k_norm = (RMSNorm(self.dim, config.norm_eps, placement) for _ in range(2))

    def __call__(self, x: Value, attend: Attend) -> Value:
        q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        q, k = (
            norm(part.unflatten(-1, (-1, self.dim))).flatten(1) for norm, part in ((self.q_norm, q), (self.k_norm, k))
        )
        return self.output(attend(side_by_side(q, k, v)))


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One layer: x [T, E] -> [T, E] in fp32."""

    def __init__(self, config: GemmaConfig, placement: Placement) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        self.attention_norm, self.attention_post_norm = (RMSNorm(hidden, eps, placement) for _ in range(2))
        self.mlp_norm, self.mlp_post_norm = (RMSNorm(hidden, eps, placement) for _ in range(2))
        self.attention = Attention(config, placement)
        self.mlp = GatedMLP(hidden, config.intermediate_size, placement, activation="gelu_tanh")

    def __call__(self, x: Value, attend: Attend, types: Value) -> Value:
        del types
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), attend))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


# ---- model -----------------------------------------------------------------------------------------------------------


class GemmaEncoder(EncoderStack):
    """The encoder."""

    def __init__(self, config: GemmaEncoderConfig, placement: Placement) -> None:
        self.config, gemma = config, config.gemma
        scale, position = gemma.embedding_scale, config.max_position
        self.embed = Embedding(gemma.vocab_size, gemma.hidden_size, placement, scale=scale, wide=True)
        ropes = (gemma.rope, gemma.local_rope or gemma.rope)
        self.rotary, self.local_rotary = (Rotary(rope, position, placement) for rope in ropes)
        self.kv_heads = gemma.num_kv_heads
        self.windows = [None if window is None else window // 2 for window in gemma.sliding_windows]
        self.layers = [Block(gemma, placement) for _ in range(gemma.num_layers)]
        self.norm = RMSNorm(gemma.hidden_size, gemma.norm_eps, placement)


FAMILY = EncoderFamily(
    hf={"Gemma3TextModel": ("gemma3_text", False)},
    gguf=("gemma-embedding",),
    config_from_hf=encoder_from_hf,
    config_from_gguf=encoder_from_gguf,
    build=GemmaEncoder,
    weights=lambda config, stored: WEIGHTS,  # noqa: ARG005
    ignored=lambda _: [r"lm_head\.weight", r"dense_\d+\.weight"],
)
