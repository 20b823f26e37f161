# SPDX-License-Identifier: MIT
"""What every decoder does with its parts: embedding, layers one after the other, the last norm, the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.rotary import Rotary


class DecoderStack:
    """Token ids [T] -> hidden states [T, E] -> logits [T, V]; a family's model makes the parts.

    Attributes:
        embed: the table, which is the head too where `head` is None.
        rotary: positions of the layers.
        layers: each takes x [T, E] as two summands, of which the second is None at first, and gives two.
        norm: behind the last layer.
        narrows: whether what follows the last layer's attention may have the rows alone whose successor is wanted.
    """

    embed: Embedding
    rotary: Rotary
    layers: Sequence[Callable[[Value, Value | None, StepInput], tuple[Value, Value]]]
    norm: RMSNorm | LayerNorm
    head: Embedding | None
    narrows: bool = False

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        self.rotary.prepare(positions)

    def forward(self, token_ids: Value, step: StepInput) -> Value:
        """Hidden states [T, E] behind the last norm."""
        x, residual, taps = self.embed(token_ids), None, step.taps
        if step.given is not None:
            x = step.given.put(x)
        for number, layer in enumerate(self.layers):
            if taps is not None:
                x, residual = taps.keep(number, x, residual)
            x, residual = layer(x, residual, step)
            if step.given is not None:
                x, residual = step.given.add(number, x, residual)
        if taps is not None:
            x, residual = taps.keep(len(self.layers), x, residual)
        return self.norm.add(x, residual)[0]

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Scores [T, V] in fp32."""
        return (self.embed if self.head is None else self.head).logits(hidden, out)
