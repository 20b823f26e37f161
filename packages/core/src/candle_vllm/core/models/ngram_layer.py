# SPDX-License-Identifier: MIT
"""Layers that add embeddings of hashed n-grams to residual streams (per-layer embeddings of Qwen4).

A token's embedding gives one value and a key for each stream. The stream gates the value by its key, and a dilated
depthwise convolution adds the gated values of earlier tokens. The ids of the preceding tokens are a state of the
sequence, like the convolution's inputs, and move with its other states.
Source: transformers' `Qwen4ExpTextPLELayer`.
Shapes: T tokens, S streams, E hidden, P elements of a token's embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation
from candle_vllm.core.kernels.ngram import LEAST, GateArguments
from candle_vllm.core.kernels.recorded import Recorded, RecordedTokens, Value
from candle_vllm.core.kernels.rms_norm import rms_norm
from candle_vllm.core.kernels.short_conv import short_conv
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.stream_mix import mix_streams
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.models.ngram_table import NGramTable


class StreamNorms:
    """An RMS norm of each of S streams with its own weight: x [T, S * E] -> [T, S * E], divided by `divisor`."""

    def __init__(self, streams: int, size: int, eps: float, placement: Placement, divisor: int = 1) -> None:
        self._flat, self._shape, self.eps, self._divisor = (
            placement.empty(streams * size),
            (streams, size),
            eps,
            divisor,
        )

    def __call__(self, x: Value) -> Value:
        x = side_by_side(x) if isinstance(x, Recorded) else x  # recorded norms overwrite heads
        return rms_norm(x.unflatten(-1, (-1, self._shape[1])), self._flat.reshape(self._shape), self.eps).flatten(1)

    def finish(self) -> None:
        """See `Finishes`."""
        self._flat /= self._divisor

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"weight": TensorParameter(self._flat)}


class TokenNumbers:
    """The ids of a step's tokens plus 1, in `count` equal columns: the inputs of the states of ids."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(self, token_ids: Value) -> Value:
        """Return fp32 [T, count] for ids [T]; in recorded steps before any other value is recorded."""
        if isinstance(token_ids, RecordedTokens):
            return token_ids.looked_up(self._rows, self._count)
        return (token_ids + 1).float()[:, None].expand(-1, self._count).contiguous()

    def _rows(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.broadcast_to((token_ids + 1).astype(np.float32)[:, None], (len(token_ids), self._count))


def gate_streams(key: Any, query: Any, value: Any) -> Value:
    """Return y of `kernels/ngram`, in value's dtype; on a GPU torch's own kernels compute it."""
    if isinstance(key, Recorded):
        from candle_vllm.core.kernels.cpu_runtime.values import buffer_value

        recorded: list[Any] = [key, query, value]
        recorder, out, size = recorded[0].recorder, recorded[0].recorder.buffer(recorded[0].width), recorded[2].width
        places = [number for each in recorded for number in (each.address, each.buffer.stride)]
        row = GateArguments._make([*places, size, out.width // size, address_of(out.array), out.stride])
        recorder.add(operation("ngram.cpu:gate_streams"), row)
        return buffer_value(recorder, out)
    size = value.shape[1]
    g = (key.float() * query.float()).unflatten(1, (-1, size)).sum(-1) * size**-0.5  # [T, S]
    gate = (g.abs().clamp_min(LEAST).sqrt() * g.sign()).sigmoid()
    return (gate[..., None] * value.float()[:, None]).flatten(1).to(value.dtype)


class NGramLayer:
    """Adds to streams x [T, S * E] by the n-grams that end at each token.

    Its parameter "taps" is [S * E, taps].
    """

    def __init__(self, config: Any, layer: int, placement: Placement) -> None:
        ngrams, streams, size, eps = config.ngrams, config.streams, config.hidden_size, config.norm_eps
        channels, before, self._ngrams = streams * size, ngrams.longest - 1, ngrams
        self.cache, self.table = config.num_layers + layer, NGramTable(ngrams, layer)
        self.key, self.value = Linear(ngrams.size, channels, placement), Linear(ngrams.size, size, placement)
        self.key_norm, self.query_norm, self.conv_norm = (StreamNorms(streams, size, eps, placement) for _ in range(3))
        self._taps, self._constant = placement.empty(channels, ngrams.taps), placement.constant
        ids = np.eye(ngrams.longest, dtype=np.float32)[before - 1 :: -1]  # row s takes the id s + 1 tokens before
        self._shift = placement.constant(np.ascontiguousarray(ids))
        each = np.tile(np.eye(streams, dtype=np.float32), 3)
        self._sum = placement.constant(each[None])

    def __call__(self, x: Value, step: StepInput) -> Value:
        conv, ids = step.caches[self.cache]
        token_ids, numbers = step.shared["ids"]
        before = short_conv(numbers, self._shift, None, ids, step.states)
        found = self.table(token_ids, before)
        value = self.value(found)
        made = gate_streams(self.key_norm(self.key(found)), self.query_norm(x), value)
        mixed = short_conv(self.conv_norm(made), self._spread, None, conv, step.states, silu=True)
        return mix_streams(side_by_side(x, made, mixed), self._sum, level=False)

    def finish(self) -> None:
        """See `Finishes`; put zeros between the taps."""
        spread = np.zeros((len(self._taps), self._ngrams.span), np.float32)
        spread[:, :: self._ngrams.longest] = on_host(self._taps)
        self._spread = self._constant(spread)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"taps": TensorParameter(self._taps)}
