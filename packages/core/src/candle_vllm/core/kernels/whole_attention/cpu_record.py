# SPDX-License-Identifier: MIT
"""Record the attention of encoders: the operations of `cpu.py`, and the memory for their intermediate results."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.attention.cpu_record import LOG2E
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation
from candle_vllm.core.kernels.rotary import TurnArguments

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.recorder import Buffer, Recorder

PANEL = 8
"""Number of keys, or of dimensions of values, in a panel."""

HIDDEN = -1e9  # added to scores of keys outside the window, so that their exponentials are exactly 0
HEADER = 64  # bytes before the threads' scratch memory: a cache line for the unit counter
LINE = 4 * LANES  # bytes of a vector


class WholeHeads(NamedTuple):
    """Queries, keys and values of a layer: address of float32 rows, row stride in floats, H, K and D."""

    address: int
    stride: int
    heads: int
    kv_heads: int
    head_dim: int


class WholeArguments(NamedTuple):
    """Arguments of `lay_out` and `attend_whole`.

    Attributes:
        qkv, stride: address of float32 rows [T, (H + 2 K) * D], and their row stride in floats.
        heads, kv_heads, head_dim: H, K and D.
        query_start: address of int64 [R + 1]: text r has the tokens query_start[r]..query_start[r + 1] - 1.
        keys, values: addresses of `panel_floats` floats each.
        out, out_stride: address of the result [T, H * D], and its row stride in floats.
        scale: factor of the scores, times log2(e).
        scratch: address of scratch memory: `HEADER`, then `thread_bytes` for each thread.
        thread_bytes: scratch memory of each thread.
        threads: number of threads that have scratch memory.
        bias: address of the element for distance 0 in a float32 table of terms that are added to scaled scores, by
            query minus key position; 0 without a bias and a window.
        bias_bytes: bytes from one head's table to the next; 0 if the heads share one table.
        window: maximum distance of a key from its query, in tokens.
    """

    qkv: int
    stride: int
    heads: int
    kv_heads: int
    head_dim: int
    query_start: int
    keys: int
    values: int
    out: int
    out_stride: int
    scale: float
    scratch: int
    thread_bytes: int
    threads: int
    bias: int
    bias_bytes: int
    window: int


def record_turn(
    recorder: Recorder,
    qkv: WholeHeads,
    places: NDArray[np.int64],
    tables: tuple[NDArray[np.float32], NDArray[np.float32]],
    turns: NDArray[np.int64] | None = None,
) -> None:
    """Record the rotation of queries and keys in place; `places` and `turns` are the rows of the tables."""
    (cos, sin), half = map(recorder.keep, tables), tables[0].shape[1]
    rows = address_of(places), 0 if turns is None else address_of(turns)
    heads = qkv.heads + qkv.kv_heads
    given = TurnArguments(qkv.address, qkv.stride, heads, qkv.head_dim, *rows, cos, sin, half)
    recorder.add(operation("rotary.cpu:make_turn", False), given)


def record_whole_attention(
    recorder: Recorder, qkv: WholeHeads, bias: NDArray[np.float32] | None, window: int | None, out: Buffer
) -> None:
    """Record `lay_out` and `attend_whole`; bias and window as in `whole_attention`, out has H * D columns.

    A text has at most `recorder.limits.tokens` tokens.
    """
    limits, head_dim = recorder.limits, qkv.head_dim
    floats = panel_floats(limits.tokens, limits.sequences, qkv.kv_heads, head_dim)
    keys, values = (recorder.memory(-(-floats // limits.tokens)) for _ in range(2))
    (table, centre), each = _bias_table(bias, window, limits.tokens), thread_bytes(limits.tokens, head_dim)
    given = WholeArguments(
        **{"qkv" if name == "address" else name: value for name, value in qkv._asdict().items()},
        query_start=address_of(recorder.arrays.query_start),
        keys=address_of(keys),
        values=address_of(values),
        out=address_of(out.array),
        out_stride=out.stride,
        scale=head_dim**-0.5 * LOG2E,
        scratch=recorder.scratch(HEADER + limits.threads * each),
        thread_bytes=each,
        threads=limits.threads,
        bias=0 if table is None else recorder.keep(table) + 4 * centre,
        bias_bytes=0 if table is None or len(table) == 1 else table.strides[0],
        window=limits.tokens if window is None else window,
    )
    recorder.add(operation("whole_attention.cpu:lay_out"), given)
    recorder.add(operation("whole_attention.cpu:make_attend_whole", recorder.isa, table is not None), given)


def _bias_table(
    bias: NDArray[np.float32] | None, window: int | None, tokens: int
) -> tuple[NDArray[np.float32] | None, int]:
    """Return the terms to add to the scores, [N, distances], and the column of distance 0.

    The operation reads whole tiles, so the table also covers up to 31 queries and a panel's keys past a text's end.
    """
    if bias is None and window is None:
        return None, 0
    distances = np.arange(-tokens - PANEL, tokens + 4 * PANEL)  # query position - key position
    if bias is None:
        table = np.zeros((1, len(distances)), np.float32)
    else:
        most = bias.shape[1] // 2
        table = (bias[:, most - distances.clip(-most, most)] * np.float32(LOG2E)).astype(np.float32)
    if window is not None:
        table[:, np.abs(distances) > window] = HIDDEN
    return np.ascontiguousarray(table), tokens + PANEL


def panel_floats(tokens: int, texts: int, heads: int, head_dim: int) -> int:
    """Return the floats in the panels of keys, or of values, of a step with `tokens` tokens of `texts` texts."""
    return PANEL * (tokens // PANEL + texts) * heads * _filled(head_dim)


def thread_bytes(longest: int, head_dim: int) -> int:
    """Return the scratch bytes of a thread: two tiles of queries, results, sums and scores."""
    return 2 * LINE * (2 * _filled(head_dim) + 1 + _filled(longest))


def _filled(count: int) -> int:
    return -(-count // PANEL) * PANEL
