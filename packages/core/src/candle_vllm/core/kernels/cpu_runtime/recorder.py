"""Recording a step on the CPU: the layers run once on values of this module, and each kernel adds rows to a plan.

Nothing is computed while recording. Three things are decided on the way:
- **Fusion.** A norm and a SiLU gate are not computed when they are met but together with the form in which matrices
  want their input (`matrices.py`); a matrix's result is added to the residual where it is made.
- **Memory.** Values live in float32 buffers of the largest step's size. A buffer whose value is no longer referred to
  is used again, because operations run in the order in which they were recorded.
- **Barriers.** Operations that only read what others read (q, k and v of one input) run without waiting in between.

A value remembers the state of its buffer; using it after the buffer was overwritten is an error of the model's code
and fails at once.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels.activation_quant import Prologue
from candle_vllm.core.kernels.attention.cpu import attend_operation, attend_row, merge_operation
from candle_vllm.core.kernels.attention.cpu_cache import stretch_step
from candle_vllm.core.kernels.attention.cpu_split import scratch_bytes
from candle_vllm.core.kernels.cpu_runtime.emit import Isa
from candle_vllm.core.kernels.cpu_runtime.matrices import (
    InputForm,
    Inputs,
    Source,
    input_form,
    make_inputs,
    multiply,
    read_rows,
)
from candle_vllm.core.kernels.cpu_runtime.operation import BARRIER, StepNumber, address_of
from candle_vllm.core.kernels.kv_write.cpu import rotate_and_write_operation, rotate_and_write_row
from candle_vllm.core.kernels.recorded import Recorded, RecordedTokens
from candle_vllm.core.kernels.rms_norm import reference as rms_norm_reference
from candle_vllm.core.kernels.rms_norm.cpu import head_norm_operation, head_norm_row

if TYPE_CHECKING:
    from candle_vllm.core.kernels.recorded import Matrix


@dataclasses.dataclass(frozen=True)
class StepLimits:
    """The largest step that a plan can run.

    Attributes:
        tokens, sequences: T and R.
        logit_rows: rows whose logits are made at once.
        table_width: blocks of the longest sequence.
        block_size: positions in a block.
        threads: of the team that runs it.
    """

    tokens: int
    sequences: int
    logit_rows: int
    table_width: int
    block_size: int
    threads: int


class StepArrays:
    """The numbers of a step, at fixed addresses; the runner fills them before each run."""

    def __init__(self, limits: StepLimits) -> None:
        self.numbers = np.zeros(StepNumber.COUNT, np.int64)
        self.token_ids, self.positions, self.slots = (np.zeros(limits.tokens, np.int64) for _ in range(3))
        self.query_start = np.zeros(limits.sequences + 1, np.int64)
        self.context_lens = np.zeros(limits.sequences, np.int64)
        self.block_tables = np.zeros((limits.sequences, limits.table_width), np.int64)
        self.logit_rows = np.zeros(limits.logit_rows, np.int64)


class Recorder:
    """Collects the rows of a plan and owns the memory behind it.

    Args:
        limits: the largest step.
        isa: instructions that the kernels may use.
    """

    def __init__(self, limits: StepLimits, isa: Isa) -> None:
        self.limits = limits
        self.isa = isa
        self.arrays = StepArrays(limits)
        self.plan: list[int] = []
        self.num_rows = 0
        self.logits: np.ndarray | None = None
        self._keep: list[object] = []  # what the plan knows by address only
        self._free: defaultdict[tuple[int, type], list[np.ndarray]] = defaultdict(list)
        self._scratch: np.ndarray | None = None

    def tokens(self) -> RecordedTokens:
        """The step's token ids, to begin the recording with."""
        return _Tokens(self)

    def add(self, operation: int, arguments: Sequence[int], *, barrier: bool = True) -> None:
        """Appends one operation."""
        length = (3 + len(arguments)) * 8
        flags = (BARRIER if barrier else 0) | length << 8
        self.plan += [operation, flags, address_of(self.arrays.numbers), *(int(number) for number in arguments)]
        self.num_rows += 1

    def keep(self, tensor: torch.Tensor) -> int:
        """Address of a tensor that must live as long as the plan."""
        tensor = tensor.contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def keep_matrix(self, matrix: Matrix) -> None:
        """The same for a matrix."""
        self._keep.append(matrix)

    def memory(self, width: int, dtype: type = np.float32) -> np.ndarray:
        """Rows [tokens, width] on a 64-byte boundary, used again once nothing refers to the returned array."""
        pool = self._free[width, dtype]
        base = pool.pop() if pool else self._allocate(self.limits.tokens * width, dtype)
        view = base[:]
        weakref.finalize(view, pool.append, base)
        return view

    def buffer(self, width: int) -> _Buffer:
        """Float32 rows [tokens, width], as `memory` gives them."""
        stride = row_stride(width)
        return _Buffer(self.memory(stride), width, stride)

    def scratch(self, size: int) -> int:
        """Address of at least `size` bytes that hold nothing from one operation pair to the next."""
        if self._scratch is None or self._scratch.nbytes < size:
            self._scratch = self._allocate(size, np.uint8)
        return address_of(self._scratch)

    def _allocate(self, count: int, dtype: type) -> np.ndarray:
        made = aligned(count, dtype)
        self._keep.append(made)
        return made


def aligned(count: int, dtype: type) -> np.ndarray:
    """Zeros at a multiple of 64 bytes; the system hands out the memory as it is first touched."""
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -address_of(raw) % 64
    return raw[start : start + size].view(dtype)


def row_stride(width: int) -> int:
    """Floats from one row to the next: whole cache lines, and an odd number of them.

    Kernels write the same columns of several rows. With rows a power of two apart, these all fall into the same few
    places of the processor's cache and drive each other out: a head of 49,152 tokens took 1.6 times as long.
    """
    return (-(-width // 16) | 1) * 16


@dataclasses.dataclass
class _Buffer:
    """Float32 rows [tokens, width], `stride` floats apart; `version` grows when a value in it is overwritten."""

    array: np.ndarray
    width: int
    stride: int
    version: int = 0


class _Tokens(RecordedTokens):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def embedding(self, matrix: Matrix) -> Recorded:
        recorder = self._recorder
        buffer = recorder.buffer(matrix.columns)
        ids = address_of(recorder.arrays.token_ids)
        read_rows(recorder, matrix, token_ids=ids, out=address_of(buffer.array), out_stride=buffer.stride)
        return _Value(recorder, buffer, 0, matrix.columns)


class _Value(Recorded):
    """Columns of a buffer; with `head_dim` they are heads."""

    def __init__(
        self, recorder: Recorder, buffer: _Buffer, column: int, width: int, head_dim: int | None = None
    ) -> None:
        self.recorder = recorder
        self._buffer = buffer
        self._version = buffer.version
        self.column = column
        self.width = width
        self.head_dim = head_dim

    @property
    def buffer(self) -> _Buffer:
        """The buffer, which must still hold this value."""
        assert self._buffer.version == self._version, "a recorded value was used after it was overwritten"
        return self._buffer

    @property
    def address(self) -> int:
        """Where the first row begins."""
        return address_of(self.buffer.array) + 4 * self.column

    def split(self, sizes: Sequence[int], dim: int) -> list[Recorded]:
        assert dim == -1
        assert sum(sizes) == self.width
        ends = np.cumsum(sizes).tolist()
        return [_Value(self.recorder, self.buffer, self.column + end - size, size) for end, size in zip(ends, sizes)]

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Recorded:
        assert dim == -1
        assert sizes[0] == -1
        return _Value(self.recorder, self.buffer, self.column, self.width, sizes[1])

    def flatten(self, start: int) -> Recorded:
        assert start == 1
        return _Value(self.recorder, self.buffer, self.column, self.width)

    def __add__(self, other: Recorded) -> Recorded:
        assert isinstance(other, _Product), "only a matrix's result can be added to a value"
        assert (self.column, self.width) == (0, self.buffer.width)
        other.emit(self.buffer, accumulate=True)
        self.buffer.version += 1
        return _Value(self.recorder, self._buffer, 0, self.width)

    def rms_norm(self, weight: torch.Tensor, eps: float) -> Recorded:
        if self.head_dim is None:
            return _Prepared(self, Prologue.NORM, self.width, weight, eps)
        arguments = head_norm_row(
            x=self.address,
            stride=self.buffer.stride,
            heads=self.width // self.head_dim,
            head_dim=self.head_dim,
            weight=self.recorder.keep(weight),
            eps=eps,
        )
        self.recorder.add(head_norm_operation(), arguments)  # in place: nothing else reads these columns
        return self

    def rotary(self, cos: torch.Tensor, sin: torch.Tensor) -> Recorded:
        return _Rotated(self, cos, sin)

    def silu_mul(self) -> Recorded:
        return _Prepared(self, Prologue.SILU, self.width // 2)

    def linear(self, matrices: Sequence[Matrix], bias: torch.Tensor | None) -> Recorded:
        return _Prepared(self, Prologue.NONE, self.width).linear(matrices, bias)

    def attend(
        self,
        k: Recorded,
        v: Recorded,
        key_cache: Any,
        value_cache: Any,
        *,
        scale: float,
        window: int | None,
    ) -> Recorded:
        assert isinstance(k, _Value)
        assert isinstance(v, _Value)
        return _attend(self, k, v, key_cache, value_cache, scale, window, None)

    def logits(self, matrix: Matrix) -> Recorded:
        return _Prepared(self, Prologue.NONE, self.width).logits(matrix)

    def rows(self, wanted: NDArray[np.int64]) -> torch.Tensor:
        whole = self.buffer.array.reshape(-1, self.buffer.stride)
        return torch.from_numpy(whole[wanted, self.column : self.column + self.width])


class _Wrapper(_Value):
    """A value that is computed together with what uses it; `source` is what it is computed from."""

    def __init__(self, source: _Value, width: int) -> None:
        super().__init__(source.recorder, source.buffer, source.column, width, source.head_dim)
        self.source = source


class _Prepared(_Wrapper):
    """The input of matrices: norm or gate, and each form that one of them wants, made once when first wanted."""

    def __init__(
        self,
        source: _Value,
        prologue: Prologue,
        columns: int,
        weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        super().__init__(source, columns)
        self._prologue, self._weight, self._eps = prologue, weight, eps
        self._forms: dict[InputForm, Inputs] = {}

    def linear(self, matrices: Sequence[Matrix], bias: torch.Tensor | None) -> Recorded:
        new = [form for form in dict.fromkeys(map(input_form, matrices)) if form not in self._forms]
        for form in new:
            self._forms[form] = make_inputs(self.recorder, form, self._from(), barrier=form is new[-1])
        return _Product(self.recorder, [(matrix, self._forms[input_form(matrix)]) for matrix in matrices], bias)

    def logits(self, matrix: Matrix) -> Recorded:
        recorder = self.recorder
        stride = row_stride(matrix.rows)
        recorder.logits = aligned(recorder.limits.logit_rows * stride, np.float32).reshape(-1, stride)[:, : matrix.rows]
        picked = self._from(address_of(recorder.arrays.logit_rows), StepNumber.LOGIT_ROWS)
        multiply(
            recorder,
            matrix,
            make_inputs(recorder, input_form(matrix), picked),
            out=address_of(recorder.logits),
            out_stride=stride,
            rows_from=StepNumber.LOGIT_ROWS,
        )
        return self

    def rows(self, wanted: NDArray[np.int64]) -> torch.Tensor:
        assert self._prologue is not Prologue.SILU, "no model ends with a gate"
        found = self.source.rows(wanted)
        return found if self._weight is None else rms_norm_reference.rms_norm(found, self._weight, self._eps)

    def _from(self, picked: int = 0, rows_from: StepNumber = StepNumber.TOKENS) -> Source:
        return Source(
            x=self.source.address,
            stride=self.source.buffer.stride,
            columns=self.width,
            prologue=self._prologue,
            weight=0 if self._weight is None else self.recorder.keep(self._weight),
            eps=self._eps,
            picked=picked,
            rows_from=rows_from,
        )


class _Product(_Value):
    """The result of matrices side by side, not yet made: it goes to a buffer of its own, or onto a residual."""

    def __init__(self, recorder: Recorder, factors: list[tuple[Matrix, Inputs]], bias: torch.Tensor | None) -> None:
        width = sum(matrix.rows for matrix, _ in factors)
        super().__init__(recorder, _Buffer(np.empty(0, np.float32), width, 0), 0, width)
        self._factors, self._bias = factors, bias
        self._made = False

    @property
    def buffer(self) -> _Buffer:
        if not self._made:
            self._buffer = self.recorder.buffer(self.width)
            self._version = 0
            self.emit(self._buffer, accumulate=False)
        return super().buffer

    def emit(self, target: _Buffer, *, accumulate: bool) -> None:
        """Writes the operations that put the result into `target`."""
        assert not self._made
        self._made = True
        bias = 0 if self._bias is None else self.recorder.keep(self._bias)
        column = 0
        for number, (matrix, inputs) in enumerate(self._factors, 1):
            multiply(
                self.recorder,
                matrix,
                inputs,
                out=address_of(target.array),
                out_stride=target.stride,
                column=column,
                bias=bias and bias + 4 * column,
                accumulate=accumulate,
                barrier=number == len(self._factors),
            )
            column += matrix.rows


class _Rotated(_Wrapper):
    """Heads that are rotated by position when they are written or attend."""

    def __init__(self, source: _Value, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__(source, source.width)
        self.tables = (cos, sin)

    def attend(
        self,
        k: Recorded,
        v: Recorded,
        key_cache: Any,
        value_cache: Any,
        *,
        scale: float,
        window: int | None,
    ) -> Recorded:
        assert isinstance(k, _Rotated)
        assert isinstance(v, _Value)
        return _attend(self.source, k.source, v, key_cache, value_cache, scale, window, self.tables)


def _attend(
    q: _Value,
    k: _Value,
    v: _Value,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    scale: float,
    window: int | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
) -> Recorded:
    """Rotates q and k, writes k and v to the cache, attends, and merges what was attended in parts."""
    recorder, arrays, limits = q.recorder, q.recorder.arrays, q.recorder.limits
    assert q.head_dim is not None
    assert q.buffer is k.buffer is v.buffer
    heads, kv_heads, dim = q.width // q.head_dim, k.width // q.head_dim, q.head_dim
    queries = recorder.memory(q.width, np.int16)
    cos, sin = (recorder.keep(table) for table in tables) if tables else (0, 0)
    written = rotate_and_write_row(
        qkv=address_of(q.buffer.array),
        stride=q.buffer.stride,
        q_column=q.column,
        k_column=k.column,
        v_column=v.column,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        block_size=limits.block_size,
        stretch_step=stretch_step(key_cache.strides, dim),
        rotary_dim=2 * tables[0].shape[1] if tables else 0,
        cos=cos,
        sin=sin,
        positions=address_of(arrays.positions),
        slots=address_of(arrays.slots),
        q=address_of(queries),
        key_cache=address_of(key_cache),
        value_cache=address_of(value_cache),
        scale=scale * math.log2(math.e),
    )
    recorder.add(rotate_and_write_operation(recorder.isa), written)
    size = scratch_bytes(
        max_tokens=limits.tokens,
        max_seqs=limits.sequences,
        heads=heads,
        head_dim=dim,
        max_context=limits.table_width * limits.block_size,
        threads=limits.threads,
    )
    out = _Buffer(recorder.memory(q.width), q.width, q.width)
    attended = attend_row(
        q=address_of(queries),
        out=address_of(out.array),
        key_cache=address_of(key_cache),
        value_cache=address_of(value_cache),
        query_start=address_of(arrays.query_start),
        context_lens=address_of(arrays.context_lens),
        block_tables=address_of(arrays.block_tables),
        table_stride=limits.table_width,
        stretch_step=stretch_step(key_cache.strides, dim),
        block_size=limits.block_size,
        heads=heads,
        kv_heads=kv_heads,
        scratch=recorder.scratch(size),
        scratch_size=size,
        window=window or 0,
    )
    recorder.add(attend_operation(dim, recorder.isa), attended)
    recorder.add(merge_operation(dim, recorder.isa), attended)
    return _Value(recorder, out, 0, q.width, dim)
