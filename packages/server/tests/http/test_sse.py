# SPDX-License-Identifier: MIT
"""EventStream alone: one write per tick, comments in silence, the end in every case."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from candle_vllm.core.engine.step.stream import PushStream, Receiver
from candle_vllm.server.http import sse
from candle_vllm.server.http.sse import DONE, KEEP_ALIVE, WRITE_PART, EventStream, StreamForm, data_event
from tests.waiting import skip, until

FORM = StreamForm(data_event, lambda failure: data_event(repr(failure).encode()))


class Connection:
    """An ASGI connection that records what is sent and can hang up."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.sent.append(message["body"])
            self.closed = not message["more_body"]


async def _run(chunks: AsyncIterator[bytes], connection: Connection, keep_alive: float = 15.0) -> None:
    stream = EventStream(chunks, FORM, keep_alive=keep_alive)
    await stream({"type": "http"}, connection.receive, connection.send)


class Source:
    """Chunks from a generator, and whether they were closed."""

    def __init__(self, make: Callable[[], AsyncGenerator[bytes, None]]) -> None:
        self._inner = make()
        self.closed = False

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> bytes:
        return await self._inner.__anext__()

    async def aclose(self) -> None:
        self.closed = True
        await self._inner.aclose()


async def test_chunks_that_are_ready_leave_in_one_write() -> None:
    async def burst() -> AsyncGenerator[bytes, None]:
        for number in range(100):
            yield b"%d" % number
        await asyncio.sleep(0.01)
        yield b"last"

    connection = Connection()
    await _run(burst(), connection)
    assert len(connection.sent) == 2
    assert b"".join(connection.sent).count(b"data: ") == 102
    assert connection.sent[-1] == b"data: last\n\n" + DONE
    assert connection.closed


async def test_silence_is_broken_by_comments() -> None:
    async def slow() -> AsyncGenerator[bytes, None]:
        await until(lambda: len(connection.sent) == 2)
        yield b"x"

    connection = Connection()
    await _run(slow(), connection, keep_alive=0.02)
    assert connection.sent[:2] == [KEEP_ALIVE, KEEP_ALIVE]
    assert connection.sent[-1].endswith(DONE)


async def test_a_failure_is_the_last_event() -> None:
    async def failing() -> AsyncGenerator[bytes, None]:
        yield b"x"
        raise ValueError("no")

    connection = Connection()
    await _run(failing(), connection)
    assert b"".join(connection.sent) == b"data: x\n\ndata: ValueError('no')\n\n"
    assert connection.closed


@pytest.mark.parametrize("begun", [True, False])
async def test_a_disconnect_closes_the_chunks(begun: bool) -> None:
    async def endless() -> AsyncGenerator[bytes, None]:
        while True:
            await asyncio.sleep(0.001 if begun else 10)
            yield b"x"

    source, connection = Source(endless), Connection()
    asyncio.get_running_loop().call_later(0.03, connection.gone.set)
    await asyncio.wait_for(_run(source, connection), 60)
    assert source.closed
    assert not connection.closed


async def test_a_disconnect_before_the_start_closes_the_chunks() -> None:
    async def endless() -> AsyncGenerator[bytes, None]:
        while True:
            await asyncio.sleep(0)
            yield b"x"

    source, connection = Source(endless), Connection()
    connection.gone.set()
    await asyncio.wait_for(_run(source, connection), 60)
    assert source.closed


async def test_cancellation_closes_the_chunks() -> None:
    async def silent() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(10)
        yield b"x"

    source = Source(silent)
    task = asyncio.create_task(_run(source, Connection()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed


async def test_a_failing_connection_closes_the_chunks() -> None:
    async def one() -> AsyncGenerator[bytes, None]:
        yield b"x"

    async def broken(_: Any) -> None:
        raise OSError("connection lost")

    source = Source(one)
    stream = EventStream(source, StreamForm(lambda chunk: chunk, lambda failure: b""))
    with pytest.raises(OSError, match="connection lost"):
        await stream({"type": "http"}, Connection().receive, broken)
    assert source.closed


class Noting(Source):
    """Chunks that want to know whether the client has them all."""

    def __init__(self, make: Callable[[], AsyncGenerator[bytes, None]]) -> None:
        super().__init__(make)
        self.taken = False

    def delivered(self) -> None:
        assert not self.closed
        self.taken = True


async def _two() -> AsyncGenerator[bytes, None]:
    yield b"x"
    yield b"y"


async def test_the_chunks_hear_that_the_client_has_everything() -> None:
    source, connection = Noting(_two), Connection()
    await _run(source, connection)
    assert source.taken
    assert connection.closed
    assert b"".join(connection.sent) == b"data: x\n\ndata: y\n\n" + DONE


async def test_a_client_that_leaves_with_the_last_bytes_has_not_everything() -> None:
    source, connection = Noting(_two), Connection()

    async def slow(message: Any) -> None:
        await connection.send(message)
        if message.get("body", b"").endswith(DONE):  # what was sent waits, and the client leaves
            connection.gone.set()
            await asyncio.sleep(0.01)

    await EventStream(source, StreamForm(data_event, lambda _: b""))({"type": "http"}, connection.receive, slow)
    assert source.closed
    assert not source.taken


async def test_a_stream_that_ends_too_late_has_not_delivered_everything() -> None:
    async def silent() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(10)
        yield b"x"

    source, connection = Noting(silent), Connection()
    stream = EventStream(source, StreamForm(data_event, lambda _: b"late"), deadline=time.monotonic() + 0.05)
    await stream({"type": "http"}, connection.receive, connection.send)
    assert b"".join(connection.sent) == b"late"
    assert source.closed
    assert not source.taken


class Direct:
    """A connection as the HTTP protocol offers it: what is written, and whether the client keeps up."""

    def __init__(self, connection: Connection) -> None:
        self._sent = connection.sent
        self.free = True

    def write(self, data: bytes) -> bool:
        assert data
        if self.free:
            self._sent.append(b"direct " + data)
        return self.free


class Pushed(PushStream[bytes]):
    """Chunks that are pushed by the test."""

    receiver: Receiver[bytes]
    closed = False

    def push(self, receiver: Receiver[bytes]) -> None:
        self.receiver = receiver
        self.holds: list[bool] = []

    def hold(self, held: bool) -> None:
        self.holds.append(held)

    def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def _pushed(
    connection: Connection, direct: Direct | None, **options: Any
) -> AsyncIterator[tuple[Pushed, asyncio.Task[None]]]:
    """A stream that has begun, and waits for chunks."""
    source = Pushed()
    stream = EventStream(source, FORM, **options)
    scope = {"type": "http", "extensions": {} if direct is None else {WRITE_PART: direct.write}}
    running = asyncio.create_task(stream(scope, connection.receive, connection.send))
    await until(lambda: stream._idle is not None)
    yield source, running
    await asyncio.wait_for(running, 60)
    assert source.closed


async def test_what_is_pushed_is_written_at_once_unless_something_waits_before_it() -> None:
    connection = Connection()
    direct = Direct(connection)
    async with _pushed(connection, direct) as (source, _):
        source.receiver.put([b"first"])
        source.receiver.put([b"a", b"b"])
        source.receiver.put([])
        assert connection.sent == [b"direct data: first\n\n", b"direct data: a\n\ndata: b\n\n"]
        direct.free = False
        source.receiver.put([b"slow"])
        direct.free = True
        source.receiver.put([b"behind"])
        assert len(connection.sent) == 2  # the order holds
        await until(lambda: len(connection.sent) == 3)
        source.receiver.put([b"last"])
        await until(lambda: len(connection.sent) == 4)
        source.receiver.end(None)
    assert connection.sent[2:] == [
        b"direct data: slow\n\ndata: behind\n\n",
        b"direct data: last\n\n",
        DONE,
    ]
    assert connection.closed


async def test_what_is_pushed_goes_through_the_layers_where_there_is_no_connection() -> None:
    connection = Connection()
    async with _pushed(connection, None) as (source, _):
        source.receiver.put([b"a"])
        source.receiver.put([b"b"])
        await until(lambda: connection.sent)
        source.receiver.put([b"c"])
        source.receiver.end(ValueError("no"))
    assert connection.sent == [b"data: a\n\ndata: b\n\n", b"data: c\n\ndata: ValueError('no')\n\n"]


async def test_a_chunk_that_cannot_be_encoded_ends_the_stream() -> None:
    connection = Connection()
    async with _pushed(connection, Direct(connection)) as (source, _):
        source.receiver.put([object()])  # type: ignore[list-item]
        source.receiver.put([b"late"])
    assert b"TypeError" in connection.sent[-1]
    assert connection.closed


async def test_what_is_pushed_is_held_while_the_client_does_not_keep_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_BUFFERED", 100)
    connection = Connection()
    async with _pushed(connection, None) as (source, _):
        while True not in source.holds:
            source.receiver.put([b"x" * 10])
        await until(lambda: not source.holds[-1])
        source.receiver.end(None)
    assert connection.sent[0].count(b"data: x") == 6  # the first that are more than 100 bytes
    assert source.holds[:2] == [True, False]


async def test_a_disconnect_ends_what_is_pushed() -> None:
    connection = Connection()
    async with _pushed(connection, Direct(connection)) as (source, running):
        source.receiver.put([b"x"])
        connection.gone.set()
        await running
        source.receiver.put([b"late"])
    assert connection.sent == [b"direct data: x\n\n"]


async def test_what_is_pushed_breaks_the_silence() -> None:
    connection = Connection()
    async with _pushed(connection, Direct(connection), keep_alive=30) as (source, _):
        for _ in range(20):
            await skip(10)
            source.receiver.put([b"x"])
        await skip(31)
        await until(lambda: KEEP_ALIVE in connection.sent[-1])
        source.receiver.put([b"y"])
        source.receiver.end(None)
    before, comment, after = b"".join(connection.sent).partition(KEEP_ALIVE)
    assert comment
    assert after == b"direct data: y\n\n" + DONE
    assert before.count(b"data: x") == 20
