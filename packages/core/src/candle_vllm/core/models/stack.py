# SPDX-License-Identifier: MIT
"""Parts and forward pass of all decoders: embedding, a stack of layers, the last norm, the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from candle_vllm.core.kernels.collectives import Stages
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary

if TYPE_CHECKING:
    from candle_vllm.core.kernels.collectives.token_shares import TokenShares


class Stage:
    """A pipeline stage: some of a model's layers. Stages form a ring: the last one returns hidden states to the first.

    Stages exchange x and the residual separately, as [2, T, E], so that results have the same bits as without stages.
    If later layers add image vectors (DeepStack, `GivenRows`), these vectors are exchanged too.

    Attributes:
        line: communication with the other stages.
        layers: indices of the stage's layers.
        size: E.
        empty: allocates memory for activations of a shape.
        deep: index of the last layer that adds image vectors, plus 1; 0 if each of the first layers adds one vector.
    """

    def __init__(self, line: Stages, layers: range, size: int, empty: Callable[..., Any], deep: int = 0) -> None:
        self.line, self.layers, self.size, self.empty, self._deep = line, layers, size, empty, deep

    @property
    def is_first(self) -> bool:
        """Whether the stage has the embedding and the head."""
        return self.line.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage has the last norm."""
        return self.line.rank == self.line.size - 1

    def arrives(self, tokens: int) -> tuple[int, ...]:
        """The shape of the input from the previous stage, for `tokens` tokens."""
        return 2, tokens, self.size

    def leaves(self, tokens: int) -> tuple[int, ...]:
        """The shape of the output to the next stage; the last stage sends to the first."""
        return self.returns(tokens) if self.is_last else (2, tokens, self.size)

    def returns(self, tokens: int) -> tuple[int, ...]:
        """The shape of the output of the last stage, which it sends to the first."""
        return tokens, self.size

    def vectors_arrive(self, width: int) -> bool:
        """Whether the previous stage sends image vectors; `width` is E, plus E for each layer that adds a vector."""
        return not self.is_first and self._depth(width) > self.layers.start

    def vectors_leave(self, width: int) -> bool:
        """Whether layers of later stages add image vectors, so that they are sent on; see `vectors_arrive`."""
        return not self.is_last and self._depth(width) > self.layers.stop

    def _depth(self, width: int) -> int:
        return self._deep if self._deep and width > self.size else width // self.size - 1

    def take(self, x: Value) -> Value:
        """Receive x from the previous stage."""
        return self.line.receive(x, self.line.rank - 1)

    def hand_on(self, x: Value) -> None:
        """Send the result of `DecoderStack.part`, or vectors, to the next stage; the last stage sends to the first."""
        self.line.send(x, 0 if self.is_last else self.line.rank + 1)

    def take_back(self, x: Value) -> Value:
        """Receive the hidden states x from the last stage."""
        return self.line.receive(x, self.line.size - 1)


class DecoderStack:
    """Decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]; a family's model creates the parts.

    Attributes:
        embed: embedding table, which is also the head if `head` is None.
        rotary, local_rotary: rotary embedding of the layers; another one for layers with a window, or None.
        layers: each maps (x, residual or None, step) to (x, residual) or (sum, None), all [T, E]; None for a layer of
            another stage.
        norm: norm after the last layer; None without a last norm.
        stage: the pipeline stage, if the model has only some of the layers; None if it has all.
        shares: divides the tokens of a layer among ranks; None if each rank has all tokens.
        deep: the layers after which image vectors are added, with the numbers of these; None for the first layers.
        narrows: whether a step may drop rows after the last cache write, if their next token is not sampled.
    """

    embed: Embedding
    rotary: Rotary
    local_rotary: Rotary | None = None
    layers: Sequence[Callable[[Value, Value | None, StepInput], tuple[Value, Value | None]] | None]
    norm: RMSNorm | LayerNorm | None
    head: Embedding | None
    narrows: bool = False
    stage: Stage | None = None
    shares: TokenShares | None = None
    deep: Mapping[int, int] | None = None

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        self.rotary.prepare(positions)
        if self.local_rotary is not None:
            self.local_rotary.prepare(positions)

    def make_rotaries(self, config: Any, placement: Placement, *, factors: bool = False) -> list[Rotary]:
        """Set `rotary` and `local_rotary` by `rope` and `local_rope` of a config; return each layer's embedding."""
        self.rotary = local = Rotary(config.rope, config.max_position, placement, factors=factors)
        if config.local_rope is not None:
            self.local_rotary = local = Rotary(config.local_rope, config.max_position, placement)
        return [self.rotary if window is None else local for window in config.sliding_windows]

    def start(self, token_ids: Value, step: StepInput) -> Value:
        """Return the input x [T, E] of the first layer: the embedding; a family with further inputs overrides it."""
        del step
        return self.embed(token_ids)

    def forward(self, token_ids: Value, step: StepInput) -> Value:
        """Compute hidden states [T, E] after the last norm, in a model with all layers."""
        assert self.stage is None, "call `part` on a model with a stage"
        return self._normed(*self._through(token_ids, step, None))

    def begun(self, token_ids: Value, x: Value, step: StepInput) -> StepInput:
        """Return the step with further inputs of a family's layers, from the tokens and their embeddings x [T, E]."""
        del token_ids, x
        return step

    def part(self, token_ids: Value, step: StepInput, arrived: Value | None, left: Value | None = None) -> Value:
        """Compute the output of a stage, in the shape of `Stage.leaves`.

        Args:
            token_ids: token ids [T], of which stages after the first use only the number.
            step: the step's tensors; `step.given` has the vectors that arrived.
            arrived: x [2, T, E] from the previous stage; None on the first stage.
            left: memory for the result; None to allocate it.
        """
        assert self.stage is not None
        x, residual = self._through(token_ids, step, arrived)
        if self.stage.is_last:
            hidden = self._normed(x, residual)
            return hidden if left is None else left.copy_(hidden)
        both = x.new_empty((2, *x.shape)) if left is None else left
        both[0], both[1] = x, 0 if residual is None else residual
        return both

    def _normed(self, x: Value, residual: Value | None) -> Value:
        """Apply the last norm, if the model has one: hidden states [T, E]."""
        if self.norm is None:
            return x if residual is None else residual + x
        return self.norm.add(x, residual)[0]

    def _through(self, token_ids: Value, step: StepInput, arrived: Value | None) -> tuple[Value, Value | None]:
        """Compute x and the residual after the layers of this stage."""
        taps, given, residual, shares = step.taps, step.given, None, self.shares
        if shares is not None:
            shares.begin(len(token_ids), may_divide=step.may_divide)
        if arrived is None:
            x = self.start(token_ids, step)
            if given is not None:
                x = given.put(x, None if self.embed.share is None else self.embed.share.collective)
            step = self.begun(token_ids, x, step)
        else:
            x, residual = arrived[0], arrived[1]
        for number, layer in enumerate(self.layers):
            if layer is None:
                continue
            if taps is not None:
                x, residual = taps.keep(number, x, residual)
            if number == step.narrowed:
                total = x if residual is None else residual + x
                assert isinstance(total, Recorded)
                x, residual = total.narrowed(), None
            x, residual = layer(x, residual, step)
            if shares is not None:
                x, residual = shares.whole(x, residual)
            if given is not None and (at := number if self.deep is None else self.deep.get(number)) is not None:
                x, residual = given.add(at, x, residual)
        if taps is not None:
            x, residual = taps.keep(len(self.layers), x, residual)
        return x, residual

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Compute logits [T, V] in fp32, in `out` if given."""
        return self.scoring.logits(self.end(hidden), out)

    def end(self, hidden: Value) -> Value:
        """Return the input of the head: the hidden states; a family with a narrower head overrides it."""
        return hidden

    @property
    def scoring(self) -> Embedding:
        """The layer that computes the logits."""
        return self.embed if self.head is None else self.head


def layers_here(model: object, count: int) -> frozenset[int]:
    """The indices of the layers that a model has: all, or those of its stage."""
    if not isinstance(model, DecoderStack):
        return frozenset(range(count))
    return frozenset(number for number, layer in enumerate(model.layers) if layer is not None)
