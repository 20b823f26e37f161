# SPDX-License-Identifier: MIT
"""The way of a request's pieces: through its sink to a receiver, or to an iterator at the end of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from candle_vllm.core.engine.outputs import FinishReason, TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step import stream as stream_module
from candle_vllm.core.engine.step.stream import RequestSink, TokenStream
from candle_vllm.core.errors import CandleVllmError, RequestAbortedError
from candle_vllm.core.sampling.params import SamplingParams


def _piece(text: str, finish: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(request_id="r", text=text, token_ids=(1,), finish_reason=finish)


def _stream(
    abort: Callable[[RequestSink], None] = lambda _: None, *, sequences: int = 1
) -> tuple[TokenStream, RequestSink]:
    sink = RequestSink(asyncio.get_running_loop(), sequences, abort)
    request = GenerationRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams(n=sequences))
    return TokenStream(request, sink), sink


class Noting:
    """A receiver that notes what it is given."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.ends: list[Exception | None] = []

    def put(self, items: Sequence[TokenOutput]) -> None:
        self.texts += [piece.text for piece in items]

    def end(self, error: Exception | None = None) -> None:
        self.ends.append(error)


async def test_a_receiver_gets_everything_in_order_and_at_once() -> None:
    stream, sink = _stream(sequences=2)
    found = Noting()
    sink.put(_piece("before"))  # there is no receiver yet
    sink.put(_piece("and", FinishReason.STOP))
    stream.push(found)
    assert found.texts == ["before", "and"]
    sink.put(_piece("a"))
    assert found.texts[2:] == ["a"]
    assert not found.ends
    sink.put(_piece("last", FinishReason.STOP))
    assert found.ends == [None]
    sink.put(_piece("late"))
    assert (found.texts[3:], found.ends) == (["last"], [None])


async def test_what_comes_while_it_is_held_is_pushed_afterwards_as_far_as_it_may() -> None:
    stream, sink = _stream()

    class Slow(Noting):
        def put(self, items: Sequence[TokenOutput]) -> None:
            super().put(items)
            if len(self.texts) in (1, 3):
                stream.hold(True)

    found = Slow()
    stream.push(found)
    for text in "abcd":
        sink.put(_piece(text))
    sink.put(_piece("last", FinishReason.STOP))
    assert (found.texts, found.ends) == (["a"], [])
    stream.hold(False)
    assert (found.texts, found.ends) == (["a", "b", "c"], [])
    stream.hold(False)
    assert (found.texts, found.ends) == (["a", "b", "c", "d", "last"], [None])


async def test_an_iterator_gets_the_same() -> None:
    stream, sink = _stream()
    reader = asyncio.ensure_future(_read(stream))
    for text in "abc":
        sink.put(_piece(text))
        await asyncio.sleep(0)
    sink.put(_piece("last", FinishReason.STOP))
    assert await reader == ["a", "b", "c", "last"]
    assert await _read(stream) == []


@pytest.mark.parametrize("pushed", [False, True])
async def test_an_error_ends_the_stream(pushed: bool) -> None:
    stream, sink = _stream()
    found = Noting()
    if pushed:
        stream.push(found)
    sink.put(_piece("a"))
    sink.put(CandleVllmError("over"))
    sink.put(_piece("late"))
    if pushed:
        assert (found.texts, [str(end) for end in found.ends]) == (["a"], ["over"])
        return
    assert (await anext(stream)).text == "a"
    with pytest.raises(CandleVllmError, match="over"):
        await anext(stream)
    assert await _read(stream) == []


@pytest.mark.parametrize("way", ["closed", "dropped", "closed unread", "dropped unread", "ended"])
async def test_a_stream_aborts_its_request_once(way: str) -> None:
    aborted: list[RequestSink] = []
    stream, sink = _stream(aborted.append)
    if "unread" not in way:
        sink.put(_piece("a", FinishReason.STOP if way == "ended" else None))
        await anext(stream)
    if way.startswith("closed"):
        await stream.aclose()
        await stream.aclose()
    del stream
    assert aborted == ([] if way == "ended" else [sink])
    sink.put(_piece("late"))


async def test_nothing_is_pushed_behind_the_end_of_a_closed_stream() -> None:
    stream, sink = _stream()
    found = Noting()
    stream.push(found)
    stream.close()
    sink.put(_piece("late"))
    sink.put(CandleVllmError("over"))
    assert not found.texts
    assert not found.ends


async def test_a_receiver_that_closes_its_stream_gets_nothing_more() -> None:
    stream, sink = _stream()

    class Closing(Noting):
        def put(self, items: Sequence[TokenOutput]) -> None:
            super().put(items)
            stream.close()

    found = Closing()
    for text in "ab":
        sink.put(_piece(text))
    sink.put(_piece("last", FinishReason.STOP))
    stream.push(found)
    assert found.texts == ["a"]


async def test_a_reader_that_is_cancelled_aborts() -> None:
    aborted: list[RequestSink] = []
    stream, sink = _stream(aborted.append)
    reader = asyncio.ensure_future(_read(stream))
    await asyncio.sleep(0)
    reader.cancel()
    sink.put(_piece("late"))
    await asyncio.gather(reader, return_exceptions=True)
    assert aborted == [sink]
    assert await _read(stream) == []


async def test_a_reader_ends_when_another_task_closes_its_stream() -> None:
    stream, _ = _stream()
    reader = asyncio.ensure_future(_read(stream))
    await asyncio.sleep(0)
    await stream.aclose()
    assert await reader == []


async def _read(stream: TokenStream) -> list[str]:
    return [piece.text async for piece in stream]


@pytest.mark.parametrize("more", [False, True])
async def test_a_held_receiver_gets_one_end(monkeypatch: pytest.MonkeyPatch, more: bool) -> None:
    """Also if it is held again, or if the engine goes on behind more outputs than may wait."""
    monkeypatch.setattr(stream_module, "MAX_UNREAD", 4)
    stream, sink = _stream()
    found = Noting()
    stream.push(found)
    stream.hold(True)
    for number in range(9 if more else 2):
        sink.put(_piece(str(number)))
    if not more:
        sink.put(_piece("last", FinishReason.STOP))
    for held in (False, True, False):
        stream.hold(held)
    if more:
        sink.put(_piece("last", FinishReason.STOP))
    assert found.texts == (list("01234") if more else ["0", "1", "last"])
    assert len(found.ends) == 1


@pytest.mark.parametrize("begun", [False, True])
async def test_what_nobody_reads_is_bounded(monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    monkeypatch.setattr(stream_module, "MAX_UNREAD", 4)
    aborted: list[RequestSink] = []
    stream, sink = _stream(aborted.append)
    if begun:
        sink.put(_piece("first"))
        await anext(stream)
    for number in range(9):
        sink.put(_piece(str(number)))
    assert [(await anext(stream)).text for _ in range(3)] == ["0", "1", "2"]
    assert not aborted
    with pytest.raises(RequestAbortedError, match="was not read: 4 outputs"):
        await _read(stream)
    assert await _read(stream) == []
    await stream.aclose()
    assert len(aborted) <= 1
