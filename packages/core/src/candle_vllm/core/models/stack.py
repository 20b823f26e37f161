# SPDX-License-Identifier: MIT
"""What every decoder does with its parts: embedding, layers one after the other, the last norm, the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from candle_vllm.core.kernels.collectives import Stages
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.rotary import Rotary


class Stage:
    """Some of a model's layers, in a ring with the others: the first stage gets back what the last norm gives.

    What goes over a border is x [T, E] as its two summands, so that bits are those of all layers in one place.

    Args:
        line: the stages.
        size: E.
        empty: memory for activations of a shape.
    """

    def __init__(self, line: Stages, size: int, empty: Callable[..., Any]) -> None:
        self.line, self._size, self._empty = line, size, empty

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding, and the head."""
        return self.line.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the last norm."""
        return self.line.rank == self.line.size - 1

    def taken(self, tokens: int) -> tuple[Value, Value]:
        """x of so many tokens, from the stage before."""
        both = self.line.receive(self._empty(2, tokens, self._size), self.line.rank - 1)
        return both[0], both[1]

    def hand_on(self, x: Value, residual: Value | None, norm: Callable[..., tuple[Value, Value]] | None) -> None:
        """x to the stage behind; the last one's `norm` of it to the first."""
        if norm is not None:
            self.line.send(norm(x, residual)[0], 0)
            return
        assert residual is not None, "there is a layer before a border"
        both = x.new_empty((2, *x.shape))
        both[0], both[1] = x, residual
        self.line.send(both, self.line.rank + 1)

    def returned(self, tokens: int) -> Value:
        """The hidden states [T, E] of so many tokens, from the last stage."""
        return self.line.receive(self._empty(tokens, self._size), self.line.size - 1)


class DecoderStack:
    """Token ids [T] -> hidden states [T, E] -> logits [T, V]; a family's model makes the parts.

    Attributes:
        embed: the table, which is the head too where `head` is None.
        rotary: positions of the layers.
        layers: each takes x [T, E] as two summands, of which the second is None at first, and gives two; None stands
            for one of another stage.
        norm: behind the last layer.
        stage: where this is a part of the model's layers; None where it has all.
        narrows: whether what follows the last layer's attention may have the rows alone whose successor is wanted.
    """

    embed: Embedding
    rotary: Rotary
    layers: Sequence[Callable[[Value, Value | None, StepInput], tuple[Value, Value]] | None]
    norm: RMSNorm | LayerNorm
    head: Embedding | None
    narrows: bool = False
    stage: Stage | None = None

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        self.rotary.prepare(positions)

    def forward(self, token_ids: Value, step: StepInput) -> Value:
        """Hidden states [T, E] behind the last norm; a stage behind the first gives nothing."""
        stage = self.stage
        if stage is None:
            return self.norm.add(*self._through(token_ids, step))[0]
        self.begin(token_ids, step)
        return stage.returned(len(token_ids)) if stage.is_first else None

    def begin(self, token_ids: Value, step: StepInput) -> None:
        """What a stage does of `forward`; the first one asks for what comes of it (`returned`) in the same order."""
        assert self.stage is not None
        x, residual = self._through(token_ids, step)
        self.stage.hand_on(x, residual, self.norm.add if self.stage.is_last else None)

    def _through(self, token_ids: Value, step: StepInput) -> tuple[Value, Value | None]:
        """x behind the layers that are here."""
        taps, residual = step.taps, None
        if self.stage is None or self.stage.is_first:
            x = self.embed(token_ids)
            if step.given is not None:
                x = step.given.put(x)
        else:
            x, residual = self.stage.taken(len(token_ids))
        for number, layer in enumerate(self.layers):
            if layer is None:
                continue
            if taps is not None:
                x, residual = taps.keep(number, x, residual)
            x, residual = layer(x, residual, step)
            if step.given is not None:
                x, residual = step.given.add(number, x, residual)
        if taps is not None:
            x, residual = taps.keep(len(self.layers), x, residual)
        return x, residual

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Scores [T, V] in fp32."""
        return (self.embed if self.head is None else self.head).logits(hidden, out)


def layers_here(model: object, count: int) -> frozenset[int]:
    """Which of a model's layers are here: all, but where it is a stage."""
    if not isinstance(model, DecoderStack):
        return frozenset(range(count))
    return frozenset(number for number, layer in enumerate(model.layers) if layer is not None)
