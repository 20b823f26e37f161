# SPDX-License-Identifier: MIT
"""Record a layer's latent attention, and an indexer's choice of positions, from the operations of this folder."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from candle_vllm.core.kernels.activation_rows import FLOAT_FORMS, RowForm, row_elements
from candle_vllm.core.kernels.attention.cpu_cache import CHUNK, ROW_TILE, scratch_bytes
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.matrices import Inputs, linear_call
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation, plan_row
from candle_vllm.core.kernels.latent_attention.layout import (
    GROUPS,
    choice_scratch,
    groups_of,
    scratch_per_thread,
    stretch_step,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder
    from candle_vllm.core.kernels.latent_attention.layout import LatentParts
    from candle_vllm.core.kernels.plain_linear.layout import PlainMatrix


@dataclasses.dataclass(frozen=True)
class Place:
    """Float32 rows: address of the first, and row stride in floats."""

    address: int
    stride: int


def record_latent(
    recorder: Recorder, q: Place, kv: Place, parts: LatentParts, cache: np.ndarray, out: Place, *, scale: float
) -> None:
    """Record the norm, rotation, the write to the cache, attention, and the products of each head before and after it.

    Args:
        q: rows of H heads [nope | rope].
        kv: rows [latent | rope].
        cache: cache of the layer, see `cpu_write.py`.
        out: rows of the result [T, H * V].
        scale: factor of the scores.
    """
    sizes = parts.sizes
    heads, nope, rope, latent = sizes.heads, sizes.nope, sizes.rope, sizes.latent
    form, mixed_form = parts.keys[0].input_form, parts.values[0].input_form
    assert form in FLOAT_FORMS
    assert mixed_form in FLOAT_FORMS
    width, factor = rope + latent, scale * math.log2(math.e)
    queries = recorder.memory(groups_of(heads) * LANES * width, np.int16)
    inputs, products = _Inputs(recorder, heads, nope, form), recorder.memory(heads * latent)
    prepared = _prepared(recorder, q, kv, parts, cache, address_of(queries), factor)
    rows = {"inputs": inputs.address, "head_bytes": inputs.head_bytes, "row_numbers": inputs.row_numbers}
    recorder.add(operation("latent_attention.cpu_write:make_prepare", form), prepared._replace(**rows))
    multiplied = _multiplied(recorder, parts.keys, inputs, Place(address_of(products), heads * latent))
    arranged = multiplied._replace(
        latent_queries=address_of(products), queries=address_of(queries), width=width, rope=rope, scale=factor
    )
    recorder.add(operation("latent_attention.cpu_heads:make_heads", True), arranged)
    mixed = _Inputs(recorder, heads, latent, mixed_form)
    _attend(recorder, address_of(queries), mixed, parts, cache, mixed_form)
    mixed_out = _multiplied(recorder, parts.values, mixed, out)
    recorder.add(operation("latent_attention.cpu_heads:make_heads", False), mixed_out)


def record_choice(
    recorder: Recorder, q: Place, key: Place, weights: Place, parts: LatentParts, cache: np.ndarray, top: int
) -> NDArray[np.int32]:
    """Record for an indexer: rotation, the write of keys to the indexer's cache, and the choice of positions.

    Rows of q and key consist of heads [nope | rope], and `weights` has an element for each head; `parts` has no
    matrices, and `nope` equals `latent`. Return positions [T * top], with `top` at most the longest context; they are
    written only for tokens that do not attend to all positions.

    For pooled keys, rows of key are [nope | gate] of equal parts: R is 0, and `latent` is twice `nope`.
    """
    sizes, limits = parts.sizes, recorder.limits
    longest = limits.table_width * limits.block_size
    width, top = sizes.rope + sizes.nope, min(top, longest)
    queries, positions = recorder.memory(sizes.heads * width, np.int16), recorder.memory(top, np.int32)
    prepared = _prepared(recorder, q, key, parts, cache, address_of(queries), 1.0)
    recorder.add(operation("latent_attention.cpu_write:make_prepare", 2), prepared)
    size = choice_scratch(longest, limits.threads)
    if parts.places is None:
        given = _over_cache(recorder, address_of(queries), parts, cache, size)
    else:
        assert (sizes.rope, sizes.latent) == (0, 2 * sizes.nope)
        assert parts.places.shape == (parts.pool, sizes.nope)
        place = prepared.stretch_step, prepared.block_shift, prepared.slots, prepared.cache
        pooled = PoolArguments(*place, recorder.keep(parts.places))
        recorder.add(operation("latent_attention.cpu_pool:make_pool", sizes.nope, parts.pool), pooled)
        with_copies = choice_scratch(longest, limits.threads, sizes.nope)
        given = _over_cache(recorder, address_of(queries), parts, cache, with_copies)._replace(scratch_size=size)
    given = given._replace(out=weights.address, row_bytes=4 * weights.stride, head_bytes=4 * longest)
    for chooses in (False, True):
        made = operation("latent_attention.cpu:make_choose", width, recorder.isa.bf16, chooses)
        recorder.add(made, given._replace(chosen=address_of(positions), top=top))
    return positions


def _prepared(
    recorder: Recorder, q: Place, kv: Place, parts: LatentParts, cache: np.ndarray, queries: int, scale: float
) -> PrepareArguments:
    arrays, sizes = recorder.arrays, parts.sizes
    return PrepareArguments(
        q=q.address,
        q_stride=q.stride,
        kv=kv.address,
        kv_stride=kv.stride,
        heads=sizes.heads,
        nope=sizes.nope,
        rope=sizes.rope,
        latent=sizes.latent,
        norm=recorder.keep(parts.norm),
        eps=parts.eps,
        scale=scale,
        stretch_step=stretch_step(cache.strides, sizes.rope + sizes.latent),
        block_shift=recorder.limits.block_shift,
        positions=address_of(arrays.positions),
        slots=address_of(arrays.slots),
        cache=address_of(cache),
        queries=queries,
        cos=recorder.keep(parts.cos),
        sin=recorder.keep(parts.sin),
    )


class _Inputs:
    """Memory for the input rows of each head's matrix: [H, maximum number of tokens, elements of a row]."""

    def __init__(self, recorder: Recorder, heads: int, columns: int, form: RowForm) -> None:
        self.row_numbers = row_elements(columns)
        self.array = recorder.memory(heads * self.row_numbers, np.int16 if form is RowForm.BF16 else np.float32)
        self.address = address_of(self.array)
        self.row_bytes = self.row_numbers * form.bytes
        self.head_bytes = recorder.limits.tokens * self.row_bytes


def _multiplied(recorder: Recorder, matrices: tuple[PlainMatrix, ...], inputs: _Inputs, out: Place) -> HeadsArguments:
    """Return the arguments for the products of all heads, whose results are adjacent columns."""
    function, rows = 0, []
    assert len({matrix.kind for matrix in matrices}) == 1
    for head, matrix in enumerate(matrices):
        x = Inputs({"x": inputs.address + head * inputs.head_bytes, "x_bytes": inputs.row_bytes}, ())
        to, column = out.address, head * matrix.rows
        function, made = linear_call(recorder, matrix, x, out=to, out_stride=out.stride, column=column)
        rows.append(plan_row(function, address_of(recorder.arrays.numbers), made))
    table, tiles = np.array(rows, np.int64), -(-matrices[0].rows // LANES)
    return HeadsArguments(function, recorder.keep_array(table), table.strides[0], len(matrices), tiles)


def _attend(
    recorder: Recorder, queries: int, mixed: _Inputs, parts: LatentParts, cache: np.ndarray, form: RowForm
) -> None:
    limits, sizes, chosen = recorder.limits, parts.sizes, parts.chosen
    longest = limits.table_width * limits.block_size
    top = longest if chosen is None else chosen.size // limits.tokens
    size = scratch_bytes(
        max_tokens=limits.tokens,
        max_seqs=limits.sequences,
        heads=groups_of(sizes.heads) * LANES,
        head_dim=sizes.latent,
        max_context=min(longest, top),
        threads=limits.threads,
        per_thread=scratch_per_thread(sizes.latent),
    )
    copied = 0 if chosen is None else limits.threads * 2 * CHUNK * (sizes.rope + sizes.latent)
    attended = _over_cache(recorder, queries, parts, cache, size + copied)._replace(
        out=mixed.address, head_bytes=mixed.head_bytes, row_bytes=mixed.row_bytes, scratch_size=size
    )
    if chosen is not None:
        tile = LANES * math.gcd(attended.parts, GROUPS)
        attended = attended._replace(chosen=address_of(chosen), top=top, tile=tile)
    constants = sizes.rope, sizes.latent, form, recorder.isa.bf16
    recorder.add(operation("latent_attention.cpu:make_attend", *constants), attended)
    recorder.add(operation("latent_attention.cpu:make_merge", sizes.latent, form), attended)


def _over_cache(recorder: Recorder, queries: int, parts: LatentParts, cache: np.ndarray, size: int) -> AttendArguments:
    arrays, limits, sizes = recorder.arrays, recorder.limits, parts.sizes
    return AttendArguments(
        q=queries,
        cache=address_of(cache),
        query_start=address_of(arrays.query_start),
        context_lens=address_of(arrays.context_lens),
        block_tables=address_of(arrays.block_tables),
        table_stride=limits.table_width,
        stretch_step=stretch_step(cache.strides, sizes.rope + sizes.latent),
        block_shift=limits.block_shift,
        heads=sizes.heads,
        parts=groups_of(sizes.heads),
        pool=parts.pool,
        scratch=recorder.scratch(size),
        scratch_size=size,
    )


class AttendArguments(NamedTuple):
    """Arguments of `attend`, of `merge`, and of the operations of a choice.

    Attributes:
        q: address of queries in the layout of `cpu_tiles.py`, times softmax scale * log2(e) except for a choice.
        out, head_bytes, row_bytes: address of the result, bytes from head to head, and from token to token of a head.
            For a choice: address of the weights, bytes of a token's scores, and row stride of the weights in bytes.
        cache: address of the layer's cache, see `cpu_write.py`.
        query_start, context_lens: addresses of int64 [R + 1] and [R]; see `AttentionRows`.
        block_tables: address of int64 [R, table_stride].
        stretch_step: slots from one stretch of the cache to the next.
        block_shift: log2(S).
        heads, parts: H, and `groups_of(H)`.
        scratch, scratch_size: address and size of scratch memory; behind it the threads copy chosen rows.
        chosen, top: address of chosen positions, int32 [T, top], and the maximum number that a token attends to.
        tile: rows of a row tile; with chosen positions, all rows of a tile belong to one token.
        pool: number of neighbouring positions that are chosen together; G, see `attended`.
    """

    q: int
    cache: int
    query_start: int
    context_lens: int
    block_tables: int
    table_stride: int
    stretch_step: int
    block_shift: int
    heads: int
    parts: int
    scratch: int
    scratch_size: int
    out: int = 0
    head_bytes: int = 0
    row_bytes: int = 0
    chosen: int = 0
    top: int = 1 << 60
    tile: int = ROW_TILE
    pool: int = 1


class PoolArguments(NamedTuple):
    """Arguments of the operation of `cpu_pool.py`.

    Attributes:
        stretch_step, block_shift, slots, cache: as in `PrepareArguments`.
        places: address of float32 [pool, D].
    """

    stretch_step: int
    block_shift: int
    slots: int
    cache: int
    places: int


class HeadsArguments(NamedTuple):
    """Arguments of the operation of `cpu_heads.py`.

    Attributes:
        function: address of the operation that multiplies a matrix.
        rows, row_bytes: address of a plan row of `function` for each head, and bytes from one row to the next.
        heads, tiles: H, and tiles of a head's matrix.
        latent_queries: address of the products, float32 [T, H, L] with L a multiple of 16, for `arranges`.
        queries, width, rope, scale: address of the queries of `cpu_tiles.py`, D, R, and the factor of the queries.
    """

    function: int
    rows: int
    row_bytes: int
    heads: int
    tiles: int
    latent_queries: int = 0
    queries: int = 0
    width: int = 0
    rope: int = 0
    scale: float = 0.0


class PrepareArguments(NamedTuple):
    """Arguments of the operation of `cpu_write.py`.

    Attributes:
        q, q_stride: address of float32 rows of heads [nope | rope], and row stride in floats.
        kv, kv_stride: address and row stride of float32 rows [latent | rope].
        heads, nope, rope, latent: H and the sizes of the parts.
        norm, eps: arguments of the latent vector's norm; `norm` is the address of its weight. Not used for an indexer.
        scale: factor of the queries: 1 for an indexer, else softmax scale * log2(e), for powers of two in `attend`.
        stretch_step: slots from one stretch of the cache to the next.
        block_shift: log2(S).
        positions, slots: addresses of int64 [T]; slot = block * S + offset.
        cache: address of the layer's cache.
        queries: address of the queries of `cpu_tiles.py`, bfloat16.
        inputs, head_bytes, row_numbers: address of the heads' rows of nope, bytes from head to head, elements from row
            to row. Not used for an indexer.
        cos, sin: addresses of float32 [positions, R / 2].
    """

    q: int
    q_stride: int
    kv: int
    kv_stride: int
    heads: int
    nope: int
    rope: int
    latent: int
    norm: int
    eps: float
    scale: float
    stretch_step: int
    block_shift: int
    positions: int
    slots: int
    cache: int
    queries: int
    cos: int
    sin: int
    inputs: int = 0
    head_bytes: int = 0
    row_numbers: int = 0
