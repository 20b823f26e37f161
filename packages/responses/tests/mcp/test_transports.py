# SPDX-License-Identifier: MIT
"""What passes a watched stream: at a bounded pace, and its end is told."""

from __future__ import annotations

import time
from typing import Any

import anyio
import pytest
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCNotification, methods

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


def tool(name: Any = "a", **fields: Any) -> dict[str, Any]:
    return {"name": name, "inputSchema": {"type": "object"}, **fields}


@pytest.mark.parametrize(
    ("given", "mended"),
    [
        ({"name": "a"}, tool()),
        *[(tool(inputSchema=empty), tool()) for empty in (None, {}, True, {"type": ["object"]})],
        (tool(inputSchema={"anyOf": [{}]}), tool(inputSchema={"anyOf": [{}], "type": "object"})),
        (tool(inputSchema={"$ref": "#/x"}), tool(inputSchema={"$ref": "#/x", "type": "object"})),
        *[(tool(**{name: 3}), tool()) for name in ("title", "description", "icons", "annotations", "_meta")],
        *[(tool(outputSchema=bad), tool()) for bad in (3, {}, {"type": "string"})],
        (tool(execution={"taskSupport": "sometimes"}, title="A"), tool(title="A")),
        *[(tool(inputSchema=bad), None) for bad in (False, 3, {"type": "string"}, {"properties": []})],
        *[(bad, None) for bad in (None, 3, [], tool(name=None), tool(name=3), {})],
    ],
)  # fmt: skip
def test_a_tool_that_does_not_fit_the_protocol_takes_no_other_with_it(given: Any, mended: Any) -> None:
    notes: list[str] = []
    result = {"tools": [tool("first"), given, tool("last")]}
    transports.mend(result, notes.append)
    methods.validate_server_result("tools/list", "2025-11-25", result)
    assert result["tools"] == [tool("first"), *([] if mended is None else [mended]), tool("last")]
    assert len(notes) == (mended is None)
    assert all("does not fit the protocol" in note for note in notes)


def test_floods_of_bad_tools_and_blocks_are_bounded() -> None:
    notes: list[str] = []
    result: dict[str, Any] = {"tools": [None] * 10_000, "content": [None] * 10_000}
    transports.mend(result, notes.append)
    assert (result["tools"], len(notes)) == ([], 21)
    assert notes[0] == "it lists 10000 tools at once; those after the first 2000 are left out"
    assert len(result["content"]) == 10_000, "what is left out is counted for the model"
    assert {block["text"] for block in result["content"][transports.MAX_MENDED :]} == {""}


async def test_rubbish_ends_it_when_nothing_else_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "MAX_RUBBISH", 3)
    send, receive = anyio.create_memory_object_stream[SessionMessage | Exception](100)
    ends: list[str] = []
    log: list[str] = []
    for item in (ValueError("a"), ValueError("b"), MESSAGE, ValueError("c"), ValueError("d"), ValueError("e"), MESSAGE):
        send.send_nowait(item)
    async with send, WatchedStream(receive, ends.append, log.append) as stream:
        assert len([item async for item in stream]) == 5
    assert ends == ["the server sent 3 consecutive items that are not messages of the protocol"]
    assert log[0] == "not a message of the protocol: a"
