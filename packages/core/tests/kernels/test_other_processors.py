# SPDX-License-Identifier: MIT
"""Kernels made for other processors, run by QEMU: they have the bits that they have here, and no newer instruction.

An emulated processor knows the instructions of its level and ends at any other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from candle_vllm.core.kernels.cpu_runtime import machine_code
from candle_vllm.core.kernels.cpu_runtime.compiler import compile_function
from candle_vllm.core.kernels.cpu_runtime.emit import I32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_tables import gather
from candle_vllm.core.kernels.cpu_runtime.level import LEVELS, Isa, host_isa, host_level, links_here
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, linear_arguments, plan_row
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.delta_rule import cpu as delta_cpu
from candle_vllm.core.kernels.packed_linear import PackedKind, PackedMatrix
from candle_vllm.core.kernels.packed_linear import cpu as packed_cpu
from candle_vllm.core.kernels.packed_linear import layout as packed_layout
from candle_vllm.core.kernels.packed_linear.grids import GridLayout
from candle_vllm.core.kernels.plain_linear import PlainKind
from candle_vllm.core.kernels.plain_linear import cpu as plain_cpu
from candle_vllm.core.kernels.plain_linear import pack as pack_plain
from candle_vllm.core.kernels.short_conv import cpu as conv_cpu
from packages.core.tests.kernels import test_delta_rule, test_short_conv
from packages.core.tests.kernels.emulated import Emulated, emulator
from packages.core.tests.kernels.linear_field import error, multiply_in_field, same_bits
from packages.core.tests.kernels.state_steps import Compiled, whole_rows
from packages.core.tests.kernels.test_packed_linear import activations, packed

LEVEL = {level.name: level for level in LEVELS}
CPUS = {
    "avx2": "Haswell",
    "neon": "cortex-a72",
    "neon-dotprod": "neoverse-n1",
    "neon-bf16": "max",
}
"""What QEMU calls a processor of a level that has nothing beyond it; of the last one it has no model but its own."""
COLUMNS, OUTPUTS = 256, 37

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="QEMU runs programs of Linux there alone")


def started(name: str) -> Emulated:
    level = LEVEL[name]
    if emulator(level) is None:
        pytest.skip(f"no qemu-{level.machine}: Debian's package is qemu-user")
    return Emulated(level, CPUS[name])


@pytest.fixture(scope="module", params=list(CPUS))
def processor(request: pytest.FixtureRequest) -> Iterator[Emulated]:
    found = started(request.param)
    yield found
    found.close()


@pytest.fixture(scope="module")
def team() -> Iterator[ThreadTeam]:
    found = ThreadTeam(1)
    yield found
    found.close()


def multiply(processor: Emulated, function: int, matrix: Any, rows: int, **inputs: Any) -> np.ndarray:
    """The linear operation on the emulated processor: float32 [T, N]."""
    out = processor.array(np.full((rows + 1, matrix.rows), np.nan, np.float32))
    numbers = processor.array(np.full(StepNumber.COUNT, rows, np.int64))
    given = {name: processor.place(x) if isinstance(x, np.ndarray) else x for name, x in inputs.items()}
    arguments = linear_arguments(matrix, out=processor.place(out), out_stride=matrix.rows, **given)
    arguments = arguments._replace(weights=processor.place(processor.array(matrix.data)))
    row = processor.array(np.array(plan_row(function, processor.place(numbers), arguments), np.int64))
    processor.call(function, processor.place(row), 0, 1)
    assert np.isnan(out[rows]).all()
    return out[:rows].copy()


def make_gathers(isa: Isa) -> Callable[[int, int], None]:
    """Squares of 96 numbers below 256, from a table, less the numbers: so many at once that every register has some."""
    table = np.arange(256, dtype=np.uint32) ** 2

    @emitted
    def squares(e: Emitter, numbers: Int, to: Int) -> None:
        places = [e.load(numbers, vector(I32), 64 * part) for part in range(6)]
        for part, found in enumerate([gather(e, table, place, isa) for place in places]):
            e.store(to, e.b.sub(found, places[part]), 64 * part)

    def take(numbers: int, to: int) -> None:
        squares(numbers, to)

    return take


def gathers(processor: Emulated) -> bool:
    """Whether the emulator itself gathers: QEMU 7 takes a vector of indices in register 4 for none at all."""
    places, out = processor.array(np.arange(150, 246, dtype=np.uint32)), processor.array(np.zeros(96, np.uint32))
    processor.call(processor.load(make_gathers(processor.level.isa)), *map(processor.place, (places, out)))
    return np.array_equal(out, places**2 - places)


def check_packed(processor: Emulated, team: ThreadTeam, kind: PackedKind) -> None:
    matrix: PackedMatrix = packed(kind, OUTPUTS, COLUMNS)
    function = processor.load(packed_cpu.make_linear(int(kind), int(processor.level.isa)))
    for rows in (1, 3, 11):
        inputs = dict(zip(("x", "scales", "sums"), (part[:rows].copy() for part in activations(11, COLUMNS))))
        places = {name: address_of(part) for name, part in inputs.items()}
        wanted = multiply_in_field(team, matrix, rows, host_isa(), None, None, **places)
        given = {name: processor.array(part) for name, part in inputs.items()}
        assert same_bits(multiply(processor, function, matrix, rows, **given), wanted)


@pytest.mark.one_of_each(2)
def test_products_have_the_same_bits(processor: Emulated, team: ThreadTeam) -> None:
    check_packed(processor, team, PackedKind.Q4_1)


def make_dot(isa: Isa) -> Callable[[int, int, int], None]:
    """Products of 64 bytes at each of two addresses, summed by fours: int32 [16] at the third."""

    @emitted
    def dot(e: Emitter, unsigned: Int, signed: Int, to: Int) -> None:
        u, s = (e.load(at, vector(I32)) for at in (unsigned, signed))
        e.store(to, e.dot_u8_i8(e.zeros(I32), u, s, isa))

    def take(unsigned: int, signed: int, to: int) -> None:
        dot(unsigned, signed, to)

    return take


def test_codes_of_all_eight_bits_are_unsigned(processor: Emulated) -> None:
    """As those of a quantised cache are, which instructions for two signed numbers would take for negative ones."""
    function = processor.load(make_dot(processor.level.isa))
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    for x in (np.full(64, -128, np.int8), np.full(64, 127, np.int8), np.arange(-32, 32, dtype=np.int8)):
        for some in codes:
            out = processor.array(np.zeros(16, np.int32))
            processor.call(function, *map(processor.place, (processor.array(some), processor.array(x), out)))
            assert np.array_equal(out, (some.astype(np.int32) * x).reshape(16, 4).sum(1))


@pytest.mark.every_case
@pytest.mark.parametrize("kind", [kind for kind in PackedKind if kind.name != "Q4_1"], ids=lambda kind: kind.name)
def test_products_of_every_type_have_the_same_bits(processor: Emulated, team: ThreadTeam, kind: PackedKind) -> None:
    if isinstance(packed_layout.LAYOUTS[kind], GridLayout) and not gathers(processor):
        pytest.skip("this QEMU loses gathered numbers")
    check_packed(processor, team, kind)


@pytest.mark.every_case
@pytest.mark.parametrize("name", ["neon-bf16", pytest.param("neon", marks=pytest.mark.every_case)])
def test_plain_products_do_not_depend_on_the_rows_beside(name: str) -> None:
    processor, random = started(name), np.random.default_rng(3)
    weights = random.standard_normal((OUTPUTS, COLUMNS)).astype(np.float32).view(np.uint32) & 0xFFFF0000
    x = random.standard_normal((11, COLUMNS)).astype(np.float32).view(np.uint32) & 0xFFFF0000
    matrix = pack_plain((weights >> 16).astype(np.uint16).reshape(-1).view(np.uint8), "BF16", OUTPUTS, COLUMNS)
    function = processor.load(plain_cpu.make_linear(int(PlainKind.BF16), int(processor.level.isa)))
    inputs = processor.array((x >> 16).astype(np.uint16))
    whole = multiply(processor, function, matrix, 11, x=inputs, x_bytes=2 * COLUMNS)
    exact = x.view(np.float32).astype(np.float64) @ weights.view(np.float32).astype(np.float64).T
    assert error(whole, exact) < 1e-5
    for row in (0, 10):
        alone = multiply(processor, function, matrix, 1, x=inputs[row : row + 1], x_bytes=2 * COLUMNS)
        assert same_bits(alone, whole[row : row + 1])
    processor.close()


def run_there(processor: Emulated, made: Compiled, functions: list[int]) -> list[np.ndarray]:
    """What operations that the plan has make on the emulated processor of the memory that it has here: all of it."""
    recorder = made.recorder
    states = recorder.arrays.states.tables.values()
    rows = [recorder.arrays.query_start, *states, recorder.arrays.numbers]
    kept = [x for x in recorder._keep if isinstance(x, np.ndarray)]
    here = [x for x in (made.states, made.kept, *recorder.allocated, *kept, *rows) if x.nbytes]
    there = [processor.array(x) for x in here]

    def moved(number: int) -> int:
        for before, after in zip(here, there):
            if 0 <= number - address_of(before) < before.nbytes:
                return processor.place(after) + number - address_of(before)
        return number

    begins = [0, *recorder.ends[:-1]]
    for begin, end, function in zip(begins, recorder.ends, functions, strict=True):
        row = processor.array(np.array([moved(number) for number in recorder.plan[begin:end]], np.int64))
        for thread in range(2):
            processor.call(function, processor.place(row), thread, 2)
    return [x.copy() for x in there[: 2 + len(recorder.allocated)]]


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("kernel", ["delta_rule", "mamba 1", "short_conv", "gated short_conv"])
def test_states_have_the_same_bits(processor: Emulated, kernel: str) -> None:
    """And results, and kept rows: in two steps, the second of which begins with what the first one kept."""
    if kernel == "delta_rule":
        made, sizes = test_delta_rule.compiled(test_delta_rule.ODD, 9, 1), test_delta_rule.ODD
        inputs, functions = sizes.text(7), [delta_cpu.prepare, delta_cpu.make_scan(1, 0), delta_cpu.keep]
    elif kernel == "mamba 1":
        sizes = test_delta_rule.MAMBA
        made, inputs = test_delta_rule.compiled(sizes, 9, 1, strength=0.0), sizes.text(7)
        functions = [delta_cpu.make_scan(0, 2), delta_cpu.keep]
    else:
        gated = kernel != "short_conv"
        made, inputs = test_short_conv.compiled(37, 4, 9, 1, gated=gated), test_short_conv.text(1, 7, 37, gated=gated)
        functions = [conv_cpu.make_short_conv(4, 1, int(gated))]
    loaded = [processor.load(function) for function in functions]
    rows = whole_rows(7)._replace(keeps=np.array([-1, -1, -1, 0, 1, 2, 3]))
    again = rows._replace(sources=np.array([2]), replays=np.array([3]), stores=np.arange(1, 8))
    for step in (rows, again):
        made.lay_out(inputs, step)
        found = run_there(processor, made, loaded)
        made.run(inputs, step, np.arange(7))
        for got, wanted in zip(found, (made.states, made.kept, *made.recorder.allocated)):
            assert np.array_equal(got, wanted, equal_nan=True)
    made.team.close()


@pytest.mark.every_case
def test_a_processor_ends_at_an_instruction_that_it_has_not() -> None:
    processor = started("neon")
    function = processor.load(packed_cpu.make_linear(int(PackedKind.Q4_1), int(LEVEL["neon"].isa)))
    processor.level = LEVEL["neon-dotprod"]
    newer = processor.load(packed_cpu.make_linear(int(PackedKind.Q4_1), int(LEVEL["neon-dotprod"].isa)))
    given = {name: processor.array(x) for name, x in zip(("x", "scales", "sums"), activations(11, COLUMNS))}
    multiply(processor, function, packed(PackedKind.Q4_1, OUTPUTS, COLUMNS), 1, **given)
    with pytest.raises(RuntimeError, match="status -4"):  # SIGILL
        multiply(processor, newer, packed(PackedKind.Q4_1, OUTPUTS, COLUMNS), 1, **given)
    processor.close()


@pytest.mark.skipif(not links_here(), reason="elsewhere LLVM links")
def test_code_of_arm64_is_loaded_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of ARM64, with code of this machine."""
    monkeypatch.setattr(machine_code, "machine", lambda: "aarch64")
    function = packed_cpu.make_linear(int(PackedKind.Q4_1), int(host_isa()))
    address = machine_code.load(machine_code.link(compile_function(function, host_level())))
    found = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:kernel" in line]
    bounds = [[int(end, 16) for end in line.split()[0].split("-")] for line in found]
    assert any(first <= address < last for first, last in bounds)
    assert all("r-xp" in line for line in found)
