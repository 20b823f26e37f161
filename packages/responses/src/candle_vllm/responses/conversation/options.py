# SPDX-License-Identifier: MIT
"""What a caller says about a conversation, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec.structs import force_setattr

from candle_vllm.core.arguments import ExplainedStruct
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.protocol.structured import format_of
from candle_vllm.openai.validation import rules_below
from candle_vllm.responses.tools.approval import ApprovalPolicy, policy_fault
from candle_vllm.responses.tools.tool import ToolCall, ToolResult

StopReason = Literal[
    "stop",  # the model ended by itself
    "length",  # an answer was cut at max_tokens or the context
    "max_turns",
    "max_tool_calls",
    "timeout",
    "loop",  # the same calls with the same results came again and again
    "client_tools",  # calls of tools that the caller runs; their results go on
    "approval",  # calls that wait for somebody's agreement
]

OWN_FIELDS = frozenset({"messages", "stream", "stream_options", "n", "tools"})


class _Limit(NamedTuple):
    name: str
    low: int
    high: int
    kind: type = int
    optional: bool = False

    def check(self, value: object) -> None:
        if value is None and self.optional:
            return
        kinds = (int, float) if self.kind is float else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds):
            what = "a number" if self.kind is float else "a whole number"
            raise InvalidParameterError(f"{self.name} must be {what}, not {value!r:.40}", self.name)
        if not self.low <= value <= self.high:
            raise InvalidParameterError(
                f"{self.name} must lie between {self.low} and {self.high}, not {value!r:.40}", self.name
            )


_LIMITS = (
    _Limit("max_turns", 1, 1000),
    _Limit("max_tool_calls", 0, 10_000, optional=True),
    _Limit("timeout", 0, 86_400, float, optional=True),
    _Limit("parallel_tools", 1, 64),
    _Limit("tool_timeout", 0, 86_400, float, optional=True),
    _Limit("max_result_chars", 1, 10_000_000),
    _Limit("max_repeats", 2, 100),
)


class ConversationOptions(ExplainedStruct, frozen=True, kw_only=True):
    """How one call of `run_conversation` is answered.

    Attributes:
        max_turns: model turns, 1 to 1000.
        allowed_tools: names that the model may see; None is all, patterns with "*" are understood. A session
            refuses a name that it has no tool of.
        max_tool_calls: tools that may run in all, 0 to 10000; None is no limit beside `max_turns`.
        timeout: seconds for the whole; None is no limit.
        approval: who agrees before a tool runs.
        parallel_tools: calls of one turn run at the same time, at most this many (1: one after the other).
        tool_timeout: seconds for one call; None is the tool's own, or 60.
        max_result_chars: of a tool's text that the model sees; more is cut, with a note that says so.
        max_repeats: 2 to 100; so many turns in a row with the same calls and the same results end the conversation.
        request: further fields of a chat completion request (`temperature`, `max_tokens`, `tool_choice`, ...).
    """

    max_turns: int = 16
    allowed_tools: tuple[str, ...] | None = None
    max_tool_calls: int | None = None
    timeout: float | None = None
    approval: ApprovalPolicy = "never"
    parallel_tools: int = 8
    tool_timeout: float | None = None
    max_result_chars: int = 50_000
    max_repeats: int = 3
    request: Mapping[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for limit in _LIMITS:
            limit.check(getattr(self, limit.name))
        if not isinstance(self.request, Mapping):
            raise InvalidParameterError(f"request must be an object, not {self.request!r:.40}", "request")
        form = self.request.get("response_format")
        if isinstance(form, type):  # of which a server at the other end knows nothing
            with rules_below("response_format"):
                force_setattr(self, "request", {**self.request, "response_format": format_of(form)})
        taken = OWN_FIELDS & set(self.request)
        if taken:
            raise InvalidParameterError(f"request must not set {', '.join(sorted(taken))}: the session does", "request")
        names = self.allowed_tools
        if names is not None and not (
            isinstance(names, (tuple, list, set, frozenset)) and all(isinstance(name, str) for name in names)
        ):
            raise InvalidParameterError(f"allowed_tools must be a list of names, not {names!r:.60}", "allowed_tools")
        if (fault := policy_fault(self.approval)) is not None:
            raise InvalidParameterError(f"approval {fault}", "approval")


class ConversationUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of all turns together; a prompt counts again in every turn, `cached_tokens` of it were not computed.

    Attributes:
        draft_tokens, accepted_draft_tokens: draft tokens that were tried, and those that became output.
        predicted_tokens, accepted_predicted_tokens: of the text that was predicted, and those that stand in the output;
            for each turn.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    predicted_tokens: int = 0
    accepted_predicted_tokens: int = 0

    def __add__(self, other: ConversationUsage) -> ConversationUsage:
        return ConversationUsage(
            **{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__}
        )


class ConversationResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a call of `run_conversation` came to.

    Attributes:
        final_message: the model's last words, "" where it ended with calls alone.
        tool_calls: what came of each call, in the order of the model's asking. Once they have 64 MB of output, later
            ones keep the text that the model saw in its place.
        turns_taken: model turns.
        completed: the model ended by itself (`stop_reason` "stop").
        stop_reason: why it ended.
        pending: calls without a result: the caller's own tools, those that wait for agreement, or those for which a
            limit left no room.
        usage: tokens of all turns.
    """

    final_message: str
    tool_calls: tuple[ToolResult, ...] = ()
    turns_taken: int
    completed: bool
    stop_reason: StopReason
    pending: tuple[ToolCall, ...] = ()
    usage: ConversationUsage
