# SPDX-License-Identifier: MIT
"""Options and result of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec.structs import force_setattr

from candle_vllm.core.arguments import ExplainedStruct
from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.setting_kinds import Integer, Number
from candle_vllm.openai.json_body import rules_below
from candle_vllm.openai.protocol.structured import format_of
from candle_vllm.responses.tools.approval import ApprovalPolicy, policy_fault
from candle_vllm.responses.tools.tool import ToolCall, ToolResult

_LoopEnd = Literal[
    "max_turns",
    "max_tool_calls",
    "timeout",
    "loop",  # the model repeated the same calls, with the same results
    "client_tools",  # the caller must run tools and return their results
    "approval",  # calls wait for approval
]
if TYPE_CHECKING:
    StopReason = FinishReason | _LoopEnd  # a `FinishReason` of the last answer, or the loop's own reason
else:
    StopReason = str  # msgspec cannot decode the union; a decoded text equals the enum member

OWN_FIELDS = frozenset({"messages", "stream", "stream_options", "n", "tools"})
_LIMITS: Mapping[str, Integer | Number] = {
    "max_turns": Integer(1, 1000),
    "max_tool_calls": Integer(0, 10_000),
    "timeout": Number(0, 86_400),
    "parallel_tools": Integer(1, 64),
    "tool_timeout": Number(0, 86_400),
    "max_result_chars": Integer(1, 10_000_000),
    "max_repeats": Integer(2, 100),
}
_UNLIMITED = ("max_tool_calls", "timeout", "tool_timeout")  # None sets no limit


class ConversationOptions(ExplainedStruct, frozen=True, kw_only=True):
    """Options of one call of `run_conversation`.

    Attributes:
        max_turns: maximum number of the model's turns, 1 to 1000.
        allowed_tools: names of the tools that the model may call, or patterns with "*"; None allows all. A session
            refuses a name without a matching tool.
        max_tool_calls: maximum number of calls that run, 0 to 10000; None sets no limit.
        timeout: seconds for the whole conversation; None sets no limit.
        approval: policy for calls that no server's `auto_approve` matches; None requires an approval for MCP tools.
        parallel_tools: maximum number of calls of one turn that run concurrently.
        tool_timeout: seconds for one call; None means the tool's own timeout, or 60.
        max_result_chars: characters of a tool's text that the model sees; a longer text is truncated, with a note.
        max_repeats: number of consecutive turns with equal calls and results that end the conversation, 2 to 100.
        request: further fields of a chat completion request (`temperature`, `max_tokens`, `tool_choice`, ...).
    """

    max_turns: int = 16
    allowed_tools: tuple[str, ...] | None = None
    max_tool_calls: int | None = None
    timeout: float | None = None
    approval: ApprovalPolicy | None = None
    parallel_tools: int = 8
    tool_timeout: float | None = None
    max_result_chars: int = 50_000
    max_repeats: int = 3
    request: Mapping[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in _LIMITS.items():
            value, whole = getattr(self, name), isinstance(kind, Integer)
            if value is None and name in _UNLIMITED:
                continue
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                what = "a whole number" if whole else "a number"
                raise InvalidParameterError(f"{name} must be {what}, not {value!r:.40}", name)
            if not kind.low <= value <= kind.high:
                said = f"{name} must lie between {kind.low} and {kind.high}, not {value!r:.40}"
                raise InvalidParameterError(said, name)
        if not isinstance(self.request, Mapping):
            raise InvalidParameterError(f"request must be an object, not {self.request!r:.40}", "request")
        form = self.request.get("response_format")
        if isinstance(form, type):  # another server cannot read a Python type
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
    """Tokens of one turn or of all; each turn counts its whole prompt. `cached_tokens` were in the prefix cache.

    Attributes:
        draft_tokens, accepted_draft_tokens: draft tokens that were verified, and those that were accepted.
        predicted_tokens, accepted_predicted_tokens: tokens of the predicted output, and those that were accepted.
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
    """Result of a call of `run_conversation`.

    Attributes:
        final_message: text of the model's last turn.
        tool_calls: results in the order of the calls; beyond 64 MB of output, only with the text that the model saw.
        completed: whether `stop_reason` is STOP.
        pending: calls without a result: the caller runs them, they wait for an approval, or a limit was reached first.
    """

    final_message: str
    tool_calls: tuple[ToolResult, ...] = ()
    turns_taken: int
    completed: bool
    stop_reason: StopReason
    pending: tuple[ToolCall, ...] = ()
    usage: ConversationUsage
