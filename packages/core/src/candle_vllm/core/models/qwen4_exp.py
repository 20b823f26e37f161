# SPDX-License-Identifier: MIT
"""Qwen4 (Qwen3.8-Flash-Next): delta nets and attention to chosen blocks between gated residual streams, with experts.

Delta nets, attention and experts are those of Qwen3.5 (`qwen3_next.py`); `qwen4_exp_parts.py` has the residual streams,
`block_index.py` the indexer, and `ngram_layer.py` the embeddings of hashed n-grams that some layers add to the streams
first.
Layers for multi-token prediction are not loaded. Source: transformers' `Qwen4ExpTextModel`.
Shapes: T tokens, N streams, E hidden, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.delta_net import GatedDeltaNet
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import qwen3_next
from candle_vllm.core.models.block_index import Attention
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.ngram_hash import NGrams
from candle_vllm.core.models.ngram_layer import NGramLayer, TokenNumbers
from candle_vllm.core.models.ngram_table import joined
from candle_vllm.core.models.qwen4_exp_config import Qwen4ExpConfig, config_from_hf
from candle_vllm.core.models.qwen4_exp_gguf import config_from_gguf, gguf_keys, require_gguf
from candle_vllm.core.models.qwen4_exp_names import WEIGHTS
from candle_vllm.core.models.qwen4_exp_parts import GatedResidual
from candle_vllm.core.models.residual_streams import StreamCopies
from candle_vllm.core.models.stack import DecoderStack


class Block:
    """One decoder layer: streams [T, N * E] -> [T, N * E], without a separate residual; layer 0 reads x [T, E]."""

    def __init__(self, config: Qwen4ExpConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        size, ngrams = config.hidden_size, config.ngrams
        self.copies = None if layer else StreamCopies(config.streams, placement)
        self.ngrams = NGramLayer(config, layer, placement) if ngrams is not None and layer in ngrams.hashes else None
        self.attention_streams, self.mlp_streams = (GatedResidual(config, placement) for _ in range(2))
        self.attention: GatedDeltaNet | Attention
        if layer in config.delta_layers:
            self.attention = GatedDeltaNet(layer, size, config.delta, config.norm_eps, placement, gate=config.gate)
        else:
            self.attention = Attention(config, layer, rotary, placement)
        assert config.mixture is not None
        self.mlp = SparseMLP(size, config.mixture, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, None]:
        assert residual is None
        x = x if self.copies is None else self.copies(x)
        x = x if self.ngrams is None else self.ngrams(x, step)
        read, gates = self.attention_streams(x)
        x = self.attention_streams.write(x, self.attention(read, step), gates)
        read, gates = self.mlp_streams(x)
        return self.mlp_streams.write(x, self.mlp(read), gates), None


class Qwen4Exp(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    norm = None  # the streams are normalised as `GatedResidual` reads them

    def __init__(self, config: Qwen4ExpConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        self.config, vocabulary = config, (config.vocab_size, config.hidden_size)
        self.embed = Embedding(*vocabulary, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.numbers = None
        if config.ngrams is not None:
            check_hashes(config.ngrams, checkpoint)
            self.numbers = TokenNumbers(config.ngrams.longest - 1)
        self.layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.streams = GatedResidual(config, placement, writes=False)
        self.head = None if config.tie_embeddings else Embedding(*vocabulary, placement)

    def start(self, token_ids: Value, step: StepInput) -> Value:
        """See `DecoderStack.start`; also give the tokens to layers with n-grams."""
        if self.numbers is not None:
            step.shared["ids"] = token_ids, self.numbers(token_ids)
        return super().start(token_ids, step)

    def _normed(self, x: Value, residual: Value | None) -> Value:
        assert residual is None
        return self.streams(x)[0]


BUFFERS = {"factors": "layer_multipliers", "sizes": "ngram_heads_vocab_sizes", "offsets": "ngram_heads_offsets"}
"""Names in safetensors files of the numbers of an `NGramHash`, which a config determines and files may leave out."""


def check_hashes(ngrams: NGrams, checkpoint: Checkpoint) -> None:
    """Raise InvalidFileError if a file has other numbers of hashes than `ngrams`."""
    for layer, hashes in ngrams.hashes.items():
        for part, name in BUFFERS.items():
            stored = checkpoint.tensors.get(f"model.layers.{layer}.ple.ple_embedding.{name}")
            numbers = np.array(getattr(hashes, part), np.int64)
            if stored is None:
                continue
            fits = (stored.dtype, stored.shape) == ("I64", numbers.shape)
            if not fits or not np.array_equal(stored.load(None), numbers):
                raise InvalidFileError(f"{stored.path}: {stored.name} has other numbers than the config's n-grams")


def ignored(config: Qwen4ExpConfig) -> list[str]:
    """Names that Qwen3.5 ignores, and the numbers of hashes, which `check_hashes` reads."""
    return [*qwen3_next.ignored(config), rf".*\.ple_embedding\.({'|'.join(BUFFERS.values())})"]


FAMILY = Family(
    hf={"Qwen4ExpForCausalLM": "qwen4_exp"},
    gguf=("qwen4exp",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Qwen4Exp,
    weights=WEIGHTS,
    ignored=ignored,
    prepared=joined,
    as_gguf={"qwen4_exp": Architecture(name="qwen4exp", more=gguf_keys, otherwise=require_gguf, every=True, norm=True)},
)
