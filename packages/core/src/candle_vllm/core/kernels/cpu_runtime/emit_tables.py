# SPDX-License-Identifier: MIT
"""Tables of constants in vector code: of 16 bytes, read by shuffles, or by selections on CPUs without shuffles; of 256
bytes or more, read by shuffles with VBMI; and of 32-bit words, gathered from memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir

from candle_vllm.core.kernels.cpu_runtime.emit import I8, I32, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa

_BYTES = 4 * LANES


def look_up(e: Emitter, numbers: Sequence[int], words: Any, isa: Isa, lanes: int = LANES) -> Any:
    """Replace each byte of the lanes, an index from 0 to 15, by that entry of `numbers`.

    Args:
        numbers: sixteen entries, 0 to 255.
        words: the bytes, as <16 x i32> or <1 x i32>.
        lanes: 16 or 1.
    """
    assert len(numbers) == 16
    if lanes == 1:
        return _one_by_one(e, numbers, words)
    if isa.wide:
        count, name = 1, "llvm.x86.avx512.pshuf.b.512"
    elif isa & (Isa.AVX2 | Isa.AVX_VNNI):
        count, name = 2, "llvm.x86.avx2.pshuf.b"
    elif isa & Isa.NEON:
        count, name = 4, "llvm.aarch64.neon.tbl1.v16i8"
    else:
        return _by_selection(e, numbers, words)
    table, kind = _row(numbers, _BYTES // count), vector(I8, _BYTES // count)
    found = [e.call(name, kind, [table, part]) for part in e.parts(words, count, I8)]
    return e.whole([e.b.bitcast(part, vector(I32, LANES // count)) for part in found])


def look_up_bytes(e: Emitter, tables: np.ndarray, places: Any, more: Sequence[Any]) -> list[Any]:
    """Return the bytes of each table at 64 indices, by shuffles of whole registers; needs VBMI.

    Args:
        tables: uint8 [number, entries]; the number of entries is 256 times 2 to the power of the number of `more`.
        places: lowest eight bits of the indices, <64 x i8>.
        more: higher bits of the indices, from the ninth on, each <64 x i1>.

    Returns:
        <64 x i8> for each table.
    """
    name, kind = "llvm.x86.avx512.vpermi2var.qi.512", vector(I8, 64)
    upper = [e.b.icmp_signed("<", places, e.zeros(I8, 64)), *more]
    assert tables.shape[1] == 128 << len(upper)
    found = []
    for table in tables:
        at = table_address(e, table)
        rows = [e.load(at, kind, start) for start in range(0, len(table), 64)]
        left = [e.call(name, kind, [low, places, high]) for low, high in zip(rows[::2], rows[1::2])]
        for bit in upper:
            left = [e.b.select(bit, high, low) for low, high in zip(left[::2], left[1::2])]
        found.append(left[0])
    return found


def table_address(e: Emitter, table: np.ndarray) -> Any:
    """Return the address of a constant array of uint8, uint16 or uint32 in the code's read-only memory."""
    data = np.ascontiguousarray(table)
    name = f"table.{hashlib.sha256(data.tobytes()).hexdigest()[:16]}.{data.dtype}"
    found = e.b.module.globals.get(name)
    if found is None:
        element = ir.IntType(8 * data.itemsize)
        kind = ir.ArrayType(element, data.size)
        found = ir.GlobalVariable(e.b.module, kind, name)
        found.linkage, found.global_constant, found.align = "internal", True, 64
        found.initializer = ir.Constant(kind, [ir.Constant(element, int(value)) for value in data.reshape(-1)])
    return e.b.ptrtoint(found, ir.IntType(64))


def gather(e: Emitter, table: np.ndarray, places: Any, isa: Isa) -> Any:
    """Gather the uint32 entries of a table at `places`, <16 x i32>, all within the table."""
    at = table_address(e, table)
    if not (isa.wide or isa & Isa.AVX2):
        found = e.zeros(I32)
        for lane in range(LANES):
            place = e.b.extract_element(places, ir.Constant(I32, lane))
            where = e.b.add(at, e.b.zext(e.b.shl(place, ir.Constant(I32, 2)), ir.IntType(64)))
            found = e.b.insert_element(found, e.load(where, I32), ir.Constant(I32, lane))
        return found
    pointer = e.b.inttoptr(at, I8.as_pointer())
    if isa.wide:
        every = e.constant(ir.IntType(1), 1)
        given = [e.zeros(I32), pointer, places, every, ir.Constant(I32, 4)]
        return e.call("llvm.x86.avx512.mask.gather.dpi.512", vector(I32), given)
    kind, every, by_four = vector(I32, LANES // 2), e.constant(I32, -1, LANES // 2), ir.Constant(I8, 4)
    given = [[e.zeros(I32, LANES // 2), pointer, half, every, by_four] for half in e.parts(places, 2)]
    return e.whole([e.call("llvm.x86.avx2.gather.d.d.256", kind, each) for each in given])


def _row(numbers: Sequence[int], count: int) -> ir.Constant:
    """Repeat the numbers to a vector of `count` bytes."""
    return ir.Constant(vector(I8, count), [ir.Constant(I8, number) for number in list(numbers) * (count // 16)])


def _by_selection(e: Emitter, numbers: Sequence[int], words: Any) -> Any:
    """Look up by four selections; each uses one bit of the indices and halves the number of candidates."""
    places = e.b.bitcast(words, vector(I8, _BYTES))
    left: list[Any] = [e.constant(I8, number, _BYTES) for number in numbers]
    for bit in range(4):
        one = e.b.and_(places, e.constant(I8, 1 << bit, _BYTES))
        is_set = e.b.icmp_unsigned("!=", one, e.zeros(I8, _BYTES))
        left = [e.b.select(is_set, high, low) for low, high in zip(left[::2], left[1::2])]
    return e.b.bitcast(left[0], vector(I32))


def _one_by_one(e: Emitter, numbers: Sequence[int], words: Any) -> Any:
    table, word = table_address(e, np.array(numbers, np.uint8)), e.b.extract_element(words, ir.Constant(I32, 0))
    found = []
    for index in range(4):
        place = e.b.and_(e.b.lshr(word, ir.Constant(I32, 8 * index)), ir.Constant(I32, 15))
        value = e.load(e.b.add(table, e.b.zext(place, ir.IntType(64))), I8)
        found.append(e.b.shl(e.b.zext(value, I32), ir.Constant(I32, 8 * index)))
    return e.b.insert_element(words, reduce(e.b.or_, found), ir.Constant(I32, 0))
