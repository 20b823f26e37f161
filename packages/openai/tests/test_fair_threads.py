# SPDX-License-Identifier: MIT
"""Threads beside the event loop: who waits for them, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from candle_vllm.core.errors import EngineOverloadedError
from candle_vllm.openai import fair_threads, serving
from candle_vllm.openai.fair_threads import MOST_WAITING, apart, asker
from candle_vllm.openai.serving import WorkerThreads
from tests.waiting import PATIENCE, Clock, until


class Gate:
    """Work that goes on when it is told to."""

    def __init__(self) -> None:
        self.begun = asyncio.Semaphore(0)
        self._loop = asyncio.get_running_loop()
        self._open = threading.Event()
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        self._loop.call_soon_threadsafe(self.begun.release)
        assert self._open.wait(PATIENCE)
        return "done"

    def open(self) -> None:
        self._open.set()


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    made = Gate()
    yield made
    made.open()


async def asked(who: str, work: Any) -> Any:
    asker.set(who)
    return await work


async def begun(gate: Gate, count: int) -> None:
    async with asyncio.timeout(PATIENCE):
        for _ in range(count):
            await gate.begun.acquire()


@pytest.mark.parametrize(
    "work", [WorkerThreads().prepare, WorkerThreads().compile, apart], ids=lambda work: work.__name__
)
async def test_one_key_has_half_of_the_threads(gate: Gate, work: Any) -> None:
    alice = [asyncio.create_task(asked("alice", work(gate))) for _ in range(5)]
    await begun(gate, 2)
    assert await asked("bob", work(lambda: "at once")) == "at once"
    assert gate.count == 2
    nobody = [asyncio.create_task(asked("", work(gate))) for _ in range(2)]
    await begun(gate, 2)
    gate.open()
    assert await asyncio.gather(*alice, *nobody) == ["done"] * 7


async def test_waiting_ends(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that holds a thread for ever does not keep others waiting for ever, nor is their work done afterwards."""
    threads = WorkerThreads()
    first = asyncio.create_task(threads.look(gate))
    await begun(gate, 1)
    monkeypatch.setattr(fair_threads, "MOST_WAITING", 0.01)
    with pytest.raises(EngineOverloadedError, match="waited 0 seconds for a thread"):
        await threads.look(gate)
    gate.open()
    assert await first == "done"
    monkeypatch.undo()
    assert await threads.look(lambda: "next") == "next"
    assert gate.count == 1


async def test_who_goes_away_keeps_a_thread_until_its_work_ends(gate: Gate) -> None:
    threads = WorkerThreads()
    running = asyncio.create_task(threads.look(gate))
    await begun(gate, 1)
    waiting, last = asyncio.create_task(threads.look(gate)), asyncio.create_task(threads.look(lambda: "last"))
    await asyncio.sleep(0)
    for task in (running, waiting):
        task.cancel()
    await asyncio.wait((running, waiting))
    assert not last.done()
    gate.open()
    assert await last == "last"
    assert gate.count == 1, "work that nobody waits for is not begun"


@pytest.mark.parametrize(
    ("kind", "name", "threads"), [("prepare", "prompts", 2), ("look", "images", 1), ("compile", "grammars", 2)]
)
async def test_few_wait(gate: Gate, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, threads: int) -> None:
    monkeypatch.setattr(serving, "MAX_COMPILING", 4)
    monkeypatch.setattr(serving, "MAX_TOKENIZING", 4)
    work = getattr(WorkerThreads(), kind)
    alice = [asyncio.create_task(asked("alice", work(gate))) for _ in range(threads + 2)]
    await begun(gate, threads)
    with pytest.raises(EngineOverloadedError, match=rf"2 requests wait for a thread \({name}\)"):
        await asked("alice", work(gate))
    bob = asyncio.create_task(asked("bob", work(lambda: "taken")))
    await asyncio.sleep(0)
    alice.pop().cancel()
    await asyncio.sleep(0)
    gate.open()
    assert await bob == "taken"
    assert await asyncio.gather(*alice) == ["done"] * (threads + 1)


@pytest.mark.parametrize("kind", ["prepare", "look", "compile"])
async def test_askers_take_turns(gate: Gate, kind: str) -> None:
    """However many requests of one key wait, another key's next one comes behind one of each other key at most."""
    work, order = getattr(WorkerThreads(), kind), list[str]()
    running = [asyncio.create_task(asked(who, work(gate))) for who in ("x", "x", "y", "y")]
    await begun(gate, 1 if kind == "look" else 4)
    waiting = [
        asyncio.create_task(asked(who, work(partial(order.append, who))))
        for who in ("alice", "alice", "alice", "alice", "bob", "carol", "bob")
    ]
    await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(*running, *waiting)
    assert order.index("bob") < 4, order  # at most three threads run what was begun beside it
    assert kind != "look" or order == ["alice", "bob", "carol", "alice", "bob", "alice", "alice"]


async def test_what_waited_too_long_is_not_begun_by_a_busy_event_loop(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's own timer may come late; the thread that gets free looks at the clock."""
    clock, threads = Clock(monkeypatch, fair_threads), WorkerThreads()
    first = asyncio.create_task(threads.look(gate))
    await begun(gate, 1)
    late = asyncio.create_task(threads.look(gate))
    await asyncio.sleep(0)
    clock.skip(MOST_WAITING)
    gate.open()
    with pytest.raises(EngineOverloadedError, match="waited 60 seconds for a thread"):
        await late
    assert await first == "done"
    assert gate.count == 1


async def test_an_error_that_nobody_waits_for_is_no_line_of_the_log() -> None:
    """Its client has gone while a thread worked, or in the same turn of the loop."""
    loop, told, go = asyncio.get_running_loop(), list[object](), threading.Event()
    loop.set_exception_handler(lambda _, context: told.append(context))
    begun = asyncio.Event()

    def failing() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert go.wait(PATIENCE)
        raise ValueError("no")

    threads = WorkerThreads()
    leaving = asyncio.create_task(threads.look(failing))
    await begun.wait()
    leaving.cancel()
    await asyncio.wait((leaving,))
    go.set()
    await threads.look(str)  # behind it
    del leaving
    await asyncio.sleep(0)
    gc.collect()
    assert told == []


class Body:
    """Of a request."""


@pytest.mark.parametrize("kind", ["prepare", "look", "compile"])
async def test_a_refused_body_is_let_go_of_without_the_collector(kind: str) -> None:
    """Errors hold the frames that they came through: none of these may hold the error."""

    def refuse(body: Body) -> None:
        try:
            raise KeyError(body)
        except KeyError as error:
            raise ValueError("no") from error

    work, body = getattr(WorkerThreads(), kind), Body()
    held = weakref.ref(body)
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            await work(refuse, body)
        del body
        await until(lambda: held() is None)
    finally:
        gc.enable()


async def test_errors_reach_who_asked() -> None:
    def failing() -> None:
        raise ValueError("no")

    threads = WorkerThreads()
    for work in (threads.prepare, threads.look, threads.compile):
        with pytest.raises(ValueError, match="no"):
            await work(failing)
        assert await work(str, 1) == "1"
