# SPDX-License-Identifier: MIT
"""Intrinsics that several kernels and the thread team need: memory by address, atomics, waiting, rows of a plan."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I32, I64, Bool, Emitter, Float, Int, emitted
from candle_vllm.core.kernels.cpu_runtime.operation import FIRST_ARGUMENT, NUMBERS, field_kinds


def pointers(kind: Any, what: str) -> Any:
    """Return an intrinsic that converts addresses to pointers to an element type."""

    def at(_: Any, address: Any) -> Any:
        def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
            return b.inttoptr(args[0], context.get_value_type(sig.return_type))

        return types.CPointer(kind)(types.int64), code

    at.__doc__ = f"An address as a pointer to {what}, for indexing or `carray`."
    return intrinsic(at)


float32_at = pointers(types.float32, "float32")
float64_at = pointers(types.float64, "float64")
uint8_at = pointers(types.uint8, "uint8")
int32_at = pointers(types.int32, "int32")
int64_at = pointers(types.int64, "int64")


@emitted
def float_from_bits(e: Emitter, bits: Int) -> Float:
    """Return the float32 whose bits are the low half of an int64."""
    return e.b.bitcast(e.b.trunc(bits, I32), F32)


@emitted
def load_acquire(e: Emitter, address: Int) -> Int:
    """Read an int64 that another thread writes."""
    return e.b.load_atomic(e.b.inttoptr(address, I64.as_pointer()), "seq_cst", 8)


@emitted
def store_release(e: Emitter, address: Int, value: Int) -> None:
    """Write an int64 that another thread reads; a thread that reads it also sees all earlier writes."""
    e.b.store_atomic(value, e.b.inttoptr(address, I64.as_pointer()), "seq_cst", 8)


@emitted
def fetch_add(e: Emitter, address: Int, value: Int) -> Int:
    """Add to an int64 and return its old value."""
    return e.b.atomic_rmw("add", e.b.inttoptr(address, I64.as_pointer()), value, "seq_cst")


@emitted
def exchange(e: Emitter, address: Int, value: Int) -> Int:
    """Write an int64 and return its old value."""
    return e.b.atomic_rmw("xchg", e.b.inttoptr(address, I64.as_pointer()), value, "seq_cst")


@emitted
def compare_exchange(e: Emitter, address: Int, expected: Int, value: Int) -> Bool:
    """Write an int64 if its value is `expected`; return whether it was written."""
    pointer = e.b.inttoptr(address, I64.as_pointer())
    return e.b.extract_value(e.b.cmpxchg(pointer, expected, value, "seq_cst", "seq_cst"), 1)


@emitted
def cpu_relax(e: Emitter, x86: bool) -> None:
    """Pause briefly, which gives the core to its other hyper-thread, if x86 is 1; do nothing if it is 0."""
    if x86:
        e.call("llvm.x86.sse2.pause", ir.VoidType(), [])


@emitted
def call_system(e: Emitter, function: Int, subject: Int, number: Int) -> None:
    """Call a C function by its address: function(subject, number, 0); the function may have fewer parameters.

    In the calling conventions of x86-64 and ARM (System V and Windows), these arguments are passed in registers; a
    function with fewer or narrower parameters ignores the rest.
    """
    kind = ir.FunctionType(I32, [I64, I64, I64])
    e.b.call(e.b.inttoptr(function, kind.as_pointer()), [subject, number, ir.Constant(I64, 0)])


@emitted
def call_operation(e: Emitter, function: Int, arguments: Int, thread: Int, threads: Int) -> None:
    """Call a compiled operation by its address: function(address of its row, thread, threads)."""
    kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
    e.b.call(e.b.inttoptr(function, kind.as_pointer()), [arguments, thread, threads])


# ---- rows of a plan --------------------------------------------------------------------------------------------------


@intrinsic
def read(_: Any, declared: Any, row: Any) -> Any:
    """Read the arguments of the row at an address, as the named tuple that declares them."""
    kinds = [types.float32 if float_ else types.int64 for float_ in field_kinds(declared.instance_class)]
    found: Any = types.BaseTuple.from_types(kinds, declared.instance_class)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        start = b.inttoptr(args[1], I64.as_pointer())
        values = [b.load(b.gep(start, [ir.Constant(I64, FIRST_ARGUMENT + at)])) for at in range(len(kinds))]
        values = [b.bitcast(b.trunc(x, I32), F32) if k is types.float32 else x for x, k in zip(values, kinds)]
        return context.make_tuple(b, found, values)

    return found(declared, row), code


@njit(inline="always")
def rank_of(table: int, thread: int, threads: int) -> tuple[int, int, int]:
    """Return the address of a counter of the thread's rank, the rank's first thread, and the first thread after it.

    Args:
        table: address of the number of threads, followed by a line of 64 bytes for each thread; 0 for a single rank. If
            another number of threads runs the operation, they are a single rank too. A single rank has no counter: 0.
    """
    if table == 0 or int64_at(table)[0] != threads:
        return 0, 0, threads
    line = int64_at(table + 64 * (1 + thread))
    return line[0], line[1], line[2]


@njit(inline="always")
def inner_row(row: int, arguments: int) -> int:
    """Return the address of the row nested in `row` after `arguments` arguments; 0 without a nested row."""
    size = 8 * (FIRST_ARGUMENT + arguments)
    return row + size if int64_at(row)[1] >> 8 > size else 0


@emitted
def step_number(e: Emitter, row: Int, which: Int) -> Int:
    """Read one of the step's numbers (`StepNumber`), by the address of a row."""
    b = e.b
    start = b.inttoptr(row, I64.as_pointer())
    numbers = b.inttoptr(b.load(b.gep(start, [ir.Constant(I64, NUMBERS)])), I64.as_pointer())
    return b.load(b.gep(numbers, [which]))
