# SPDX-License-Identifier: MIT
"""Protocols and tables of a model family: how the loader and the engine read, build, fill and run its models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import EncoderConfig, ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.pooled_head import Dense
from candle_vllm.core.quantization.tensors import StoredTensor

DIVISORS = "rope_freqs.weight"
BIASES = (".attn_output.bias", ".ffn_gate.bias", ".ffn_up.bias", ".ffn_down.bias")
MAMBA_BIASES = (".ssm_in.bias", ".ssm_out.bias")
LAYER_NORM_EPS = "attention.layer_norm_epsilon"
"""Names in GGUF files, for the rows of `Family.as_gguf`: ends of tensors' names, and a metadata key."""


class Decoder(Protocol):
    """The interface of a model for the engine.

    Attributes:
        narrows: see `DecoderStack`.
    """

    narrows: bool

    @property
    def config(self) -> ModelConfig:
        """The model's config."""

    def prepare(self, positions: int) -> None:
        """Compute rotary tables for positions below `positions`, at most `max_position`; by default for all."""

    def forward(self, token_ids: Value, step: StepInput) -> Value:
        """Token ids [T] to hidden states [T, E]."""

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Hidden states [T, E] to logits [T, V] in fp32, written to `out` if it is given."""


class DraftHead(Protocol):
    """The interface of layers that draft tokens from the hidden states of a model.

    They read token p + 1 and the hidden states at position p, and predict token p + 2.

    Attributes:
        taps: layers of the model whose inputs `fuse` reads side by side; None for the output of the model's last norm.
        input_size: elements that `fuse` reads for each token.
    """

    taps: tuple[int, ...] | None
    input_size: int

    @property
    def config(self) -> ModelConfig:
        """The config of the head, as if its layers were a model."""

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""

    def fuse(self, states: Value) -> Value:
        """Convert the model's hidden states [T, input_size] to the hidden states that `forward` reads."""

    def forward(self, token_ids: Value, hidden: Value, step: StepInput) -> tuple[Value, Value]:
        """Token ids [T] and hidden states to the input [T, E] of `logits`, and the hidden states for the next draft."""

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Hidden states [T, E] to the logits in fp32 of the draft vocabulary."""


class Encoder(Protocol):
    """The interface of an encoder, which reads whole texts."""

    @property
    def config(self) -> EncoderConfig:
        """The model's config."""

    def forward(self, token_ids: Value, positions: Value, types: Value, lengths: Sequence[int]) -> Value:
        """Token ids [T] of concatenated texts to hidden states [T, E] in fp32; see `EncoderStack.forward`."""

    def scores(self, first: Value) -> Value:
        """Hidden states [R, E] of the texts' first tokens to scores [R, L], in a model with L labels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp's GGUF files describe the models of one model_type.

    Attributes:
        name: value of `general.architecture`.
        more: additional keys, without the architecture's prefix; they take precedence over common keys.
        otherwise: config fields that have another value in a GGUF file, such as the layout of stored tensors.
        eps: key of the norms' epsilon.
        interleaved: q and k rows are stored in pairs of adjacent rows, as in safetensors.
        reordered: q and k rows are stored in such pairs, and in safetensors in halves.
        names: of a tensor's several GGUF names, one that contains such a substring is written; otherwise the first one.
        head: llama.cpp requires a head in the file, even if it equals the embedding table.
        log_multiplier: value of `rope.scaling.yarn_log_multiplier` divided by `mscale_all_dim`; None without this key.
        unread: ends of the names of tensors that llama.cpp does not know; it refuses files with such tensors.
        square: llama.cpp requires that all heads together are as wide as the hidden state.
        every: llama.cpp requires that all layers have experts.
        norm: whether llama.cpp normalises the weights of chosen experts; None if the file has a key for it.
    """

    name: str
    more: Callable[[Any], dict[str, Any]] = lambda _: {}
    otherwise: Callable[[Any], dict[str, Any]] = lambda _: {}
    eps: str = "attention.layer_norm_rms_epsilon"
    interleaved: bool = False
    reordered: bool = False
    names: Callable[[Any], Sequence[str]] = lambda _: ()
    head: bool = False
    log_multiplier: float | None = None
    unread: tuple[str, ...] = (DIVISORS, *BIASES)
    square: bool = False
    every: bool = False
    norm: bool | None = None

    def stored(self, config: Any) -> Any:
        """Return the model's config as in a file of this architecture."""
        tied = config.tie_embeddings and not self.head
        pairs = self.interleaved or self.reordered
        usual: dict[str, Any] = {"interleaved_rotary": pairs, "tie_embeddings": tied, "has_head": True}
        return dataclasses.replace(config, **usual | self.otherwise(config))

    def check(self, config: Any, names: Iterable[str], source: Path) -> None:
        """Refuse a model that llama.cpp would not load, or would compute differently.

        Args:
            names: names of the file's tensors.
            source: path for error messages.

        Raises:
            UnsupportedModelError: the message lists everything that llama.cpp does not support.
        """
        found = tuple(names)
        lacks = [end.removeprefix(".") for end in self.unread if any(name.endswith(end) for name in found)]
        if self.square and config.num_heads * config.head_dim != config.hidden_size:
            lacks.append("heads that together are not as wide as the hidden state")
        mixture = getattr(config, "mixture", None)
        if self.every and len(config.sparse_layers) < config.num_layers:
            lacks.append("layers without experts")
        if mixture is not None and self.norm not in (None, mixture.renormalise):
            lacks.append(f"norm_topk_prob {str(mixture.renormalise).lower()}")
        if lacks:
            raise UnsupportedModelError(
                f"{source}: llama.cpp's {self.name} does not support {', '.join(lacks)}; serve it from its folder with "
                "`isq` to quantise it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How to read, build and fill the models of one file in this folder.

    Attributes:
        hf: `architectures` of config.json, each with the model_type by which its config is read.
        gguf: `general.architecture` of GGUF files.
        config_from_hf, config_from_gguf: read a model's config strictly, a `ModelConfig` or the family's subclass of
            it, which `build`, `ignored` and others get. `config_from_gguf` is None if `gguf` is empty.
        build: makes the model without its weights.
        weights: the table of weight names.
        ignored: patterns of names of stored tensors that are not loaded.
        prepared: renames the tensors of a checkpoint to the names of the table; None if they already have these names.
        completed: adds to the config of `config_from_hf` what only the tensors show; None if `config.json` is complete.
        as_gguf: how its models are written as GGUF files, by their model_type.
    """

    hf: Mapping[str, str]
    gguf: tuple[str, ...] = ()
    config_from_hf: Callable[[Fields, str], ModelConfig]
    config_from_gguf: Callable[[Fields, Checkpoint], ModelConfig] | None = None
    build: Callable[[Any, Placement, Checkpoint], Decoder]
    weights: Sequence[WeightName]
    ignored: Callable[[Any], Sequence[str]]
    prepared: Callable[[Checkpoint], Checkpoint] | None = None
    completed: Callable[[Any, Mapping[str, StoredTensor]], ModelConfig] | None = None
    as_gguf: Mapping[str, Architecture] = dataclasses.field(default_factory=dict[str, Architecture])


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """How to read, build and fill the encoders of one file in this folder.

    Attributes:
        hf: `architectures` of config.json, each with its model_type, and whether the model has a head for scores.
        gguf, config_from_gguf, build, ignored: as for `Family`; config_from_hf also gets `scores`, the second in `hf`.
        weights: makes the table of weight names from a config and the names of stored tensors.
        behind: makes the layers of a head that follows the pooling; None if no architecture has such a head.
        in_torch: why its layers run op by op in torch; None if they are compiled on a CPU.
    """

    hf: Mapping[str, tuple[str, bool]]
    gguf: tuple[str, ...] = ()
    config_from_hf: Callable[..., EncoderConfig]
    config_from_gguf: Callable[[Fields, Checkpoint], EncoderConfig] | None = None
    build: Callable[[Any, Placement], Encoder]
    weights: Callable[[Any, Iterable[str]], Sequence[WeightName]]
    ignored: Callable[[Any], Sequence[str]]
    behind: Callable[[Any, Checkpoint], tuple[Dense, ...]] | None = None
    in_torch: str | None = None
