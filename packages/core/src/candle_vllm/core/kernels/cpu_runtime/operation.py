# SPDX-License-Identifier: MIT
"""Operations: compiled functions that a plan calls by address. They are precompiled, cached, or compiled when needed.

An operation is a function `op(row, thread, threads)`. `row` is the address of the operation's **plan row**, int64
numbers: [0] the operation's address; [1] flags and the row's length in bytes (shifted by 8); [2] the address of the
step's numbers (`StepNumber`); from [3] on the arguments: addresses and sizes. A call computes the share of one thread
of a team; another thread may make the call (`walk.py`). So an operation may wait for others only for a bounded time.

**Arguments** are declared once for each operation, as a named tuple with fields of type `int`, or `float` for a
float32. The recorder creates the tuple, `plan_row` writes it to the row, and the operation reads it by
`primitives.read`.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from threading import Thread
from typing import Any, ClassVar, NamedTuple, TypeAlias, get_type_hints
from weakref import WeakKeyDictionary

import numpy as np

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime.kernel_cache import (
    WANTED,
    compiled_address,
    is_first_start,
    is_missing,
    kept_name,
    kernel_cache,
    note_asked,
)
from candle_vllm.core.kernels.cpu_runtime.level import Level, best_level, bytes_ahead, choose_level, host_level

NUMBERS = 2  # index in a plan row: the address of the step's numbers
FIRST_ARGUMENT = 3
BARRIER = 1  # flag: every thread waits for the others after this operation
RUNS_BYTES = 4096
"""Size of a thread's list of memory to prefetch, see `tiles.py`."""
IS_X86 = int(platform.machine().lower() in ("x86_64", "amd64", "i686"))


class StepNumber(enum.IntEnum):
    """Index of each number of a step in the array of the step's numbers, which every operation can read."""

    TOKENS = 0  # T: tokens of the step
    SEQUENCES = 1  # R: sequences of the step
    LOGIT_ROWS = 2  # number of tokens whose logits are wanted
    PAIRS = 3  # pairs of tokens and experts in the current mixture of experts; written by the plan itself
    ADAPTERS = 4  # number of groups of rows, one for each adapter (`kernels/lora`)
    LOGIT_ADAPTERS = 5  # number of groups of the tokens whose logits are wanted
    COUNT = 6  # length of the array


def operation(code: str, *constants: int) -> int:
    """Return the address of an operation, from the cache or compiled; it is valid for the life of the process.

    Args:
        code: the Python function: "folder.module:name", below `kernels`. The module is imported only for compilation.
        constants: arguments with which `code` returns the operation; without constants, `code` is the operation.

    Raises:
        ConfigError: the operation must be compiled, and Numba is not installed.
    """
    asked = _ASKED.get()
    if asked is None:
        return _address(code, *map(int, constants))
    asked.append((code, *map(int, constants)))
    return 0


@cache
def _address(code: str, *constants: int) -> int:
    return compiled_address(*named_function(code, *constants))


LEVELS_IN_USE = WeakKeyDictionary[object, Level]()
"""The level at which each recorder was created; the recorder may later request operations with its instructions."""


def use_level(name: str | None) -> None:
    """Compile operations for the named level from now on, in this process; None is the highest level of this CPU.

    Raises:
        ConfigError: this CPU lacks instructions of the level, or the level lacks some that a recorder may request.
    """
    before = host_level()
    choose_level(name)
    if host_level() != before:  # recorded plans contain the addresses of the old code
        used = next((level for level in LEVELS_IN_USE.values() if level.isa & ~host_level().isa), None)
        if used is not None:
            choose_level(before.name)
            raise ConfigError(
                f"cpu_level={name!r} is below {used.name!r}, the level of another engine in this process: close that "
                "engine first, or give both engines the same cpu_level",
                "cpu_level",
            )
        _address.cache_clear()
        kernel_cache.cache_clear()


_Named: TypeAlias = tuple[Any, ...]  # code and constants of an operation
_ASKED: ContextVar[list[_Named] | None] = ContextVar("_ASKED", default=None)


def compile_first(ask: Callable[[], object], later: Sequence[str] = ()) -> None:
    """Compile missing operations, if there are several, in two processes at a first start; see `is_first_start`.

    The processes start at opposite ends of the list, so at most one operation is compiled twice. The second process is
    optional: it may not start, or fail. At later starts it compiles operations of `later` that are still missing.

    Args:
        ask: function that requests the operations; within it, `operation` returns 0.
        later: operations that no caller waits for: the second process compiles them last. See `is_coming`.
    """
    if getattr(sys, "frozen", False) or not sys.executable:  # a frozen application, or one that embeds Python
        return
    missing = _ask_missing(ask) if is_first_start() else []
    if len(missing) < 2:
        left = [named for named in later if not is_coming(named)]  # only one second process, even if many models load
        left = [named for named in left if is_missing(named.replace(":", ".").replace(",", "."))]
        if left and (helper := _second_process(left)) is not None:
            _leave_alone(helper, left)
        return
    helper = _second_process([*(",".join(map(str, named)) for named in reversed(missing)), *later])
    token = WANTED.set(tuple(kept_name(named_function(*named)[0], host_level()) for named in missing))
    try:
        for named in missing:
            _address(*named)
    except BaseException:
        if helper is not None:
            helper.kill()
            helper.communicate()
        raise
    finally:
        WANTED.reset(token)
    if helper is not None:
        _leave_alone(helper, later)


def _ask_missing(ask: Callable[[], object]) -> list[_Named]:
    """Call `ask`; return the operations that it requests and that must be compiled."""
    token = _ASKED.set(asked := list[_Named]())
    try:
        ask()
    finally:
        _ASKED.reset(token)
    names = {named: named_function(*named)[0] for named in asked}
    note_asked(names.values())
    return [named for named, name in names.items() if is_missing(name)]


def _second_process(names: Sequence[str]) -> subprocess.Popen[bytes] | None:
    program = [sys.executable, "-P", "-m", "candle_vllm.core.kernels.cpu_runtime.travelling"]
    program += [] if host_level() == best_level() else ["--level", host_level().name]
    program += ["--keep", *names]
    quiet = subprocess.DEVNULL
    with suppress(OSError):
        # The second process exits when its standard input closes, so it ends with this process in every case.
        return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
    return None


def _leave_alone(helper: subprocess.Popen[bytes], later: Sequence[str]) -> None:
    if sys.platform != "win32":
        with suppress(OSError):  # the process may have ended already
            os.setpriority(os.PRIO_PROCESS, helper.pid, 10)
    _COMING.update(dict.fromkeys(later, helper))
    Thread(target=_await_end, args=(helper,), name="candle-vllm-compiling", daemon=True).start()


def _await_end(helper: subprocess.Popen[bytes]) -> None:
    helper.wait()
    if helper.stdin is not None:
        helper.stdin.close()


_COMING: dict[str, subprocess.Popen[bytes]] = {}


def is_coming(code: str) -> bool:
    """Whether a second process of `compile_first` that compiles this operation of `later` is still running."""
    return code in _COMING and _COMING[code].poll() is None


def named_function(code: str, *constants: int) -> tuple[str, Callable[[], Callable[..., None]]]:
    """Return the name of an operation in the cache, and a function that creates the operation's Python function."""
    numbers = [int(constant) for constant in constants]

    def make() -> Callable[..., None]:
        module, _, name = code.partition(":")
        named = getattr(importlib.import_module(f"candle_vllm.core.kernels.{module}"), name)
        return named(*numbers) if numbers else named

    return ".".join([code.replace(":", "."), *map(str, numbers)]), make


@cache
def c_function(code: str, arguments: int, *constants: int) -> Callable[..., None]:
    """Return a compiled function of `arguments` int64 arguments for calls from Python; it releases the GIL."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(operation(code, *constants))


@cache
def field_kinds(declared: type[tuple[Any, ...]]) -> list[bool]:
    """Return for each field whether it is a float."""
    hints = get_type_hints(declared)
    assert set(hints.values()) <= {int, float}
    return [hints[name] is float for name in getattr(declared, "_fields")]  # noqa: B009 - a named tuple's


def plan_row(
    operation: int, numbers: int, arguments: tuple[Any, ...], *, barrier: bool = False, inner: Sequence[int] = ()
) -> list[int]:
    """Return a row of a plan.

    Args:
        operation: address of the operation.
        numbers: address of the step's numbers.
        arguments: the operation's named tuple of arguments.
        barrier: whether all threads wait for each other after the operation.
        inner: the plan row of a nested operation, which the operation calls.
    """
    kinds = field_kinds(type(arguments))
    given = [float_bits(value) if float_ else int(value) for value, float_ in zip(arguments, kinds, strict=True)]
    return [operation, int(barrier) | (FIRST_ARGUMENT + len(given) + len(inner)) * 8 << 8, numbers, *given, *inner]


def slot(declared: type[tuple[Any, ...]], name: str) -> int:
    """Return the index of a field in a plan row, for code that changes rows."""
    return FIRST_ARGUMENT + getattr(declared, "_fields").index(name)  # noqa: B009 - as above


def address_of(array: np.ndarray) -> int:
    """Return the address of an array's data."""
    return array.ctypes.data


def float_bits(value: float) -> int:
    """Return the bits of a float32, as a signed integer."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


# ---- products of all weight formats ----------------------------------------------------------------------------------


ROWS = 16
"""Rows of a tile of weights: 32-bit lanes of a vector."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix [N, K] whose rows are interleaved, 16 in a tile; each weight format has a subclass in its `layout.py`.

    Attributes:
        linear, embedding: names of the operations that multiply and, in some formats, read rows, see `operation`.
        rows, columns: N and K.
        kind: the layout, a number that selects the compiled operations.
        data: uint8 [tiles, bytes of a tile], contiguous, aligned to 64 bytes.
    """

    linear: ClassVar[str]
    embedding: ClassVar[str]
    rows: int
    columns: int
    kind: Any
    data: np.ndarray

    @property
    def input_form(self) -> Any:
        """The format of the input that the matrix multiplies, an `InputForm`."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Length of a tile along K, in units of the weight format."""
        raise NotImplementedError

    @property
    def span(self) -> int:
        """See `LinearArguments`."""
        return 0

    @property
    def tile_bytes(self) -> int:
        """Bytes from one tile to the next."""
        return self.data.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.data.nbytes


class LinearArguments(NamedTuple):
    """Arguments of a linear operation; T rows of activations.

    Attributes:
        rows_from: the `StepNumber` that is T.
        weights, tile_bytes: address of the tiles, and bytes from one tile to the next.
        outputs: N.
        length: length of a tile along K, in units of the weight format.
        out, row_bytes: address of the first written column of the result, and the result's row stride in bytes.
        bias: address of float32 [N], or 0.
        accumulate: whether to add to the result instead of overwriting it.
        picked: address of int64 row numbers of the activations; 0 for rows 0, 1, 2, ...
        x: address of the activations, in the input form of the weight format.
        x_bytes: row stride of activations that are not in `Groups`: a multiple of 64, with zeros after K.
        scales, sums: addresses of scales and sums of activations in `Groups`.
        span: for small floats (`scaled_linear`): loop iterations for the columns that share a scale; otherwise 0.
        ahead: prefetch distance of quantised weights, in bytes.
        beside: address of the threads' lists of other memory to prefetch meanwhile (`tiles.py`), `RUNS_BYTES` apart; or
            0. Only products of quantised weights use it.
    """

    rows_from: int
    weights: int
    tile_bytes: int
    outputs: int
    length: int
    out: int
    row_bytes: int
    bias: int
    accumulate: int
    picked: int
    x: int
    x_bytes: int
    scales: int
    sums: int
    span: int
    ahead: int
    beside: int = 0


def linear_arguments(
    matrix: Matrix,
    *,
    x: int,
    x_bytes: int = 0,
    scales: int = 0,
    sums: int = 0,
    out: int,
    out_stride: int,
    column: int = 0,
    bias: int = 0,
    accumulate: bool = False,
    picked: int = 0,
    rows_from: StepNumber = StepNumber.TOKENS,
) -> LinearArguments:
    """Return the arguments for a matrix; the caller keeps all memory alive. For other parameters see `LinearArguments`.

    Args:
        out, column: address of the result, and its first column that is written.
        out_stride: floats from one row of the result to the next.
    """
    assert out_stride >= column + matrix.rows
    return LinearArguments(
        rows_from=rows_from,
        weights=address_of(matrix.data),
        tile_bytes=matrix.tile_bytes,
        outputs=matrix.rows,
        length=matrix.length,
        out=out + 4 * column,
        row_bytes=4 * out_stride,
        bias=bias,
        accumulate=accumulate,
        picked=picked,
        x=x,
        x_bytes=x_bytes,
        scales=scales,
        sums=sums,
        span=matrix.span,
        ahead=bytes_ahead(),
    )


class EmbeddingArguments(NamedTuple):
    """Arguments of an operation that reads rows of an embedding table [V, E].

    Attributes:
        rows_from: the `StepNumber` that is T.
        weights, tile_bytes: address of the tiles, and bytes from one tile to the next.
        rows, columns: V and E.
        token_ids: address of int64 [T]; the row of an id that is not within 0 .. V - 1 becomes NaN.
        out, row_bytes: address of the result, float32 [T, E], and its row stride in bytes.
    """

    rows_from: int
    weights: int
    tile_bytes: int
    rows: int
    columns: int
    token_ids: int
    out: int
    row_bytes: int


def embedding_arguments(
    matrix: Matrix, *, token_ids: int, out: int, out_stride: int, rows_from: StepNumber = StepNumber.TOKENS
) -> EmbeddingArguments:
    """Return the arguments for a table; `out_stride` is in floats."""
    assert out_stride >= matrix.columns
    weights = address_of(matrix.data)
    return EmbeddingArguments(
        rows_from, weights, matrix.tile_bytes, matrix.rows, matrix.columns, token_ids, out, 4 * out_stride
    )
