# SPDX-License-Identifier: MIT
"""Events of an answer -> Anthropic's events -> the whole message (step 10 of a request's life).

A whole message is joined from the events of a stream, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec.structs import replace

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.openai.anthropic import answers
from candle_vllm.openai.anthropic.tool_input import ToolInput, parsed_input
from candle_vllm.openai.events import Begun, CallBegun, CallText, Ended, Event, Head, Text, Thought
from candle_vllm.openai.events import Usage as Counts

_Kind = Literal["text", "thinking"]


class EventWriter:
    """Converts the events of one answer.

    One block is closed before the next begins. White space between blocks is omitted, because clients send blocks back
    in the next request, and this API refuses blank text blocks.

    Args:
        show_thinking: whether thinking blocks have their text; otherwise they are empty.
        context_bound: whether the context limits the answer, because `max_tokens` exceeds it.
    """

    def __init__(self, *, show_thinking: bool = True, context_bound: bool = False) -> None:
        self._show_thinking = show_thinking
        self._context_bound = context_bound
        self._counts: Counts | None = None
        self._index = -1
        self._open: _Kind | ToolInput | None = None
        self._space: tuple[_Kind, str] | None = None  # white space that may begin a block
        self._stop: answers.StopDelta | None = None
        self._begun = False

    def start(self, head: Head, counts: Counts) -> list[answers.MessageEvent]:
        """Return the events before the first token, which tell clients that the request runs.

        The number of cached prompt tokens is not known yet; the final counts have it.
        """
        self._begun = True
        name = "msg_" + head.id.removeprefix("chatcmpl-")
        message = answers.Message(id=name, model=head.model, content=(), usage=answers.Usage.of(counts))
        return [answers.MessageStart(message=message), answers.Ping()]

    def write(self, events: Sequence[Event]) -> list[answers.MessageEvent]:
        """Convert events of an answer with one choice."""
        return [made for event in events for made in self._written(event)]

    def _written(self, event: Event) -> list[answers.MessageEvent]:
        match event:
            case Text():
                return self._say("text", event.text) if event.text else []
            case Thought():
                return self._say("thinking", event.text)
            case CallText():
                assert isinstance(self._open, ToolInput)
                return self._json(self._open.feed(event.text))
            case CallBegun():
                block = answers.ToolUseBlock(id=event.id, name=event.name, input={})
                return [*self._close(), *self._begin(ToolInput(), block)]
            case Begun():
                assert self._counts is not None
                return [] if self._begun else self.start(event.head, self._counts)
            case Ended():
                self._stop = self._stopped(event)
                return self._close(cut=event.reason is not FinishReason.TOOL_CALLS)
            case Counts():
                self._counts = event
                if not event.final:
                    return []
                assert self._stop is not None
                return [answers.MessageDelta(delta=self._stop, usage=answers.Usage.of(event)), answers.MessageStop()]

    def _say(self, kind: _Kind, text: str) -> list[answers.MessageEvent]:
        if self._open == kind:
            return self._words(kind, text)
        if self._space is not None and self._space[0] == kind:
            text = self._space[1] + text
        if not text.strip():
            self._space = kind, text
            return []
        block = answers.TextBlock(text="") if kind == "text" else answers.ThinkingBlock(thinking="", signature="")
        if self._index >= 0:
            text = text.lstrip()
        return [*self._close(), *self._begin(kind, block), *self._words(kind, text)]

    def _words(self, kind: _Kind, text: str) -> list[answers.MessageEvent]:
        if kind == "text":
            return [answers.ContentBlockDelta(index=self._index, delta=answers.TextDelta(text=text))]
        if not self._show_thinking:
            return []
        return [answers.ContentBlockDelta(index=self._index, delta=answers.ThinkingDelta(thinking=text))]

    def _json(self, text: str) -> list[answers.MessageEvent]:
        return (
            [answers.ContentBlockDelta(index=self._index, delta=answers.InputJsonDelta(partial_json=text))]
            if text
            else []
        )

    def _begin(self, kind: _Kind | ToolInput, block: answers.ContentBlock) -> list[answers.MessageEvent]:
        self._index += 1
        self._open, self._space = kind, None
        return [answers.ContentBlockStart(index=self._index, content_block=block)]

    def _close(self, *, cut: bool = False) -> list[answers.MessageEvent]:
        """Close the open block; `cut` means that the answer ended here without completing a call."""
        kind, self._open, self._space = self._open, None, None
        if kind is None:
            return []
        events: list[answers.MessageEvent] = []
        if kind == "thinking":
            events.append(
                answers.ContentBlockDelta(index=self._index, delta=answers.SignatureDelta(signature=answers.SIGNATURE))
            )
        elif isinstance(kind, ToolInput):
            events += self._json(kind.finish(cut=cut))
        return [*events, answers.ContentBlockStop(index=self._index)]

    def _stopped(self, ended: Ended) -> answers.StopDelta:
        if ended.reason is FinishReason.STOP and isinstance(ended.stop, str):
            return answers.StopDelta(stop_reason="stop_sequence", stop_sequence=ended.stop)
        bound = ended.reason is FinishReason.LENGTH and self._context_bound
        return answers.StopDelta(stop_reason="model_context_window_exceeded" if bound else ended.reason.anthropic)


def join_message(events: Sequence[answers.MessageEvent]) -> answers.Message:
    """Join `events` to the whole message."""
    start = events[0]
    assert isinstance(start, answers.MessageStart)
    message, blocks = start.message, list[answers.ContentBlock]()
    deltas: list[list[answers.ContentBlockDelta]] = []
    for event in events:
        if isinstance(event, answers.ContentBlockStart):
            blocks.append(event.content_block)
            deltas.append([])
        elif isinstance(event, answers.ContentBlockDelta):
            deltas[event.index].append(event)
        elif isinstance(event, answers.MessageDelta):
            message = replace(
                message,
                stop_reason=event.delta.stop_reason,
                stop_sequence=event.delta.stop_sequence,
                usage=event.usage,
            )
    return replace(message, content=tuple(_filled(block, news) for block, news in zip(blocks, deltas, strict=True)))


def _filled(block: answers.ContentBlock, news: Sequence[answers.ContentBlockDelta]) -> answers.ContentBlock:
    deltas = [one.delta for one in news]
    if isinstance(block, answers.TextBlock):
        return answers.TextBlock(text="".join(one.text for one in deltas if isinstance(one, answers.TextDelta)))
    if isinstance(block, answers.ThinkingBlock):
        thoughts = "".join(one.thinking for one in deltas if isinstance(one, answers.ThinkingDelta))
        return answers.ThinkingBlock(thinking=thoughts, signature=answers.SIGNATURE)
    text = "".join(one.partial_json for one in deltas if isinstance(one, answers.InputJsonDelta))
    return replace(block, input=parsed_input(text))
