# SPDX-License-Identifier: MIT
"""The drafter of Gemma 4: a small model whose layers read the key-value caches of the model for which it drafts.

It reads the model's embedding of the last token and its hidden state of the token before, side by side, and predicts
the next token. The next draft starts from its own output, projected to the model's size. All drafts of a step have the
last token's position, because the caches have no row of a draft token: layers with a window read the model's last cache
with a window, the other layers its last cache without one.

Models E2B and E4B store centroids that limit the logits to some clusters of tokens. They are not read: all logits are
computed, as in llama.cpp. Sources: transformers, `Gemma4AssistantForCausalLM`; llama.cpp, architecture
gemma4-assistant. Shapes: T tokens, E hidden, F hidden size of the model, V vocabulary.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.cache_specs import CacheSpec
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import gemma4, gemma4_config
from candle_vllm.core.models.gemma4_config import Gemma4Config
from candle_vllm.core.models.stack import DecoderStack

ARCHITECTURES = ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM")
GGUF_ARCHITECTURE = "gemma4-assistant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssistantConfig(Gemma4Config):
    """Config of a drafter. `sources` are layers of the model, counted from its end: -1 is the last one.

    Attributes:
        target_size: F.
    """

    target_size: int

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig.cache_specs`: the drafter has no cache of its own."""
        return ()


def config_from_hf(fields: Fields, checkpoint: Checkpoint, target: ModelConfig) -> AssistantConfig:
    """Read a drafter's `config.json`; `target` is the model for which it drafts."""
    del checkpoint
    names = fields.get("architectures", list, [])
    if not any(name in ARCHITECTURES for name in names):
        raise UnsupportedModelError(
            f"{fields.path}: architecture {names!r:.80} does not draft from a model's caches; implemented: "
            f"{', '.join(ARCHITECTURES)}"
        )
    values = {**fields.section("text_config").values, "num_kv_shared_layers": 0}
    config = gemma4_config.config_from_hf(Fields(values, fields.path), "gemma4_text")
    return _reading(config, target, fields.count("backbone_hidden_size", 1536), fields)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint, target: ModelConfig) -> AssistantConfig:
    """Read a drafter's GGUF metadata."""
    if fields.get("general.architecture", str, "") != GGUF_ARCHITECTURE:
        raise UnsupportedModelError(f"{fields.path}: the architecture is not {GGUF_ARCHITECTURE}")
    fields = Fields(fields.values, fields.path, f"{GGUF_ARCHITECTURE}.")
    values = {**fields.values, f"{fields.prefix}attention.shared_kv_layers": 0}
    config = gemma4_config.config_from_gguf(Fields(values, fields.path, fields.prefix), checkpoint)
    return _reading(config, target, fields.count("embedding_length_out"), fields)


def _reading(config: Gemma4Config, target: ModelConfig, size: int, fields: Fields) -> AssistantConfig:
    """Return the config whose layers read the caches of `target`; refuse a drafter of another model."""
    if not isinstance(target, Gemma4Config) or (size, config.vocab_size) != (target.hidden_size, target.vocab_size):
        raise InvalidFileError(
            f"{fields.path}: it drafts for a Gemma 4 of {config.vocab_size} tokens with hidden states of {size} "
            f"elements; the model is {target.model_type} and has {target.vocab_size} and {target.hidden_size}"
        )
    if config.mixture is not None or config.input_size:
        raise UnsupportedModelError(f"{fields.path}: experts or per-layer embeddings of a drafter are not implemented")
    last = {window: source for source, window in zip(target.sources, target.sliding_windows)}
    wrong = [
        n
        for n, (window, shape) in enumerate(zip(config.sliding_windows, config.shapes))
        if window not in last or target.shapes[last[window]] != shape or (window or 2) < 2
    ]
    if wrong:
        raise InvalidFileError(f"{fields.path}: layer {wrong[0]} of the drafter fits no cache of the model")
    given = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    windows = tuple(window and window - 1 for window in config.sliding_windows)  # the last token has no row in a cache
    given |= {"sources": tuple(last[window] - target.num_layers for window in config.sliding_windows)}
    given |= {"sliding_windows": windows, "keys_as_values": frozenset(), "final_softcap": None, "tie_embeddings": True}
    return AssistantConfig(**given, target_size=size)


class Assistant:
    """The drafter: hidden states [T, F] and token ids [T] -> logits [T, V].

    Args:
        config, checkpoint, placement: as for any model.
        target: the model, whose embedding is used.
    """

    taps: tuple[int, ...] | None = None

    def __init__(
        self, config: AssistantConfig, checkpoint: Checkpoint, placement: Placement, target: DecoderStack
    ) -> None:
        self.config, self.input_size, self._target = config, config.target_size, target
        self.decoder = gemma4.Gemma4(config, placement, checkpoint)
        self.before = Linear(2 * config.target_size, config.hidden_size, placement)
        self.after = Linear(config.hidden_size, config.target_size, placement)

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        self.decoder.prepare(positions)

    def fuse(self, states: Value) -> Value:
        """See `DraftHead.fuse`; the hidden states are unchanged."""
        return states

    def forward(self, token_ids: Value, hidden: Value, step: StepInput) -> tuple[Value, Value]:
        """See `DraftHead.forward`."""
        x, residual = self.before(side_by_side(self._target.embed(token_ids), hidden)), None
        for layer in self.decoder.layers:
            assert layer is not None, "a drafter has all layers"
            x, residual = layer(x, residual, step)
        assert self.decoder.norm is not None
        x = self.decoder.norm.add(x, residual)[0]
        return x, side_by_side(self.after(x))  # a copy, which no later operation of the plan overwrites

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Logits [T, V] in fp32."""
        return self.decoder.embed.logits(hidden, out)


_PREFIX = "decoder."
WEIGHTS = [
    *(dataclasses.replace(line, target=_PREFIX + line.target) for line in gemma4.WEIGHTS),
    WeightName("before:weight", "pre_projection.weight", "nextn.pre_projection.weight"),
    WeightName("after:weight", "post_projection.weight", "nextn.post_projection.weight"),
]
IGNORED = (r"lm_head\.weight", r"masked_embedding\..*", r"masked_embd_.*")
"""Names of tensors that are not loaded: the copy of the embedding, and the clusters of tokens."""
