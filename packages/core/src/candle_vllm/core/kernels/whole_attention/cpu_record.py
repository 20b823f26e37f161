# SPDX-License-Identifier: MIT
"""Recording attention of encoders: both operations of `cpu.py`, and the memory between them (step 6 of ten)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.recorder import Buffer, Recorder

PANEL = 8
"""Keys, or dimensions of values, of a panel."""

LOG2E = 1.4426950408889634
HEADER = 64  # bytes before the threads' scratch memory: the counter, on a cache line of its own
LINE = 4 * LANES  # bytes of a vector


class WholeArguments(NamedTuple):
    """The arguments of both operations.

    Attributes:
        qkv, stride: address of float32 rows [T, 3 * H * D], and floats from one to the next.
        heads, head_dim: H and D.
        query_start: address of int64 [R + 1]: text r has the tokens query_start[r]..query_start[r + 1].
        keys, values: addresses of `panel_floats` floats each.
        out, out_stride: address of the result [T, H * D], and floats from one row to the next.
        scale: of scores, times log2(e).
        scratch: address of `scratch_bytes`.
        thread_bytes: of these, each thread's.
        threads: as many have some.
    """

    qkv: int
    stride: int
    heads: int
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


class TurnArguments(NamedTuple):
    """The arguments of `turn`.

    Attributes:
        qkv, stride, heads, head_dim: as of `WholeArguments`.
        half: R/2, pairs of a head that turn.
        places: address of int64 [T], the rows of the tables.
        cos, sin: addresses of float32 [P, half].
    """

    qkv: int
    stride: int
    heads: int
    head_dim: int
    half: int
    places: int
    cos: int
    sin: int


def turn_operation() -> int:
    """Address of the compiled operation."""
    return operation("whole_attention.cpu:turn")


def record_turn(
    recorder: Recorder,
    qkv: tuple[int, int],
    heads: int,
    head_dim: int,
    places: NDArray[np.int64],
    tables: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> None:
    """Writes `turn` into a plan: arguments as those of `record_whole_attention`, and cos and sin."""
    cos, sin = (recorder.keep(table) for table in tables)
    given = TurnArguments(*qkv, heads, head_dim, tables[0].shape[1], address_of(places), cos, sin)
    recorder.add(turn_operation(), given)


def lay_out_operation() -> int:
    """Address of the compiled operation."""
    return operation("whole_attention.cpu:lay_out")


def attend_whole_operation(isa: Isa) -> int:
    """Address of the compiled operation."""
    return operation("whole_attention.cpu:make_attend_whole", isa)


def record_whole_attention(recorder: Recorder, qkv: tuple[int, int], heads: int, head_dim: int, out: Buffer) -> None:
    """Writes both operations into a plan.

    Args:
        recorder: of the plan; a text has at most as many tokens as its largest step.
        qkv: address of the rows, and floats from one to the next.
        heads, head_dim: H and D.
        out: of H * D columns.
    """
    limits = recorder.limits
    floats = panel_floats(limits.tokens, limits.sequences, heads, head_dim)
    keys, values = (recorder.memory(-(-floats // limits.tokens)) for _ in range(2))
    given = WholeArguments(
        qkv=qkv[0],
        stride=qkv[1],
        heads=heads,
        head_dim=head_dim,
        query_start=address_of(recorder.arrays.query_start),
        keys=address_of(keys),
        values=address_of(values),
        out=address_of(out.array),
        out_stride=out.stride,
        scale=head_dim**-0.5 * LOG2E,
        scratch=recorder.scratch(scratch_bytes(limits.tokens, head_dim, limits.threads)),
        thread_bytes=thread_bytes(limits.tokens, head_dim),
        threads=limits.threads,
    )
    recorder.add(lay_out_operation(), given)
    recorder.add(attend_whole_operation(recorder.isa), given)


def panel_floats(tokens: int, texts: int, heads: int, head_dim: int) -> int:
    """Floats of the panels of keys, and of those of values, in a step of that many tokens and texts."""
    return PANEL * (tokens // PANEL + texts) * heads * _filled(head_dim)


def thread_bytes(longest: int, head_dim: int) -> int:
    """Scratch memory of one thread: two tiles of queries, results, sums and scores."""
    return 2 * LINE * (2 * _filled(head_dim) + 1 + _filled(longest))


def scratch_bytes(longest: int, head_dim: int, threads: int) -> int:
    """Scratch memory of both operations, for texts of at most `longest` tokens."""
    return HEADER + threads * thread_bytes(longest, head_dim)


def _filled(count: int) -> int:
    return -(-count // PANEL) * PANEL
