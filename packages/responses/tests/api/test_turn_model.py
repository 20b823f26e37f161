# SPDX-License-Identifier: MIT
"""The token limit of all turns of a response."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from candle_vllm.openai.events import Event
from candle_vllm.openai.task import Message, Paths, Task, TextPart
from candle_vllm.responses.api.turn_model import TokensSpentError, TurnModel
from candle_vllm.responses.conversation.http_chunks import ChunkReader


class Server:
    """A server that sends its usage with the chunks, as DeepSeek's does, and none after them."""

    @asynccontextmanager
    async def stream(self, request: Any) -> AsyncGenerator[AsyncIterator[Event]]:
        del request

        async def events() -> AsyncGenerator[Event]:
            reader = ChunkReader()
            for count, reason in ((1, None), (3, "stop")):
                choice = {"index": 0, "delta": {"content": "x"}, "finish_reason": reason}
                for event in reader.read({"choices": [choice], "usage": {"completion_tokens": count}}):
                    yield event

        yield events()


async def test_usage_beside_the_last_delta_counts_against_the_limit() -> None:
    model = TurnModel(Server(), max_tokens=6)
    task = Task(paths=Paths({}), messages=(Message(role="user", parts=(TextPart("a"),)),))
    for _ in range(2):
        async with model.stream(task) as events:
            assert [event async for event in events]
    with pytest.raises(TokensSpentError):
        async with model.stream(task):
            pass
