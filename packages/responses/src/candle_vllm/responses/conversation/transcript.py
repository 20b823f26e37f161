# SPDX-License-Identifier: MIT
"""Transcript: the messages that a conversation adds.

A call is *open* until it has a result. When a run ends, no call that has begun is open: if its result is lost (by a
timeout or a cancellation), a tool message reports that, because running it again could repeat its effects. A call that
has not begun remains open and may run later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from candle_vllm.openai.task import Message, Part, TextPart
from candle_vllm.responses.tools.tool import ToolCall, ToolResult, cut

_SHORTEST = 200  # characters to which a result may be cut if the prompt is too long
LOST = "The call was cut off before its result was known. It may have done some or all of its work."


class Transcript:
    """The messages that a conversation adds to the given ones, and which calls of the last turn have begun.

    Args:
        open_calls: open calls of the last given assistant message, in its order.
        call_ids: ids of all calls in the given messages.
        images: number of images in the given messages; also an attribute, to which callers add images of results.
        earlier: the given messages; also an attribute, in which results are cut if the prompt is too long.
        ran: ids of calls whose results in `earlier` may be cut, because they ran here.
    """

    def __init__(
        self, open_calls: Sequence[ToolCall] = (), call_ids: Iterable[str] = (), images: int = 0,
        earlier: Sequence[Message] = (), ran: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self._calls = tuple(open_calls)
        self._ids = set(call_ids)
        self.earlier, self._ran = tuple(earlier), set(ran)
        self.images = images
        self._messages: tuple[Message, ...] = ()
        self._results: dict[str, Message] = {}
        self._begun: set[str] = set()

    @property
    def added(self) -> tuple[Message, ...]:
        """New messages: turns, and results in the order of the calls."""
        return (*self._messages, *(self._results[call.id] for call in self._calls if call.id in self._results))

    @property
    def grew(self) -> bool:
        return bool(self._messages or self._results)

    @property
    def open_calls(self) -> tuple[ToolCall, ...]:
        """Calls of the last assistant message that have no result, in its order."""
        return tuple(call for call in self._calls if call.id not in self._results)

    @property
    def call_ids(self) -> frozenset[str]:
        """Ids of all calls; a new call must have another id."""
        return frozenset(self._ids)

    def add_turn(self, message: Message) -> None:
        """Add the message of a turn; all earlier calls must have results."""
        assert not self.open_calls, "the calls of the last turn are open"
        self._messages = (*self.added, message)
        self._calls = tuple(ToolCall(id=one.id, name=one.name, arguments=one.arguments) for one in message.calls)
        self._ids |= {call.id for call in self._calls}
        self._results, self._begun = {}, set()

    def begin(self, call: ToolCall) -> None:
        self._begun.add(call.id)

    def add_result(self, result: ToolResult, parts: tuple[Part, ...] = ()) -> None:
        """Add the result of an open call, in any order; non-empty `parts` replace its text for the model."""
        assert result.call.id in {call.id for call in self.open_calls}, "the call is not open"
        self._ran.add(call_id := result.call.id)
        self._results[call_id] = Message(role="tool", parts=parts or (TextPart(result.text),), call_id=call_id)

    def shorten(self) -> int:
        """Cut results of calls that ran here to half of the longest text's length; return it, or 0 if all are short."""
        ours = (message for message in (*self.earlier, *self.added) if message.call_id in self._ran)
        parts = (part for message in ours for part in message.parts)
        most = max((len(part.text) for part in parts if isinstance(part, TextPart)), default=0) // 2
        if most < _SHORTEST:
            return 0
        self.earlier = tuple(self._cut(message, most) for message in self.earlier)
        self._messages = tuple(self._cut(message, most) for message in self._messages)
        self._results = {call_id: self._cut(message, most) for call_id, message in self._results.items()}
        return most

    def lost_calls(self) -> tuple[ToolCall, ...]:
        """Return the calls that have begun and have no result."""
        return tuple(call for call in self.open_calls if call.id in self._begun)

    def settle(self) -> None:
        """Add a result that reports the loss to each call that has begun and has no result."""
        for call in self.lost_calls():
            self._results[call.id] = Message(role="tool", parts=(TextPart(LOST),), call_id=call.id)

    def _cut(self, message: Message, most: int) -> Message:
        if message.call_id not in self._ran:
            return message
        parts = (TextPart(cut(part.text, most)) if isinstance(part, TextPart) else part for part in message.parts)
        return replace(message, parts=tuple(parts))
