# SPDX-License-Identifier: MIT
"""What passes a watched stream: at a bounded pace, and its end is told."""

from __future__ import annotations

import time

import anyio
import pytest
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCNotification

from candle_vllm.responses.mcp import transports
from candle_vllm.responses.mcp.transports import CLOSED, WatchedStream

MESSAGE = SessionMessage(JSONRPCNotification(jsonrpc="2.0", method="notifications/x"))


async def test_a_flood_of_messages_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "MAX_PER_SECOND", 20)
    send, receive = anyio.create_memory_object_stream[SessionMessage | Exception](100)
    ends: list[str] = []
    for _ in range(30):
        send.send_nowait(MESSAGE)
    send.close()
    began = time.monotonic()
    async with WatchedStream(receive, ends.append, print) as stream:
        assert len([item async for item in stream]) == 30
    assert time.monotonic() - began > 0.9
    assert ends[0] == CLOSED


async def test_rubbish_ends_it_when_nothing_else_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "MAX_RUBBISH", 3)
    send, receive = anyio.create_memory_object_stream[SessionMessage | Exception](100)
    ends: list[str] = []
    log: list[str] = []
    for item in (ValueError("a"), ValueError("b"), MESSAGE, ValueError("c"), ValueError("d"), ValueError("e"), MESSAGE):
        send.send_nowait(item)
    async with send, WatchedStream(receive, ends.append, log.append) as stream:
        assert len([item async for item in stream]) == 5
    assert ends == ["the server sent 3 things in a row that are no messages of the protocol"]
    assert log[0] == "not a message of the protocol: a"
