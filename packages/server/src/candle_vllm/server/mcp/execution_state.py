# SPDX-License-Identifier: MIT
"""State of a chat request whose tools this server runs: tokens, calls, and the text of the last turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from candle_vllm.core.engine.outputs import DRAFT_COUNTS, FinishReason
from candle_vllm.openai.chat_answers import Told, wire_usage
from candle_vllm.openai.events import Usage as Counts
from candle_vllm.openai.protocol.chat import ServerToolCall
from candle_vllm.openai.protocol.usage import Usage
from candle_vllm.responses.conversation import events
from candle_vllm.responses.conversation.options import ConversationUsage
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import ToolCall

NOT_RUN = "not_run"
CONTEXT = "context_length"


class ExecutionState:
    """The state, which is updated with each event of the conversation.

    Args:
        registry: knows the server of each tool.
        reasons: whether the model may reason, so that reasoning tokens are counted.
        told: further counts that the usage contains.

    Attributes:
        finish_reason: finish reason of the whole answer; "" while it is in progress.
        limit: the server's limit that ended the answer, or UNSET.
        turns: number of turns that have ended.
        text, thoughts, logprobs: output of the last turn.
    """

    def __init__(self, registry: ToolRegistry, *, reasons: bool, told: Told = Told()) -> None:  # noqa: B008  # immutable
        self._registry = registry
        self._reasons, self._told = reasons, told
        self._usage = ConversationUsage()
        self._calls: dict[str, ServerToolCall] = {}  # by id, in the model's order
        self.finish_reason = ""
        self.limit: str | UnsetType = UNSET
        self.turns = 0
        self.text = ""
        self.thoughts = ""
        self.logprobs: list[Any] = []

    def add(self, event: events.Event) -> None:
        """Update the state with an event."""
        match event:
            case events.TurnStarted():
                self.text, self.thoughts, self.logprobs = "", "", []
            case events.TextDelta():
                self.text += event.text
                self.logprobs += event.logprobs
            case events.ReasoningDelta():
                self.thoughts += event.text
            case events.TurnFinished():
                self.turns += 1
                self._usage += event.usage
                self._ask(event.message.get("tool_calls") or ())
            case events.ToolFinished():
                result = event.result
                self._note(result.call, result.status, result.seconds, result.server)
            case events.ConversationFinished():
                reason = event.result.stop_reason
                if isinstance(reason, FinishReason):
                    self.end(reason)
                else:
                    self.end(FinishReason.LENGTH, limit=reason)
            case _:
                pass

    def end(self, reason: FinishReason, limit: str | UnsetType = UNSET) -> None:
        """End the conversation."""
        self.finish_reason, self.limit = reason.value, limit

    @property
    def calls(self) -> tuple[ServerToolCall, ...] | UnsetType:
        """All calls, for the answer; UNSET without calls."""
        return tuple(self._calls.values()) or UNSET

    @property
    def usage(self) -> Usage:
        """Tokens of all turns."""
        total = self._usage
        counts = Counts(
            prompt_tokens=total.prompt_tokens,
            completion_tokens=total.completion_tokens,
            cached_tokens=total.cached_tokens,
            reasoning_tokens=total.reasoning_tokens if self._reasons else None,
            **{name: getattr(total, name) for name in DRAFT_COUNTS},
            final=True,
        )
        return wire_usage(counts, self._told)

    def _ask(self, calls: Sequence[dict[str, Any]]) -> None:
        for call in calls:
            function = call["function"]
            self._note(ToolCall(id=call["id"], name=function["name"], arguments=function["arguments"]), NOT_RUN)

    def _note(self, call: ToolCall, status: str, seconds: float = 0.0, server: str | None = None) -> None:
        entry = self._registry.entry(call.name) if server is None else None
        if entry is not None:
            server = entry.definition.server
        self._calls[call.id] = ServerToolCall(
            server=server, name=call.name, arguments=call.arguments, status=status, seconds=round(seconds, 3)
        )
