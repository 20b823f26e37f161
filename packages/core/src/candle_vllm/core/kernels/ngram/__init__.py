# SPDX-License-Identifier: MIT
"""Operations of recorded steps: look up embeddings of hashed n-grams, and gate streams by them.

`cpu.look_up`: a token with id t[0] is preceded by t[1], t[2], ... Where one of these is `eos`, or before the text's
beginning, it and all earlier ones count as `eos`. With n = 2 .. N and head h of `heads / (N - 1)` for each n,

    row = (t[0] * m[0] xor t[1] * m[1] xor ... t[n - 1] * m[n - 1]) mod size[h] + offset[h]      in int64

y [T, heads * D] fp32 has the rows [D] of all heads side by side. `before` [T, N - 1] has the ids of the preceding
tokens plus 1, the nearest first, and 0 before the beginning.

`cpu.gate_streams`: key and query [T, S * E] have S streams in adjacent columns, value [T, E]. y [T, S * E] is

    sigmoid(sign(g) sqrt(max(|g|, LEAST))) * value,    g = sum over the stream of key * query / sqrt(E)

for each stream. `models/ngram_layer.py` computes both op by op. Source: transformers' `Qwen4ExpTextPLELayer`.
"""

from __future__ import annotations

from typing import NamedTuple

LEAST = 1e-6
"""Lower bound of |g|."""


class LookUpArguments(NamedTuple):
    """Arguments of `look_up`.

    Attributes:
        token_ids: address of int64 [T].
        before, before_stride, count: address and row stride of `before`, and N - 1.
        heads, size, eos: heads, D, and the id that begins a text.
        factors, sizes, offsets: addresses of int64 [N], [heads] and [heads]: m, size and offset.
        starts, addresses, parts: addresses of int64 [parts + 1], the first rows of the table's parts, and of int64
            [parts], their addresses; number of parts.
        itemsize: bytes of an element: 4 for float32, 2 for bfloat16.
        out, out_stride: address and row stride of the result.
    """

    token_ids: int
    before: int
    before_stride: int
    count: int
    heads: int
    size: int
    eos: int
    factors: int
    sizes: int
    offsets: int
    starts: int
    addresses: int
    parts: int
    itemsize: int
    out: int
    out_stride: int


class GateArguments(NamedTuple):
    """Arguments of `gate_streams`: addresses and row strides of the values; E and S."""

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
