# SPDX-License-Identifier: MIT
"""Record the operations of `cpu.py` for a layer.

A record has the arguments of one operation. Addresses are those of float32 rows where no type is given; strides, widths
and sizes are in floats. Fields of several records:

    positions, query_start: addresses of int64 [T] and [R + 1]
    turns: address of int64 [T], a token's row in the tables of the rotary embedding minus its position; 0 for zeros
    tables, log_tables: addresses of int64 [R, table_stride], pages of the cache and blocks of the logs
    block_shift: log2(S)
    x, stride, heads, size: heads of each token, for `compress` the elements of an entry
    cos, sin, half: addresses of float32 [positions, R / 2], and R / 2
    ratio: tokens of a group; 0 without entries
    log, share, step: address of a log, E, and floats from an entry to the next in a block
    top, chosen: address of int32 [T, top], the entries of tokens with more than `top`; 0 if no token has more
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from candle_vllm.core.kernels.attention.cpu_record import LOG2E
from candle_vllm.core.kernels.attention.rows import PagedCache, WindowedCache
from candle_vllm.core.kernels.compressed_attention import EntryParts, Groups, IndexQueries
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation
from candle_vllm.core.kernels.cpu_runtime.values import buffer_value
from candle_vllm.core.kernels.latent_attention.layout import FEW_TOKENS
from candle_vllm.core.kernels.rotary import TurnArguments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder


class WriteArguments(NamedTuple):
    """Arguments of `write`: rows of which `count` floats are copied, the first column in a cache whose rows have
    `width` floats, and address of int64 [T], the slots. With positions, tokens copy their rows of a table."""

    rows: int
    stride: int
    count: int
    cache: int
    width: int
    slots: int
    positions: int
    turns: int


class CompressArguments(NamedTuple):
    """Arguments of `compress`: the first column that is read in a cache whose rows have `width` floats, `overlaps` of
    `Groups`, and bias, weight and epsilon of `EntryParts`."""

    positions: int
    query_start: int
    tables: int
    log_tables: int
    table_stride: int
    block_shift: int
    inputs: int
    width: int
    size: int
    overlaps: int
    bias: int
    norm: int
    eps: float
    cos: int
    sin: int
    half: int
    ratio: int
    log: int
    share: int
    step: int


class ChooseArguments(NamedTuple):
    """Arguments of `choose`: queries, weights of their heads, and scratch memory with the bytes of a token's scores."""

    positions: int
    query_start: int
    log_tables: int
    table_stride: int
    block_shift: int
    x: int
    stride: int
    heads: int
    size: int
    weights: int
    weight_stride: int
    ratio: int
    log: int
    share: int
    step: int
    top: int
    chosen: int
    scratch: int
    scratch_size: int


class AttendArguments(NamedTuple):
    """Arguments of `attend`: queries, results, caches of keys and values of `kv_heads` heads, positions of the window,
    factor of the scores and address of float32 [H], the sinks, or 0, both times log2(e), and maximum number of rows of
    a token, a multiple of 16."""

    positions: int
    query_start: int
    tables: int
    log_tables: int
    table_stride: int
    block_shift: int
    x: int
    stride: int
    heads: int
    size: int
    out: int
    out_stride: int
    kv_heads: int
    keys: int
    values: int
    window: int
    scale: float
    sinks: int
    most: int
    scratch: int
    cos: int
    sin: int
    half: int
    ratio: int = 0
    log: int = 0
    share: int = 0
    step: int = 0
    top: int = 0
    chosen: int = 0


class RecordedStep:
    """Records the operations of a layer; `reference.TorchStep` has the same methods.

    Args:
        tables: cos and sin [positions, R / 2] of the rotary embedding.
        cache, logs: caches and logs of the layer, float32 [1, B, S, width] each.
        pairs: whether pairs of neighbouring elements rotate.
    """

    def __init__(
        self, recorder: Recorder, tables: tuple[Any, Any], cache: PagedCache, logs: PagedCache, *, pairs: bool = True
    ) -> None:
        arrays, limits = recorder.arrays, recorder.limits
        pool = cache.pool if isinstance(cache, WindowedCache) else None
        self._recorder, self._cache, self._logs, self._pairs = recorder, cache, logs, pairs
        self._longest = limits.table_width * limits.block_size
        self._slots = address_of(arrays.slots if pool is None else arrays.page_slots[pool])
        self._rotary = {"cos": recorder.keep(tables[0]), "sin": recorder.keep(tables[1]), "half": tables[0].shape[1]}
        self._turns = address_of(arrays.positions), 0 if arrays.turns is None else address_of(arrays.turns)
        self._blocks = {"query_start": address_of(arrays.query_start), "log_tables": address_of(arrays.block_tables)}
        self._blocks |= {"table_stride": limits.table_width, "block_shift": limits.block_shift}
        self._blocks |= {"positions": self._turns[0]}
        self._pages = {"tables": address_of(arrays.block_tables if pool is None else arrays.page_tables[pool])}

    def turned(self, x: Any) -> Any:
        """Rotate the heads of x [T, H, D] in place; return x."""
        positions, turns = self._turns
        row = TurnArguments(**_heads(x), positions=positions, turns=turns, **self._rotary)
        self._recorder.add(operation("rotary.cpu:make_turn", self._pairs), row)
        return x

    def write(self, values: Sequence[Any], cache: Any, *, turns: bool = False) -> None:
        """Write values [T, ...] side by side to a cache; with `turns`, the tokens' cosines and sines follow."""
        at, half = address_of(cache), self._rotary["half"]
        rows = [((value.address, value.buffer.stride, value.width), (0, 0)) for value in values]
        rows += [((self._rotary[name], half, half), self._turns) for name in ("cos", "sin") if turns]
        copy = operation("compressed_attention.cpu:write")
        for row, turn in rows:
            self._recorder.add(copy, WriteArguments(*row, at, cache.shape[-1], self._slots, *turn))
            at += 4 * row[2]

    def compress(self, column: int, log: Any, groups: Groups, parts: EntryParts) -> None:
        """Write the entries of the groups that end in this step to a log, from a column of the inputs on."""
        inputs, keep = self._cache.values if groups.gated else log, self._recorder.keep
        row = CompressArguments(
            inputs=address_of(inputs) + 4 * column,
            width=inputs.shape[-1],
            size=groups.size,
            overlaps=groups.overlaps,
            bias=keep(parts.bias) if groups.gated else 0,
            norm=keep(parts.norm),
            eps=parts.eps,
            **self._rotary,
            **_log(log, groups),
            **self._blocks,
            **self._pages,
        )
        self._recorder.add(operation("compressed_attention.cpu:make_compress", groups.gated), row)

    def attend(
        self, q: Any, sinks: Any, window: int | None, scale: float, groups: Groups | None, index: IndexQueries | None
    ) -> Any:
        """Return the weighted sums [T, H, D] for rotated q [T, H, D], rotated back; without a window tokens attend to
        the positions of the groups that the index chooses, whose values do not rotate."""
        recorder, cache, longest, out = self._recorder, self._cache, self._longest, self._recorder.buffer(q.width)
        entries, own, chosen = 0, dict[str, int](), None
        if groups is not None:
            entries, own = longest // groups.ratio, _log(self._logs.keys, groups)
        if index is not None and entries > index.top:
            chosen, entries = self._choose(index, entries), index.top
            own |= {"chosen": address_of(chosen), "top": entries}
        if window is not None:
            most = min(window, longest) + entries
        else:
            most = longest if chosen is None else (entries + 1) * own["ratio"]
        most = -(-most // LANES) * LANES
        row = AttendArguments(
            **_heads(q),
            out=address_of(out.array),
            out_stride=out.stride,
            kv_heads=cache.keys.shape[-1] // q.head_dim,
            keys=address_of(cache.keys),
            values=0 if cache.values is None else address_of(cache.values),
            window=window or 0,
            scale=scale * LOG2E,
            sinks=0 if sinks is None else recorder.keep(sinks * np.float32(LOG2E)),
            most=most,
            scratch=recorder.scratch(32 * most * recorder.limits.threads),
            **own,
            **self._rotary,
            **self._blocks,
            **self._pages,
        )
        recorder.add(operation("compressed_attention.cpu:make_attend", window is None, recorder.isa), row)
        return buffer_value(recorder, out).unflatten(-1, (-1, q.head_dim))

    def _choose(self, index: IndexQueries, entries: int) -> NDArray[np.int32]:
        """Return the chosen entries [T, top] of tokens with more than `top`; a token has at most `entries`."""
        recorder, weights, chosen = self._recorder, index.weights, self._recorder.memory(index.top, np.int32)
        heads = _heads(index.q)
        row = ChooseArguments(
            **heads,
            weights=recorder.keep(np.ones(heads["heads"], np.float32)) if weights is None else weights.address,
            weight_stride=0 if weights is None else weights.buffer.stride,
            top=index.top,
            chosen=address_of(chosen),
            scratch=recorder.scratch(4 * entries * max(FEW_TOKENS, recorder.limits.threads)),
            scratch_size=4 * entries,
            **_log(index.log, index.groups),
            **self._blocks,
        )
        for chooses in (0, 1):
            recorder.add(operation("compressed_attention.cpu:make_choose", chooses, recorder.isa), row)
        return chosen


def _heads(x: Any) -> dict[str, int]:
    return {"x": x.address, "stride": x.buffer.stride, "heads": x.width // x.head_dim, "size": x.head_dim}


def _log(log: Any, groups: Groups) -> dict[str, int]:
    """Return the arguments for a log; a pooled key without gates is in the row of its group's last position."""
    at, width = address_of(log), log.shape[-1]
    last, step = (0, groups.size) if groups.gated else ((groups.ratio - 1) * width, groups.ratio * width)
    return {"ratio": groups.ratio, "log": at + 4 * last, "share": width, "step": step}
