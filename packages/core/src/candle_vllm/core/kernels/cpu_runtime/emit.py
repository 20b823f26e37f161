# SPDX-License-Identifier: MIT
"""Vector code for the CPU kernels, emitted as LLVM IR (`emitted`).

Vectors are 16 lanes of 32 bits (512 bits). For a CPU with shorter registers LLVM splits the same code. Dot products,
table look-ups (`emit_tables.py`) and AMX (`emit_squares.py`) use an instruction set's own instructions if `Isa` has
them, on parts of a vector if its registers are shorter. Integer results are equal bit for bit in all instruction sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Annotated, Any, get_type_hints

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
# The types of `emitted` functions' values: while code is emitted, all of them are LLVM values.
Int = Annotated[Any, types.int64]
Float = Annotated[Any, types.float32]
Double = Annotated[Any, types.float64]
Bool = Annotated[Any, types.boolean]
SHIFTER = 12582912.0
"""1.5 * 2^23: a float that is added to it is rounded to an integer, which is in the low bits of the sum."""

# 2^r = 1 + r * (...) on [-0.5, 0.5], relative error below 2e-7 with fp32 arithmetic
_EXP2 = (1.3264746e-3, 9.6715130e-3, 5.5507336e-2, 2.4022242e-1, 6.9314700e-1)


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite's IR layer does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()


def _bits(element: ir.Type) -> int:
    return element.width if isinstance(element, ir.IntType) else 32 if element == F32 else 16


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


class Emitter:
    """LLVM IR builder with the vector operations of the kernels.

    Addresses are 64-bit integers; loads and stores need no alignment.
    """

    def __init__(self, builder: Any) -> None:
        self.b = builder

    # ---- constants, memory -------------------------------------------------------------------------------------------

    def int64(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def zeros(self, element: ir.Type, lanes: int = LANES) -> Any:
        return ir.Constant(vector(element, lanes), None)

    def constant(self, element: ir.Type, value: float, lanes: int = LANES) -> Any:
        """Return a vector whose lanes are all the same constant."""
        return ir.Constant(vector(element, lanes), [ir.Constant(element, value)] * lanes)

    def load(self, address: Any, kind: ir.Type, offset: int = 0) -> Any:
        """Read a value of `kind` at address + offset (bytes)."""
        at = self.b.add(address, self.int64(offset)) if offset else address
        value = self.b.load(self.b.inttoptr(at, kind.as_pointer()), typ=kind)
        value.align = 1
        return value

    def store(self, address: Any, value: Any, offset: int = 0) -> None:
        """Write a value at address + offset (bytes)."""
        at = self.b.add(address, self.int64(offset)) if offset else address
        instruction = self.b.store(value, self.b.inttoptr(at, value.type.as_pointer()))
        instruction.align = 1

    def made_here(self, value: Any, isa: Isa) -> Any:
        """Return the vector, marked so that LLVM computes it before later marked vectors.

        LLVM schedules a long block as if it had more registers than exist, and then spills values to the stack.
        """
        size, register = (128, "w") if isa & Isa.NEON else (512 if isa.wide else 256, "x")
        found = []
        for part in self.parts(value, max(value.type.count * _bits(value.type.element) // size, 1)):
            kind = ir.FunctionType(part.type, [part.type])
            found.append(self.b.asm(kind, "", f"={register},0", [part], side_effect=True))
        return self.whole(found)

    def store_masked(self, address: Any, value: Any, mask: Any) -> None:
        """Write the lanes of a vector for which `mask`, <lanes x i1>, is set; other memory stays unchanged."""
        at = self.b.inttoptr(address, value.type.as_pointer())
        element, lanes = str(value.type.element), value.type.count
        name = f"llvm.masked.store.v{lanes}{element}.p0"
        self.call(name, ir.VoidType(), [value, at, ir.Constant(I32, 1), mask])

    def prefetch(self, address: Any, offset: int = 0, *, near: int = 3) -> None:
        """Prefetch the cache line at address + offset for reading; the address may be beyond the end of the memory.

        near: 3 loads the line into all cache levels, 2 into all but the first.
        """
        at = self.b.add(address, self.int64(offset)) if offset else address
        how = [ir.Constant(I32, number) for number in (0, near, 1)]  # a read, of data
        self.call("llvm.prefetch.p0", ir.VoidType(), [self.b.inttoptr(at, I8.as_pointer()), *how])

    def splat(self, value: Any, lanes: int = LANES) -> Any:
        """Return a vector with a scalar in every lane."""
        empty = ir.Constant(vector(value.type, lanes), ir.Undefined)
        first = self.b.insert_element(empty, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, empty, ir.Constant(vector(I32, lanes), [0] * lanes))

    def pick(self, order: Sequence[int], x: Any, y: Any = None) -> Any:
        """Return a vector of lanes by their indices in x, or in x followed by y."""
        return self.b.shuffle_vector(x, x if y is None else y, ir.Constant(vector(I32, len(order)), list(order)))

    def parts(self, value: Any, count: int, element: ir.Type | None = None) -> list[Any]:
        """Split a vector into `count` equal parts, with the bits reinterpreted as `element`, if that is given."""
        each, found = value.type.count // count, []
        for start in range(0, value.type.count, each):
            part = value if count == 1 else self.pick(range(start, start + each), value)
            if element is not None:
                part = self.b.bitcast(part, vector(element, each * _bits(value.type.element) // _bits(element)))
            found.append(part)
        return found

    def whole(self, parts: list[Any]) -> Any:
        """Concatenate equal vectors; their number is a power of two."""
        while len(parts) > 1:
            parts = [self.pick(range(2 * parts[0].type.count), *pair) for pair in zip(parts[::2], parts[1::2])]
        return parts[0]

    def in_parts(self, name: str, count: int, total: Any, *given: tuple[Any, ir.Type]) -> Any:
        """Apply an LLVM intrinsic to each of `count` parts of `total` and of the `given` (vector, element type)."""
        columns = zip(self.parts(total, count), *(self.parts(value, count, element) for value, element in given))
        return self.whole([self.call(name, column[0].type, list(column)) for column in columns])

    def shifted(self, words: Any, by: int) -> Any:
        """Shift lanes of 32 bits to the left by `by` bits, or to the right if it is negative."""
        shift = self.b.shl if by > 0 else self.b.lshr
        return shift(words, self.constant(I32, abs(by), words.type.count)) if by else words

    # ---- arithmetic --------------------------------------------------------------------------------------------------

    def call(self, name: str, result: ir.Type, arguments: list[Any]) -> Any:
        """Call an LLVM intrinsic or a C function."""
        function = self.b.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [argument.type for argument in arguments])
            function = ir.Function(self.b.module, kind, name)
        return self.b.call(function, arguments)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """Return x * y + z in each lane, rounded once."""
        return self.call(f"llvm.fma.v{LANES}f32", vector(F32), [x, y, z])

    def half_to_float(self, value: Any) -> Any:
        """Convert 16 float16 lanes to float32."""
        return self.b.fpext(value, vector(F32))

    def float_to_bf16(self, value: Any) -> Any:
        """Round a float, or 16, to bfloat16 (nearest even), stored in 16-bit integers. The inputs must not be NaN."""
        scalar = value.type == F32
        wide, narrow = (I32, I16) if scalar else (vector(I32), vector(I16))
        number = partial(ir.Constant if scalar else self.constant, I32)
        bits = self.b.bitcast(value, wide)
        odd = self.b.and_(self.b.lshr(bits, number(16)), number(1))
        rounded = self.b.add(self.b.add(bits, number(0x7FFF)), odd)
        return self.b.trunc(self.b.lshr(rounded, number(16)), narrow)

    def dot_u8_i8(self, total: Any, unsigned: Any, signed: Any, isa: Isa, *, largest: int = 255) -> Any:
        """Return total[lane] + the sum of the four products of the lane's unsigned and signed bytes, <16 x i32>, exact.

        `largest` is the maximum of the unsigned bytes.
        """
        if isa & Isa.VNNI:
            return self.in_parts("llvm.x86.avx512.vpdpbusd.512", 1, total, (unsigned, I8), (signed, I8))
        if isa & Isa.AVX_VNNI:
            return self.in_parts("llvm.x86.avx512.vpdpbusd.256", 2, total, (unsigned, I8), (signed, I8))
        if largest <= 128 and isa & (Isa.AVX2 | Isa.AVX512):  # then the sum of two products is below 2^15
            sums = self.b.bitcast(self.pairs_u8_i8(unsigned, signed, isa), vector(I32))
            return self.dot_i16(total, sums, self.constant(I32, 0x00010001), isa)
        # Even and odd bytes as 16-bit integers, of which pmaddwd and similar instructions add two products each.
        pairs, eight = vector(I16, 2 * LANES), self.constant(I16, 8, 2 * LANES)
        u, s = self.b.bitcast(unsigned, pairs), self.b.bitcast(signed, pairs)
        even = (self.b.and_(u, self.constant(I16, 255, 2 * LANES)), self.b.ashr(self.b.shl(s, eight), eight))
        odd = (self.b.lshr(u, eight), self.b.ashr(s, eight))
        return self.dot_i16(self.dot_i16(total, *even, isa), *odd, isa)

    def pairs_u8_i8(self, unsigned: Any, signed: Any, isa: Isa) -> Any:
        """Return sums of two adjacent products of unsigned and signed bytes, <32 x i16>, saturating; needs AVX2."""
        count, name = (1, "llvm.x86.avx512.pmaddubs.w.512") if isa.wide else (2, "llvm.x86.avx2.pmadd.ub.sw")
        pairs = zip(self.parts(unsigned, count, I8), self.parts(signed, count, I8))
        return self.whole([self.call(name, vector(I16, 2 * LANES // count), list(both)) for both in pairs])

    def dot_i16(self, total: Any, x: Any, y: Any, isa: Isa) -> Any:
        """Return total[lane] + both products of the lane's signed 16-bit pairs, modulo 2^32; x and y are <16 x i32>."""
        if isa & Isa.VNNI:
            return self.in_parts("llvm.x86.avx512.vpdpwssd.512", 1, total, (x, I16), (y, I16))
        if isa & Isa.AVX_VNNI:
            return self.in_parts("llvm.x86.avx512.vpdpwssd.256", 2, total, (x, I16), (y, I16))
        if isa & (Isa.AVX2 | Isa.AVX512):
            count, name = (1, "llvm.x86.avx512.pmaddw.d.512") if isa.wide else (2, "llvm.x86.avx2.pmadd.wd")
            kind, pairs = vector(I32, LANES // count), zip(self.parts(x, count, I16), self.parts(y, count, I16))
            return self.b.add(total, self.whole([self.call(name, kind, list(both)) for both in pairs]))
        products = self.b.mul(
            *(self.b.sext(self.b.bitcast(value, vector(I16, 2 * LANES)), vector(I32, 2 * LANES)) for value in (x, y))
        )
        for start in (0, 1):
            total = self.b.add(total, self.pick(range(start, 2 * LANES, 2), products))
        return total

    def dot_bf16(self, total: Any, x: Any, y: Any, isa: Isa) -> Any:
        """Return total[lane] + the two products of the lane's bfloat16 pairs; x, y are <16 x i32>, total is floats."""
        if isa & Isa.BF16:
            return self.in_parts("llvm.x86.avx512bf16.dpbf16ps.512", 1, total, (x, BF16), (y, BF16))
        if isa & Isa.ARM_BF16:
            return self.in_parts("llvm.aarch64.neon.bfdot.v4f32.v8bf16", 4, total, (x, BF16), (y, BF16))
        for pair in zip(self.widened_pairs(x), self.widened_pairs(y)):
            total = self.fma(*pair, total)
        return total

    def widened_pairs(self, x: Any) -> list[Any]:
        """Return the lower and the upper bfloat16 of each lane of <16 x i32>, as 16 floats each."""
        low, high = self.b.shl(x, self.constant(I32, 16)), self.b.and_(x, self.constant(I32, -65536))
        return [self.b.bitcast(part, vector(F32)) for part in (low, high)]

    def power_of_two(self, shifted: Any, rest: Any) -> Any:
        """Return 2^(n + rest) of 16 floats; `shifted` is SHIFTER + n with an integer n, rest is in [-0.5, 0.5]."""
        power = self.constant(F32, _EXP2[0])
        for factor in (*_EXP2[1:], 1.0):
            power = self.fma(power, rest, self.constant(F32, factor))
        exponent = self.b.shl(self.b.bitcast(shifted, vector(I32)), self.constant(I32, 23))
        return self.b.bitcast(self.b.add(self.b.bitcast(power, vector(I32)), exponent), vector(F32))

    def sum_lanes(self, value: Any) -> Any:
        """Return the sum of 16 floats by repeated halving: lane i plus lane i + 8, then plus lane i + 4, ..."""
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            value = self.b.fadd(*(self.pick(range(start, start + lanes), value) for start in (0, lanes)))
        return self.b.extract_element(value, ir.Constant(I32, 0))

    def choose(self, number: Any, cases: Mapping[int, Callable[[], None]]) -> None:
        """Emit a switch: run the case of `number`, an int64; do nothing for a number without a case."""
        after = self.b.append_basic_block("chosen")
        switch = self.b.switch(number, after)
        for value, emit in cases.items():
            block = self.b.append_basic_block(f"case{value}")
            switch.add_case(self.int64(value), block)
            self.b.position_at_end(block)
            emit()
            self.b.branch(after)
        self.b.position_at_end(after)

    # ---- loops -------------------------------------------------------------------------------------------------------

    @contextmanager
    def each(self, count: Any) -> Iterator[Any]:
        """Repeat the code that the block emits for index 0 .. count - 1; `count` is at least 1."""
        before = self.b.block
        head, after = self.b.append_basic_block("loop"), self.b.append_basic_block("after")
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(I64)
        index.add_incoming(self.int64(0), before)
        yield index
        following = self.b.add(index, self.int64(1))
        index.add_incoming(following, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, count), head, after)
        self.b.position_at_end(after)

    @contextmanager
    def each_or_skip(self, count: Any) -> Iterator[Any]:
        """Do what `each` does, but `count` may be 0."""
        with self._if_any(count), self.each(count) as index:
            yield index

    @contextmanager
    def _if_any(self, count: Any) -> Iterator[None]:
        """Skip the code that the block emits if `count` is 0."""
        inside, after = self.b.append_basic_block("some"), self.b.append_basic_block("done")
        self.b.cbranch(self.b.icmp_signed(">", count, self.int64(0)), inside, after)
        self.b.position_at_end(inside)
        yield
        self.b.branch(after)
        self.b.position_at_end(after)

    def loop(self, count: Any, state: list[Any], body: Any) -> list[Any]:
        """Run body(index, state) -> state for index 0 .. count - 1 (count at least 1); return the last state."""
        before = self.b.block
        with self.each(count) as index:
            carried = [self.b.phi(value.type) for value in state]
            for phi, value in zip(carried, state):
                phi.add_incoming(value, before)
            results = body(index, carried)
            for phi, value in zip(carried, results):
                phi.add_incoming(value, self.b.block)
        return results

    def loop_or_skip(self, count: Any, state: list[Any], body: Any) -> list[Any]:
        """Do what `loop` does, but `count` may be 0."""
        before = self.b.block
        with self._if_any(count):
            results = self.loop(count, state, body)
            last = self.b.block
        merged = []
        for initial, result in zip(state, results):
            phi = self.b.phi(initial.type)
            phi.add_incoming(initial, before)
            phi.add_incoming(result, last)
            merged.append(phi)
        return merged


def emitted(emit: Callable[..., Any]) -> Any:
    """Make a function of compiled code from one that emits its code, inline, with an `Emitter` as its first argument.

    The annotations are the signature. An `Int`, `Float`, `Double` or `Bool` is an LLVM value. A parameter of any other
    type, such as `int` or `Isa`, is a constant in the compiled code, and `emit` gets it as that type.
    """
    _, *kinds, result = get_type_hints(emit, include_extras=True).values()
    values = [kind.__metadata__[0] if hasattr(kind, "__metadata__") else None for kind in kinds]  # None: a constant
    result = types.void if result is type(None) else result.__metadata__[0]

    @wraps(emit)
    def typed(_: Any, *given: Any) -> Any:
        declared = [own if value is None else value for own, value in zip(given, values, strict=True)]
        constants = {at: kinds[at](given[at].literal_value) for at, value in enumerate(values) if value is None}

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            made = emit(Emitter(builder), *(constants.get(at, each) for at, each in enumerate(arguments)))
            return context.get_dummy_value() if result is types.void else made

        return result(*declared), code

    return intrinsic(prefer_literal=None in values)(typed)
