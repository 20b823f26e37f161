# SPDX-License-Identifier: MIT
# pyright: reportCallIssue=false, reportArgumentType=false
"""Tables and slots of layers with a window, which have fewer pages than blocks, on the CPU (step 6)."""

from __future__ import annotations

from candle_vllm.core.kernels.attention.cpu_record import PageArguments
from candle_vllm.core.kernels.attention.cpu_split import first_seen
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import int64_at, read, step_number

_SEQUENCES = int(StepNumber.SEQUENCES)


def find_pages(row, thread, threads):
    """The operation: of each sequence what its rows see, and where they write."""
    given = read(PageArguments, row)
    page_of, starts, contexts = int64_at(given.page_of), int64_at(given.query_start), int64_at(given.context_lens)
    slots, page_slots, shift = int64_at(given.slots), int64_at(given.page_slots), given.block_shift
    sequences = step_number(row, _SEQUENCES)
    for r in range(sequences * thread // threads, sequences * (thread + 1) // threads):
        table = int64_at(given.block_tables + 8 * r * given.table_stride)
        pages = int64_at(given.page_tables + 8 * r * given.table_stride)
        context, token, end = contexts[r], starts[r], starts[r + 1]
        for n in range(first_seen(context - (end - token), given.window) >> shift, ((context - 1) >> shift) + 1):
            pages[n] = page_of[table[n]]
        for t in range(token, end):
            block = slots[t] >> shift
            page_slots[t] = slots[t] + ((page_of[block] - block) << shift)
