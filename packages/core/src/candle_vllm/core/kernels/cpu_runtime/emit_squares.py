# SPDX-License-Identifier: MIT
"""AMX tile registers in vector code: each has up to 16 rows of up to 64 bytes, a **square**; products are 16 x 16 sums.

An operation configures the registers by `shape_squares` before it uses them, and calls `end_squares` afterwards. Linux
must have granted AMX (`level.host_flags`). Source: Intel's Architecture Instruction Set Extensions, chapter 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from candle_vllm.core.kernels.cpu_runtime.emit import I8, Emitter, emitted, vector


def square_call(e: Emitter, name: str, *arguments: Any) -> None:
    """Call one of LLVM's AMX intrinsics; integer arguments are register numbers."""
    given = [ir.Constant(I8, each) if isinstance(each, int) else each for each in arguments]
    e.call(f"llvm.x86.{name}", ir.VoidType(), given)


def load_square(e: Emitter, register: int, address: Any, stride: Any) -> None:
    """Load a register's rows, which are `stride` bytes apart in memory."""
    square_call(e, "tileloadd64", register, e.b.inttoptr(address, I8.as_pointer()), stride)


def store_square(e: Emitter, register: int, address: Any, stride: int) -> None:
    square_call(e, "tilestored64", register, e.b.inttoptr(address, I8.as_pointer()), e.int64(stride))


def shape_squares(e: Emitter, memory: Any, shapes: Sequence[tuple[int, int]]) -> None:
    """Configure the registers from 0 on by 64 bytes at `memory`: `shapes` has (rows, bytes of a row) of each."""
    table = bytearray(64)
    table[0] = 1  # the palette
    for register, (lines, width) in enumerate(shapes):
        table[16 + 2 * register], table[48 + register] = width, lines
    e.store(memory, ir.Constant(vector(I8, 64), list(table)))
    square_call(e, "ldtilecfg", e.b.inttoptr(memory, I8.as_pointer()))


@emitted
def end_squares(e: Emitter) -> None:
    """Release the registers, so that the system need not save their contents for the thread."""
    square_call(e, "tilerelease")
