# SPDX-License-Identifier: MIT
"""Recorder: the plan of a CPU step (one row for each operation), and its memory.

- **Memory.** Values are in float32 buffers of the largest step's size. A buffer is reused when its value is no longer
  referenced, because operations run in the order of recording.
- **Barriers.** Operations that only share inputs (q, k and v of one input) run without a barrier between them.
"""

from __future__ import annotations

import dataclasses
import enum
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_level
from candle_vllm.core.kernels.cpu_runtime.operation import (
    LEVELS_IN_USE,
    RUNS_BYTES,
    Matrix,
    StepNumber,
    address_of,
    operation,
    plan_row,
)
from candle_vllm.core.kernels.lora import NumberType
from candle_vllm.core.kernels.side_by_side import CopyArguments
from candle_vllm.core.kernels.states import StateRows

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.numa import CpuRanks
    from candle_vllm.core.kernels.recorded import LookUp
    from candle_vllm.core.kernels.states import StateCache


@dataclasses.dataclass(frozen=True)
class StepLimits:
    """Size of the largest step that a plan can run, and which inputs a step may have.

    Attributes:
        tokens, sequences: T and R.
        logit_rows: maximum number of rows with logits.
        table_width: blocks of the longest sequence.
        block_size: positions in a block.
        threads: threads of the team that runs the plan.
        adapter_rank: largest LoRA rank; 0 without adapters.
        adapter_dtype: type of the adapters' matrices.
        row_adapters: maximum number of adapters of a row.
        ahead: whether tokens may attend to later positions, see `kernels/attention`.
        turned: whether rotary positions may differ from positions (M-RoPE).
        states: whether layers store states.
        pools: number of page pools of layers with a sliding window, see `WindowedBlocks`.
        ranks: division of the threads among NUMA nodes; None if they are not divided.
    """

    tokens: int
    sequences: int
    logit_rows: int
    table_width: int
    block_size: int
    threads: int
    adapter_rank: int = 0
    adapter_dtype: NumberType = "BF16"
    row_adapters: int = 1
    ahead: bool = False
    turned: bool = False
    states: bool = False
    pools: int = 0
    ranks: CpuRanks | None = None

    @property
    def block_shift(self) -> int:
        """log2 of the block size in positions."""
        return self.block_size.bit_length() - 1


class StepArrays:
    """Arrays of a step's inputs at fixed addresses, filled before each run.

    Attributes:
        wanted_start: [sequences + 1] offset of each sequence's logit rows, and their total number.
        moved_on: whether the runner has already advanced the arrays from a decoding step to the step after it.
        turns: [tokens] a token's row in rotary tables minus its position; None if no plan needs it.
        states: fields of `StateRows` in `kernels/states.py`; empty if no layer has a state.
        page_tables, page_slots: block tables and slots of each page pool.
    """

    def __init__(self, limits: StepLimits) -> None:
        self.numbers = np.zeros(StepNumber.COUNT, np.int64)
        self.tokens = np.zeros((4, limits.tokens), np.int64)
        self.token_ids, self.positions, self.slots, self.token_types = self.tokens
        self.query_start = np.zeros(limits.sequences + 1, np.int64)
        self.context_lens = np.zeros(limits.sequences, np.int64)
        self.block_tables = np.zeros((limits.sequences, limits.table_width), np.int64)
        self.page_tables = np.zeros((limits.pools, limits.sequences, limits.table_width), np.int64)
        self.page_slots = np.zeros((limits.pools, limits.tokens), np.int64)
        self.logit_rows = np.zeros(limits.logit_rows, np.int64)
        self.ahead = np.zeros(limits.tokens if limits.ahead else 0, np.int64)
        self.wanted_start = np.zeros(limits.sequences + 1, np.int64)
        self.moved_on = False
        self.turns = np.zeros(limits.tokens, np.int64) if limits.turned else None
        tokens, sequences = (limits.tokens, limits.sequences) if limits.states else (0, 0)
        of_tokens, of_sequences = np.zeros((2, tokens), np.int64), np.zeros((3, sequences), np.int64)
        self.states = StateRows(self.query_start, *of_sequences, *of_tokens)


class EntryArrays:
    """Arrays at fixed addresses of a step's entries (a row with one of its adapters) in groups, one for each adapter.

    Attributes:
        rows, scales: row and adapter scale of each entry.
        starts: first entry of each group, and the end of the last group.
        tables: address of the table (`lora/layout.py`) of each group's adapter.
    """

    def __init__(self, entries: int) -> None:
        self.rows, self.scales = np.zeros(entries, np.int64), np.zeros(entries, np.float32)
        self.starts, self.tables = np.zeros(entries + 1, np.int64), np.zeros(entries, np.int64)


class Adapted(enum.IntEnum):
    """Whether a plan adds adapters: no; to the products; or to copies of the products (DoRA)."""

    NOT = 0
    ADDED = 1
    APART = 2


class MeasuredKeys(NamedTuple):
    """Sums over the keys and queries of a layer, which a plan adds to.

    Attributes:
        fit: the layer's `PagedCache.fit`.
        sums: [K, 3, D]: sums over all tokens of keys, of their squares, and of the squares of the head's queries.
        group: number of query heads of a KV head.
        centred: whether scores may all change by the same number: without softcap and sinks.
    """

    fit: NDArray[np.float32]
    sums: NDArray[np.float64]
    group: int
    centred: bool


class Recorder:
    """Recorder of plans; owns their memory. `isa` are the instructions that kernels may use."""

    def __init__(self, limits: StepLimits, isa: Isa) -> None:
        self.limits = limits
        self.isa = isa
        LEVELS_IN_USE[self] = host_level()
        self.arrays = StepArrays(limits)
        self.plan: list[int] = []
        self.ends: list[int] = []  # end of each operation's row in the plan
        self.num_rows = 0
        self.logits: np.ndarray | None = None
        self.adapted = Adapted.NOT
        entries = limits.tokens * limits.row_adapters if limits.adapter_rank else 0
        self.entries = EntryArrays(entries)  # entries of all rows of the step
        self.logit_entries = EntryArrays(min(entries, limits.logit_rows * limits.row_adapters))
        self.measured: list[MeasuredKeys] | None = None  # a list if the plan measures keys
        self.measured_at = np.zeros(limits.tokens, np.int64)  # the row of the rotary tables at which a key is measured
        self._keep: list[object] = []  # objects that plans refer to by address
        self._free: defaultdict[tuple[int, type], list[np.ndarray]] = defaultdict(list)
        self._scratch: np.ndarray | None = None
        self._row_numbers = np.empty(0, np.int64)
        self._beside: np.ndarray | None = None
        self.look_ups: dict[LookUp, tuple[NDArray[np.int64], Buffer]] = {}
        self.allocated: list[np.ndarray] = []  # memory of values and of intermediate results
        self.ranks = 0 if limits.ranks is None else self._rank_table(limits.ranks)

    def begin(self, adapted: Adapted) -> None:
        """Begin another plan in the same memory; only one of the recorder's plans may run at a time."""
        self.plan, self.ends, self.num_rows, self.adapted = [], [], 0, adapted

    def add(
        self,
        address: int,
        arguments: tuple[Any, ...],
        *,
        barrier: bool = True,
        inner: tuple[int, tuple[Any, ...]] | None = None,
    ) -> None:
        """Append the operation at `address` with its arguments, and the nested operation that it calls."""
        numbers = address_of(self.arrays.numbers)
        within = () if inner is None else plan_row(inner[0], numbers, inner[1])
        self.plan += plan_row(address, numbers, arguments, barrier=barrier, inner=within)
        self.ends.append(len(self.plan))
        self.num_rows += 1

    def pick_rows(self, rows: tuple[int, int], width: int, to: tuple[int, int]) -> None:
        """Append an operation that copies the rows whose logits are wanted.

        Args:
            rows: address of all rows, and their stride in 32-bit words.
            width: 32-bit words of a row.
            to: address of the copies, and their stride in 32-bit words.
        """
        picked, rows_from = address_of(self.arrays.logit_rows), StepNumber.LOGIT_ROWS
        self.add(
            operation("side_by_side.cpu:copy"), CopyArguments(*rows, width, *to, picked=picked, rows_from=rows_from)
        )

    def state_arguments(self, cache: StateCache) -> dict[str, int]:
        """Return the common arguments of operations with a state.

        states, slot_bytes: address of the states, and stride of slots.
        kept, kept_bytes, kept_row_bytes: address of the inputs of draft tokens, and strides of slots and rows.
        query_start, slots, sources, replays, stores, keeps: addresses of the step's `StateRows`.
        """
        assert self.limits.states
        assert cache.states[0].flags.c_contiguous
        return {
            "states": address_of(cache.states),
            "slot_bytes": cache.states.strides[0],
            "kept": address_of(cache.kept),
            "kept_bytes": cache.kept.strides[0],
            "kept_row_bytes": cache.kept.strides[1],
            **{name: address_of(numbers) for name, numbers in self.arrays.states.tables.items()},
        }

    def keep(self, numbers: NDArray[np.float32]) -> int:
        """Return the address of an array converted to float32, which is kept alive as long as the recorder."""
        return self.keep_array(np.ascontiguousarray(numbers, np.float32))

    def keep_matrix(self, matrix: Matrix) -> None:
        """Keep a matrix alive as long as the recorder."""
        self._keep.append(matrix)

    def keep_array(self, array: np.ndarray) -> int:
        """Return the address of an array, which is kept alive as long as the recorder."""
        self._keep.append(array)
        return address_of(array)

    def memory(self, width: int, dtype: type = np.float32) -> np.ndarray:
        """Allocate flat rows [tokens, width], aligned to 64 bytes; reused once the array is freed, views or not."""
        pool = self._free[width, dtype]
        base = pool.pop() if pool else self._allocate(self.limits.tokens * width, dtype)
        view = base[:]
        weakref.finalize(view, pool.append, base)
        return view

    def rows(self, width: int, copies: int = 1) -> tuple[np.ndarray, int]:
        """Allocate float32 rows [tokens * copies, width]; return them and the row stride in floats."""
        stride = row_stride(width)
        return self.memory(copies * stride), stride

    def buffer(self, width: int) -> Buffer:
        """Allocate float32 rows [tokens, width]."""
        array, stride = self.rows(width)
        return Buffer(array, width, stride)

    def looked_up(self, rows: LookUp, numbers: NDArray[np.int64], width: int) -> Buffer:
        """Return the buffer, common to all plans, to which `look_up` writes `rows(numbers)` before a step."""
        if rows not in self.look_ups:
            self.look_ups[rows] = numbers, self.buffer(width)
        return self.look_ups[rows][1]

    def look_up(self) -> None:
        """Fill the buffers of `looked_up`, before the step runs."""
        for rows, (numbers, buffer) in self.look_ups.items():
            count = self.arrays.numbers[StepNumber.TOKENS]
            buffer.rows[:count] = rows(numbers[:count])

    def row_numbers(self, copies: int) -> np.ndarray:
        """Return row numbers 0, 1, 2, ... for rows [tokens * copies]."""
        if len(self._row_numbers) < self.limits.tokens * copies:
            self._row_numbers = np.arange(self.limits.tokens * copies, dtype=np.int64)
            self._keep.append(self._row_numbers)
        return self._row_numbers

    def scratch(self, size: int) -> int:
        """Return the address of `size` bytes of scratch memory, which the next caller's operations overwrite."""
        if self._scratch is None or self._scratch.nbytes < size:
            self._scratch = self._allocate(size, np.uint8)
        return address_of(self._scratch)

    def beside(self) -> int:
        """Return the address of the threads' lists of memory to prefetch during a product, see `LinearArguments`."""
        if self._beside is None:
            self._beside = self._allocate(self.limits.threads * RUNS_BYTES, np.uint8)
        return address_of(self._beside)

    def _rank_table(self, ranks: CpuRanks) -> int:
        """Return the address of the table that `primitives.rank_of` reads, in lines of 8 int64."""
        counters = aligned(8 * len(ranks.each), np.int64)
        table = aligned(8 * (1 + ranks.threads), np.int64)
        table[0] = ranks.threads
        for thread in range(ranks.threads):
            rank = ranks.of_thread(thread)
            counter = self.keep_array(counters) + 64 * rank
            table[8 * (1 + thread) :][:3] = counter, *ranks.starts[rank : rank + 2]
        return self.keep_array(table)

    def _allocate(self, count: int, dtype: type) -> np.ndarray:
        made = aligned(count, dtype)
        self._keep.append(made)
        self.allocated.append(made)
        return made


def aligned(count: int, dtype: type) -> np.ndarray:
    """Allocate zeros, aligned to 64 bytes; the system provides the memory at its first use."""
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -address_of(raw) % 64
    return raw[start : start + size].view(dtype)


def row_stride(width: int) -> int:
    """Return the row stride in floats: an odd number of whole cache lines.

    Kernels write the same columns of several rows. With a power of two as stride, these map to the same few cache sets
    and evict each other.
    """
    return (-(-width // 16) | 1) * 16


@dataclasses.dataclass
class Buffer:
    """Float32 rows [tokens, width], `stride` floats apart; `version` is incremented when its value is overwritten."""

    array: np.ndarray
    width: int
    stride: int
    version: int = 0

    @property
    def rows(self) -> NDArray[np.float32]:
        """View of the rows [tokens, width]."""
        return self.array.reshape(-1, self.stride)[:, : self.width]
