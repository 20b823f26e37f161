"""Adapters made of numbers, and what the compiled operations add, for tests."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.conversion.gguf_tensors import Constant
from candle_vllm.core.kernels.activation_rows import RowForm, row_elements
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, plan_row
from candle_vllm.core.kernels.cpu_runtime.recorder import aligned
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.lora import Delta, FittedAdapter, PackedAdapter, Place
from candle_vllm.core.kernels.lora import layout as lay
from candle_vllm.core.quantization.plain import read_plain


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
    form = RowForm[adapter.layout.dtype]

    def words(address: int, count: int) -> NDArray[np.int64]:
        return np.frombuffer(ctypes.string_at(int(address), 8 * count), np.int64)

    found: list[Any] = []
    for place in places:
        about = words(adapter.layout.address, place.number + 1)[place.number]
        if not about:
            found.append(None)
            continue
        a, ranks, parts = words(about, lay.HEAD)
        found.append((ranks, parts, ctypes.string_at(int(a), int(ranks) * row_elements(place.columns) * form.bytes)))
        for number in range(parts):
            part = words(about + 8 * (lay.HEAD + number * lay.PART), lay.PART)
            panels = -(-part[lay.ROWS] // lay.PANEL)
            said = [at for at in range(lay.PART) if at != lay.MATRIX]
            b = ctypes.string_at(int(part[lay.MATRIX]), int(panels * part[lay.STEPS]) * lay.PANEL_BYTES)
            found.append((part[said].tolist(), b))
    return found


def as_inputs(x: np.ndarray, form: RowForm) -> np.ndarray:
    """Rows of activations as the operations read them."""
    wide = np.zeros((len(x), row_elements(x.shape[1])), np.float32)
    wide[:, : x.shape[1]] = x
    if form is RowForm.BF16:
        wide = read_plain(wide.reshape(-1).view(np.uint8), "F32", wide.shape, "BF16")
    memory = aligned(wide.size + 64, wide.dtype.type)[: wide.size].reshape(wide.shape)
    memory[:] = wide
    return memory


def add(
    team: ThreadTeam,
    isa: Isa,
    place: Place,
    groups: list[tuple[PackedAdapter, list[int], list[float]]],
    x: np.ndarray,
    y: np.ndarray,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """What stands in y [T, N] when adapters have been added for x [T, K]; the memory around it stays NaN."""
    form = RowForm[groups[0][0].layout.dtype]
    rows = np.array([row for _, of, _ in groups for row in of], np.int64)
    scales = np.array([scale for *_, of in groups for scale in of], np.float32)
    starts = np.concatenate(([0], np.cumsum([len(of) for _, of, _ in groups]))).astype(np.int64)
    tables = np.array([adapter.layout.address for adapter, *_ in groups], np.int64)
    inputs = as_inputs(x[rows], form)
    field = np.full((len(y) + 2, y.shape[1] + 24), np.nan, np.float32)
    view = field[1:-1, 5 : 5 + y.shape[1]]
    view[:] = y
    size = lay.BLOCK_BYTES * lay.most_blocks(3 * 256)
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
        "h": address_of(h),
        "h_bytes": size,
    }
    expand = lay.ExpandArguments(
        **common,
        rows=address_of(rows),
        scales=address_of(scales),
        out=address_of(view),
        row_bytes=field.strides[0],
        columns=y.shape[1],
        base=0 if own is None else address_of(own),
        base_bytes=0 if own is None else own.strides[0],
    )
    operations = [
        (lay.shrink_operation(form, isa), lay.ShrinkArguments(**common)),
        (lay.expand_operation(form, isa), expand),
    ]
    plan = [n for at, given in operations for n in plan_row(at, address_of(numbers), given, barrier=True)]
    team.run(np.array(plan, np.int64), len(operations))
    result = view.copy()
    view[:] = np.nan
    assert np.isnan(field).all()
    return result
