# SPDX-License-Identifier: MIT
"""Model configuration, read strictly into frozen dataclasses.

`config.json` and GGUF metadata are read through `Fields`, which names the file and the key in every error. Each model
family makes a `ModelConfig`, an `EncoderConfig` or a subclass from the fields (see `models/`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from candle_vllm.core.errors import ConfigError, InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec
from candle_vllm.core.loading.rope import RopeConfig, rope_from_gguf, rope_from_hf, stretched_context
from candle_vllm.core.loading.tensors import Checkpoint

MAX_LAYERS = 4096
MAX_EXPERTS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSizes:
    """Shapes of latent attention.

    Attributes:
        heads: H, number of query heads.
        nope: elements of a query head without rotary embedding.
        rope: R, elements with rotary embedding of a query head, and of the single key of all heads.
        latent: L, elements of a token's latent vector.
        value: V, elements of a head's result.
    """

    heads: int
    nope: int
    rope: int
    latent: int
    value: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configuration of a decoder, for the engine and the layers.

    Attributes:
        model_type: `model_type` of config.json, or `general.architecture` of a GGUF file.
        vocab_size: rows of the embedding table (the tokenizer may have fewer tokens).
        intermediate_size: inner size of dense feed-forward layers.
        max_position: maximum context length, scaling included.
        norm_eps: epsilon of the norms, unless a family's code has a fixed one.
        rope: rotary embedding of every layer; in a family with two kinds, of the layers with full attention.
        tie_embeddings: the output layer shares the embedding table.
        sliding_windows: per layer, number of last tokens that a query attends to, including itself; None for all.
        attention_softcap: soft cap of attention scores in every layer; None without a cap.
        attention_sinks: whether heads have sinks, see `kernels/attention`.
        slopes: ALiBi slope of each head: slope times distance is subtracted from a score; empty without ALiBi.
        relative_logits: whether scores have relative logits, see `kernels/attention`.
        num_experts: number of experts of a layer; 0 for a model without experts.
        interleaved_rotary: q and k rows are stored in interleaved pairs, and are reordered to half-split order.
        has_head: the model generates text; otherwise it has no output layer, and computes embeddings or scores.
        eos_token_ids: EOS token ids from the config; -1 if the vocabulary has no EOS token.
        index: sizes of the indexer of sparse attention (DeepSeek V3.2); None without sparse attention. Its keys are not
            compressed, so `latent` equals `nope`; it has no values, so `value` is 0. For pooled keys (GLM-5.3-Flash),
            `latent` is twice `nope`: a key and its gates.
        index_top: maximum number of positions that the indexer chooses for a query.
        index_pool: number of neighbouring positions that the indexer chooses together; it must divide the block size.
        index_block: number of positions that the index of MiniMax M3 chooses together; the block size must divide it.
        answer_window: in every layer, a generated token attends to the prompt and to this number of last generated
            tokens, including itself (reference sliding window attention); None for all tokens.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    attention_softcap: float | None = None
    attention_sinks: bool = False
    slopes: tuple[float, ...] = ()
    relative_logits: bool = False
    num_experts: int = 0
    interleaved_rotary: bool = False
    has_head: bool = True
    eos_token_ids: tuple[int, ...] = ()
    index: LatentSizes | None = None
    index_top: int = 0
    index_pool: int = 1
    index_block: int = 0
    answer_window: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InvalidFileError(f"{self.num_heads} heads are not a multiple of {self.num_kv_heads} key-value heads")
        if not 0 < self.head_dim <= 1024 or self.rope.dim > self.head_dim:
            raise InvalidFileError(
                f"head size {self.head_dim} with {self.rope.dim} rotary dimensions is not possible: it must be at most "
                "1024, and at least the rotary dimensions"
            )
        if not 0 < self.max_position <= MAX_COUNT:
            raise InvalidFileError(
                f"the model's config says its context is {self.max_position} tokens; at most {MAX_COUNT} are possible"
            )
        if not 0 < self.vocab_size <= MAX_COUNT:
            raise InvalidFileError(f"the vocabulary has {self.vocab_size} tokens; it must have 1 to {MAX_COUNT}")
        if not 0 < self.norm_eps < 1:
            raise InvalidFileError(f"the epsilon of the model's norms is {self.norm_eps}; it must be between 0 and 1")
        for window in (*self.sliding_windows, self.answer_window):
            if window is not None and not 0 < window <= MAX_COUNT:
                raise InvalidFileError(
                    f"the model's config says its sliding window is {window} tokens; it must be 1 to {MAX_COUNT}"
                )
        if not 0 <= self.num_experts <= MAX_EXPERTS:
            raise InvalidFileError(
                f"the model has {self.num_experts} experts in a layer; at most {MAX_EXPERTS} are supported"
            )
        assert len(self.sliding_windows) == self.num_layers

    @property
    def one_at_a_time(self) -> str | None:
        """Reason why the model runs one sequence at a time (the engine cannot cache its state), or None."""
        return None

    @property
    def implementation(self) -> str:
        """See `ModelInfo`."""
        return "native"

    @property
    def latent(self) -> LatentSizes | None:
        """Sizes of latent attention; None for a model with plain keys and values."""
        return None

    @property
    def shared_choices(self) -> Sequence[int]:
        """Layers that attend to the positions that the indexer of an earlier layer has chosen."""
        return ()

    @property
    def stream_count(self) -> int:
        """Number of residual streams that the layers mix; 0 for a model with the usual residual connections."""
        return 0

    @property
    def compresses(self) -> bool:
        """Whether layers attend to compressed entries or chosen blocks, see `kernels/compressed_attention`."""
        return False

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """Cache spec of each layer; a family whose layers have two caches appends the specs of the second ones."""
        if self.latent is not None:
            return (PagedSpec(1, self.latent.rope + self.latent.latent, 0),) * self.num_layers
        heads, dim = self.num_kv_heads, self.head_dim
        return tuple(PagedSpec(heads, dim, dim, window) for window in self.sliding_windows)


def shared_from_hf(
    fields: Fields, model_type: str, *, eps: str = "rms_norm_eps", names: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Read the keys that most families' `config.json` share, as arguments of a `ModelConfig`.

    `eps` is the key of the norms' epsilon. `names` maps usual keys to the family's, such as {"hidden_size": "n_embd"}.
    """

    def key(usual: str) -> str:
        return names.get(usual, usual)

    hidden, heads = fields.count(key("hidden_size")), fields.count(key("num_attention_heads"))
    layers = fields.count(key("num_hidden_layers"), most=MAX_LAYERS)
    position = fields.count(key("max_position_embeddings"))
    head_dim = fields.count("head_dim", hidden // heads)
    rope = rope_from_hf(fields, head_dim, position)
    return {
        "model_type": model_type,
        "vocab_size": fields.count("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.count(key("intermediate_size")),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.count(key("num_key_value_heads"), heads),
        "head_dim": head_dim,
        "max_position": stretched_context(rope, position),
        "norm_eps": fields.get(eps, float),
        "rope": rope,
        "tie_embeddings": fields.get("tie_word_embeddings", bool, False),
        "sliding_windows": (None,) * layers,
        "eos_token_ids": fields.token_ids("eos_token_id", lowest=-1),
    }


def shared_from_gguf(
    fields: Fields, checkpoint: Checkpoint, *, eps: str = "attention.layer_norm_rms_epsilon"
) -> dict[str, Any]:
    """Read the keys that most architectures' GGUF metadata share, as arguments of a `ModelConfig`.

    `fields` have the architecture as prefix. The tensors determine the vocabulary size, and whether the output layer
    shares the embedding table. `eps` is the key of the norms' epsilon.
    """
    hidden, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    layers, position = fields.count("block_count", most=MAX_LAYERS), fields.count("context_length")
    head_dim = fields.count("attention.key_length", hidden // heads)
    rope = rope_from_gguf(fields, head_dim, position)
    embedding = checkpoint.tensors.get("token_embd.weight")
    return {
        "model_type": Fields(fields.values, fields.path).get("general.architecture", str),
        "vocab_size": embedding.shape[0] if embedding and embedding.shape else fields.count("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.count("feed_forward_length"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position": stretched_context(rope, position) if rope.kind == "yarn" else position,
        "norm_eps": fields.get(eps, float),
        "rope": rope,
        "tie_embeddings": "output.weight" not in checkpoint.tensors,
        "sliding_windows": (fields.get("attention.sliding_window", int, None) or None,) * layers,
    }


def layer_windows(fields: Fields, layers: int, window: int | None) -> tuple[int | None, ...] | None:
    """Return windows by `layer_types`, which names full or sliding attention per layer; None without this key."""
    if "layer_types" not in fields:
        return None
    kinds = fields.get("layer_types", list)
    if len(kinds) != layers or not all(kind in ("full_attention", "sliding_attention") for kind in kinds):
        raise UnsupportedModelError(f"{fields.path}: layer_types must name full or sliding attention per layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def gguf_windows(fields: Fields, layers: int, window: int | None, *, period: int) -> tuple[int | None, ...]:
    """Return windows by GGUF's `attention.sliding_window_pattern`.

    The value is a list, with true for each layer that has a window, or a number n: every n-th layer has no window, and
    with 0 all layers have one. Without the key, n is `period`. Source: llama.cpp, `load_swa_pattern`.
    """
    key = "attention.sliding_window_pattern"
    stored = fields.values.get(fields.prefix + key)
    if isinstance(stored, list):
        if len(stored) != layers or not all(isinstance(has, (bool, int)) for has in stored):
            raise InvalidFileError(f"{fields.path}: {fields.prefix}{key} must say true or false for {layers} layers")
        return tuple(window if has else None for has in stored)
    period = fields.get(key, int, period)
    return tuple(None if period and (layer + 1) % period == 0 else window for layer in range(layers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Configuration of a bidirectional encoder, for the engine and the layers.

    Attributes:
        model_type: Hugging Face's name of the model family.
        vocab_size: number of rows of the embedding table.
        max_position: maximum length of a text, in tokens.
        first_position: row of the position table for a text's first token (RoBERTa's is after the padding token's row).
        token_types: rows of the table that distinguishes the texts of a pair; 1 for a model without a distinction.
        labels: names of the outputs of the model's classification head for a text or pair: one for a cross-encoder,
            several for a classifier, no names without a head.
        likelihood: activation that maps these outputs to 0..1: a sigmoid of each, a softmax over all, or no activation.
        head_pooling: pooling before a head that the engine applies, "all" to apply it to each token; None if the model
            applies its head itself (see `scores`), or has no head.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position: int
    norm_eps: float
    first_position: int = 0
    token_types: int = 1
    activation: str = "gelu"
    labels: tuple[str, ...] = ()
    likelihood: Literal["none", "sigmoid", "softmax"] = "none"
    head_pooling: Literal["mean", "cls", "all"] | None = None
    num_experts: int = 0
    tie_embeddings: bool = False
    has_head: bool = False  # a language model's head
    implementation: ClassVar[str] = "native"

    @property
    def scores(self) -> bool:
        """Whether the model applies its head itself, and returns the head's outputs instead of vectors."""
        return bool(self.labels) and self.head_pooling is None

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise InvalidFileError(f"hidden size {self.hidden_size} is not a multiple of the {self.num_heads} heads")
        if not 0 < self.max_position <= MAX_COUNT:
            raise InvalidFileError(f"the context length must be 1 to {MAX_COUNT} tokens, not {self.max_position}")
        if self.first_position < 0:
            raise InvalidFileError(f"pad_token_id is {self.first_position - 1}; it must be -1 or more")
        if not 0 < self.norm_eps < 1:
            raise InvalidFileError(f"the epsilon of the model's norms is {self.norm_eps}; it must be between 0 and 1")


_SCALED_BY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight")  # GGUF tensors: Llama 3's, longrope's


def stretched(config: ModelConfig, factor: float | None, checkpoint: Checkpoint) -> ModelConfig:
    """Multiply the model's context length by `factor` with YaRN; None changes nothing.

    Raises:
        ConfigError: the model has no rotary embedding, has one that is scaled already, has two different ones, or runs
            on transformers' layers; or the context would be too long.
    """
    if factor is None:
        return config
    length = int(config.max_position * factor)
    obstacle = _stretching_obstacle(config, length, checkpoint)
    if obstacle is not None:
        raise ConfigError(f"yarn_scaling_factor={factor:g}: {obstacle}", "yarn_scaling_factor")
    yarn = dataclasses.replace(config.rope, kind="yarn", factor=factor, original_max_position=config.max_position)
    return dataclasses.replace(config, rope=yarn, max_position=length)


def _stretching_obstacle(config: ModelConfig, length: int, checkpoint: Checkpoint) -> str | None:
    left_out, rope = "leave the setting out", config.rope
    if config.implementation != "native":
        alone = "runs on layers of transformers, which take scaling from config.json alone"
        return f"{config.model_type} {alone}: {left_out}, and write rope_parameters there"
    table, unrotated = getattr(config, "positions", 0), len(getattr(config, "unrotated_layers", ()))
    if table or config.slopes or unrotated == config.num_layers or not getattr(config, "rotates", True):
        what = f"a table of {config.max_position} positions" if table else "no rotary positions"
        return f"{config.model_type} has {what}, and YaRN stretches only rotary ones: {left_out}"
    if rope.kind != "default" or any(name in checkpoint.tensors for name in _SCALED_BY_TENSORS):
        how = "by tensors of its file" if rope.kind == "default" else f"{rope.kind}, in its files"
        already = f"are scaled already ({how}), for {config.max_position} tokens"
        return f"the rotary positions of this model {already}: {left_out}"
    shared = {field.name for field in dataclasses.fields(ModelConfig)}
    own = [field.name for field in dataclasses.fields(config) if field.name not in shared]
    if any(isinstance(getattr(config, name), RopeConfig) for name in own):
        two = f"the layers of {config.model_type} have rotary positions of two kinds"
        return f"{two}, which one factor cannot stretch: {left_out}"
    if length > MAX_COUNT:
        many = f"{config.max_position} tokens would become {length}, and at most {MAX_COUNT} are possible"
        return f"{many}: set it to {MAX_COUNT // config.max_position} or less"
    return None
