# SPDX-License-Identifier: MIT
"""Adapters made of numbers, and what the compiled operations add, for tests."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.conversion.gguf_tensors import Constant
from candle_vllm.core.kernels.activation_rows import row_elements
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.cpu_runtime.matrices import linear_operation
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, linear_arguments, operation, plan_row
from candle_vllm.core.kernels.cpu_runtime.recorder import aligned
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.lora import Delta, FittedAdapter, PackedAdapter, Place
from candle_vllm.core.kernels.lora import layout as lay
from candle_vllm.core.kernels.lora.cpu_shrink import count_blocks
from candle_vllm.core.kernels.plain_linear import PlainMatrix


def stored(numbers: np.ndarray) -> Constant:
    numbers = np.ascontiguousarray(numbers, np.float32)
    return Constant("made", numbers.shape, "F32", numbers.nbytes, Path("made"), numbers)


def low_rank(generator: np.random.Generator, rows: int, columns: int, rank: int, **given: Any) -> Delta:
    """Random A and B, whose product is about as large as its input."""
    a = generator.standard_normal((rank, columns)) / np.sqrt(columns)
    b = generator.standard_normal((rows, rank)) / np.sqrt(rank)
    return Delta(a=stored(a), b=stored(b), **{"scale": 0.5, **given})


def fitted(deltas: dict[str, dict[str, Delta]], alora: tuple[int, ...] | None = None) -> FittedAdapter:
    digest = hashlib.sha256(repr([(id(d), p) for p, of in deltas.items() for d in of.values()]).encode()).digest()
    rank = max((delta.rank for of in deltas.values() for delta in of.values()), default=0)
    return FittedAdapter(digest=digest, alora=alora, deltas=deltas, rank=rank, nbytes=0, norm=1.0)


def contents(adapter: PackedAdapter, places: Iterable[Place]) -> list[Any]:
    """All that the operations read of an adapter of A and B alone, in the order of places; addresses are left out."""
    form = lay.NumberForm[adapter.layout.dtype]

    def words(address: int, count: int) -> NDArray[np.int64]:
        return np.frombuffer(ctypes.string_at(int(address), 8 * count), np.int64)

    found: list[Any] = []
    for place in places:
        about = words(adapter.layout.address, place.number + 1)[place.number]
        if not about:
            found.append(None)
            continue
        a, ranks, parts = words(about, lay.HEAD)
        size = int(ranks) * row_elements(place.columns) * form.bytes
        size += 4 * form.block_scales * count_blocks(int(ranks))
        found.append((ranks, parts, ctypes.string_at(int(a), size)))
        for number in range(parts):
            part = words(about + 8 * (lay.HEAD + number * lay.PART), lay.PART)
            panels = -(-part[lay.ROWS] // lay.PANEL)
            said = [at for at in range(lay.PART) if at != lay.MATRIX]
            size = int(panels) * (int(part[lay.STEPS]) * lay.PANEL_BYTES + form.panel_scales)
            b = ctypes.string_at(int(part[lay.MATRIX]), size)
            found.append((part[said].tolist(), b))
    return found


def add(
    team: ThreadTeam,
    isa: Isa,
    place: Place,
    groups: list[tuple[PackedAdapter, list[int], list[float]]],
    x: np.ndarray,
    y: np.ndarray,
    own: np.ndarray | None = None,
    matrices: Sequence[PlainMatrix] = (),
    late: bool = False,
) -> np.ndarray:
    """What stands in y [T, N] when adapters have been added for x [T, K]; the memory around it stays NaN.

    The model's products are in y, or in `own`, or are made of matrices of float32, by the same operations. Where it is
    late, no thread has begun with `shrink` when others need it.
    """
    form = lay.NumberForm[groups[0][0].layout.dtype]
    rows = np.array([row for _, of, _ in groups for row in of], np.int64)
    scales = np.array([scale for *_, of in groups for scale in of], np.float32)
    starts = np.concatenate(([0], np.cumsum([len(of) for _, of, _ in groups]))).astype(np.int64)
    tables = np.array([adapter.layout.address for adapter, *_ in groups], np.int64)
    inputs = aligned(len(x) * row_elements(x.shape[1]), np.float32).reshape(len(x), -1)
    inputs[:, : x.shape[1]] = x
    field = np.full((len(y) + 2, y.shape[1] + 24), np.nan, np.float32)
    view = field[1:-1, 5 : 5 + y.shape[1]]
    view[:] = y
    size = lay.BLOCK_BYTES * lay.most_blocks(3 * 256)
    done = aligned(lay.DONE_BYTES * team.threads, np.uint8)
    done[:] = 255
    h = aligned(len(rows) * size, np.uint8)
    h[:] = 255
    numbers = np.full(StepNumber.COUNT, -1, np.int64)
    numbers[StepNumber.ADAPTERS], numbers[StepNumber.TOKENS] = len(groups), len(y)
    common = {
        "place": place.number,
        "groups_from": StepNumber.ADAPTERS,
        "starts": address_of(starts),
        "tables": address_of(tables),
        "x": address_of(inputs),
        "x_bytes": inputs.strides[0],
        "rows": address_of(rows),
        "done": address_of(done),
        "h": address_of(h),
        "h_bytes": size,
    }
    expand = lay.ExpandArguments(
        **common,
        scales=address_of(scales),
        out=address_of(view),
        row_bytes=field.strides[0],
        columns=y.shape[1],
        base=0 if own is None else address_of(own),
        base_bytes=0 if own is None else own.strides[0],
    )
    shrink = plan_row(
        operation("lora.cpu_shrink:make_shrink", form, isa), address_of(numbers), lay.ShrinkArguments(**common)
    )
    within = shrink if late else ()  # which the threads do not see, as if all came to `expand` before
    begin = lay.BeginArguments(address_of(done))
    plan = plan_row(operation("lora.cpu_shrink:begin"), address_of(numbers), begin, barrier=True, inner=within)
    begins = len(plan) - len(within)
    plan += () if late else shrink
    expand_rows, column = operation("lora.cpu_expand:make_expand", form, isa), 0
    for matrix in matrices:
        product = linear_arguments(
            matrix,
            x=address_of(x),
            x_bytes=x.strides[0],
            out=address_of(view),
            out_stride=field.shape[1],
            column=column,
        )
        inner = plan_row(linear_operation(matrix, isa), address_of(numbers), product)
        made = expand._replace(first=column, columns=matrix.rows, back=8 * (len(plan) - begins))
        plan += plan_row(expand_rows, address_of(numbers), made, inner=inner)
        column += matrix.rows
    if not matrices:
        plan += plan_row(expand_rows, address_of(numbers), expand._replace(back=8 * (len(plan) - begins)))
    team.run(np.array(plan, np.int64), 2 - late + max(1, len(matrices)))
    result = view.copy()
    view[:] = np.nan
    assert np.isnan(field).all()
    return result
