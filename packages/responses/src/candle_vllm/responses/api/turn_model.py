# SPDX-License-Identifier: MIT
"""TurnModel: the model of one response, with the limits that all of its turns share.

`max_output_tokens` limits the whole response: each turn gets the tokens that earlier turns and the context have left.
With `truncation: auto`, the oldest turns are left out of the prompt until the rest fits.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import Any

from msgspec.structs import replace

from candle_vllm.core.errors import CandleVllmError, InvalidParameterError, PromptTooLongError
from candle_vllm.openai.events import Event, Usage
from candle_vllm.openai.protocol.fields import MAX_MESSAGES
from candle_vllm.openai.task import Message, Paths, Task
from candle_vllm.responses.conversation.chat_model import ChatModel, eyes_of

_STEPS = 16  # maximum number of times that a prompt is shortened and tokenized again


class TokensSpentError(CandleVllmError):
    """No token of `max_output_tokens` is left for another turn."""


class TurnModel:
    """Answers the turns of one response.

    Args:
        max_tokens: maximum number of tokens of all turns together, or None.
        truncate: whether old turns may be left out.
    """

    def __init__(self, model: ChatModel, *, max_tokens: int | None = None, truncate: bool = False) -> None:
        self._model = model
        self._left = max_tokens
        self._truncate = truncate
        self.entered = lambda: None  # called when the engine has accepted a turn
        self.grew = False  # whether the prompt may have grown since the request, by turns or by results of tools
        self.eyes = eyes_of(model)

    @asynccontextmanager
    async def stream(self, request: Task | Mapping[str, Any]) -> AsyncGenerator[AsyncIterator[Event]]:
        """Yield the events of one turn; `TokensSpentError` if no token is left for it."""
        assert isinstance(request, Task), "turns are asked for by tasks"
        if self._left is not None:
            if self._left < 1:
                raise TokensSpentError("max_output_tokens were spent on earlier turns")
            request = replace(request, sampling={**request.sampling, "max_tokens": self._left})
        async with AsyncExitStack() as stack:
            events = await self._enter(stack, request)
            self.grew = True
            self.entered()
            yield self._counted(events)

    async def _enter(self, stack: AsyncExitStack, task: Task) -> AsyncIterator[Event]:
        units = _units(task.messages) if self._truncate else []
        dropped = _least(units, len(task.messages) - MAX_MESSAGES)
        step = -(-len(units) // _STEPS)
        while True:
            kept = replace(task, messages=_without(task.messages, units[:dropped])) if dropped else task
            check_number(len(kept.messages), task.paths)
            try:
                return await stack.enter_async_context(self._model.stream(kept))
            except PromptTooLongError:
                if dropped < len(units):
                    dropped = min(dropped + step, len(units))
                elif self.grew and task.sampling.get("max_tokens") is not None:  # now the context is the limit
                    task = replace(task, sampling={**task.sampling, "max_tokens": None})
                else:
                    raise

    async def _counted(self, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
        counted = 0
        async for event in events:
            if self._left is not None and isinstance(event, Usage):  # cumulative; some servers send no final counts
                self._left -= event.completion_tokens - counted
                counted = event.completion_tokens
            yield event


def check_number(count: int, paths: Paths) -> None:
    """Raise `InvalidParameterError` if a task may not have this number of messages."""
    if not 0 < count <= MAX_MESSAGES:
        field = paths.fields.get("messages", "messages")
        told = f"have at most {MAX_MESSAGES} entries, not a list of {count}" if count else "not be empty"
        raise InvalidParameterError(f"{field} must {told}", field)


def fewer(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages without the oldest turns, if there are more than a task may have."""
    units = _units(messages)
    return _without(messages, units[: _least(units, len(messages) - MAX_MESSAGES)])


def _units(messages: Sequence[Message]) -> list[list[int]]:
    """Return the places of messages that may be left out: each user's turn with its answers, except the last.

    System messages are never left out.
    """
    starts = [place for place, message in enumerate(messages) if message.role == "user"]
    first = next((place for place, message in enumerate(messages) if message.role != "system"), len(messages))
    if starts and first < starts[0]:
        starts.insert(0, first)
    return [[n for n in range(start, end) if messages[n].role != "system"] for start, end in pairwise(starts)]


def _least(units: Sequence[Sequence[int]], too_many: int) -> int:
    """Return the number of the oldest turns that must be left out to remove `too_many` messages."""
    gone = 0
    for count, unit in enumerate(units):
        if gone >= too_many:
            return count
        gone += len(unit)
    return len(units)


def _without(messages: Sequence[Message], units: Sequence[Sequence[int]]) -> tuple[Message, ...]:
    left_out = {place for unit in units for place in unit}
    return tuple(one for place, one in enumerate(messages) if place not in left_out)
