# SPDX-License-Identifier: MIT
"""What adapters add on the CPU: as plain torch has it, whatever else is in the step, in every variant."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from threading import Thread

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from candle_vllm.core.errors import AdapterError
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import slot
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.lora import Delta, NumberType, PackedAdapter, Place
from candle_vllm.core.kernels.lora.cpu_shrink import count_blocks
from candle_vllm.core.kernels.lora.layout import BLOCK_BYTES, ShrinkArguments, most_blocks
from candle_vllm.core.kernels.lora.pack import pack_adapter, quantise
from candle_vllm.core.kernels.lora.reference import decoded, quantised
from candle_vllm.core.kernels.plain_linear import pack
from packages.core.tests.kernels.lora_field import add, fitted, low_rank, stored
from tests.common_run import few

ISAS = [Isa.GENERIC, host_isa()] if host_isa() & Isa.BF16 else [Isa.GENERIC]
COMMON = [(ISAS[-1], "BF16"), (Isa.GENERIC, "I8")]
each_form = pytest.mark.parametrize(("isa", "dtype"), few(itertools.product(ISAS, ["F32", "BF16", "I8"]), *COMMON))
TOLERANCE = {"F32": 1e-6, "BF16": 5e-3, "I8": 1e-5}  # of BF16 the reference rounds inputs too; of I8 ties differ
PLACES = {"layer": (Place(1, 96, {"q.": (0, 0, 40), "k.": (0, 40, 53), "v.": (0, 53, 123)}),)}


@pytest.fixture(scope="module")
def team():
    team = ThreadTeam(3)
    yield team
    team.close()


def both(deltas: dict[str, Delta], dtype: NumberType, places=PLACES) -> tuple[PackedAdapter, PackedAdapter]:
    """An adapter for the compiled operations, and for plain torch."""
    compiled, plain = (
        pack_adapter(fitted({"layer": deltas}), places, dtype, compiled=compiled) for compiled in (True, False)
    )
    return compiled, plain


def expected(groups, place: Place, x: np.ndarray, y: np.ndarray, own: np.ndarray) -> np.ndarray:
    total, inputs, products = (torch.from_numpy(array).clone() for array in (y, x, own))
    for adapter, rows, scales in groups:
        for delta in adapter.layout.deltas[place.number]:
            columns = slice(delta.begin, delta.end)
            added = adapter.layout.added(delta, inputs[rows], products[rows, columns])
            total[rows, columns] += torch.tensor(scales)[:, None] * added
    return total.numpy()


def distance(found: np.ndarray, wanted: np.ndarray, scale: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / np.sqrt(np.mean(scale**2)))


def random_rows(generator: np.random.Generator, rows: int, place: Place) -> tuple[np.ndarray, np.ndarray]:
    width = max(end for _, _, end in place.parts.values())
    x, y = (generator.standard_normal((rows, n)).astype(np.float32) for n in (place.columns, width))
    return x, y


@each_form
@pytest.mark.parametrize("ranks", [(1, 4, 6), (8, 12, 16), (24, 64, 256)], ids=str)
def test_every_rank_adds_what_the_reference_adds(team, isa, dtype, ranks):
    generator = np.random.default_rng(sum(ranks))
    (place,) = PLACES["layer"]
    deltas = {
        name: low_rank(generator, end - begin, place.columns, rank)
        for rank, (name, (_, begin, end)) in zip(ranks, place.parts.items())
    }
    compiled, plain = both(deltas, dtype)
    for rows in (1, 3, 8, 45):
        x, y = random_rows(generator, rows + 3, place)
        chosen = generator.permutation(rows + 3)[:rows].tolist()
        scales = generator.uniform(0.5, 2, rows).astype(np.float32).tolist()
        found = add(team, isa, place, [(compiled, chosen, scales)], x, y)
        wanted = expected([(plain, chosen, scales)], place, x, y, y)
        others = np.setdiff1d(np.arange(rows + 3), chosen)
        assert (found[others] == y[others]).all()
        assert distance(found, wanted, wanted - y) < TOLERANCE[dtype]


@each_form
@pytest.mark.parametrize("columns", [1, 31, 33, 576])
def test_odd_widths(team, isa, dtype, columns):
    generator = np.random.default_rng(columns)
    place = Place(0, columns, {"": (0, 0, 301)})
    compiled, plain = both({"": low_rank(generator, 301, columns, 20)}, dtype, {"layer": (place,)})
    x, y = random_rows(generator, 9, place)
    found = add(team, isa, place, [(compiled, list(range(9)), [1.0] * 9)], x, y)
    wanted = expected([(plain, list(range(9)), [1.0] * 9)], place, x, y, y)
    assert distance(found, wanted, wanted - y) < TOLERANCE[dtype]


@each_form
@pytest.mark.parametrize("columns", [96, 2080, 4128])  # some, a few more than, and twice the columns of 4 spans
def test_a_row_has_the_bits_that_it_has_alone(team, isa, dtype, columns):
    generator, lone = np.random.default_rng(5), ThreadTeam(1)
    place = dataclasses.replace(EVEN["layer"][0], columns=columns)
    adapters = [
        both({name: low_rank(generator, 41, columns, rank) for name in names}, dtype, {"layer": (place,)})[0]
        for names, rank in ((("q.", "k.", "v."), 16), (("v.",), 5), (("q.", "v."), 40))
    ]
    x, y = random_rows(generator, 40, place)
    of = [(adapter, range(first, 40, step)) for adapter, first, step in zip(adapters, (0, 3, 7), (1, 2, 3))]
    alone = []
    for row in range(40):
        groups = [(adapter, [0], [1.5]) for adapter, rows in of if row in rows]
        alone.append(add(lone, isa, place, groups, x[row : row + 1], y[row : row + 1])[0])
    for count in (*range(2, 14), 40):
        rows_of = [(adapter, [row for row in rows if row < count]) for adapter, rows in of]
        groups = [(adapter, rows, [1.5] * len(rows)) for adapter, rows in rows_of if rows]
        for threads in (lone, team):
            assert (add(threads, isa, place, groups, x[:count], y[:count]) == alone[:count]).all()
    lone.close()


@pytest.mark.parametrize("isa", few(ISAS, ISAS[-1]), ids=str)
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_added_within_the_product_as_behind_it(team, isa, rows):
    """Whoever makes columns of the model's product adds to them, so nobody waits in between."""
    generator = np.random.default_rng(rows)
    (place,) = PLACES["layer"]
    deltas = {name: low_rank(generator, end - begin, 96, 12) for name, (_, begin, end) in place.parts.items()}
    adapter, _ = both(deltas, "BF16")
    x, y = random_rows(generator, rows, place)
    numbers = [
        generator.standard_normal((end - begin, 96)).astype(np.float32) for _, begin, end in place.parts.values()
    ]
    matrices = [pack(each.view(np.uint8).reshape(-1), "F32", *each.shape) for each in numbers]
    groups = [(adapter, list(range(0, rows, 2)), [1.5] * len(range(0, rows, 2)))]
    within = add(team, isa, place, groups, x, np.full_like(y, np.nan), matrices=matrices)
    own = add(team, isa, place, [(adapter, [], [])], x, np.full_like(y, np.nan), matrices=matrices)
    assert distance(own, x @ np.concatenate(numbers).T, own) < 1e-5
    assert (within == add(team, isa, place, groups, x, own)).all()
    assert (within == add(team, isa, place, groups, x, np.full_like(y, np.nan), matrices=matrices, late=True)).all()
    lone = ThreadTeam(1)
    assert (within == add(lone, isa, place, groups, x, np.full_like(y, np.nan), matrices=matrices)).all()
    lone.close()


@pytest.mark.parametrize("dtype", few(["F32", "BF16", "I8"], "BF16", "I8"))
@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (4, 4128)])
def test_what_two_threads_do_at_once_is_the_same(dtype, rows, columns):
    """More threads than cores: some come so late that others do their share as well."""
    generator, lone, many = np.random.default_rng(2), ThreadTeam(1), ThreadTeam(8)
    place = dataclasses.replace(PLACES["layer"][0], columns=columns)
    deltas = {name: low_rank(generator, end - begin, columns, 16) for name, (_, begin, end) in place.parts.items()}
    adapter, _ = both(deltas, dtype, {"layer": (place,)})
    x, y = random_rows(generator, rows, place)
    groups = [(adapter, list(range(rows)), [0.5] * rows)]
    alone = add(lone, host_isa(), place, groups, x, y)
    for late in [False, True] * 20:
        assert (add(many, host_isa(), place, groups, x, y, late=late) == alone).all()
    lone.close()
    many.close()


def test_sums_stay_while_they_are_computed_again():
    """`expand` may read them meanwhile, if a thread is so late that another one has done its share."""
    generator, lone = np.random.default_rng(2), ThreadTeam(1)
    place = Place(0, 65536, {"": (0, 0, 16)})
    adapter, _ = both({"": low_rank(generator, 16, place.columns, 16)}, "I8", {"layer": (place,)})

    class Watched:
        threads = 1

        def run(self, plan: np.ndarray, rows: int) -> None:
            lone.run(plan, rows)
            shrink = plan[plan[1] >> 11 :]  # behind the row of `begin`
            sums = int(shrink[slot(ShrinkArguments, "h")]), 2 * BLOCK_BYTES
            first = ctypes.string_at(*sums)
            again = Thread(target=lone.run, args=(np.tile(shrink, 200), 200))
            again.start()
            while again.is_alive():
                assert ctypes.string_at(*sums) == first

    add(Watched(), host_isa(), place, [(adapter, [0, 1], [1.0, 1.0])], *random_rows(generator, 2, place))
    lone.close()


def test_no_rank_takes_more_blocks_than_the_memory_for_the_largest_rank_has():
    assert all(count_blocks(rank) <= most_blocks(most) for most in range(1, 1025) for rank in range(0, most + 1, 4))


@pytest.mark.parametrize("dtype", few(["F32", "BF16", "I8"], "I8"))
def test_every_cpu_adds_the_same(team, dtype):
    generator = np.random.default_rng(9)
    (place,) = PLACES["layer"]
    deltas = {name: low_rank(generator, end - begin, 96, 12) for name, (_, begin, end) in place.parts.items()}
    adapter, _ = both(deltas, dtype)
    x, y = random_rows(generator, 19, place)
    groups = [(adapter, list(range(19)), [0.5] * 19)]
    assert (add(team, Isa.GENERIC, place, groups, x, y) == add(team, host_isa(), place, groups, x, y)).all()


EVEN = {"layer": (Place(2, 96, {"q.": (0, 0, 41), "k.": (0, 41, 82), "v.": (0, 82, 123)}),)}


@each_form
def test_dora_biases_and_whole_matrices(team, isa, dtype):
    generator = np.random.default_rng(8)
    place = EVEN["layer"][0]
    deltas = {
        "q.": low_rank(
            generator,
            41,
            96,
            8,
            column_scale=generator.uniform(0.5, 1.5, 41).astype(np.float32),
            bias=generator.standard_normal(41).astype(np.float32),
        ),
        "k.": Delta(full=stored(generator.standard_normal((41, 96)) / 10)),
        "v.": Delta(bias=generator.standard_normal(41).astype(np.float32)),
    }
    compiled, plain = both(deltas, dtype, EVEN)
    assert compiled.apart
    x, own = random_rows(generator, 11, place)
    rows, scales = [1, 2, 3, 5, 8, 9, 10], [1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 0.25]
    memory = np.ascontiguousarray(np.pad(own, ((0, 0), (0, 13)), constant_values=np.nan))
    found = add(team, isa, place, [(compiled, rows, scales)], x, np.full_like(own, 7), memory)
    wanted = expected([(plain, rows, scales)], place, x, own, own)
    assert (found[[0, 4, 6, 7]] == own[[0, 4, 6, 7]]).all()
    assert distance(found, wanted, wanted - own) < TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "bytes_"), [("BF16", 2), ("I8", 1)])
def test_an_adapter_takes_what_its_numbers_take(dtype: NumberType, bytes_: int):
    place = Place(0, 576, {"": (0, 0, 1536)})
    made = both({"": low_rank(np.random.default_rng(0), 1536, 576, 16)}, dtype, {"layer": (place,)})[0]
    assert bytes_ * 16 * (1536 + 576) < made.nbytes < 1.15 * bytes_ * 16 * (1536 + 576)


@pytest.mark.parametrize("compiled", [True, False])
def test_trained_rows_count_as_memory(compiled: bool):
    rows = np.arange(6), np.ones((6, 1000), np.float32)
    place = Place(0, 1000, {"": (0, 0, 64)}, lookup=True)
    one = fitted({"embed": {"": Delta(rows=rows)}})
    assert pack_adapter(one, {"embed": (place,)}, "F32", compiled=compiled).nbytes >= rows[1].nbytes


@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize(("columns", "groups"), [(1, 1), (16, 1), (21, 1), (1, 4), (33, 4), (576, 4)])
def test_whole_numbers_are_those_of_the_reference(kind, columns, groups):
    """Zeros, numbers that are too small for a scale, and large ones among them."""
    generator = np.random.default_rng(columns)
    numbers = generator.standard_normal((40, columns)).astype(np.float32)
    numbers[1:5] *= np.array([0, 1e-37, 1e-30, 1e30], np.float32)[:, None]
    numbers[5, 0] = 100
    bits = numbers.view(np.uint32) >> 16
    if kind == "BF16":
        numbers = (bits << 16).view(np.float32)
    codes, scales = quantised(numbers, groups)
    made = np.full(7 + 40 * (columns + 2 * groups) + 64, 77, np.uint8)
    matrix = np.array([[3 * columns, 40, columns, groups, 7]])
    source = np.concatenate([np.full((3, columns), 9, np.float32), numbers])  # three rows stand before it
    quantise((source.view(np.uint32) >> 16).astype(np.uint16) if kind == "BF16" else source, made, matrix)
    assert (made[:7] == 77).all()
    assert (made[-64:] == 77).all()
    found, at = made[7:-64], 40 * columns
    assert (found[:at].view(np.int8).reshape(40, columns) == codes).all()
    assert (found[at:].view(np.uint16).reshape(40, groups) == scales.view(np.uint32) >> 16).all()
    assert np.abs(codes.astype(int)).max() <= 127
    assert not codes[1:3].any()
    error = np.abs(decoded(codes, scales) - numbers) / np.maximum(np.abs(numbers).max(1), 1e-30)[:, None]
    assert error.max() < 0.5 * 1.01 / 127


@pytest.mark.parametrize("isa", few(ISAS, ISAS[-1]), ids=str)
def test_products_of_whole_numbers_are_near(team, isa):
    """Within a hundredth of what bfloat16 adds, and two where some numbers are much larger than others."""
    generator = np.random.default_rng(3)
    place = Place(0, 576, {"": (0, 0, 320)})
    for draw, most in ((generator.standard_normal, 1e-2), (lambda shape: generator.standard_t(3, shape), 2e-2)):
        delta = Delta(a=stored(draw((16, 576)) / 24), b=stored(draw((320, 16)) / 4))
        x, y = random_rows(generator, 12, place)
        added = [
            add(team, isa, place, [(made, list(range(12)), [1.0] * 12)], x, y) - y
            for made in (both({"": delta}, dtype, {"layer": (place,)})[0] for dtype in ("BF16", "I8"))
        ]
        assert 1e-3 < distance(added[1], added[0], added[0]) < most


def test_what_the_model_does_not_multiply_is_refused():
    delta = low_rank(np.random.default_rng(0), 4, 4, 4)
    with pytest.raises(AdapterError, match=r"layer:z\.weight"):
        pack_adapter(fitted({"layer": {"z.": delta}}), PLACES, "F32", compiled=True)


@pytest.mark.parametrize("place", [Place(0, 4, {"": (0, 0, 4)}, lookup=True), Place(0, 4, {"": (0, 0, 4)}, 1)])
def test_dora_of_tables_and_experts_is_refused(place):
    delta = low_rank(np.random.default_rng(0), 4, 4, 4, column_scale=np.ones(4, np.float32))
    with pytest.raises(AdapterError, match="DoRA"):
        pack_adapter(fitted({"layer": {"": delta}}), {"layer": (place,)}, "F32", compiled=True)
