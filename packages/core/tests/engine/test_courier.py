# SPDX-License-Identifier: MIT
"""Pieces come in order, first ones first, and a thousand of them leave the loop its sockets."""

from __future__ import annotations

import asyncio
from typing import Any

from candle_vllm.core.engine.step.thread import BATCH, OutputQueue


class Noting:
    """A sink that notes what it gets in a list of all."""

    def __init__(self, name: int, log: list[tuple[int, Any]]) -> None:
        self.name = name
        self.log = log
        self.loop = asyncio.get_running_loop()

    def put(self, item: Any) -> None:
        self.log.append((self.name, item))


async def test_each_sink_gets_its_items_in_order_and_first_ones_go_before() -> None:
    log: list[tuple[int, Any]] = []
    sinks = [Noting(number, log) for number in range(5 * BATCH)]
    late = Noting(-1, log)
    courier = OutputQueue(asyncio.get_running_loop())
    courier.send([(sink, 0) for sink in sinks], ())  # type: ignore[misc]
    courier.send((), [(sink, 1) for sink in sinks])  # type: ignore[misc]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    courier.send([(late, 0)], [(sink, 2) for sink in sinks])  # type: ignore[misc]
    while len(log) < 3 * len(sinks) + 1:
        await asyncio.sleep(0)
    for sink in sinks:
        assert [item for name, item in log if name == sink.name] == [0, 1, 2]
    place = log.index((-1, 0))
    assert place < len(sinks) + 3 * BATCH  # although 160 others were waiting before it
    assert log[: len(sinks)] == [(sink.name, 0) for sink in sinks]


async def test_the_loop_turns_between_two_batches() -> None:
    log: list[tuple[int, Any]] = []
    courier = OutputQueue(asyncio.get_running_loop())
    sink = Noting(0, log)
    courier.send((), [(sink, number) for number in range(10 * BATCH)])  # type: ignore[misc]
    seen: list[int] = []
    while len(log) < 10 * BATCH:
        await asyncio.sleep(0)
        seen.append(len(log))
    assert [later - sooner for sooner, later in zip([0, *seen], seen)].count(BATCH) == 10


async def test_a_sink_that_fails_stops_no_other() -> None:
    log: list[tuple[int, Any]] = []
    courier, failures = OutputQueue(asyncio.get_running_loop()), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))
    sinks = [Noting(number, log) for number in range(2 * BATCH)]
    failing = sinks[BATCH]  # in the second batch
    failing.put = lambda _: 1 // 0  # type: ignore[method-assign, assignment]
    courier.send((), [(sink, 0) for sink in sinks])  # type: ignore[misc]
    await asyncio.sleep(0)
    courier.send((), [(sink, 1) for sink in sinks if sink is not failing])  # type: ignore[misc]
    for _ in range(20):
        await asyncio.sleep(0)
    assert [type(each) for each in failures] == [ZeroDivisionError]
    for sink in sinks:
        assert [item for name, item in log if name == sink.name] == ([] if sink is failing else [0, 1])


async def test_a_closed_loop_is_no_failure() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    OutputQueue(loop).send((), [(Noting(0, []), 0)])  # type: ignore[misc]
