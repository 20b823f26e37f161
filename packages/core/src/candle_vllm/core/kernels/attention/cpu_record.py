# SPDX-License-Identifier: MIT
"""Record a layer's attention: rotary embedding, cache write, attention and its merge (step 6 of a request's life)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.attention.cpu_cache import (
    PLAIN,
    CacheKind,
    head_gap,
    scratch_bytes,
    stretch_step,
)
from candle_vllm.core.kernels.attention.rows import WindowedCache
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, operation
from candle_vllm.core.kernels.cpu_runtime.recorder import MeasuredKeys
from candle_vllm.core.kernels.kv_write import WriteArguments, rotate_and_write_operation

if TYPE_CHECKING:
    from candle_vllm.core.kernels.attention.rows import PagedCache
    from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder
    from candle_vllm.core.kernels.recorded import Recorded


@dataclasses.dataclass(frozen=True)
class Scores:
    """Options of attention scores; see `kernels/attention`.

    Attributes:
        narrows: whether attention is computed only for tokens whose logits are wanted.
        causal: whether no token attends to a later position.
        chosen: a recorded choice of the blocks to which each token attends, instead of its sequence's blocks.
    """

    scale: float
    window: int | None
    softcap: float | None
    sinks: NDArray[np.float32] | None
    narrows: bool = False
    causal: bool = False
    slopes: NDArray[np.float32] | None = None
    relative: tuple[Recorded, NDArray[np.float32]] | None = None
    chosen: ChoiceArguments | None = None


@dataclasses.dataclass(frozen=True)
class FusedHeads:
    """Location of q [T, H, D], k and v [T, K, D] in fused rows.

    Attributes:
        address, stride: address of the float32 rows, and their row stride in floats.
        columns: indices in a row at which q, k and v begin; only q for a layer that writes no keys and values.
        heads, head_dim: H and D.
        rows_from: the `StepNumber` that is T; LOGIT_ROWS if only tokens whose logits are wanted are computed.
    """

    address: int
    stride: int
    columns: tuple[int, ...]
    heads: int
    head_dim: int
    rows_from: StepNumber = StepNumber.TOKENS


def record_attention(
    recorder: Recorder,
    qkv: FusedHeads,
    cache: PagedCache,
    scores: Scores,
    tables: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    out: int,
    relative: tuple[int, int] = (0, 0),
) -> None:
    """Record rotation of q and k, the write of k and v to the cache, attention, and the merge of partial results.

    Args:
        cache: the layer's cache, in the layout of `cpu_cache.py`.
        tables: cos and sin, a row for each position and a column for each rotated pair; None without rotation.
        out: address of the result, contiguous float32 [T, H, D]; T is the number of tokens that are computed.
        relative: address and row stride in floats of `scores.relative[0]`.
    """
    queries = recorder.memory(qkv.heads * qkv.head_dim, np.int16)
    _record_write(recorder, qkv, cache, scores, tables, address_of(queries))
    arrays, limits, dim = recorder.arrays, recorder.limits, qkv.head_dim
    kv_heads = cache.keys.shape[1]
    block_tables = arrays.page_tables[cache.pool] if isinstance(cache, WindowedCache) else arrays.block_tables
    narrow = qkv.rows_from is StepNumber.LOGIT_ROWS
    if scores.narrows and not narrow:
        every = queries
        queries = recorder.memory(qkv.heads * dim, np.int16)
        words = qkv.heads * dim // 2
        recorder.pick_rows((address_of(every), words), words, (address_of(queries), words))
    keys, values = cache.kinds or PLAIN
    profiles = np.zeros((0, 0), np.float32) if scores.relative is None else scores.relative[1]
    assert scores.relative is None or not (scores.narrows or narrow)
    # from the longest distance to 0, so that the profiles of following keys follow; zeros are beyond both ends
    mirrored = np.pad(profiles[:, ::-1] * np.float32(LOG2E), ((0, 0), (LANES, LANES)))
    size = scratch_bytes(
        max_tokens=limits.tokens,
        max_seqs=limits.sequences,
        heads=qkv.heads,
        head_dim=dim,
        max_context=limits.table_width * limits.block_size,
        threads=limits.threads,
    )
    attended = AttendArguments(
        q=address_of(queries),
        out=out,
        key_cache=address_of(cache.keys),
        value_cache=address_of(cache.values),
        query_start=address_of(arrays.wanted_start if scores.narrows or narrow else arrays.query_start),
        context_lens=address_of(arrays.context_lens),
        block_tables=address_of(block_tables),
        table_stride=limits.table_width,
        stretch_step=stretch_step(cache.keys.strides, dim, keys),
        block_shift=limits.block_shift,
        heads=qkv.heads,
        kv_heads=kv_heads,
        scratch=recorder.scratch(size),
        scratch_size=size,
        window=scores.window or 0,
        cap=(scores.softcap or 0.0) * LOG2E,
        sinks=0 if scores.sinks is None else recorder.keep(scores.sinks * np.float32(LOG2E)),
        slopes=0 if scores.slopes is None else recorder.keep(scores.slopes * np.float32(LOG2E)),
        ahead=address_of(arrays.ahead) if limits.ahead and not (scores.causal or scores.narrows or narrow) else 0,
        head_gap=head_gap(cache.keys.strides, limits.block_size, dim, keys),
        ranks=recorder.ranks if limits.ranks is not None and limits.ranks.divides(kv_heads) else 0,
        relative=relative[0],
        relative_stride=relative[1],
        profiles=recorder.keep(mirrored),
        profile_count=len(mirrored),
        profile_size=mirrored.shape[1],
    )
    if (chosen := scores.chosen) is not None:  # each token is a sequence of its own
        assert not scores.narrows
        blocks = {"block_tables": chosen.tables, "table_stride": kv_heads * chosen.count, "head_tables": chosen.count}
        rows = {"query_start": address_of(recorder.row_numbers(2)), "context_lens": chosen.contexts}
        attended = attended._replace(**blocks, **rows, sequences=StepNumber.TOKENS)
    recorder.add(attend_operation(dim, recorder.isa, keys, values, scores.relative is not None), attended)
    recorder.add(merge_operation(dim, values), attended)


def _record_write(
    recorder: Recorder,
    qkv: FusedHeads,
    cache: PagedCache,
    scores: Scores,
    tables: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    queries: int,
) -> None:
    arrays, writes = recorder.arrays, len(qkv.columns) > 1
    every = qkv.rows_from is StepNumber.TOKENS
    assert every or not writes
    keys, values = cache.kinds or PLAIN
    cos, sin = (recorder.keep(table) for table in tables) if tables else (0, 0)
    written = WriteArguments(
        qkv=qkv.address,
        stride=qkv.stride,
        q_column=qkv.columns[0],
        k_column=qkv.columns[1] if writes else 0,
        v_column=qkv.columns[2] if writes else 0,
        heads=qkv.heads,
        kv_heads=cache.keys.shape[1] if writes else 0,
        head_dim=qkv.head_dim,
        block_shift=recorder.limits.block_shift,
        stretch_step=stretch_step(cache.keys.strides, qkv.head_dim, keys),
        half=tables[0].shape[1] if tables else 0,
        cos=cos,
        sin=sin,
        positions=address_of(arrays.positions),
        slots=address_of(arrays.page_slots[cache.pool] if isinstance(cache, WindowedCache) else arrays.slots),
        q=queries,
        key_cache=address_of(cache.keys),
        value_cache=address_of(cache.values),
        scale=scores.scale * LOG2E,
        fit=address_of(cache.fit) if keys.is_quantised else 0,
        group=qkv.heads // cache.keys.shape[1],
        turns=0 if arrays.turns is None else address_of(arrays.turns),
        head_gap=head_gap(cache.keys.strides, recorder.limits.block_size, qkv.head_dim, keys),
        picked=0 if every else address_of(arrays.logit_rows),
        rows_from=qkv.rows_from,
    )
    if recorder.measured is not None and writes and keys.is_quantised:
        sums = np.zeros(cache.fit.shape)
        centred = scores.softcap is None and scores.sinks is None
        recorder.measured.append(MeasuredKeys(cache.fit, sums, written.group, centred))
        summed = written._replace(fit=address_of(sums), positions=address_of(recorder.measured_at))
        recorder.add(operation("kv_write.cpu:measure"), summed)
    recorder.add(rotate_and_write_operation(keys, values), written)


LOG2E = math.log2(math.e)


class AttendArguments(NamedTuple):
    """Arguments of `attend` and of `merge`, which runs after a barrier.

    Attributes:
        q: address of queries [T, H, D], scaled by softmax scale * log2(e), in bfloat16 or quantised (`cpu_quantised`).
        out: address of float32 results [T, H, D].
        key_cache, value_cache: addresses of the layer's caches, see `cpu_cache.py`.
        query_start, context_lens: addresses of int64 [R + 1] and [R]; see `AttentionRows`.
        block_tables: address of int64 [R, table_stride]; with `head_tables`, a sequence has a table for each KV head.
        stretch_step: slots from one stretch of the caches to the next.
        block_shift: the binary logarithm of S.
        heads, kv_heads: H and K.
        scratch, scratch_size: address and bytes of the scratch memory, see `scratch_bytes`.
        window: positions that a token attends to, its own included; 0 for all, -n for chunks of n positions.
        cap: soft cap times log2(e); 0 without a soft cap.
        sinks: address of float32 [H], the heads' sinks times log2(e); 0 without sinks.
        ahead: address of int64 [T]: how many later positions each token attends to; 0 for causal attention.
        head_gap: see `cpu_cache.head_gap`.
        ranks: see `rank_of`; 0 if the heads are not divided among ranks.
        slopes: address of float32 [H], each head's ALiBi slope times log2(e); 0 without ALiBi.
        relative, relative_stride: address and row stride in floats of float32 [T, H * P]; 0 without relative logits.
        profiles: address of float32 [P, profile_size]: the profiles times log2(e), the longest distance first, between
            `LANES` zeros.
        profile_count: P.
        head_tables: blocks from the table of a KV head to that of the next one; 0 for one table of all heads.
        sequences: the `StepNumber` that is R.
    """

    q: int
    out: int
    key_cache: int
    value_cache: int
    query_start: int
    context_lens: int
    block_tables: int
    table_stride: int
    stretch_step: int
    block_shift: int
    heads: int
    kv_heads: int
    scratch: int
    scratch_size: int
    window: int = 0
    cap: float = 0.0
    sinks: int = 0
    ahead: int = 0
    head_gap: int = 0
    ranks: int = 0
    slopes: int = 0
    relative: int = 0
    relative_stride: int = 0
    profiles: int = 0
    profile_count: int = 0
    profile_size: int = 0
    head_tables: int = 0
    sequences: int = StepNumber.SEQUENCES


class ChoiceArguments(NamedTuple):
    """Arguments of the operations of `cpu_choice.py`.

    Attributes:
        index, stride: address of float32 rows of K query heads and a key, rotated, and their row stride in floats.
        heads, size: K and Di.
        positions, slots, cache: addresses of int64 [T] each, and of the index's cache.
        query_start, block_tables, table_stride, block_shift: as in `AttendArguments`.
        shift, top, local: log2 of a key block's positions; number of blocks that are chosen, and of last ones of them.
        scores, blocks: address of float32 [T, K, blocks]; number of key blocks of the longest sequence.
        tables, count: address of int64 [T, K, count], the chosen blocks of the cache in the order of their positions.
        contexts: address of int64 [T], the number of positions in the blocks of each head.
    """

    index: int
    stride: int
    heads: int
    size: int
    positions: int
    slots: int
    cache: int
    query_start: int
    block_tables: int
    table_stride: int
    block_shift: int
    shift: int
    top: int
    local: int
    scores: int
    blocks: int
    tables: int
    contexts: int
    count: int


def attend_operation(head_dim: int, isa: Isa, keys: CacheKind, values: CacheKind, relates: bool = False) -> int:
    """Return the address of the compiled `attend`; `relates` if there are relative logits."""
    return operation("attention.cpu:make_attend", head_dim, attend_isa(isa, keys, values), keys, values, relates)


def attend_isa(isa: Isa, keys: CacheKind, values: CacheKind) -> Isa:
    """Return the instruction sets of `isa` for which `attend` has code of its own; others give the same code."""
    if (keys, values) == PLAIN:
        return isa.bf16
    used = isa & (Isa.VNNI | Isa.AVX_VNNI)
    if not used and (keys.has_halves or values.has_halves):
        used = isa & (Isa.AVX512 | Isa.AVX2 | Isa.NEON)
    return used | isa.bf16 & ~Isa.AMX if not (keys.is_quantised and values.is_quantised) else used


def merge_operation(head_dim: int, values: CacheKind) -> int:
    """Return the address of the compiled `merge`."""
    return operation("attention.cpu:make_merge", head_dim, values.is_quantised)
