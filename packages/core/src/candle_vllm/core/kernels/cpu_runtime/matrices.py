"""What depends on how a matrix is stored while a step is recorded: the form of its input, and its operations.

Packed matrices read 8-bit groups, plain ones rows of bfloat16 or float32. Matrices of all kinds may stand side by side
in one product; each form of their common input is made once.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from candle_vllm.core.kernels.activation_quant import GROUP, Prologue
from candle_vllm.core.kernels.activation_quant.cpu import quantise_operation, quantise_row
from candle_vllm.core.kernels.activation_rows import RowForm, row_elements
from candle_vllm.core.kernels.activation_rows.cpu import rows_operation, rows_row
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of
from candle_vllm.core.kernels.packed_linear import cpu as packed
from candle_vllm.core.kernels.packed_linear.layout import PackedMatrix
from candle_vllm.core.kernels.plain_linear import cpu as plain
from candle_vllm.core.kernels.plain_linear.layout import PlainKind

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder
    from candle_vllm.core.kernels.recorded import Matrix


class InputForm(enum.Enum):
    """How a matrix reads its input."""

    GROUPS = "8-bit groups of 32"
    BF16 = "rows of bfloat16"
    F32 = "rows of float32"


def input_form(matrix: Matrix) -> InputForm:
    """The form that a matrix reads."""
    if isinstance(matrix, PackedMatrix):
        return InputForm.GROUPS
    return InputForm.BF16 if matrix.kind is PlainKind.BF16 else InputForm.F32


@dataclasses.dataclass(frozen=True)
class Source:
    """What an input is made from.

    Attributes:
        x, stride: address of float32 rows, and floats from one to the next.
        columns: K, behind the prologue.
        prologue: what is computed on the way.
        weight, eps: of a norm; the weight's address.
        picked, rows_from: which rows: addresses as in `quantise_row`.
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
    """An input in one form: the arguments by which operations find it, and the memory behind them."""

    arguments: Mapping[str, int]
    arrays: tuple[np.ndarray, ...]


def make_inputs(recorder: Recorder, form: InputForm, source: Source, *, barrier: bool = True) -> Inputs:
    """Records the making of an input."""
    common = dataclasses.asdict(source)
    prologue, columns = common.pop("prologue"), source.columns
    if form is InputForm.GROUPS:
        q = recorder.memory(columns, np.int8)
        scales, sums = recorder.memory(columns // GROUP), recorder.memory(columns // GROUP)
        at_q, at_scales, at_sums = address_of(q), address_of(scales), address_of(sums)
        arguments = quantise_row(**common, q=at_q, scales=at_scales, sums=at_sums)
        recorder.add(quantise_operation(prologue), arguments, barrier=barrier)
        return Inputs({"xq": at_q, "xs": at_scales, "xsum": at_sums}, (q, scales, sums))
    wanted = RowForm[form.name]
    out = recorder.memory(row_elements(columns), np.int16 if wanted is RowForm.BF16 else np.float32)
    recorder.add(rows_operation(prologue, wanted), rows_row(**common, out=address_of(out)), barrier=barrier)
    return Inputs({"x": address_of(out), "x_bytes": wanted.bytes * row_elements(columns)}, (out,))


def multiply(
    recorder: Recorder,
    matrix: Matrix,
    inputs: Inputs,
    *,
    out: int,
    out_stride: int,
    column: int = 0,
    bias: int = 0,
    accumulate: bool = False,
    rows_from: StepNumber = StepNumber.TOKENS,
    barrier: bool = True,
) -> None:
    """Records a matrix times an input of its form; see `linear_row` of both kinds for the arguments."""
    recorder.keep_matrix(matrix)
    place = {"out": out, "out_stride": out_stride, "column": column, "bias": bias}
    how = {"accumulate": accumulate, "rows_from": rows_from}
    if isinstance(matrix, PackedMatrix):
        operation = packed.linear_operation(matrix.kind, recorder.isa)
        arguments = packed.linear_row(matrix, **inputs.arguments, **place, **how)
    else:
        operation = plain.linear_operation(matrix.kind, recorder.isa)
        arguments = plain.linear_row(matrix, **inputs.arguments, **place, **how)
    recorder.add(operation, arguments, barrier=barrier)


def read_rows(recorder: Recorder, matrix: Matrix, *, token_ids: int, out: int, out_stride: int) -> None:
    """Records the reading of a table's rows; see `embedding_row` of both kinds for the arguments."""
    recorder.keep_matrix(matrix)
    if isinstance(matrix, PackedMatrix):
        operation = packed.embedding_rows_operation(matrix.kind)
        arguments = packed.embedding_row(matrix, token_ids=token_ids, out=out, out_stride=out_stride)
    else:
        operation = plain.embedding_rows_operation(matrix.kind)
        arguments = plain.embedding_row(matrix, token_ids=token_ids, out=out, out_stride=out_stride)
    recorder.add(operation, arguments)
