"""WatchedTurns: a model whose turns belong to one HTTP request (between steps 2 and 10 of its life)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Scope

from candle_vllm.openai.events import Begun, Event, Head
from candle_vllm.responses.conversation.chat_model import ChatModel
from candle_vllm.server.observing.request_context import begin_generation


class WatchedTurns:
    """Passes turns on, and knows what the answer to the whole request begins with.

    Args:
        model: answers the turns.
        scope: of the HTTP request.

    Attributes:
        head: of the first turn, once it has begun: its id, time and names are those of the answer.
        entered: the engine has taken the first turn.
    """

    def __init__(self, model: ChatModel, scope: Scope) -> None:
        self._model = model
        self._scope = scope
        self._turns = 0
        self.head: Head | None = None
        self.entered = asyncio.Event()

    @asynccontextmanager
    async def stream(self, request: Mapping[str, Any]) -> AsyncGenerator[AsyncIterator[Event]]:
        """The events of one turn. Turns after the first have ids and times of their own."""
        self._turns += 1
        if self._turns > 1:
            request = {name: value for name, value in request.items() if name != "request_id"}
            begin_generation(self._scope)
        async with self._model.stream(request) as events:
            self.entered.set()
            yield self._read(events)

    async def _read(self, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
        async for event in events:
            if self.head is None and isinstance(event, Begun):
                self.head = event.head
            yield event
