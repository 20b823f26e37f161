# SPDX-License-Identifier: MIT
"""Choice of key blocks by an index on the CPU, for attention of each KV head to blocks of its own (MiniMax M3).

An index has a query head of Di elements for each of the K KV heads, and one key for each position, cached as float32
[B, S, Di]. A key block is a power of two of positions, a multiple of S. Its score for a head is the largest product of
the head's query with a key of the block. A token attends to the blocks of its last positions (`local`) and to the other
blocks with the largest scores, to `top` blocks in all. In the order of positions, the last block has the token's own
position and all others are whole, so that each head attends to the same number of positions.

`models/minimax_m3_index.py` records these operations; `models/minimax_m3_choice.py` computes the same op by op.
Source: transformers' `MiniMaxM3VLIndexer`.
"""

from __future__ import annotations

from collections.abc import Callable

from candle_vllm.core.kernels.attention.cpu_record import ChoiceArguments
from candle_vllm.core.kernels.attention.cpu_tiles import NOTHING
from candle_vllm.core.kernels.compressed_attention.cpu import products_of, sequence_of
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.latent_attention.cpu import choose_largest

_TOKENS, _SEQUENCES = StepNumber.TOKENS.value, StepNumber.SEQUENCES.value


def write_keys(row, thread, threads):
    """Write the step's keys to the index's cache."""
    given = read(ChoiceArguments, row)
    size, tokens = given.size, step_number(row, _TOKENS)
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        key = float32_at(given.index + 4 * (t * given.stride + given.heads * size))
        to = float32_at(given.cache + 4 * size * int64_at(given.slots)[t])
        for i in range(size):
            to[i] = key[i]


def make_score(ISA: int) -> Callable[..., None]:
    """Return the operation that computes the scores of tokens with more than `top` blocks."""

    def score(row, thread, threads):
        given = read(ChoiceArguments, row)
        heads, size, shift, quads = given.heads, given.size, given.block_shift, (given.heads + 3) >> 2
        memory = stack_bytes(32 + 96 * quads)
        keys, queries, products = int64_at(memory), int64_at(memory + 32), memory + 32 + 32 * quads
        starts, positions = int64_at(given.query_start), int64_at(given.positions)
        for r in range(step_number(row, _SEQUENCES)):
            table, scores = int64_at(given.block_tables + 8 * r * given.table_stride), float32_at(given.scores)
            end = starts[r + 1]
            for block in range((positions[end - 1] >> given.shift) + 1 - given.local):
                if (r + block) % threads != thread:
                    continue
                for t in range(starts[r], end):  # a block's keys stay in the CPU's cache for all tokens
                    seen = (positions[t] >> given.shift) + 1
                    if seen <= given.top or block >= seen - given.local:
                        continue
                    for h in range(4 * quads):
                        queries[h] = given.index + 4 * (t * given.stride + min(h, heads - 1) * size)
                    at = t * heads * given.blocks + block
                    for h in range(heads):
                        scores[at + h * given.blocks] = NOTHING
                    for first in range(block << given.shift, (block + 1) << given.shift, 4):
                        slot = (table[first >> shift] << shift) + (first & ((1 << shift) - 1))
                        for i in range(4):
                            keys[i] = given.cache + 4 * size * (slot + i)
                        for quad in range(quads):
                            products_of(ISA, memory + 32 + 32 * quad, memory, products + 64 * quad, 4, size >> 4)
                        for h in range(4 * heads):
                            place = at + (h >> 2) * given.blocks
                            scores[place] = max(scores[place], float32_at(products)[h])

    return score


def choose(row, thread, threads):
    """Write the tables of the chosen blocks, and how many positions they have."""
    given, sequences = read(ChoiceArguments, row), step_number(row, _SEQUENCES)
    top, local, per = given.top, given.local, given.shift - given.block_shift
    chosen, tokens = stack_bytes(4 * top), step_number(row, _TOKENS)
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        position = int64_at(given.positions)[t]
        seen = (position >> given.shift) + 1
        table = int64_at(given.block_tables + 8 * sequence_of(given.query_start, sequences, t) * given.table_stride)
        count = min(seen, top)
        int64_at(given.contexts)[t] = position + 1 - ((seen - count) << given.shift)
        for h in range(t * given.heads, (t + 1) * given.heads):
            if seen > top:
                choose_largest(given.scores + 4 * h * given.blocks, seen - local, top - local, chosen)
            to = int64_at(given.tables + 8 * h * given.count)
            for n in range(count):
                block = int(int32_at(chosen)[n]) if seen > top and n < top - local else n + seen - count
                for i in range(1 << per):
                    at = min((block << per) + i, position >> given.block_shift)
                    to[(n << per) + i] = table[at]
