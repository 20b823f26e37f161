# SPDX-License-Identifier: MIT
"""Where the pieces of a request go: to who waits for them, or past it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from candle_vllm.core.engine.outputs import FinishReason, TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step import stream as stream_module
from candle_vllm.core.engine.step.stream import Inbox, TokenStream
from candle_vllm.core.errors import CandleVllmError, RequestAbortedError
from candle_vllm.core.sampling.params import SamplingParams
from tests.waiting import until


def _piece(text: str, finish: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(request_id="r", text=text, token_ids=(1,), finish_reason=finish)


def _stream(inbox: Inbox, abort: Callable[[], None] = lambda: None) -> TokenStream:
    return TokenStream(GenerationRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams()), abort, inbox)


async def _read(stream: TokenStream) -> list[str]:
    return [piece.text async for piece in stream]


async def test_a_shortcut_gets_what_is_waited_for_and_the_reader_the_rest() -> None:
    inbox = Inbox(asyncio.get_running_loop())
    stream, passed = _stream(inbox), list[str]()

    def take(piece: TokenOutput) -> bool:
        if piece.text != "declined":
            passed.append(piece.text)
        return piece.text != "declined"

    stream.shortcut(take)
    inbox.put(_piece("before"))  # nobody waits yet
    inbox.put(_piece("after it"))
    reader = asyncio.create_task(_read(stream))
    await until(lambda: inbox._arrival is not None)
    inbox.put(_piece("a"))
    assert passed == ["a"]  # at once
    inbox.put(_piece("declined"))
    inbox.put(_piece("behind"))  # the reader has not had its turn: the order holds
    await until(lambda: inbox._arrival is not None)
    inbox.put(_piece("b"))
    inbox.put(_piece("last", FinishReason.STOP))
    assert passed == ["a", "b"]
    assert await reader == ["before", "after it", "declined", "behind", "last"]


async def test_an_error_is_the_readers() -> None:
    inbox = Inbox(asyncio.get_running_loop())
    stream = _stream(inbox)
    stream.shortcut(lambda _: True)
    reader = asyncio.create_task(_read(stream))
    await asyncio.sleep(0)
    inbox.put(CandleVllmError("over"))
    assert str((await asyncio.gather(reader, return_exceptions=True))[0]) == "over"


async def test_nothing_passes_a_reader_that_was_cancelled() -> None:
    inbox = Inbox(asyncio.get_running_loop())
    passed, aborted = list[str](), list[bool]()
    stream = _stream(inbox, lambda: aborted.append(True))
    stream.shortcut(lambda piece: not passed.append(piece.text))
    reader = asyncio.create_task(_read(stream))
    await asyncio.sleep(0)
    reader.cancel()
    inbox.put(_piece("late"))
    await asyncio.gather(reader, return_exceptions=True)
    inbox.put(_piece("later"))
    assert not passed
    assert aborted == [True]


async def test_what_nobody_reads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "MAX_UNREAD", 4)
    inbox, aborted = Inbox(asyncio.get_running_loop()), list[str]()
    stream = _stream(inbox, lambda: aborted.append("aborted"))
    for number in range(9):
        inbox.put(_piece(str(number)))
    assert len(inbox._items) == 4
    assert [(await anext(stream)).text for _ in range(3)] == ["0", "1", "2"]
    assert not aborted
    with pytest.raises(RequestAbortedError, match="was not read: 4 pieces"):
        await anext(stream)
    assert aborted == ["aborted"]
    await stream.aclose()
    assert aborted == ["aborted"]
