# SPDX-License-Identifier: MIT
"""Where requests go: by what each replica was given and has to do, and what comes of it under a trace's shape."""

from __future__ import annotations

import pytest

from benchmarks.serve.replica_load import (
    BLOCK,
    Machine,
    Outcome,
    conversations,
    round_robin,
    shortest_queue,
    simulate,
)
from candle_vllm.core.errors import EngineOverloadedError, InvalidParameterError
from candle_vllm.core.remote.routing import Room, Router

ROOM = Room(num_blocks=8, block_size=16, max_num_seqs=4)


def blocks(*names: int) -> list[int]:
    return list(names)


def test_a_known_beginning_stays_and_new_ones_spread() -> None:
    router = Router([ROOM, ROOM])
    assert router.give("a", blocks(1, 2, 3), 50) == 0
    router.over("a")
    assert router.give("b", blocks(11, 12, 13), 50) == 1  # the one that was given least
    router.over("b")
    for name in "cde":
        assert router.give(name, blocks(1, 2, 3, 4), 70) == 0
        router.over(name)
    assert router.sequences == 0


def test_waiting_costs_until_it_is_more_than_running_the_beginning_elsewhere() -> None:
    router = Router([Room(1000, 16, 256)] * 2)
    beginning = list(range(100))  # 1600 tokens
    assert router.give("first", beginning, 1610) == 0
    router.begun("first")
    placed = [router.give(str(n), beginning, 1610) for n in range(20)]
    assert placed[:3] == [0, 0, 0]
    assert 1 in placed
    assert abs(placed.count(0) - placed.count(1)) < 10
    assert router.sequences == 21


def test_a_replica_whose_steps_are_full_is_passed_over() -> None:
    router = Router([ROOM, ROOM])
    known = blocks(1, 2, 3, 4, 5, 6)
    assert router.give("full", known, 100, sequences=4) == 0
    assert router.give("next", known, 100) == 1
    assert router.give("wide", [], 5, sequences=3) == 1
    assert router.give("none has a place", [], 5) == 0  # and less is to be done there


def test_the_index_holds_what_a_cache_holds_and_forgets_tails_first() -> None:
    router = Router([ROOM, Room(64, 16, 4)])
    assert router.give("a", list(range(8)), 130) == 0
    router.over("a")
    assert router.give("b", list(range(100, 104)), 70, without=(1,)) == 0  # pushes four blocks out: 4 to 7
    router.over("b")
    first = router._replicas[0]
    assert first.found(list(range(8))) == 4
    assert len(first.known) == ROOM.num_blocks
    router.forget_prefixes()
    assert first.found([0]) == 0


def test_a_dead_replica_gets_nothing_and_comes_back_empty() -> None:
    router = Router([ROOM, ROOM])
    assert router.give("a", blocks(1, 2), 40) == 0
    assert router.place_of("a") == 0
    router.lost(0)
    assert router.place_of("a") is None
    assert router.sequences == 0
    router.over("a")  # what is told late changes nothing
    router.begun("a")
    assert router.give("b", blocks(1, 2), 40) == 1
    router.lost(1)
    assert router.give("c", blocks(1, 2), 40) is None
    router.back(0, ROOM)
    assert router.give("c", blocks(1, 2), 40, without=(1,)) == 0


def test_an_id_is_given_once_and_the_queue_has_a_bound() -> None:
    """Also where two threads ask at the same time: both looked before either was counted."""
    router = Router([ROOM] * 2)
    assert router.give("a", (), 20, sequences=3, most=2) == 0  # a single request may be larger
    with pytest.raises(InvalidParameterError, match="'a' is in use"):
        router.give("a", (), 20, most=9)
    with pytest.raises(EngineOverloadedError, match="at most 3 are allowed"):
        router.give("b", (), 20, most=3)
    router.over("a")
    assert router.sequences == 0


def test_the_sums_return_to_nothing() -> None:
    router = Router([ROOM] * 3)
    for number in range(30):
        assert router.give(str(number), blocks(number), 20, sequences=1 + number % 3) is not None
    for number in range(0, 30, 2):
        router.begun(str(number))
    for number in range(30):
        router.over(str(number))
        router.over(str(number))
    assert all((each.load, each.held, each.sequences, each.to_run) == (0, 0, 0, 0) for each in router._replicas)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    load, machine = conversations(seed=1, requests=1500, rate=3), Machine()
    router = Router([Room(machine.num_blocks, BLOCK, machine.max_num_seqs)] * 4)

    def ours(name: str, asked: object, _: object) -> int:
        number = router.give(name, asked.full, asked.length)  # type: ignore[attr-defined]
        assert number is not None
        return number

    found = {
        "round robin": simulate(load, 4, round_robin, machine),
        "shortest queue": simulate(load, 4, shortest_queue, machine),
        "ours": simulate(load, 4, ours, machine, router.begun, router.over),
    }
    assert router.sequences == 0
    return found


def test_the_load_has_the_shape_of_the_trace() -> None:
    load = conversations(seed=1, requests=4000, rate=3)
    seen: set[int] = set()
    found = total = 0
    for asked in load:
        found += sum(block in seen for block in asked.full)
        total += len(asked.full)
        seen.update(asked.full)
    assert 0.33 < found / total < 0.41  # the trace: 0.366 in a cache without bounds
    assert 10_500 < sum(asked.length for asked in load) / len(load) < 13_500  # 12,035
    assert 300 < sum(asked.answer for asked in load) / len(load) < 390  # 343


@pytest.mark.parametrize("other", ["round robin", "shortest queue"])
def test_more_is_cached_and_first_tokens_come_sooner(outcomes: dict[str, Outcome], other: str) -> None:
    ours, theirs = outcomes["ours"], outcomes[other]
    assert ours.cached > 1.4 * theirs.cached
    assert ours.mean < 0.8 * theirs.mean
    assert ours.median < 0.8 * theirs.median
    assert ours.p90 < 0.8 * theirs.p90
