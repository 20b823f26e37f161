# SPDX-License-Identifier: MIT
"""Choice of key blocks by an index on the CPU, for attention of each KV head to blocks of its own (MiniMax M3).

An index has a query head of Di elements for each of the K KV heads, and one key for each position, cached as float32
[B, S, Di]. A key block is a power of two of positions, a multiple of S. Its score for a head is the largest product of
the head's query with a key of the block, up to the token's position. A token attends to the blocks of its last
positions (`local`) and to those with the largest scores, `top` blocks in all. In the order of positions, the last block
has the token's own position and all others are whole, so that each head attends to the same number of positions.

`models/minimax_m3_index.py` records these operations, and computes the same op by op. A score does not depend on the
rest of the step. Source: transformers' `MiniMaxM3VLIndexer`.
"""

from __future__ import annotations

from collections.abc import Callable

from candle_vllm.core.kernels.attention.cpu_record import ChoiceArguments
from candle_vllm.core.kernels.attention.cpu_tiles import NOTHING
from candle_vllm.core.kernels.compressed_attention.cpu import copy_floats, products_of, sequence_of
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.latent_attention.cpu import choose_largest
from candle_vllm.core.kernels.latent_attention.layout import FEW_TOKENS

_TOKENS, _SEQUENCES = StepNumber.TOKENS.value, StepNumber.SEQUENCES.value


def write_keys(row, thread, threads):
    """Write the step's keys to the index's cache."""
    given = read(ChoiceArguments, row)
    tokens, size = step_number(row, _TOKENS), given.size
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        key = given.index + 4 * (t * given.stride + given.heads * size)
        copy_floats(given.cache + 4 * size * int64_at(given.slots)[t], key, size)


def make_choose(CHOOSES: int, ISA: int) -> Callable[..., None]:
    """Return the first (0) or second (1) operation of a choice.

    In a step of few tokens the first computes scores, with the blocks divided among threads, and the second chooses. In
    larger steps the second does both, with the tokens divided among threads.
    """

    def choose(row, thread, threads):
        given = read(ChoiceArguments, row)
        tokens, heads, size, top = step_number(row, _TOKENS), given.heads, given.size, given.top
        few, quads, sequences = tokens <= FEW_TOKENS, (heads + 3) >> 2, step_number(row, _SEQUENCES)
        per, mask = given.shift - given.block_shift, (1 << given.block_shift) - 1
        memory, chosen = stack_bytes(32 + 96 * quads), stack_bytes(4 * top)
        keys, queries, products = int64_at(memory), int64_at(memory + 32), float32_at(memory + 32 + 32 * quads)
        for t in range(tokens):
            if CHOOSES == 1 and t % threads != thread:
                continue
            position = int64_at(given.positions)[t]
            seen = (position >> given.shift) + 1
            others = seen - given.local if seen > top else 0  # blocks with scores
            table = int64_at(given.block_tables + 8 * sequence_of(given.query_start, sequences, t) * given.table_stride)
            scores = given.scratch + 4 * (t if few else thread) * heads * given.blocks
            for h in range(4 * quads):
                queries[h] = given.index + 4 * (t * given.stride + min(h, heads - 1) * size)
            for block in range(others if few == (CHOOSES == 0) else 0):
                if few and block % threads != thread:
                    continue
                for h in range(heads):
                    float32_at(scores)[h * given.blocks + block] = NOTHING
                for first in range(block << given.shift, (block + 1) << given.shift, 4):
                    slot = (table[first >> given.block_shift] << given.block_shift) + (first & mask)
                    for i in range(4):
                        keys[i] = given.cache + 4 * size * (slot + i)
                    for quad in range(quads):
                        products_of(
                            ISA, memory + 32 + 32 * quad, memory, memory + 32 + 32 * quads + 64 * quad, 4, size >> 4
                        )
                    for h in range(heads):
                        most = float32_at(scores)[h * given.blocks + block]
                        for i in range(4):
                            most = max(most, products[4 * h + i])
                        float32_at(scores)[h * given.blocks + block] = most
            if CHOOSES == 1:
                count = min(seen, top)
                int64_at(given.contexts)[t] = position + 1 - ((seen - count) << given.shift)
                for h in range(heads):
                    if others > 0:
                        choose_largest(scores + 4 * h * given.blocks, others, top - given.local, chosen)
                    to = int64_at(given.tables + 8 * (t * heads + h) * given.count)
                    for n in range(count):
                        block = n + seen - count
                        if others > 0 and n < top - given.local:
                            block = int(int32_at(chosen)[n])
                        for i in range(1 << per):
                            at = min((block << per) + i, position >> given.block_shift)
                            to[(n << per) + i] = table[at]

    return choose
