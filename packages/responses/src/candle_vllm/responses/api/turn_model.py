# SPDX-License-Identifier: MIT
"""TurnModel: the model of one response, with what holds for all of its turns together.

`max_output_tokens` is a limit of the whole response: each turn gets what the turns before have left. `truncation: auto`
leaves the oldest turns out of what the model sees until the rest fits.
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

_STEPS = 16  # how often a prompt is shortened at most; each try costs what a prompt's tokens cost


class TokensSpentError(CandleVllmError):
    """Nothing is left of `max_output_tokens` for another turn."""


class TurnModel:
    """Answers the turns of one response.

    Args:
        model: answers tasks.
        max_tokens: of all turns together, or None.
        truncate: whether old turns may be left out.

    Attributes:
        entered: called when a turn has been taken by the engine, and will be answered.
        eyes: the model's.
    """

    def __init__(self, model: ChatModel, *, max_tokens: int | None = None, truncate: bool = False) -> None:
        self._model = model
        self._left = max_tokens
        self._truncate = truncate
        self.entered = lambda: None
        self.eyes = eyes_of(model)

    @asynccontextmanager
    async def stream(self, request: Task | Mapping[str, Any]) -> AsyncGenerator[AsyncIterator[Event]]:
        """The events of one turn; raises `TokensSpentError` where there is no token left for it."""
        assert isinstance(request, Task), "turns are asked for by tasks"
        if self._left is not None:
            if self._left < 1:
                raise TokensSpentError("max_output_tokens were spent on earlier turns")
            request = replace(request, sampling={**request.sampling, "max_tokens": self._left})
        async with AsyncExitStack() as stack:
            events = await self._enter(stack, request)
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
                if dropped >= len(units):
                    raise
                dropped = min(dropped + step, len(units))

    async def _counted(self, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
        async for event in events:
            if self._left is not None and isinstance(event, Usage) and event.final:
                self._left -= event.completion_tokens
            yield event


def check_number(count: int, paths: Paths) -> None:
    """Raises `InvalidParameterError` for so many messages where a task may not have them."""
    if not 0 < count <= MAX_MESSAGES:
        field = paths.fields.get("messages", "messages")
        told = f"have at most {MAX_MESSAGES} entries, not a list of {count}" if count else "not be empty"
        raise InvalidParameterError(f"{field} must {told}", field)


def fewer(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Without the oldest turns, where there are more messages than a task may have."""
    units = _units(messages)
    return _without(messages, units[: _least(units, len(messages) - MAX_MESSAGES)])


def _units(messages: Sequence[Message]) -> list[range]:
    """What may be left out, the oldest first: turns of a user with their answers, but for the last one.

    System messages stay.
    """
    starts = [place for place, message in enumerate(messages) if message.role == "user"]
    first = next((place for place, message in enumerate(messages) if message.role != "system"), len(messages))
    if starts and first < starts[0]:
        starts.insert(0, first)
    return [range(start, end) for start, end in pairwise(starts)]


def _least(units: Sequence[range], too_many: int) -> int:
    """How many of the oldest have to go for so many messages less."""
    gone = 0
    for count, unit in enumerate(units):
        if gone >= too_many:
            return count
        gone += len(unit)
    return len(units)


def _without(messages: Sequence[Message], units: Sequence[range]) -> tuple[Message, ...]:
    left_out = {place for unit in units for place in unit}
    return tuple(one for place, one in enumerate(messages) if place not in left_out or one.role == "system")
