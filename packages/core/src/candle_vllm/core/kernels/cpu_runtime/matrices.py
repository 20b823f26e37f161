# SPDX-License-Identifier: MIT
"""Record matrix products; the kind of the matrix determines the input form and the operations.

An input form is the format in which kernels read activations, such as int8 groups or bfloat16 rows. A fused product may
have matrices of several kinds; each form of their common input is computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from candle_vllm.core.kernels.activation_quant import GROUP, Groups, Prologue, QuantiseArguments, quantise_operation
from candle_vllm.core.kernels.activation_rows import (
    FLOAT_FORMS,
    InputForm,
    RowForm,
    RowsArguments,
    row_bytes,
    row_elements,
    rows_operation,
)
from candle_vllm.core.kernels.column_order import OrderArguments
from candle_vllm.core.kernels.cpu_runtime.level import Isa, bytes_ahead
from candle_vllm.core.kernels.cpu_runtime.operation import (
    LinearArguments,
    Matrix,
    StepNumber,
    address_of,
    embedding_arguments,
    linear_arguments,
    operation,
)
from candle_vllm.core.kernels.packed_linear import layout as packed
from candle_vllm.core.kernels.word_linear import layout as words

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder


@dataclasses.dataclass(frozen=True)
class InputRows:
    """Input before the conversion to an input form.

    Attributes:
        x, stride: address of float32 rows, and row stride in floats.
        columns: K, after the prologue.
        prologue: computation that is fused with the conversion, such as a norm.
        weight, eps: arguments of a norm; weight is an address.
        picked, rows_from: which rows are converted, as in `QuantiseArguments`.
    """

    x: int
    stride: int
    columns: int
    prologue: Prologue
    weight: int = 0
    eps: float = 0.0
    picked: int = 0
    rows_from: StepNumber = StepNumber.TOKENS


@dataclasses.dataclass(frozen=True)
class Inputs:
    """An input in one form: arguments for the operations that read it, and the arrays that must stay alive."""

    arguments: Mapping[str, Any]
    arrays: tuple[np.ndarray, ...]


def make_forms(
    recorder: Recorder, forms: Sequence[InputForm], source: InputRows, *, copies: int = 1
) -> dict[InputForm, Inputs]:
    """Record conversions of an input, `copies` rows per token; a barrier follows the last one."""
    made: dict[InputForm, Inputs] = {}
    rows = next((form for form in forms if form in FLOAT_FORMS), None)
    if recorder.adapted and rows is not None and Groups() in forms:  # LoRA reads rows: one operation makes both forms
        columns, only = source.columns, len(forms) == 2
        out = recorder.memory(copies * columns, np.int16 if rows is RowForm.BF16 else np.float32)
        at = address_of(out)
        made[Groups()] = _convert(recorder, Groups(), source, copies=copies, barrier=only, rows=(rows, at))
        made[rows] = Inputs({"x": at, "x_bytes": rows.bytes * columns}, (out,))
    left = [form for form in forms if form not in made]
    for place, form in enumerate(left, 1):
        made[form] = _convert(recorder, form, source, copies=copies, barrier=place == len(left))
    return made


def _convert(
    recorder: Recorder,
    form: InputForm,
    source: InputRows,
    *,
    copies: int = 1,
    barrier: bool = True,
    rows: tuple[RowForm, int] | None = None,
) -> Inputs:
    """Record the conversion of an input, `copies` rows per token. `rows`: a second form, and the address for it."""
    if isinstance(form, Groups) and form.order is not None:
        return _ordered_inputs(recorder, form.order, source, copies=copies, barrier=barrier)
    common: dict[str, Any] = dataclasses.asdict(source)
    prologue, columns = common.pop("prologue"), source.columns
    if isinstance(form, Groups):
        q = recorder.memory(copies * columns, np.int8)
        scales, sums = (recorder.memory(copies * columns // GROUP) for _ in range(2))
        at_q, at_scales, at_sums = address_of(q), address_of(scales), address_of(sums)
        wide, at_rows = (0, 0) if rows is None else (rows[0].bytes, rows[1])
        arguments = QuantiseArguments(**common, q=at_q, scales=at_scales, sums=at_sums, rows=at_rows)
        recorder.add(quantise_operation(prologue, wide), arguments, barrier=barrier)
        return Inputs({"x": at_q, "scales": at_scales, "sums": at_sums}, (q, scales, sums))
    size = row_bytes(form, columns)
    out = recorder.memory(copies * size // form.bytes, {1: np.int8, 2: np.int16, 4: np.float32}[form.bytes])
    recorder.add(rows_operation(prologue, form), RowsArguments(**common, out=address_of(out)), barrier=barrier)
    return Inputs({"x": address_of(out), "x_bytes": size}, (out,))


def _ordered_inputs(recorder: Recorder, order: bytes, source: InputRows, *, copies: int, barrier: bool) -> Inputs:
    """Record the conversion of an input to groups with reordered columns, after its prologue."""
    columns, arrays = source.columns, ()
    x, stride, picked = source.x, source.stride, source.picked
    if source.prologue is not Prologue.NONE:
        made = _convert(recorder, RowForm.F32, source, copies=copies)
        x, stride, picked, arrays = made.arguments["x"], row_elements(columns), 0, made.arrays
    rows = recorder.memory(copies * columns)
    arguments = OrderArguments(
        x=x,
        stride=stride,
        order=recorder.keep_array(np.frombuffer(order, np.int64)),
        columns=columns,
        out=address_of(rows),
        out_stride=columns,
        picked=picked,
        rows_from=source.rows_from,
    )
    recorder.add(operation("column_order.cpu:column_order"), arguments)
    ordered = InputRows(address_of(rows), columns, columns, Prologue.NONE, rows_from=source.rows_from)
    made = _convert(recorder, Groups(), ordered, copies=copies, barrier=barrier)
    return Inputs(made.arguments, (*made.arrays, *arrays, rows))


def linear_call(recorder: Recorder, matrix: Matrix, inputs: Inputs, **how: Any) -> tuple[int, LinearArguments]:
    """Return a linear operation and its arguments for `Recorder.add`; `how` is passed to `linear_arguments`."""
    recorder.keep_matrix(matrix)
    form, given = matrix.input_form, inputs.arguments
    assert form not in FLOAT_FORMS or given["x_bytes"] >= row_bytes(form, matrix.columns)
    return linear_operation(matrix, recorder.isa), linear_arguments(matrix, **given, **how)


def linear_operation(matrix: Matrix, isa: Isa) -> int:
    """Return the address of the compiled linear operation of a matrix's kind."""
    constants = () if isinstance(matrix, words.WordMatrix) else (matrix.kind,)
    return operation(matrix.linear, *constants, isa)


def gate_products(
    recorder: Recorder, factors: Sequence[tuple[Matrix, Inputs]], prologue: Prologue, rows_from: StepNumber
) -> Inputs | None:
    """Record a fused gated product: act(gate x) * (other x) in groups; return None if no operation fuses it."""
    if len(factors) != 2:
        return None
    (gate, inputs), (other, same) = factors
    if not isinstance(gate, packed.PackedMatrix) or not isinstance(other, packed.PackedMatrix) or inputs is not same:
        return None
    if (gate.kind, gate.rows) != (other.kind, other.rows) or gate.rows % GROUP:
        return None
    recorder.keep_matrix(gate)
    recorder.keep_matrix(other)
    q = recorder.memory(gate.rows, np.int8)
    scales, sums = (recorder.memory(gate.rows // GROUP) for _ in range(2))
    arguments = packed.GatedArguments(
        rows_from=rows_from,
        gate=address_of(gate.data),
        other=address_of(other.data),
        tile_bytes=gate.tile_bytes,
        outputs=gate.rows,
        length=gate.length,
        **inputs.arguments,
        ahead=bytes_ahead(),
        q=address_of(q),
        q_scales=address_of(scales),
        q_sums=address_of(sums),
    )
    recorder.add(operation("packed_linear.cpu_gated:make_gated", gate.kind, prologue, recorder.isa), arguments)
    return Inputs({"x": address_of(q), "scales": address_of(scales), "sums": address_of(sums)}, (q, scales, sums))


def read_rows(recorder: Recorder, matrix: Matrix, *, token_ids: int, out: int, out_stride: int) -> None:
    """Record a lookup of embedding rows; see `embedding_arguments`."""
    assert matrix.input_form in (Groups(), *FLOAT_FORMS, RowForm.I8), "columns of the table are reordered"
    recorder.keep_matrix(matrix)
    arguments = embedding_arguments(matrix, token_ids=token_ids, out=out, out_stride=out_stride)
    recorder.add(operation(matrix.embedding, matrix.kind), arguments)  # tables without `embedding` were decoded at load
