# SPDX-License-Identifier: MIT
"""Bodies that are read and counted; waiting for an answer while watching the connection."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from candle_vllm.core.errors import EngineOverloadedError
from candle_vllm.openai import fair_threads
from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.fair_threads import apart, request_bytes, this_request
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.serving import WorkerThreads
from candle_vllm.server import Settings, create_app
from candle_vllm.server.http import body as body_module
from candle_vllm.server.http.body import BIG_BODY, Held, Pieces, parse_request, unless_disconnected
from candle_vllm.server.http.errors import ClientGone, HttpError
from candle_vllm.server.http.routing import NOBODY, Caller
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import PATIENCE, until


async def _never() -> Any:
    await asyncio.Event().wait()


async def _gone() -> Any:
    return {"type": "http.disconnect"}


async def test_an_answer_is_returned() -> None:
    assert await unless_disconnected(asyncio.sleep(0, "x"), _never) == "x"


async def test_a_disconnect_cancels_what_is_waited_for() -> None:
    working = asyncio.create_task(asyncio.sleep(10))
    with pytest.raises(ClientGone):
        await unless_disconnected(working, _gone)
    assert working.cancelled()


@pytest.mark.parametrize("deferred", [False, True])
async def test_what_came_while_the_waiting_was_cancelled_is_given_back(deferred: bool) -> None:
    dropped, begun = list[str](), asyncio.Event()

    async def stubborn() -> str:
        begun.set()
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            return "late"
        return "never"

    async def later(value: str) -> None:
        await asyncio.sleep(0)
        dropped.append(value)

    waiting = asyncio.create_task(unless_disconnected(stubborn(), _never, later if deferred else dropped.append))
    await begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert dropped == ["late"]


MB = 1 << 20


class Body:
    """A request whose body comes in pieces, when they are given."""

    def __init__(self, app: Any, label: str = "", parse: Callable[[bytes], Any] = len) -> None:
        self.pieces: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.parsed: list[int] = []
        caller = Caller(label, label)
        scope = {"app": app, "headers": [(b"content-type", b"application/json")], "state": {"caller": caller}}
        self.task = asyncio.create_task(parse_request(scope, self.pieces.get, 8 * MB, parse))

    async def send(self, size: int, more: bool = True) -> None:
        self.pieces.put_nowait({"type": "http.request", "body": b" " * size, "more_body": more})
        while not self.pieces.empty():
            await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_bodies_of_all_requests_are_bounded_and_small_ones_are_never_refused() -> None:
    app = create_app(PacedEngine(), Settings(max_held_mb=16))
    slow = [Body(app) for _ in range(3)]
    for each in slow[:2]:
        await each.send(8 * MB - 1000)
    await slow[2].send(BIG_BODY)  # which is not counted
    small = Body(app)
    await small.send(BIG_BODY, more=False)
    assert await small.task == BIG_BODY
    await slow[2].send(BIG_BODY * 3)
    with pytest.raises(HttpError, match="--max-held-mb") as refusal:
        await slow[2].task
    assert (refusal.value.status, refusal.value.headers["retry-after"]) == (503, "1")
    await slow[0].send(10, more=False)  # nobody else's request fails
    assert await slow[0].task == 8 * MB - 990
    slow[1].pieces.put_nowait({"type": "http.disconnect"})
    with pytest.raises(ClientGone):
        await slow[1].task
    again = [Body(app) for _ in range(2)]  # the bytes of those that have gone can be had again
    for each in again:
        await each.send(8 * MB, more=False)
    assert [await each.task for each in again] == [8 * MB] * 2


@pytest.mark.parametrize("ends", ["too large", "too slow", "parser"])
async def test_a_body_that_fails_gives_back_what_it_held(monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    app = create_app(PacedEngine(), Settings(max_held_mb=16))
    one = Body(app)
    await one.send(4 * MB)
    if ends == "too large":
        await one.send(8 * MB)
    elif ends == "too slow":
        monkeypatch.setattr(body_module, "SILENCE_SECONDS", 0.0)
        await one.send(1)
    else:
        one.task.cancel()
    with pytest.raises((HttpError, asyncio.CancelledError)):
        await one.task
    app.state.held.add(NOBODY, 16 * MB)  # all of it


BIG = BIG_BODY + 100
ALICE, BOB = Caller("a", "a"), Caller("b", "b")


class Parser:
    """Parses when it may, and says whose bodies it has begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.may_end = threading.Event()

    async def parse(self, held: Held, caller: Caller) -> str:
        held.add(caller, BIG - BIG_BODY)

        def parse(_: bytes) -> str:
            self.begun.append(caller.label)
            assert self.may_end.wait(PATIENCE)
            return caller.label

        return await held.parse(caller, b" " * BIG, parse)

    async def has_begun(self, label: str, times: int) -> None:
        await until(lambda: self.begun.count(label) == times)


async def test_one_big_body_is_parsed_at_a_time_and_keys_take_turns() -> None:
    held, parser = Held(MB), Parser()
    tasks = [asyncio.create_task(parser.parse(held, ALICE)) for _ in range(8)]
    await parser.has_begun("a", 1)
    tasks += [asyncio.create_task(parser.parse(held, BOB)) for _ in range(8)]
    await asyncio.sleep(0.05)
    assert parser.begun == ["a"]
    assert held._by_key == {"a": 800, "b": 800}
    tasks[7].cancel()  # it waits for a place
    with pytest.raises(asyncio.CancelledError):
        await tasks.pop(7)
    await until(lambda: held._by_key == {"a": 700, "b": 800})
    parser.may_end.set()
    assert await asyncio.gather(*tasks) == ["a"] * 7 + ["b"] * 8
    assert parser.begun == ["a", *["a", "b"] * 6, "b", "b"]
    assert not held._by_key


async def test_bytes_count_until_their_thread_ends_though_nobody_waits() -> None:
    held, parser = Held(MB), Parser()
    task = asyncio.create_task(parser.parse(held, NOBODY))
    await parser.has_begun("", 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    next_one = asyncio.create_task(parser.parse(held, NOBODY))
    await asyncio.sleep(0.05)
    assert held._by_key == {"": 200}
    assert parser.begun == [""]
    parser.may_end.set()
    assert await next_one == ""
    assert not held._by_key


async def test_bytes_count_in_every_iteration_between_the_parser_and_the_wait_for_a_turn() -> None:
    held, parser, counts = Held(MB), Parser(), list[dict[str, int]]()

    async def serve() -> None:
        await parser.parse(held, NOBODY)
        with held.waiting({}):
            await asyncio.sleep(0.01)

    serving = asyncio.create_task(serve())
    await parser.has_begun("", 1)
    parser.may_end.set()
    while not serving.done():
        counts.append(dict(held._by_key))
        await asyncio.sleep(0)
    assert len(counts) > 3
    assert all(each == {"": 100} for each in counts)
    assert not held._by_key


async def test_bytes_of_a_body_that_finds_no_place_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_threads._big, "_most_waiting", 2)
    held, parser = Held(MB), Parser()
    tasks = [asyncio.create_task(parser.parse(held, ALICE)) for _ in range(2)]
    await parser.has_begun("a", 1)
    with pytest.raises(EngineOverloadedError, match=r"1 requests wait for a thread \(big bodies\)"):
        await parser.parse(held, ALICE)
    await until(lambda: held._by_key == {"a": 200})
    parser.may_end.set()
    assert await asyncio.gather(*tasks) == ["a", "a"]
    assert not held._by_key


async def test_steps_of_a_big_request_take_the_turn_of_big_bodies() -> None:
    """Also those of tasks that the request's own task begins; a small request does not wait for them."""
    held, parser = Held(MB), Parser()
    parsing = asyncio.create_task(parser.parse(held, ALICE))
    await parser.has_begun("a", 1)

    async def small() -> str:
        await held.parse(BOB, b"{}", bytes)
        return await apart(str, "small")

    async def continued() -> str:
        this_request().add(BIG)
        return await apart(str, "continued")

    async def big() -> str:
        held.add(BOB, BIG - BIG_BODY)
        await held.parse(BOB, b" " * BIG, len)
        return await asyncio.create_task(apart(str, "big"))

    assert await asyncio.create_task(small()) == "small"
    waiting = [asyncio.create_task(each) for each in (continued(), big())]
    await asyncio.sleep(0.05)
    assert not any(each.done() for each in waiting)
    parser.may_end.set()
    assert await asyncio.gather(parsing, *waiting) == ["a", "continued", "big"]


async def test_the_loop_reads_one_piece_of_what_is_big_in_a_round() -> None:
    """And of two keys by turns."""
    rounds, read, pieces = 0, list[tuple[int, str]](), Pieces()

    def count() -> None:
        nonlocal rounds
        rounds += 1
        asyncio.get_running_loop().call_soon(count)

    async def turn(key: str) -> None:
        await pieces.turn(key)

    count()
    gone = asyncio.create_task(turn("a"))
    await asyncio.sleep(0)
    for key in ("a", "a", "b", "b"):
        pieces.add(key, lambda key=key: read.append((rounds, key)))
    gone.cancel()
    await until(lambda: len(read) == 4)
    assert [key for _, key in read] in (["a", "b", "a", "b"], ["b", "a", "b", "a"])
    assert len({at for at, _ in read}) == 4


async def test_a_refused_body_is_not_kept_by_its_error() -> None:
    app = create_app(PacedEngine(), Settings())
    one = Body(app, parse=decode_json)
    await one.send(4 * MB)  # white space
    await one.send(0, more=False)
    with pytest.raises(InvalidBodyError) as refused:
        await one.task
    assert not app.state.held._by_key
    error: BaseException | None = refused.value
    assert error is not None
    assert error.__context__ is error.__cause__ is None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    values = [value for frame in frames[1:] for value in frame.f_locals.values()]
    assert frames[1:]
    assert not [value for value in values if isinstance(value, (bytes, str, list)) and len(value) > 1000]


def test_one_key_has_half_of_what_is_held() -> None:
    held, alice, bob = Held(10), Caller("alice", "a"), Caller("bob", "b")
    held.add(alice, 5)
    with pytest.raises(HttpError, match="Your key has no memory left for waiting bodies"):
        held.add(alice, 1)
    held.add(bob, 4)
    with pytest.raises(HttpError, match="The server has no memory left for waiting bodies"):
        held.add(bob, 2)
    held.add(alice, -5)
    held.add(bob, 1)
    held.add(bob, -5)
    held.add(NOBODY, 10)


async def test_a_request_counts_until_its_prompt_is_made() -> None:
    """With what it continues; the first bytes do not count, and what is refused has not been counted."""
    held = Held(MB)
    scope: Any = {}
    await held.parse(NOBODY, b"{}", bytes)
    with held.waiting(scope):
        this_request().add(BIG_BODY)
        assert held._by_key == {"": 2}
        with pytest.raises(HttpError, match="--max-held-mb"):
            this_request().add(MB)
        assert held._by_key == {"": 2}
    assert not held._by_key
    await held.parse(NOBODY, b"{}", bytes)
    with held.waiting(scope) as request:
        request.add(BIG_BODY)
        assert await asyncio.create_task(WorkerThreads().prepare(lambda: "tokens")) == "tokens"
        assert not held._by_key
        request.add(BIG_BODY)
        assert not held._by_key, "its prompt is made"
    with held.waiting(scope) as request:
        goes_on = request.moved()
    assert held._by_key == {"": 2 + BIG_BODY}
    goes_on.release()
    goes_on.release()
    assert not held._by_key
    request_bytes.set(goes_on)
    with held.waiting(scope), held.waiting(scope):
        assert held._by_key == {"": 2 + BIG_BODY}
    assert not held._by_key
