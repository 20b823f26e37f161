"""Operations: compiled functions that a plan calls by address, each compiled once per machine and kept on disk.

An operation is `op(row, thread, threads)`. `row` is its row of the plan, int64 numbers: [0] its own address, [1] flags
and the row's length in bytes (shifted by 8), [2] the address of the step's numbers (`StepNumber`), from [3] on its
arguments: addresses and sizes. Every thread of the team calls it with its own number and does its share; it never
waits.

**Arguments** are declared once for each operation, as a named tuple whose fields are `int`, or `float` for a float32.
The one who records makes the tuple, `plan_row` writes it down, and the operation reads it by `read`: for the compiler
a field is the number at its place.
"""

from __future__ import annotations

import enum
import logging
import platform
import struct
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, get_type_hints

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I32, I64, Isa
from candle_vllm.core.kernels.cpu_runtime.kernel_cache import compile_kept

logger = logging.getLogger(__name__)
T = TypeVar("T")

SIGNATURE = types.void(types.CPointer(types.int64), types.int64, types.int64)
NUMBERS = 2  # where a row has the address of the step's numbers
FIRST_ARGUMENT = 3
BARRIER = 1  # flag: every thread waits for the others behind this operation
IS_X86 = int(platform.machine().lower() in ("x86_64", "amd64", "i686"))


class StepNumber(enum.IntEnum):
    """Where a step's own numbers stand in the array that every operation can read."""

    TOKENS = 0  # T
    SEQUENCES = 1  # R
    LOGIT_ROWS = 2  # rows whose logits are wanted
    PAIRS = 3  # of tokens and experts, in the mixture that runs; written by the plan itself
    COUNT = 8


def host_isa() -> Isa:
    """The instructions of this CPU that the kernels can use."""
    features = llvmlite.binding.get_host_cpu_features()
    isa = Isa.GENERIC
    if features.get("avx512vnni") and features.get("avx512bw"):
        isa |= Isa.VNNI
    if features.get("avx512bf16"):
        isa |= Isa.BF16
    return isa


def compile_operation(function: Callable[..., None]) -> int:
    """Compiles `function(arguments, thread, threads)`, or takes it from the cache; returns its address.

    The address is valid for the life of the process. `function` may close over integers only.
    """
    # Numba has an index of variants for each name, which two processes must not write at once: one could get the
    # other's variant. With its constants in its name every variant has an index of its own.
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        assert isinstance(cell.cell_contents, int)
        function.__qualname__ += f".{name}{int(cell.cell_contents)}"
    compiled = compile_kept(
        lambda cached: cfunc(SIGNATURE, cache=cached, error_model="numpy", fastmath=False)(function)
    )
    _keep(compiled)
    assert compiled.address is not None
    return compiled.address


@cache
def _floats(declared: type[tuple[Any, ...]]) -> list[bool]:
    """Of each field, whether it is a float."""
    hints = get_type_hints(declared)
    assert set(hints.values()) <= {int, float}
    return [hints[name] is float for name in getattr(declared, "_fields")]  # noqa: B009 - a named tuple's


def plan_row(operation: int, numbers: int, arguments: tuple[Any, ...], *, barrier: bool = False) -> list[int]:
    """A row of a plan.

    Args:
        operation: its address.
        numbers: address of the step's numbers.
        arguments: the operation's named tuple.
        barrier: whether all threads wait for each other behind it.
    """
    kinds = _floats(type(arguments))
    given = [_float_bits(value) if float_ else int(value) for value, float_ in zip(arguments, kinds, strict=True)]
    return [operation, int(barrier) | (FIRST_ARGUMENT + len(given)) * 8 << 8, numbers, *given]


def slot(declared: type[tuple[Any, ...]], name: str) -> int:
    """Where a field stands in a row, for what changes a row."""
    return FIRST_ARGUMENT + getattr(declared, "_fields").index(name)  # noqa: B009 - as above


@intrinsic
def read(_: Any, declared: Any, row: Any) -> Any:
    """The arguments of a row, as the named tuple that declares them; in compiled code."""
    kinds = [types.float32 if float_ else types.int64 for float_ in _floats(declared.instance_class)]
    found: Any = types.BaseTuple.from_types(kinds, declared.instance_class)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        values = [b.load(b.gep(args[1], [ir.Constant(I64, FIRST_ARGUMENT + at)])) for at in range(len(kinds))]
        values = [b.bitcast(b.trunc(x, I32), F32) if k is types.float32 else x for x, k in zip(values, kinds)]
        return context.make_tuple(b, found, values)

    return found(declared, row), code


@intrinsic
def step_number(_: Any, row: Any, which: Any) -> Any:
    """One of the step's numbers; in compiled code."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        numbers = b.inttoptr(b.load(b.gep(args[0], [ir.Constant(I64, NUMBERS)])), I64.as_pointer())
        return b.load(b.gep(numbers, [args[1]]))

    return types.int64(row, types.int64), code


def address_of(array: np.ndarray) -> int:
    """Where an array's data begins."""
    return array.ctypes.data


def _float_bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


@cache
def _kept() -> list[Any]:
    return []


def _keep(compiled: Any) -> None:
    """Holds compiled code for the life of the process: plans know it only by address."""
    _kept().append(compiled)
