# SPDX-License-Identifier: MIT
"""Embeddings of hashed n-grams from a table that stays in its file, and streams gated by them.

Contract of `look_up`: a token with id t[0] is preceded by t[1], t[2], ... Where one of these is `eos`, or before the
text's beginning, it and all earlier ones count as `eos`. With n = 2 .. N and head h of `heads / (N - 1)` for each n,

    row = (t[0] * m[0] xor t[1] * m[1] xor ... t[n - 1] * m[n - 1]) mod size[h] + offset[h]      in int64

y [T, heads * D] has the rows [D] of all heads side by side. `before` [T, N - 1] fp32 has the ids of the preceding tokens
plus 1, the nearest first, and 0 before the beginning: a state that `kernels/short_conv` shifts, so that it moves with a
sequence's other states. y is fp32 in recorded steps.

Contract of `gate_streams`: key and query [T, S * E] have S streams in adjacent columns, value [T, E]. y [T, S * E] is

    sigmoid(sign(g) sqrt(max(|g|, LEAST))) * value,    g = sum over the stream of key * query / sqrt(E)

for each stream, in fp32, rounded to value's dtype, in new memory. Source: transformers' `Qwen4ExpTextPLELayer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation
from candle_vllm.core.kernels.recorded import Recorded, RecordedTokens, Value

LEAST = 1e-6
"""Lower bound of |g|."""


@dataclasses.dataclass(frozen=True)
class NGramHash:
    """How n-grams become rows; see above.

    Attributes:
        factors: m, int64 [N].
        sizes, offsets: of each head, int64 [heads].
        eos: the id that begins a text.
    """

    factors: NDArray[np.int64]
    sizes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    eos: int

    def rows(self, token_ids: NDArray[np.int64], before: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the row of each head, [T, heads]."""
        mixed, ended, found = token_ids * self.factors[0], np.zeros(len(token_ids), bool), []
        for sizes, earlier, factor in zip(np.split(self.sizes, before.shape[1]), before.T, self.factors[1:]):
            token = earlier.astype(np.int64) - 1
            ended |= (token < 0) | (token == self.eos)
            mixed = mixed ^ np.where(ended, self.eos, token) * factor
            found.append(mixed[:, None] % sizes)
        return np.concatenate(found, 1) + self.offsets


def record_look_up(
    token_ids: RecordedTokens, before: Any, parts: Sequence[NDArray[Any]], hashes: NGramHash, size: int
) -> Recorded:
    """Record `look_up`; `parts` are float32 or, as their bits, bfloat16 arrays [rows, D] that form the table."""
    from candle_vllm.core.kernels.cpu_runtime.values import buffer_value

    recorder, heads = before.recorder, len(hashes.sizes)
    place, out = (before.address, before.buffer.stride), recorder.buffer(heads * size)
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    addresses = np.array([recorder.keep_array(part) for part in parts], np.int64)
    tables = map(recorder.keep_array, (hashes.factors, hashes.sizes, hashes.offsets, starts, addresses))
    to = address_of(out.array), out.stride
    row = LookUpArguments(address_of(token_ids.numbers), *place, before.width, heads, size, *tables, len(parts),
                          parts[0].itemsize, hashes.eos, *to)  # fmt: skip
    recorder.add(operation("ngram.cpu:look_up"), row)
    return buffer_value(recorder, out)


def gate_streams(key: Value, query: Value, value: Value) -> Value:
    """Return y; on a GPU torch's own kernels compute it."""
    if isinstance(key, Recorded):
        return _record_gates(key, query, value)
    size = value.shape[1]
    g = (key.float() * query.float()).unflatten(1, (-1, size)).sum(-1) * size**-0.5  # [T, S]
    gate = (g.abs().clamp_min(LEAST).sqrt() * g.sign()).sigmoid()
    return (gate[..., None] * value.float()[:, None]).flatten(1).to(value.dtype)


def _record_gates(*values: Any) -> Recorded:
    from candle_vllm.core.kernels.cpu_runtime.values import buffer_value

    recorder, out = values[0].recorder, values[0].recorder.buffer(values[0].width)
    places = [number for value in values for number in (value.address, value.buffer.stride)]
    row = GateArguments(*places, values[2].width, values[0].width // values[2].width, address_of(out.array), out.stride)
    recorder.add(operation("ngram.cpu:gate_streams"), row)
    return buffer_value(recorder, out)


class LookUpArguments(NamedTuple):
    """Arguments of the operation of `look_up`.

    Attributes:
        token_ids: address of int64 [T].
        before, before_stride, count: address and row stride of `before`, and N - 1.
        heads, size: heads, and D.
        factors, sizes, offsets: addresses of the arrays of the `NGramHash`.
        starts, addresses, parts: addresses of int64 [parts + 1], the first rows of the table's parts, and of int64
            [parts], their addresses; number of parts.
        itemsize: bytes of an element: 4 for float32, 2 for bfloat16.
        eos: see `NGramHash`.
        out, out_stride: address and row stride of the result.
    """

    token_ids: int
    before: int
    before_stride: int
    count: int
    heads: int
    size: int
    factors: int
    sizes: int
    offsets: int
    starts: int
    addresses: int
    parts: int
    itemsize: int
    eos: int
    out: int
    out_stride: int


class GateArguments(NamedTuple):
    """Arguments of the operation of `gate_streams`: addresses and row strides of the values; E and S."""

    key: int
    key_stride: int
    query: int
    query_stride: int
    value: int
    value_stride: int
    size: int
    streams: int
    out: int
    out_stride: int
