"""Recording a layer's latent attention: the operations of this folder, one after the other."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from candle_vllm.core.kernels.activation_rows import RowForm, row_elements
from candle_vllm.core.kernels.cpu_runtime.matrices import Inputs, linear_call
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, plan_row
from candle_vllm.core.kernels.latent_attention.cpu import (
    AttendArguments,
    attend_operation,
    groups_of,
    merge_operation,
    scratch_bytes,
)
from candle_vllm.core.kernels.latent_attention.cpu_heads import HeadsArguments, heads_operation
from candle_vllm.core.kernels.latent_attention.cpu_tiles import LANES
from candle_vllm.core.kernels.latent_attention.cpu_write import PrepareArguments, prepare_operation, stretch_step

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder
    from candle_vllm.core.kernels.latent_attention.layout import LatentParts
    from candle_vllm.core.kernels.plain_linear.layout import PlainMatrix


@dataclasses.dataclass(frozen=True)
class Place:
    """Float32 rows: the address of the first, and floats from one to the next."""

    address: int
    stride: int


def record_latent(
    recorder: Recorder, q: Place, kv: Place, parts: LatentParts, cache: np.ndarray, out: Place, *, scale: float
) -> None:
    """Rotates, writes to the cache and attends.

    Args:
        recorder: of the plan.
        q: rows of H heads [nope | rope].
        kv: rows [latent | rope].
        parts: what the layer has.
        cache: of the layer, as `cpu_write.cache_shape` says.
        out: where the result [T, H * V] goes.
        scale: of scores.
    """
    arrays, sizes = recorder.arrays, parts.sizes
    heads, nope, rope, latent = sizes.heads, sizes.nope, sizes.rope, sizes.latent
    assert len({matrix.kind for matrix in (*parts.keys, *parts.values)}) == 1
    form = parts.keys[0].input_form
    width, factor = rope + latent, scale * math.log2(math.e)
    queries = recorder.memory(groups_of(heads) * LANES * width, np.int16)
    inputs, products = _Inputs(recorder, heads, nope, form), recorder.memory(heads * latent)
    prepared = PrepareArguments(
        q=q.address,
        q_stride=q.stride,
        kv=kv.address,
        kv_stride=kv.stride,
        heads=heads,
        nope=nope,
        rope=rope,
        latent=latent,
        norm=recorder.keep(parts.norm),
        eps=parts.eps,
        scale=factor,
        stretch_step=stretch_step(cache.strides, width),
        block_shift=recorder.limits.block_shift,
        positions=address_of(arrays.positions),
        slots=address_of(arrays.slots),
        cache=address_of(cache),
        queries=address_of(queries),
        inputs=inputs.address,
        head_bytes=inputs.head_bytes,
        row_numbers=inputs.row_numbers,
        cos=recorder.keep(parts.cos),
        sin=recorder.keep(parts.sin),
    )
    recorder.add(prepare_operation(int(form)), prepared)
    multiplied = _multiplied(recorder, parts.keys, inputs, Place(address_of(products), heads * latent))
    arranged = multiplied._replace(
        latent_queries=address_of(products), queries=address_of(queries), width=width, rope=rope, scale=factor
    )
    recorder.add(heads_operation(arranges=True), arranged)
    mixed = _Inputs(recorder, heads, latent, form)
    _attend(recorder, address_of(queries), mixed, parts, cache, form)
    recorder.add(heads_operation(arranges=False), _multiplied(recorder, parts.values, mixed, out))


class _Inputs:
    """Memory for input rows of every head's matrix: [H, most tokens, numbers of a row]."""

    def __init__(self, recorder: Recorder, heads: int, columns: int, form: RowForm) -> None:
        self.row_numbers = row_elements(columns)
        self.array = recorder.memory(heads * self.row_numbers, np.int16 if form is RowForm.BF16 else np.float32)
        self.address = address_of(self.array)
        self.row_bytes = self.row_numbers * form.bytes
        self.head_bytes = recorder.limits.tokens * self.row_bytes


def _multiplied(recorder: Recorder, matrices: tuple[PlainMatrix, ...], inputs: _Inputs, out: Place) -> HeadsArguments:
    """Every head's product; the results stand side by side."""
    function, rows = 0, []
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
    arrays, limits, sizes = recorder.arrays, recorder.limits, parts.sizes
    size = scratch_bytes(
        max_tokens=limits.tokens,
        max_seqs=limits.sequences,
        heads=sizes.heads,
        latent=sizes.latent,
        max_context=limits.table_width * limits.block_size,
        threads=limits.threads,
    )
    attended = AttendArguments(
        q=queries,
        out=mixed.address,
        head_bytes=mixed.head_bytes,
        row_bytes=mixed.row_bytes,
        cache=address_of(cache),
        query_start=address_of(arrays.query_start),
        context_lens=address_of(arrays.context_lens),
        block_tables=address_of(arrays.block_tables),
        table_stride=limits.table_width,
        stretch_step=stretch_step(cache.strides, sizes.rope + sizes.latent),
        block_shift=limits.block_shift,
        heads=sizes.heads,
        parts=groups_of(sizes.heads),
        scratch=recorder.scratch(size),
        scratch_size=size,
    )
    recorder.add(attend_operation(sizes.rope, sizes.latent, int(form), recorder.isa), attended)
    recorder.add(merge_operation(sizes.latent, int(form)), attended)
