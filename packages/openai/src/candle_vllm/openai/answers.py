"""How one request's answers are to be read, and the reading of one choice: pieces of text -> deltas (step 10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.engine.request import FinishReason, TokenOutput
from candle_vllm.openai.formats.binding import BoundLayout, SpecialText
from candle_vllm.openai.formats.events import CallArguments, CallEnd, CallStart, Event, TextPiece
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.protocol.chat import ChatDelta, FunctionCallDelta, ToolCallDelta

TOOL_CALLS = "tool_calls"  # the finish reason of an answer that calls tools


@dataclasses.dataclass(frozen=True)
class AnswerPlan:
    """What the answers to one request may hold.

    Attributes:
        bound: the model's layout; None where the text is the answer as it is.
        tools: what may be called: name -> schema of the arguments; None where calls are not looked for.
        held: calls are held to their form by a grammar.
        lazy: it begins with the call.
        most_calls: further calls are left out; None is no limit.
        in_reasoning: the prompt has opened the thoughts.
        behind_reasoning: the prompt has closed the thoughts; white space at the beginning belongs to it.
        show_reasoning: thoughts are part of the answer.
        show_special_tokens: the names of special tokens are part of the text.
        special_tokens: the engine's text has the names of special tokens in it.
    """

    bound: BoundLayout | None = None
    tools: Mapping[str, Mapping[str, Any]] | None = None
    held: bool = False
    lazy: bool = False
    most_calls: int | None = None
    in_reasoning: bool = False
    behind_reasoning: bool = False
    show_reasoning: bool = True
    show_special_tokens: bool = False
    special_tokens: bool = False

    @property
    def may_reason(self) -> bool:
        """Whether an answer can have thoughts."""
        return self.bound is not None and self.bound.layout.reasoning is not None

    def reader(self) -> AnswerReader:
        """For one choice."""
        return AnswerReader(self)


class AnswerReader:
    """Reads the pieces of one choice.

    Attributes:
        reasoning_tokens: tokens that were thoughts, or the marks around them.
        hides: the last piece was thoughts, and those are not shown.
    """

    def __init__(self, plan: AnswerPlan) -> None:
        self.reasoning_tokens = 0
        self.hides = False
        self._last_call_is_whole = False
        self._plan = plan
        self._parser: OutputParser | None = None
        self._special: SpecialText | None = None
        if plan.bound is not None:
            self._parser = OutputParser(
                plan.bound.layout,
                tools=plan.tools,
                in_reasoning=plan.in_reasoning,
                behind_reasoning=plan.behind_reasoning,
                held=plan.held,
                lazy=plan.lazy,
                most_calls=plan.most_calls,
                names=plan.bound.shown,
                shown=plan.bound.shown if plan.show_special_tokens else None,
            )
            if plan.special_tokens:
                self._special = SpecialText(plan.bound, keep=plan.show_special_tokens)

    def read(self, piece: TokenOutput) -> list[ChatDelta]:
        """What is new."""
        parser = self._parser
        if parser is None:
            return [ChatDelta(content=piece.text)] if piece.text else []
        before = parser.in_reasoning
        text = piece.text if self._special is None else self._special.add(piece.text, piece.special_tokens)
        events = parser.feed(text)
        if piece.finish_reason is not None:
            if self._special is not None:
                events += parser.feed(self._special.finish())
            events += parser.finish(piece.finish_reason is FinishReason.STOP and piece.stop_reason is None)
        thought = before or parser.in_reasoning
        self.reasoning_tokens += len(piece.token_ids) if thought else 0
        self.hides = thought and not self._plan.show_reasoning
        for event in events:
            if isinstance(event, CallEnd):
                self._last_call_is_whole = event.whole
        return [delta for event in events if (delta := self._delta(event)) is not None]

    def finish_reason(self, piece: TokenOutput) -> str:
        """Why the choice ended, in OpenAI's words.

        A text that was cut is `length` even where it has calls, and `stop` where a stop string cut its last call.
        """
        assert piece.finish_reason is not None
        called = self._parser is not None and self._parser.num_calls > 0
        if (
            called
            and (piece.stop_reason is None or self._last_call_is_whole)
            and piece.finish_reason is FinishReason.STOP
        ):
            return TOOL_CALLS
        return piece.finish_reason.value

    def _delta(self, event: Event) -> ChatDelta | None:
        if isinstance(event, TextPiece):
            if event.kind == "content":
                return ChatDelta(content=event.text)
            return ChatDelta(reasoning_content=event.text) if self._plan.show_reasoning else None
        if isinstance(event, CallStart):
            function = FunctionCallDelta(name=event.name, arguments="")
            call = ToolCallDelta(index=event.index, id=event.id, type="function", function=function)
            return ChatDelta(tool_calls=(call,))
        if isinstance(event, CallArguments):
            function = FunctionCallDelta(arguments=event.text)
            return ChatDelta(tool_calls=(ToolCallDelta(index=event.index, function=function),))
        return None
