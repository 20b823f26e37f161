# SPDX-License-Identifier: MIT
"""Intrinsics that several kernels and the thread team need: memory by address, atomics, waiting, rows of a plan."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I32, I64, Emitter
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


@intrinsic
def float_from_bits(_: Any, bits: Any) -> Any:
    """Return the float32 whose bits are the low half of an int64."""
    signature = types.float32(types.int64)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.bitcast(b.trunc(args[0], I32), F32)

    return signature, code


@intrinsic
def load_acquire(_: Any, address: Any) -> Any:
    """Read an int64 that another thread writes."""
    signature = types.int64(types.int64)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.load_atomic(b.inttoptr(args[0], I64.as_pointer()), "seq_cst", 8)

    return signature, code


@intrinsic
def store_release(_: Any, address: Any, value: Any) -> Any:
    """Write an int64 that another thread reads; a thread that reads it also sees all earlier writes."""
    signature = types.void(types.int64, types.int64)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        b.store_atomic(args[1], b.inttoptr(args[0], I64.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return signature, code


@intrinsic
def fetch_add(_: Any, address: Any, value: Any) -> Any:
    """Add to an int64 and return its old value."""
    signature = types.int64(types.int64, types.int64)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return signature, code


@intrinsic
def exchange(_: Any, address: Any, value: Any) -> Any:
    """Write an int64 and return its old value."""
    signature = types.int64(types.int64, types.int64)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.atomic_rmw("xchg", b.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return signature, code


@intrinsic
def compare_exchange(_: Any, address: Any, expected: Any, value: Any) -> Any:
    """Write an int64 if its value is `expected`; return whether it was written."""
    signature = types.boolean(types.int64, types.int64, types.int64)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        pointer = b.inttoptr(args[0], I64.as_pointer())
        return b.extract_value(b.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return signature, code


@intrinsic(prefer_literal=True)
def cpu_relax(_: Any, x86: Any) -> Any:
    """Pause briefly, which gives the core to its other hyper-thread, if x86 is 1; do nothing if it is 0."""
    signature = types.void(x86)
    on_x86 = bool(x86.literal_value)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        if on_x86:
            Emitter(b).call("llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return signature, code


@intrinsic
def call_system(_: Any, function: Any, subject: Any, number: Any) -> Any:
    """Call a C function by its address: function(subject, number, 0); the function may have fewer parameters.

    In the calling conventions of x86-64 and ARM (System V and Windows), these arguments are passed in registers; a
    function with fewer or narrower parameters ignores the rest.
    """
    signature = types.void(types.int64, types.int64, types.int64)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(I32, [I64, I64, I64])
        b.call(b.inttoptr(args[0], kind.as_pointer()), [args[1], args[2], ir.Constant(I64, 0)])
        return context.get_dummy_value()

    return signature, code


@intrinsic
def call_operation(_: Any, function: Any, arguments: Any, thread: Any, threads: Any) -> Any:
    """Call a compiled operation by its address: function(address of its row, thread, threads)."""
    signature = types.void(types.int64, types.int64, types.int64, types.int64)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return signature, code


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


@intrinsic
def step_number(_: Any, row: Any, which: Any) -> Any:
    """Read one of the step's numbers (`StepNumber`), by the address of a row."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        start = b.inttoptr(args[0], I64.as_pointer())
        numbers = b.inttoptr(b.load(b.gep(start, [ir.Constant(I64, NUMBERS)])), I64.as_pointer())
        return b.load(b.gep(numbers, [args[1]]))

    return types.int64(types.int64, types.int64), code
