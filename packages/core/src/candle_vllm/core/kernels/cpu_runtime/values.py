# SPDX-License-Identifier: MIT
"""Record a step on the CPU: the layers run once on values of this module, and each kernel appends rows to a plan.

Nothing is computed while recording. **Fusion** is decided when a value is used: a norm, a gate or an activation is
computed together with the conversion to the input form of the matrices that read it (`matrices.py`). A **pending**
value is a result, such as a product, whose operations are not recorded yet. In a sum, a pending value or a norm is
added directly to the memory of the other value; a norm to which a value is added is computed first.

A value stores the version of its buffer. The use of a value after its buffer was overwritten is an error in the model's
code and raises at once; changes of some columns, and operations in place such as norms of heads, can go unnoticed.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.activation_quant import Groups, Prologue
from candle_vllm.core.kernels.activation_rows import InputForm
from candle_vllm.core.kernels.attention.cpu_record import FusedHeads, Scores, record_attention
from candle_vllm.core.kernels.cpu_runtime.matrices import (
    InputRows,
    Inputs,
    gate_products,
    linear_call,
    make_forms,
    read_rows,
)
from candle_vllm.core.kernels.cpu_runtime.operation import Matrix, StepNumber, address_of, operation
from candle_vllm.core.kernels.cpu_runtime.recorder import Adapted, Buffer, Recorder, aligned, row_stride
from candle_vllm.core.kernels.embedding import AddArguments
from candle_vllm.core.kernels.lora.cpu_record import INPUT_FORM, Joining, record_experts
from candle_vllm.core.kernels.moe.arguments import is_gated
from candle_vllm.core.kernels.moe.plan import PROLOGUES, Pairs, Results, record_products, record_route, record_sum
from candle_vllm.core.kernels.position_scale import PositionScaleArguments
from candle_vllm.core.kernels.recorded import Floats, Gates, LookUp, Recorded, RecordedRows, RecordedTokens
from candle_vllm.core.kernels.rms_norm import HeadNormArguments, NormOntoArguments, norm_rows
from candle_vllm.core.kernels.scale_cap import ScaleCapArguments, scale_cap_arguments, scale_cap_operation
from candle_vllm.core.kernels.short_conv import ShortConvArguments, state_shape
from candle_vllm.core.kernels.side_by_side import CopyArguments
from candle_vllm.core.kernels.silu_mul import GATES, GatedRowsArguments, gated_rows_operation
from candle_vllm.core.kernels.stream_mix import MixArguments, WeightArguments

if TYPE_CHECKING:
    from candle_vllm.core.kernels.activation import Activation
    from candle_vllm.core.kernels.attention.rows import PagedCache
    from candle_vllm.core.kernels.delta_rule.layout import DeltaGates
    from candle_vllm.core.kernels.latent_attention.layout import LatentParts
    from candle_vllm.core.kernels.lora import Place
    from candle_vllm.core.kernels.moe.arguments import Activation as ExpertActivation
    from candle_vllm.core.kernels.moe.arguments import Routing
    from candle_vllm.core.kernels.recorded import ExpertWeights, GateKind
    from candle_vllm.core.kernels.states import StateCache


def step_tokens(recorder: Recorder, numbers: NDArray[np.int64] | None = None) -> RecordedTokens:
    """Return the first value of a recording: the step's token ids, or other `numbers`, one for each token."""
    return _Tokens(recorder, recorder.arrays.token_ids if numbers is None else numbers)


def buffer_of(value: Recorded) -> Buffer:
    """Return a value's buffer; records the computation of a pending value."""
    assert isinstance(value, _Value)
    assert (value.column, value.width) == (0, value.buffer.width)
    return value.buffer


def put_value(value: Recorded, target: Buffer) -> None:
    """Record the computation of a pending value into `target`."""
    assert isinstance(value, _Pending)
    value.emit(target, accumulate=False)


def buffer_value(recorder: Recorder, buffer: Buffer) -> Recorded:
    """Return a value of all columns of a buffer, which operations have written or which are filled before a step."""
    return _Value(recorder, buffer, 0, buffer.width)


class _Tokens(RecordedTokens):
    def __init__(self, recorder: Recorder, numbers: NDArray[np.int64]) -> None:
        self._recorder, self.numbers = recorder, numbers

    def embedding(self, matrix: Matrix, scale: float | None = None, place: Place | None = None) -> Recorded:
        return _TableRows(self._recorder, matrix, address_of(self.numbers), scale, place)

    def looked_up(self, rows: LookUp, width: int) -> Recorded:
        return _LookedUp(self._recorder, self._recorder.looked_up(rows, self.numbers, width))


class _Value(Recorded):
    """Columns of a buffer; heads if `head_dim` is set.

    Attributes:
        rows_from: the `StepNumber` that is the number of rows: TOKENS, or LOGIT_ROWS for only the wanted rows.
    """

    def __init__(
        self,
        recorder: Recorder,
        buffer: Buffer,
        column: int,
        width: int,
        head_dim: int | None = None,
        rows_from: StepNumber = StepNumber.TOKENS,
    ) -> None:
        self.recorder = recorder
        self._buffer = buffer
        self._version = buffer.version
        self.column = column
        self.width = width
        self.head_dim = head_dim
        self.rows_from = rows_from

    @property
    def buffer(self) -> Buffer:
        """Buffer of the value; raises if the buffer was overwritten."""
        assert self._buffer.version == self._version, "a recorded value was used after it was overwritten"
        return self._buffer

    @property
    def address(self) -> int:
        """Address of the first row."""
        return address_of(self.buffer.array) + 4 * self.column

    def split(self, sizes: Sequence[int], dim: int) -> list[Recorded]:
        assert dim == -1
        assert sum(sizes) == self.width
        ends = np.cumsum(sizes).tolist()
        return [self._part(end - size, size) for end, size in zip(ends, sizes)]

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Recorded:
        assert sizes[0] == -1
        if dim:
            return self._part(0, self.width, sizes[1])
        wide = Buffer(self.buffer.array, stride := sizes[1] * self.buffer.stride, stride)
        rows = _Value(self.recorder, wide, self.column, stride, self.buffer.stride, self.rows_from)
        return rows.first_of_heads(self.width).unflatten(-1, (-1, self.width))

    def flatten(self, start: int, end: int = -1) -> Recorded:
        if start:
            return self._part(0, self.width)
        assert end == 1
        made, heads = self.recorder.buffer(self.head_dim or 0), self.width // (self.head_dim or 1)
        for number in range(heads):
            part = self._part(number * made.width, made.width)
            part.put(Buffer(made.array, made.width, heads * made.stride), number * made.stride)
        return _Value(self.recorder, made, 0, made.width, rows_from=self.rows_from)

    def _part(self, first: int, width: int, head_dim: int | None = None) -> _Value:
        return _Value(self.recorder, self.buffer, self.column + first, width, head_dim, self.rows_from)

    def __add__(self, other: Recorded) -> Recorded:
        if not isinstance(other, (_Pending, _Prepared)):
            assert isinstance(other, _Value)
            assert other.rows_from is StepNumber.TOKENS
            other = _LookedUp(self.recorder, buffer_of(other))
        assert (self.column, self.width) == (0, self.buffer.width)
        target = self.buffer
        if self.rows_from is not other.rows_from:
            target = self._wanted_rows()
        if isinstance(other, _Pending):
            other.emit(target, accumulate=True)
        else:
            other.onto(target)
        target.version += 1
        return _Value(self.recorder, target, 0, self.width, rows_from=other.rows_from)

    def _wanted_rows(self) -> Buffer:
        """Record a copy of the wanted rows (of tokens whose logits are wanted)."""
        assert self.rows_from is StepNumber.TOKENS
        made = self.recorder.buffer(self.width)
        self.recorder.pick_rows((self.address, self.buffer.stride), self.width, (address_of(made.array), made.stride))
        return made

    def scaled(self, factor: float) -> Recorded:
        return self._changed(0, factor, 0.0)

    def clamped(self, low: float, high: float) -> Recorded:
        return self._changed(2, low, high)

    def _changed(self, kind: int, factor: float, cap: float) -> Recorded:
        buffer, counted, end = self.buffer, self.rows_from, self.column + self.width
        assert self.column % 16 == 0 == (end % 16 if end < buffer.width else 0), "whole lines of 16 floats change"
        row = scale_cap_arguments(
            x=self.address, stride=buffer.stride, columns=self.width, scale=factor, cap=None, rows_from=counted
        )
        self.recorder.add(scale_cap_operation(kind), row._replace(cap=cap))
        buffer.version += self.width == buffer.width  # if the value is only some columns, the others do not change
        return _Value(self.recorder, buffer, self.column, self.width, rows_from=counted)

    def beside(self, *others: Recorded) -> _Value:
        parts = [part for part in (self, *others) if isinstance(part, _Value)]
        assert len(parts) == len(others) + 1
        made, column = self.recorder.buffer(sum(part.width for part in parts)), 0
        narrow = any(part.rows_from is StepNumber.LOGIT_ROWS for part in parts)
        for part in parts:
            part.put(made, column, picked=narrow and part.rows_from is StepNumber.TOKENS)
            column += part.width
        return _Value(self.recorder, made, 0, made.width, rows_from=StepNumber.LOGIT_ROWS if narrow else self.rows_from)

    def narrowed(self) -> Recorded:
        assert not isinstance(self, _Wrapper)
        return _Value(self.recorder, self._wanted_rows(), 0, self.width, rows_from=StepNumber.LOGIT_ROWS)

    def put(self, target: Buffer, column: int, *, picked: bool = False) -> None:
        """Copy the value, or only its rows whose logits are wanted, to columns of `target` from `column` on."""
        at = address_of(target.array) + 4 * column
        source = self.buffer  # a pending value is computed before its copy
        if picked:
            self.recorder.pick_rows((self.address, source.stride), self.width, (at, target.stride))
            return
        row = CopyArguments(self.address, source.stride, self.width, at, target.stride, rows_from=self.rows_from)
        self.recorder.add(operation("side_by_side.cpu:copy"), row)

    def first_of_heads(self, size: int) -> Recorded:
        assert self.head_dim is not None
        heads, source = self.width // self.head_dim, self.buffer
        made = self.recorder.buffer(heads * size)
        place = (self.address, source.stride, size, address_of(made.array), made.stride)
        row = CopyArguments(*place, rows_from=self.rows_from, parts=heads, gap=self.head_dim)
        self.recorder.add(operation("side_by_side.cpu:copy"), row)
        return _Value(self.recorder, made, 0, made.width, rows_from=self.rows_from)

    def rms_norm(self, weight: Floats, eps: float) -> Recorded:
        if self.head_dim is None:
            return _Prepared(self, Prologue.NORM, self.width, weight, eps)
        return self._norm_heads(self.head_dim, weight, eps, layer=False)

    def layer_norm(self, weight: Floats, bias: Floats | None, eps: float) -> Recorded:
        if self.head_dim is None:
            both = np.concatenate([weight, np.zeros_like(weight) if bias is None else bias])
            return _Prepared(self, Prologue.LAYER_NORM, self.width, both, eps)
        assert bias is None
        return self._norm_heads(self.head_dim, weight, eps, layer=True)

    def _norm_heads(self, head_dim: int, weight: Floats, eps: float, *, layer: bool) -> Recorded:
        """Normalise heads in place, because no other value reads these columns."""
        arguments = HeadNormArguments(
            x=self.address,
            stride=self.buffer.stride,
            heads=self.width // head_dim,
            head_dim=head_dim,
            weight=self.recorder.keep(weight),
            eps=eps,
            weight_step=4 * head_dim if weight.ndim == 2 else 0,
            rows_from=self.rows_from,
        )
        self.recorder.add(operation("rms_norm.cpu:make_head_norm", layer), arguments)
        return self

    def rotary(self, cos: Floats, sin: Floats) -> Recorded:
        return _Rotated(self, cos, sin)

    def position_scale(self, table: Floats) -> Recorded:
        assert self.rows_from is StepNumber.TOKENS
        place, positions = (self.address, self.buffer.stride, self.width), address_of(self.recorder.arrays.positions)
        row = PositionScaleArguments(*place, positions, self.recorder.keep(table))
        self.recorder.add(operation("position_scale.cpu:position_scale"), row)
        return self

    def mixed(self, table: Floats | Recorded, gates: Recorded | None, scale: Floats | None, *, level: bool) -> Recorded:
        recorder, kept, table_stride = self.recorder, 0, 0
        if isinstance(table, _Value):
            assert gates is None
            assert table.head_dim is not None
            kinds, made, streams = 1, table.width // table.head_dim, table.head_dim
            narrow = self.rows_from is not table.rows_from
            kept, table_stride = _place(table.narrowed() if narrow else table)
        else:
            assert not isinstance(table, Recorded)
            kinds, made, streams = table.shape
            kept = recorder.keep(table)
        columns = self.width // streams
        assert columns % 16 == 0
        at_gates, gate_stride = _place(gates)
        assert not isinstance(gates, _Value) or gates.rows_from is self.rows_from
        out = recorder.buffer(made * columns)
        place, gating = (self.address, self.buffer.stride, streams, columns), (at_gates, gate_stride, kinds - 1)
        scaling = 0 if scale is None else recorder.keep(scale)
        to = address_of(out.array), out.stride, self.rows_from
        row = MixArguments(*place, kept, made, *gating, scaling, level, *to, table_stride)
        recorder.add(operation("stream_mix.cpu:mix"), row)
        return _Value(recorder, out, 0, out.width, rows_from=self.rows_from)

    def stream_weights(self, scale: Floats, base: Floats, streams: int, *, rounds: int, eps: float) -> Recorded:
        recorder, out = self.recorder, self.recorder.buffer(self.width)
        given = (self.address, self.buffer.stride, self.width, streams, recorder.keep(scale), recorder.keep(base))
        row = WeightArguments(*given, rounds, eps, address_of(out.array), out.stride, self.rows_from)
        recorder.add(operation("stream_mix.cpu:weigh"), row)
        return _Value(recorder, out, 0, out.width, rows_from=self.rows_from)

    def cut(self, deviations: float) -> None:
        row = ScaleCapArguments(self.address, self.buffer.stride, self.width, deviations, 0.0, self.rows_from)
        self.recorder.add(scale_cap_operation(3), row)

    def short_conv(
        self, weight: Floats, bias: Floats | None, cache: StateCache, *, silu: bool, gates: Gates
    ) -> Recorded:
        assert self.rows_from is StepNumber.TOKENS
        recorder, (channels, taps), out = self.recorder, weight.shape, self.recorder.buffer(self.width)
        assert channels == self.width
        assert cache.states.shape[1:] == state_shape(channels, taps)
        given = [gate for gate in gates or () if isinstance(gate, _Value)]
        assert all(gate.buffer is self.buffer and gate.width == channels for gate in given)
        gate_in, gate_out = (gate.address for gate in given) if given else (0, 0)
        row = ShortConvArguments(
            x=self.address,
            stride=self.buffer.stride,
            gate_in=gate_in,
            gate_out=gate_out,
            channels=channels,
            weight=recorder.keep(weight.T),
            bias=recorder.keep(np.zeros(channels, np.float32) if bias is None else bias),
            out=address_of(out.array),
            out_stride=out.stride,
            **recorder.state_arguments(cache),
        )
        recorder.add(operation("short_conv.cpu:make_short_conv", taps, silu, bool(given)), row)
        self.buffer.version += bool(given)
        return buffer_value(recorder, out)

    def delta_rule(
        self, *others: Recorded, gates: DeltaGates, cache: StateCache, scale: float, normed: bool
    ) -> Recorded:
        from candle_vllm.core.kernels.delta_rule.cpu_record import Rows, record_delta_rule

        assert self.rows_from is StepNumber.TOKENS
        given = [value for value in (self, *others) if isinstance(value, _Value)]
        parts = [Rows(value.address, value.buffer.stride, value.width, value.head_dim) for value in given]
        out = self.recorder.buffer(parts[2].width)
        result = Rows(address_of(out.array), out.stride, out.width, parts[2].head_dim)
        record_delta_rule(self.recorder, parts, result, gates, cache, scale=scale, normed=normed)
        for buffer in {id(value.buffer): value.buffer for value in given[:2]}.values():
            buffer.version += 1
        return _Value(self.recorder, out, 0, out.width, result.head_dim)

    def gate_mul(self, kind: GateKind) -> Recorded:
        return _Prepared(self, GATES[kind], self.width // 2)

    def gated(self, gate: Recorded, kind: GateKind) -> Recorded:
        assert isinstance(gate, _Value)
        assert self.width % gate.width == 0
        assert gate.rows_from is StepNumber.TOKENS
        source = self.buffer  # a pending value is computed before the gate
        return self._times(source, kind, gate.buffer.stride, gate.address, self.width // gate.width)

    def xielu(self, numbers: Floats) -> Recorded:
        return self._times(self.buffer, "xielu", 0, self.recorder.keep(numbers), 1)

    def _times(self, buffer: Buffer, kind: str, gate_stride: int, gate: int, span: int) -> Recorded:
        picked = 0 if self.rows_from is StepNumber.TOKENS else address_of(self.recorder.arrays.logit_rows)
        place = (self.address, buffer.stride, self.width, gate, gate_stride)
        row = GatedRowsArguments(*place, span, picked, self.rows_from)
        self.recorder.add(gated_rows_operation(kind, spread=span > 1), row)
        buffer.version += 1
        return _Value(self.recorder, buffer, self.column, self.width, rows_from=self.rows_from)

    def activation(self, kind: Activation) -> Recorded:
        return _Prepared(self, Prologue[kind.upper()], self.width)

    def linear(self, matrices: Sequence[Matrix], bias: Floats | None, place: Place | None = None) -> Recorded:
        return _Prepared(self, Prologue.NONE, self.width).linear(matrices, bias, place)

    def route(self, routing: Routing) -> Pairs:
        assert self.rows_from is StepNumber.TOKENS
        return record_route(self.recorder, (self.address, self.buffer.stride), self.width, routing)

    def weighted(self, pairs: Pairs) -> tuple[Recorded, Pairs]:
        assert pairs.top_k == 1
        made, recorder = self.beside(), self.recorder
        numbers, ones, table = recorder.row_numbers(1), np.ones(recorder.limits.tokens, np.float32), pairs.weights
        row = PositionScaleArguments(made.address, made.buffer.stride, made.width, *map(address_of, (numbers, table)))
        recorder.add(operation("position_scale.cpu:position_scale"), row)
        recorder.keep_array(ones)
        return made, dataclasses.replace(pairs, weights=ones)

    def expert_linear(self, weights: ExpertWeights, pairs: Pairs, activation: ExpertActivation | None) -> RecordedRows:
        return _Prepared(self, Prologue.NONE, self.width).expert_linear(weights, pairs, activation)

    def attend(self, k: Recorded | None, v: Recorded | None, cache: PagedCache, **scores: Any) -> Recorded:
        assert k is None or isinstance(k, _Value)
        assert v is None or isinstance(v, _Value)
        return _attend(self, k, v, cache, Scores(**scores), None)

    def attend_whole(
        self,
        heads: int,
        kv_heads: int,
        turned: tuple[RecordedTokens, Floats, Floats] | None,
        near: tuple[Floats | None, int | None],
    ) -> Recorded:
        from candle_vllm.core.kernels.whole_attention.cpu_record import WholeHeads, record_turn, record_whole_attention

        head_dim = self.width // (heads + 2 * kv_heads)
        out, source = self.recorder.buffer(heads * head_dim), self.buffer
        qkv = WholeHeads(self.address, source.stride, heads, kv_heads, head_dim)
        if turned is not None:
            record_turn(self.recorder, qkv, turned[0].numbers, turned[1:])
            source.version += 1
        record_whole_attention(self.recorder, qkv, *near, out)
        return buffer_value(self.recorder, out)

    def attend_latent(self, kv: Recorded, parts: LatentParts, cache: Any, *, scale: float) -> Recorded:
        from candle_vllm.core.kernels.latent_attention.cpu_record import Place, record_latent

        made = buffer_value(self.recorder, self.recorder.buffer(parts.sizes.heads * parts.sizes.value))
        q, k, out = (Place(*_place(value)) for value in (self, kv, made))
        record_latent(self.recorder, q, k, parts, cache, out, scale=scale)
        return made

    def choose_positions(self, key: Recorded, weights: Recorded, parts: LatentParts, cache: Any, top: int) -> Any:
        from candle_vllm.core.kernels.latent_attention.cpu_record import Place, record_choice

        assert isinstance(key, _Value)
        keys = self.recorder.buffer(key.width)
        key.put(keys, 0)
        q, k, w = (Place(*_place(value)) for value in (self, buffer_value(self.recorder, keys), weights))
        return record_choice(self.recorder, q, k, w, parts, cache, top)

    def wanted(self) -> Recorded:
        return _Prepared(self, Prologue.NONE, self.width).wanted()

    def logits(self, bias: Floats | None, scale: float, cap: float | None) -> Recorded:
        del bias, scale, cap
        raise AssertionError("`logits` needs the product of a matrix with the rows of `wanted()`")

    def rows(self, wanted: NDArray[np.int64]) -> Floats:
        whole = self.buffer.array.reshape(-1, self.buffer.stride)
        return whole[wanted, self.column : self.column + self.width]


class _Wrapper(_Value):
    """A value that is computed together with its consumer; `source` is its input."""

    def __init__(self, source: _Value, width: int) -> None:
        super().__init__(source.recorder, source.buffer, source.column, width, source.head_dim, source.rows_from)
        self.source = source


class _Prepared(_Wrapper):
    """Input of matrices: a value, unchanged or after a norm, gate or activation. Each input form is computed once."""

    def __init__(
        self,
        source: _Value,
        prologue: Prologue,
        columns: int,
        weight: Floats | None = None,
        eps: float = 0.0,
    ) -> None:
        assert not isinstance(source, _Prepared), "a norm's or activation's input must be computed: use `side_by_side`"
        super().__init__(source, columns)
        self._prologue, self._weight, self._eps = prologue, weight, eps
        self._forms: dict[InputForm, Inputs] = {}
        self._picked = 0

    def __add__(self, other: Recorded) -> Recorded:
        made = self.recorder.buffer(self.width)
        self.onto(made, accumulate=False)
        return _Value(self.recorder, made, 0, made.width, rows_from=self.rows_from) + other

    def _missing(self, forms: Iterable[InputForm]) -> list[InputForm]:
        return [form for form in dict.fromkeys(forms) if form not in self._forms]

    def _inputs(self, forms: Iterable[InputForm]) -> Mapping[InputForm, Inputs]:
        """Return the input by form; record the conversions to those of `forms` that are missing."""
        if new := self._missing(forms):
            self._forms |= make_forms(self.recorder, new, self._from())
        return self._forms

    def linear(self, matrices: Sequence[Matrix], bias: Floats | None, place: Place | None = None) -> Recorded:
        wanted, joins = [matrix.input_form for matrix in matrices], None
        if self.recorder.adapted and place is not None:
            joins = Joining(self.recorder, place, self.rows_from)
            joins.begin(barrier=not self._missing([*wanted, INPUT_FORM]))
        forms = self._inputs(wanted if joins is None else [*wanted, INPUT_FORM])
        factors = [(matrix, forms[matrix.input_form]) for matrix in matrices]
        if joins is not None:
            joins.inputs = forms[INPUT_FORM]
        return _Product(self.recorder, factors, bias, self.rows_from, joins)

    def expert_linear(self, weights: ExpertWeights, pairs: Pairs, activation: ExpertActivation | None) -> RecordedRows:
        wanted = [matrix.input_form for of_experts in weights.matrices for matrix in of_experts]
        joined = weights.place if self.recorder.adapted else None
        inputs = self._inputs(wanted if joined is None else [*wanted, INPUT_FORM])
        made = record_products(self.recorder, weights, inputs, pairs, pairs.token_of)
        if joined is not None:
            record_experts(self.recorder, joined, inputs[INPUT_FORM], pairs, made, by_place=False)
        return _PairRows(self.recorder, made, activation)

    def put(self, target: Buffer, column: int, *, picked: bool = False) -> None:
        assert not picked
        self.onto(target, accumulate=False, column=column)

    def onto(self, target: Buffer, *, accumulate: bool = True, column: int = 0) -> None:
        """Record that the norm is added to the columns of `target` from `column` on, or overwrites them."""
        assert self._prologue.norm, "only a norm can be added to a value; gates and activations cannot"
        assert self._weight is not None
        arguments = NormOntoArguments(
            x=self.source.address,
            stride=self.source.buffer.stride,
            columns=self.width,
            weight=self.recorder.keep(self._weight),
            eps=self._eps,
            target=address_of(target.array) + 4 * column,
            target_stride=target.stride,
            accumulate=accumulate,
            rows_from=self.rows_from,
        )
        self.recorder.add(operation("rms_norm.cpu:make_norm_onto", self._prologue is Prologue.LAYER_NORM), arguments)

    def wanted(self) -> Recorded:
        picked = _Prepared(self.source, self._prologue, self.width, self._weight, self._eps)
        if self.rows_from is StepNumber.TOKENS:
            picked._picked, picked.rows_from = address_of(self.recorder.arrays.logit_rows), StepNumber.LOGIT_ROWS
        return picked

    def rows(self, wanted: NDArray[np.int64]) -> Floats:
        assert self._prologue is Prologue.NONE or self._prologue.norm, "no model ends with an activation"
        found = self.source.rows(wanted)
        if self._weight is None:
            return found
        return norm_rows(found, self._weight, self._eps, layer=self._prologue is Prologue.LAYER_NORM)

    def _from(self) -> InputRows:
        return InputRows(
            x=self.source.address,
            stride=self.source.buffer.stride,
            columns=self.width,
            prologue=self._prologue,
            weight=0 if self._weight is None else self.recorder.keep(self._weight),
            eps=self._eps,
            picked=self._picked,
            rows_from=self.rows_from,
        )


class _Pending(_Value):
    """A pending value and the pending values added to it; computed into its own buffer or added to a residual."""

    def __init__(self, recorder: Recorder, width: int) -> None:
        super().__init__(recorder, Buffer(np.empty(0, np.float32), width, 0), 0, width)
        self._made = False
        self._added: list[_Pending] = []

    @property
    def buffer(self) -> Buffer:
        if not self._made:
            self._buffer = self.recorder.buffer(self.width)
            self._version = 0
            self.emit(self._buffer, accumulate=False)
        return super().buffer

    def __add__(self, other: Recorded) -> Recorded:
        if self._made or not isinstance(other, _Pending):
            return super().__add__(other)
        assert self.rows_from is other.rows_from
        self._added.append(other)
        return self

    def emit(self, target: Buffer, *, accumulate: bool) -> None:
        """Record the operations that compute the value into `target`."""
        assert not self._made
        assert target.width == self.width, "a result can only be added to one of its width"
        self._made = True
        self._record(target, accumulate)
        for other in self._added:
            other.emit(target, accumulate=True)

    @abstractmethod
    def _record(self, target: Buffer, accumulate: bool) -> None: ...


class _TableRows(_Pending):
    """Rows of a table, times `scale`; `numbers` is the address of the row numbers, one for each token."""

    def __init__(
        self, recorder: Recorder, matrix: Matrix, numbers: int, scale: float | None, place: Place | None
    ) -> None:
        super().__init__(recorder, matrix.columns)
        self._matrix, self._numbers, self._scale = matrix, numbers, scale
        self._joins = None if place is None or not recorder.adapted else Joining(recorder, place)

    def _record(self, target: Buffer, accumulate: bool) -> None:
        recorder, columns = self.recorder, self.width
        made = recorder.buffer(columns) if accumulate else target
        x, stride = address_of(made.array), made.stride
        if self._joins is None:
            read_rows(recorder, self._matrix, token_ids=self._numbers, out=x, out_stride=stride)
        else:
            self._joins.look_up(self._numbers)
            own = recorder.buffer(columns) if recorder.adapted is Adapted.APART else made
            read_rows(recorder, self._matrix, token_ids=self._numbers, out=address_of(own.array), out_stride=own.stride)
            self._joins.expand(made, own, (0, columns), numbers=self._numbers)
            if own is not made:
                self._joins.replace(made, own, numbers=self._numbers)
        if self._scale is not None:
            row = scale_cap_arguments(x=x, stride=stride, columns=columns, scale=self._scale, cap=None)
            recorder.add(scale_cap_operation(0), row)
        if accumulate:
            row = AddArguments(x, stride, columns, address_of(target.array), target.stride)
            recorder.add(operation("embedding.cpu:add"), row)


class _LookedUp(_Pending):
    """Rows that are already in their own buffer when a step begins."""

    def __init__(self, recorder: Recorder, given: Buffer) -> None:
        super().__init__(recorder, given.width)
        self._given = given

    def _record(self, target: Buffer, accumulate: bool) -> None:
        row = address_of(self._given.array), self._given.stride, self.width, address_of(target.array), target.stride
        code, arguments = (
            ("embedding.cpu:add", AddArguments) if accumulate else ("side_by_side.cpu:copy", CopyArguments)
        )
        self.recorder.add(operation(code), arguments(*row))


class _Product(_Pending):
    """Products of an input with several matrices, concatenated."""

    def __init__(
        self,
        recorder: Recorder,
        factors: list[tuple[Matrix, Inputs]],
        bias: Floats | None,
        rows_from: StepNumber = StepNumber.TOKENS,
        joins: Joining | None = None,
    ) -> None:
        super().__init__(recorder, sum(matrix.rows for matrix, _ in factors))
        self._factors, self._bias, self.rows_from, self._joins = factors, bias, rows_from, joins

    def logits(self, bias: Floats | None, scale: float, cap: float | None) -> Recorded:
        assert self.rows_from is StepNumber.LOGIT_ROWS
        assert bias is None or self._bias is None
        recorder, columns, stride = self.recorder, self.width, row_stride(self.width)
        if recorder.logits is None:
            made = aligned(recorder.limits.logit_rows * stride, np.float32)
            recorder.logits = made.reshape(-1, stride)[:, :columns]
        made = recorder.logits  # the logits of all plans share memory
        self._bias = self._bias if bias is None else bias
        self.emit(Buffer(made, columns, stride), accumulate=False)
        if scale != 1 or cap is not None:
            x, counted = address_of(made), self.rows_from
            row = scale_cap_arguments(x=x, stride=stride, columns=columns, scale=scale, cap=cap, rows_from=counted)
            recorder.add(scale_cap_operation(int(cap is not None)), row)
        return self

    def gate_mul(self, kind: GateKind) -> Recorded:
        alone = not (self._made or self._added) and self._bias is None and self._joins is None
        return _Gated(self, self._factors if alone else (), GATES[kind])

    def _record(self, target: Buffer, accumulate: bool) -> None:
        bias = 0 if self._bias is None else self.recorder.keep(self._bias)
        recorder, joins, column = self.recorder, self._joins, 0
        if joins is not None:
            joins.shrink()
        apart = joins is not None and recorder.adapted is Adapted.APART
        own = joins.own(self.width) if joins is not None and apart else target
        later = {"bias": bias, "accumulate": accumulate}  # for `expand` or `replace` if `own` has products alone
        for number, (matrix, inputs) in enumerate(self._factors, 1):
            product = linear_call(
                recorder,
                matrix,
                inputs,
                out=address_of(own.array),
                out_stride=own.stride,
                column=column,
                bias=0 if apart else bias and bias + 4 * column,
                accumulate=accumulate and not apart,
                rows_from=self.rows_from,
            )
            barrier = number == len(self._factors)
            if joins is None:
                recorder.add(*product, barrier=barrier)
            else:
                columns = column, matrix.rows
                joins.expand(target, own, columns, product, barrier=barrier, **(later if apart else {}))
            column += matrix.rows
        if joins is not None and apart and self.rows_from is StepNumber.LOGIT_ROWS:
            joins.replace(target, own, **later)


class _Gated(_Value):
    """act(gate) * up of a product whose columns are gate, then up; one operation may compute products and result."""

    def __init__(self, product: _Product, factors: Sequence[tuple[Matrix, Inputs]], prologue: Prologue) -> None:
        buffer = Buffer(np.empty(0, np.float32), product.width // 2, 0)
        super().__init__(product.recorder, buffer, 0, product.width // 2, rows_from=product.rows_from)
        self._product, self._factors, self._prologue = product, factors, prologue
        self._groups: Inputs | None = None
        self._prepared: _Prepared | None = None

    @property
    def buffer(self) -> Buffer:
        raise AssertionError("a gated product can only be the input of matrices; it has no buffer")

    def linear(self, matrices: Sequence[Matrix], bias: Floats | None, place: Place | None = None) -> Recorded:
        forms = {matrix.input_form for matrix in matrices}
        if self._prepared is None and forms == {Groups()} and (place is None or not self.recorder.adapted):
            if self._groups is None:
                self._groups = gate_products(self.recorder, self._factors, self._prologue, self.rows_from)
            if (groups := self._groups) is not None:
                return _Product(self.recorder, [(matrix, groups) for matrix in matrices], bias, self.rows_from)
        if self._prepared is None:
            self._prepared = _Prepared(self._product, self._prologue, self.width)
        return self._prepared.linear(matrices, bias, place)


class _PairRows(RecordedRows):
    """Results of experts' matrices, a row for each pair. With an activation, a row has gate and up products (up alone
    without a gate), and the activation is fused with the input conversion of the next matrices."""

    def __init__(self, recorder: Recorder, results: Results, activation: ExpertActivation | None) -> None:
        self._recorder, self._results = recorder, results
        self._activation: ExpertActivation | None = activation

    def expert_linear(self, weights: ExpertWeights, pairs: Pairs, activation: ExpertActivation | None) -> RecordedRows:
        assert self._activation is not None
        recorder, made = self._recorder, self._results
        source = InputRows(
            x=address_of(made.rows),
            stride=made.stride,
            columns=made.width // (2 if is_gated(self._activation) else 1),
            prologue=PROLOGUES[self._activation],
            rows_from=StepNumber.PAIRS,
        )
        forms = list(dict.fromkeys(matrix.input_form for of_experts in weights.matrices for matrix in of_experts))
        joined = weights.place if recorder.adapted else None
        if joined is not None and INPUT_FORM not in forms:
            forms.append(INPUT_FORM)
        inputs = make_forms(recorder, forms, source, copies=pairs.top_k)
        every = recorder.row_numbers(pairs.top_k)
        result = record_products(recorder, weights, inputs, pairs, every)
        if joined is not None:
            record_experts(recorder, joined, inputs[INPUT_FORM], pairs, result, by_place=True)
        return _PairRows(recorder, result, activation)

    def combine(self, shared: Recorded | None, gate: Recorded | None) -> Recorded:
        assert self._activation is None
        return _Mixture(self._recorder, self._results, shared, gate)


class _Mixture(_Pending):
    """Weighted sum of experts' results, and of the shared expert."""

    def __init__(self, recorder: Recorder, results: Results, shared: Recorded | None, gate: Recorded | None) -> None:
        super().__init__(recorder, results.width)
        self._results, self._shared, self._gate = results, shared, gate

    def _record(self, target: Buffer, accumulate: bool) -> None:
        places = [_place(value) for value in (self._shared, self._gate)]
        to = (address_of(target.array), target.stride)
        record_sum(self.recorder, self._results, to, accumulate=accumulate, shared=places[0], gate=places[1])


def _place(value: Recorded | None) -> tuple[int, int]:
    """Return address and stride of a value's rows; (0, 0) for None."""
    if value is None:
        return 0, 0
    assert isinstance(value, _Value)
    return value.address, value.buffer.stride


class _Rotated(_Wrapper):
    """Heads whose rotation is fused with the cache write or the attention that reads them."""

    def __init__(self, source: _Value, cos: Floats, sin: Floats) -> None:
        super().__init__(source, source.width)
        self.tables = (cos, sin)

    def rms_norm(self, weight: Floats, eps: float) -> Recorded:
        """Rotate the heads in place, because the norm must follow the rotation."""
        from candle_vllm.core.kernels.whole_attention.cpu_record import WholeHeads, record_turn

        dim, arrays = self.head_dim, self.recorder.arrays
        assert dim is not None
        heads = WholeHeads(self.address, self.buffer.stride, self.width // dim, 0, dim)
        record_turn(self.recorder, heads, arrays.positions, self.tables, arrays.turns)
        return self.source.rms_norm(weight, eps)

    def attend(self, k: Recorded | None, v: Recorded | None, cache: PagedCache, **scores: Any) -> Recorded:
        assert k is None or isinstance(k, _Rotated)
        assert v is None or isinstance(v, _Value)
        keys = None if k is None else k.source
        return _attend(self.source, keys, v, cache, Scores(**scores), self.tables)


def _attend(
    q: _Value,
    k: _Value | None,
    v: _Value | None,
    cache: PagedCache,
    scores: Scores,
    tables: tuple[Floats, Floats] | None,
) -> Recorded:
    recorder, dim = q.recorder, q.head_dim
    assert dim is not None
    written = [q] if k is None or v is None else [q, k, v]
    assert all(each.buffer is q.buffer for each in written)
    heads = FusedHeads(
        address=address_of(q.buffer.array),
        stride=q.buffer.stride,
        columns=tuple(each.column for each in written),
        heads=q.width // dim,
        head_dim=dim,
        rows_from=q.rows_from,
    )
    out = Buffer(recorder.memory(q.width), q.width, q.width)
    relative = _place(None if scores.relative is None else scores.relative[0])
    record_attention(recorder, heads, cache, scores, tables, address_of(out.array), relative)
    rows_from = StepNumber.LOGIT_ROWS if scores.narrows else q.rows_from
    return _Value(recorder, out, 0, q.width, dim, rows_from)
