# SPDX-License-Identifier: MIT
"""Add adapters to experts' products on the CPU, for each pair of an entry (`layout.py`) and an expert of its row.

In `shrink` threads divide pairs; in `expand` they divide columns, as in `cpu_expand.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.lora.cpu_expand import PARTS_MEMORY, make_parts
from candle_vllm.core.kernels.lora.cpu_shrink import RESULTS, RUN_MEMORY, SOURCES, count_blocks, make_run
from candle_vllm.core.kernels.lora.layout import BLOCK_BYTES, ExpandArguments, ShrinkArguments


def make_shrink(FORM: int, ISA: int) -> Callable[..., None]:
    multiply = make_run(FORM, ISA)

    def shrink_experts(row, thread, threads):
        given = read(ShrinkArguments, row)
        groups, top_k = step_number(row, given.groups_from), given.top_k
        starts, tables = int64_at(given.starts), int64_at(given.tables)
        memory = stack_bytes(RUN_MEMORY)
        for group in range(groups):
            table = int64_at(tables[group])[given.place]
            if table == 0:
                continue
            begin = starts[group]
            pairs = (starts[group + 1] - begin) * top_k
            for pair in range(pairs * thread // threads, pairs * (thread + 1) // threads):
                entry = begin + pair // top_k
                chosen = int64_at(given.rows)[entry] * top_k + pair % top_k
                about = int64_at(table)[int64_at(given.experts)[chosen]]
                if about == 0:
                    continue
                source = int64_at(given.places)[chosen] if given.by_place != 0 else int64_at(given.rows)[entry]
                ranks = int64_at(about)[1]
                int64_at(memory + SOURCES)[0] = given.x + source * given.x_bytes
                int64_at(memory + RESULTS)[0] = (
                    given.h + entry * given.h_bytes + pair % top_k * (given.h_bytes // top_k)
                )
                for quarter in range(4):
                    multiply(int64_at(about)[0], ranks, quarter, 0, count_blocks(ranks), 1, given.x_bytes, memory, 0)

    return shrink_experts


def make_expand(FORM: int, ISA: int) -> Callable[..., None]:
    add_parts = make_parts(FORM, ISA)

    def expand_experts(row, thread, threads):
        given = read(ExpandArguments, row)
        tiles = (given.columns + 15) >> 4
        first, last = 16 * (tiles * thread // threads), min(16 * (tiles * (thread + 1) // threads), given.columns)
        if first >= last:
            return
        groups, top_k = step_number(row, given.groups_from), given.top_k
        starts, tables = int64_at(given.starts), int64_at(given.tables)
        most = (given.h_bytes // top_k // BLOCK_BYTES) * 16 + 32
        memory = stack_bytes(PARTS_MEMORY + 8 * 4 * most * 2)
        for group in range(groups):
            table = int64_at(tables[group])[given.place]
            if table == 0:
                continue
            begin = starts[group]
            for pair in range((starts[group + 1] - begin) * top_k):
                entry = begin + pair // top_k
                chosen = int64_at(given.rows)[entry] * top_k + pair % top_k
                about = int64_at(table)[int64_at(given.experts)[chosen]]
                if about == 0:
                    continue
                at = given.h + entry * given.h_bytes + pair % top_k * (given.h_bytes // top_k)
                float32_at(memory + 64)[0] = float32_at(given.scales)[entry]
                int64_at(memory + 128)[0] = given.out + int64_at(given.places)[chosen] * given.row_bytes
                int64_at(memory + 192)[0] = 0
                add_parts(about, at, False, 1, memory, most, first, last, 0)

    return expand_experts
