# SPDX-License-Identifier: MIT
"""EAGLE-3 heads: one layer that drafts a model's next tokens from the hidden states of three of its layers.

At position p the head reads the embedding of token p + 1 and the model's hidden states of p, fused to one vector g; it
predicts token p + 2. If token p + 1 is itself a draft token, g is the head's output at p - 1. The block is Llama's,
except that its attention reads norm(embedding) and norm(g) side by side.

`config.json` names `LlamaForCausalLMEagle3` or `Eagle3LlamaForCausalLM`, or has the library speculators' form; GGUF
files have the architecture eagle3. EAGLE-3.1 adds norms before fusion; its next draft starts from the normed vector.
Source: Li, Wei, Zhang and Zhang, 2025, arXiv:2503.01840. Shapes: T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import ModelConfig, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import half_split
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.llama import Attention, LlamaConfig
from candle_vllm.core.models.stack import DecoderStack

# ---- config ----------------------------------------------------------------------------------------------------------

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")
GGUF_ARCHITECTURE = "eagle3"
_MOST_TAPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3Config(LlamaConfig):
    """Config of a head. `vocab_size` is the number of the embedding's rows.

    Attributes:
        taps: layers of the model whose inputs the head reads.
        target_size: hidden size of the model.
        draft_vocab_size: number of tokens that the head can draft.
        norm_before_residual: the residual stream starts from the normalised hidden state, not from the hidden state.
        norm_before_fuse: one norm of all fused hidden states.
        norm_each: a norm of each layer's hidden state before they are fused.
        norm_output: the next draft starts from the normalised output, not from the sum before the norm.
    """

    taps: tuple[int, ...]
    target_size: int
    draft_vocab_size: int
    norm_before_residual: bool = False
    norm_before_fuse: bool = False
    norm_each: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers != 1:
            raise UnsupportedModelError(
                f"a head of {self.num_layers} layers is not implemented: EAGLE-3 heads have one"
            )
        if self.norm_before_fuse and self.norm_each:
            raise InvalidFileError("norm_before_fc and fc_norm cannot both be set")
        if not 0 < self.draft_vocab_size <= MAX_COUNT:
            raise InvalidFileError(f"draft_vocab_size is {self.draft_vocab_size}; it must be 1 to {MAX_COUNT}")


def config_from_hf(fields: Fields, target: ModelConfig) -> Eagle3Config:
    """Read a head's `config.json`; `target` is the model for which it drafts."""
    names = fields.get("architectures", list, [])
    if not any(name in ARCHITECTURES for name in names):
        raise UnsupportedModelError(
            f"{fields.path}: architecture {names!r:.80} is not an EAGLE-3 head; implemented: {', '.join(ARCHITECTURES)}"
        )
    speculators = "transformer_layer_config" in fields
    inner = fields.get("transformer_layer_config", dict, {})
    values = {"max_position_embeddings": target.max_position, **fields.values, **inner}
    layer, own = Fields(values, fields.path), fields.section("eagle_config")
    layer.choice("hidden_act", "silu", "silu", "swish")
    if not own.get("use_aux_hidden_state", bool, True):
        raise UnsupportedModelError(f"{fields.path}: eagle_config.use_aux_hidden_state false is not implemented")
    bias = layer.get("attention_bias", bool, False)
    shared = shared_from_hf(layer, "eagle3")
    return Eagle3Config(
        **_fitted(shared, target),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=layer.get("mlp_bias", bool, False),
        taps=_taps(fields, own, target),
        target_size=fields.count("target_hidden_size", shared["hidden_size"]),
        draft_vocab_size=fields.count("draft_vocab_size", shared["vocab_size"]),
        norm_before_residual=fields.get("norm_before_residual", bool, speculators),
        norm_before_fuse=own.get("norm_before_fc", bool, fields.get("norm_before_fc", bool, False)),
        norm_each=fields.get("fc_norm", bool, False),
        norm_output=fields.get("norm_output", bool, False),
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint, target: ModelConfig) -> Eagle3Config:
    """Read a head's GGUF metadata."""
    tensors = checkpoint.tensors
    values = {f"{fields.prefix}vocab_size": target.vocab_size, **fields.values}
    shared = shared_from_gguf(Fields(values, fields.path, fields.prefix), checkpoint)
    key = "extract_layers" if "extract_layers" in fields else "target_layers"
    head = tensors.get("d2t") or tensors.get("output.weight")
    return Eagle3Config(
        **_fitted(shared, target),
        interleaved_rotary=True,
        taps=_checked_taps(fields, key, fields.get(key, list), target.num_layers),
        target_size=fields.count("target_hidden_size"),
        draft_vocab_size=head.shape[0] if head is not None and head.shape else shared["vocab_size"],
        norm_before_residual=fields.get("norm_before_residual", bool, False),
    )


def _fitted(shared: Mapping[str, Any], target: ModelConfig) -> dict[str, Any]:
    """Untie the head; with default or llama3 scaling give it the model's context: heads are trained on short texts."""
    if target.stream_count:
        raise UnsupportedModelError("an EAGLE-3 head of a model with several residual streams is not implemented")
    plain = shared["rope"].kind in ("default", "llama3")
    return {**shared, "tie_embeddings": False} | ({"max_position": target.max_position} if plain else {})


def _taps(fields: Fields, own: Fields, target: ModelConfig) -> tuple[int, ...]:
    """The layers whose inputs are fused: a top-level key has these, `eagle_config` those before; three by default."""
    key, layers = "eagle_aux_hidden_state_layer_ids", target.num_layers
    if key in fields:
        return _checked_taps(fields, key, fields.get(key, list), layers)
    if key in own:
        before = _checked_taps(own, key, own.get(key, list), layers - 1)
        return tuple(number + 1 for number in before)
    if layers < 6:
        raise InvalidFileError(f"{fields.path}: {key} is missing, and a model of {layers} layers has no usual ones")
    return 2, layers // 2, layers - 3


def _checked_taps(fields: Fields, key: str, given: list[Any], most: int) -> tuple[int, ...]:
    right = all(isinstance(number, int) and not isinstance(number, bool) for number in given)
    if not right or not 0 < len(given) <= _MOST_TAPS or not all(0 <= number <= most for number in given):
        raise InvalidFileError(
            f"{fields.path}: {fields.prefix}{key} is {given!r:.80}; it must be 1 to {_MOST_TAPS} layers, each from 0 "
            f"to {most}"
        )
    return tuple(given)


# ---- head ------------------------------------------------------------------------------------------------------------


class Eagle3:
    """The head: hidden states of the model or of the head, and token ids [T] -> logits [T, draft vocabulary].

    Args:
        config, checkpoint, placement: as for any model.
        target: the model, whose embedding and output layer are used if the checkpoint lacks them.
    """

    def __init__(
        self, config: Eagle3Config, checkpoint: Checkpoint, placement: Placement, target: DecoderStack
    ) -> None:
        self.config = config
        self.taps: tuple[int, ...] | None = config.taps
        self.input_size = len(config.taps) * config.target_size
        hidden, eps, stored = config.hidden_size, config.norm_eps, checkpoint.tensors
        self.own_embed = None
        if has_embedding(checkpoint):
            self.own_embed = Embedding(config.vocab_size, hidden, placement)
        self.own_head = None
        if any(name in stored for name in ("lm_head.weight", "output.weight")):
            self.own_head = Embedding(config.draft_vocab_size, hidden, placement)
        self._shared = target
        self.whole_norm = RMSNorm(self.input_size, eps, placement) if config.norm_before_fuse else None
        each = len(config.taps) if config.norm_each else 0
        norms = [RMSNorm(config.target_size, eps, placement) for _ in range(each)]
        self.norms: list[RMSNorm | None] = [*norms, *[None] * (_MOST_TAPS - each)]
        self.fuser = Linear(self.input_size, hidden, placement)
        self.embedding_norm = RMSNorm(hidden, eps, placement)
        self.hidden_norm = RMSNorm(hidden, eps, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement, factors="rope_freqs.weight" in stored)
        self.attention = Attention(config, 0, self.rotary, placement, inputs=2 * hidden)
        self.mlp_norm = RMSNorm(hidden, eps, placement)
        self.mlp = GatedMLP(hidden, config.intermediate_size, placement, bias=config.mlp_bias)
        self.norm = RMSNorm(hidden, eps, placement)

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        self.rotary.prepare(positions)

    def fuse(self, states: Value) -> Value:
        """See `DraftHead.fuse`."""
        if self.whole_norm is not None:
            states = self.whole_norm(states)
        elif self.config.norm_each:
            parts = states.split([self.config.target_size] * len(self.config.taps), dim=-1)
            states = side_by_side(*(norm(part) for norm, part in zip(self.norms, parts) if norm is not None))
        return self.fuser(states)

    def forward(self, token_ids: Value, hidden: Value, step: StepInput) -> tuple[Value, Value]:
        """See `DraftHead.forward`."""
        embedded = (self.own_embed or self._shared.embed).rows(token_ids)
        normed = self.hidden_norm(hidden)
        x = self.attention(side_by_side(self.embedding_norm(embedded), normed), step)
        x, residual = self.mlp_norm.add(x, normed if self.config.norm_before_residual else hidden)
        x, total = self.norm.add(self.mlp(x), residual)
        return x, x if self.config.norm_output else total

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Logits [T, draft vocabulary] in fp32."""
        return (self.own_head or self._shared.head or self._shared.embed).logits(hidden, out)


# ---- weight names ----------------------------------------------------------------------------------------------------

_LAYERS = ("midlayer.", "layers.0.", "model.midlayer.", "model.layers.0.")
_EMBED_HF, _EMBED_GG = ("embed_tokens.weight", "model.embed_tokens.weight"), "token_embd.weight"


def has_embedding(checkpoint: Checkpoint) -> bool:
    """Whether the head's checkpoint has an embedding."""
    return any(name in checkpoint.tensors for name in (*_EMBED_HF, _EMBED_GG))


def _line(target: str, hf: str, gguf: str, view: Any = None) -> WeightName:
    return WeightName(target, tuple(layer + hf for layer in _LAYERS), f"blk.0.{gguf}", view, view)


def _whole(target: str, hf: str, gguf: str | None) -> WeightName:
    return WeightName(target, (hf, f"model.{hf}"), gguf)


WEIGHTS = [
    WeightName("own_embed:weight", _EMBED_HF, _EMBED_GG),
    WeightName("rotary:factors", None, "rope_freqs.weight"),
    _whole("whole_norm:weight", "input_norm.weight", None),
    *(_whole(f"norms.{n}:weight", f"fc_norm.{n}.weight", None) for n in range(_MOST_TAPS)),
    _whole("fuser:weight", "fc.weight", "fc.weight"),
    _line("embedding_norm:weight", "input_layernorm.weight", "attn_norm.weight"),
    _line("hidden_norm:weight", "hidden_norm.weight", "attn_norm_2.weight"),
    *(
        _line(f"attention.qkv:{part}.{kind}", f"self_attn.{part}_proj.{kind}", f"attn_{part}.{kind}", view)
        for part, view in (("q", half_split("num_heads")), ("k", half_split("num_kv_heads")), ("v", None))
        for kind in ("weight", "bias")
    ),
    *(
        _line(f"{target}{kind}", f"{hf}.{kind}", f"{gguf}.{kind}")
        for target, hf, gguf in (
            ("attention.output:", "self_attn.o_proj", "attn_output"),
            ("mlp.gate_up:gate.", "mlp.gate_proj", "ffn_gate"),
            ("mlp.gate_up:up.", "mlp.up_proj", "ffn_up"),
            ("mlp.down:", "mlp.down_proj", "ffn_down"),
        )
        for kind in ("weight", "bias")
    ),
    _line("mlp_norm:weight", "post_attention_layernorm.weight", "ffn_norm.weight"),
    _whole("norm:weight", "norm.weight", "output_norm.weight"),
    WeightName("own_head:weight", "lm_head.weight", "output.weight"),
]
IGNORED = (r"(model\.)?(d2t|t2d)", r".*rotary_emb\.inv_freq", r"mask_hidden", r"verifier_.*")
"""Patterns of names of tensors that are not loaded: vocabularies (see `draft_token_ids`), and tensors for training."""


def draft_token_ids(config: Eagle3Config, checkpoint: Checkpoint, tokens: int) -> NDArray[np.int64] | None:
    """The model's token id for each token of the head, int64 [draft vocabulary]; None without `d2t`: the ids are equal.

    Args:
        config: config of the head.
        checkpoint: `d2t` holds the model's token ids (GGUF), or their differences from the head's (safetensors).
        tokens: vocabulary size of the model.

    Raises:
        InvalidFileError: `d2t` is not one integer for each token of the head, or an id is not a token of the model.
    """
    stored = checkpoint.tensors.get("d2t") or checkpoint.tensors.get("model.d2t")
    size, path = config.draft_vocab_size, checkpoint.path
    if stored is None:
        if size > tokens:
            raise InvalidFileError(f"{path}: the head drafts {size} tokens and the model has {tokens}")
        return None
    if stored.type_name not in ("I64", "I32") or stored.shape != (size,):
        raise InvalidFileError(
            f"{path}: d2t is {stored.type_name} {list(stored.shape)}; it must be {size} whole numbers, one for each "
            "token that the head drafts"
        )
    ids = stored.load(stored.type_name).astype(np.int64)
    if checkpoint.format == "safetensors":
        with np.errstate(over="ignore"):
            ids = ids + np.arange(size)
    wrong = np.flatnonzero((ids < 0) | (ids >= tokens))
    if len(wrong):
        raise InvalidFileError(
            f"{path}: d2t makes token {ids[wrong[0]]} of the head's {wrong[0]}, and the model has {tokens} tokens"
        )
    return ids
