# SPDX-License-Identifier: MIT
"""What every decoder does with its parts: embedding, layers one after the other, the last norm, the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from candle_vllm.core.kernels.collectives import Stages
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.rotary import Rotary

if TYPE_CHECKING:
    from candle_vllm.core.kernels.collectives.token_shares import TokenShares


class Stage:
    """Some of a model's layers, in a ring with the others: the first stage gets back what the last norm gives.

    What goes over a border is x [T, E] as its two summands, so that bits are those of all layers in one place. Where
    layers further on add of the vectors of rows that are given (`GivenRows`), these go over it too.

    Attributes:
        line: the stages.
        layers: the numbers of its layers.
        size: E.
        empty: gives memory for activations of a shape.
    """

    def __init__(self, line: Stages, layers: range, size: int, empty: Callable[..., Any]) -> None:
        self.line, self.layers, self.size, self.empty = line, layers, size, empty

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding, and the head."""
        return self.line.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the last norm."""
        return self.line.rank == self.line.size - 1

    def arrives(self, tokens: int) -> tuple[int, ...]:
        """The shape of what comes from the stage before, of so many tokens."""
        return 2, tokens, self.size

    def leaves(self, tokens: int) -> tuple[int, ...]:
        """The shape of what goes to the stage behind, of the last one to the first."""
        return self.returns(tokens) if self.is_last else (2, tokens, self.size)

    def returns(self, tokens: int) -> tuple[int, ...]:
        """The shape of what the last stage gives back to the first."""
        return tokens, self.size

    def vectors_arrive(self, width: int) -> bool:
        """Whether the stage before hands on vectors of so many numbers."""
        return not self.is_first and width > (self.layers.start + 1) * self.size

    def vectors_leave(self, width: int) -> bool:
        """Whether vectors of so many numbers go to the stage behind."""
        return not self.is_last and width > (self.layers.stop + 1) * self.size

    def take(self, x: Value) -> Value:
        """x, filled with what the stage before hands on."""
        return self.line.receive(x, self.line.rank - 1)

    def hand_on(self, x: Value) -> None:
        """What `DecoderStack.part` gave, or vectors, to the stage behind; of the last one to the first."""
        self.line.send(x, 0 if self.is_last else self.line.rank + 1)

    def take_back(self, x: Value) -> Value:
        """x, filled with the hidden states that the last stage gives back."""
        return self.line.receive(x, self.line.size - 1)


class DecoderStack:
    """Token ids [T] -> hidden states [T, E] -> logits [T, V]; a family's model makes the parts.

    Attributes:
        embed: the table, which is the head too where `head` is None.
        rotary: positions of the layers.
        layers: each takes x [T, E] as two summands, of which the second is None at first, and gives two, or their
            sum and None; None stands for one of another stage.
        norm: behind the last layer; None without a last norm.
        stage: where this is a part of the model's layers; None where it has all.
        shares: what divides the tokens of a layer among ranks; None where each has all.
        narrows: whether what follows the last attention that writes keys and values may have the rows alone whose
            successor is wanted.
    """

    embed: Embedding
    rotary: Rotary
    layers: Sequence[Callable[[Value, Value | None, StepInput], tuple[Value, Value | None]] | None]
    norm: RMSNorm | LayerNorm | None
    head: Embedding | None
    narrows: bool = False
    stage: Stage | None = None
    shares: TokenShares | None = None

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        self.rotary.prepare(positions)

    def start(self, token_ids: Value, step: StepInput) -> Value:
        """x [T, E] of the first layer: the embedding; a family whose tokens get more than that overrides it."""
        del step
        return self.embed(token_ids)

    def forward(self, token_ids: Value, step: StepInput) -> Value:
        """Hidden states [T, E] behind the last norm, of a model whose layers are all here."""
        assert self.stage is None, "a stage gives `part`"
        return self._normed(*self._through(token_ids, step, None))

    def begun(self, token_ids: Value, x: Value, step: StepInput) -> StepInput:
        """The step with what a family's layers are given beside x, made of the tokens and their embeddings x [T, E]."""
        del token_ids, x
        return step

    def part(self, token_ids: Value, step: StepInput, arrived: Value | None, left: Value | None = None) -> Value:
        """What a stage hands on, of the shape of `Stage.leaves`.

        Args:
            token_ids, step: see `forward`; of the ids the first stage alone takes more than their number. What is given
                has the vectors that have arrived.
            arrived: x [2, T, E] of the stage before; None on the first one.
            left: memory for the result; None for any.
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
        """The hidden states [T, E] behind the last layer."""
        if self.norm is None:
            return x if residual is None else residual + x
        return self.norm.add(x, residual)[0]

    def _through(self, token_ids: Value, step: StepInput, arrived: Value | None) -> tuple[Value, Value | None]:
        """x behind the layers that are here."""
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
            if given is not None:
                x, residual = given.add(number, x, residual)
        if taps is not None:
            x, residual = taps.keep(len(self.layers), x, residual)
        return x, residual

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Scores [T, V] in fp32."""
        return self.scoring.logits(self.end(hidden), out)

    def end(self, hidden: Value) -> Value:
        """What the head multiplies: the hidden states; a family whose head is narrower overrides it."""
        return hidden

    @property
    def scoring(self) -> Embedding:
        """What gives the logits."""
        return self.embed if self.head is None else self.head


def layers_here(model: object, count: int) -> frozenset[int]:
    """Which of a model's layers are here: all, but where it is a stage."""
    if not isinstance(model, DecoderStack):
        return frozenset(range(count))
    return frozenset(number for number, layer in enumerate(model.layers) if layer is not None)
