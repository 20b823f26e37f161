"""Who may run which tool: never asked, always asked, by tool, or by a callback."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from typing import Literal

from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition


class Approval(StrEnum):
    """The answer to whether a call may run."""

    ALLOW = "allow"
    DENY = "deny"
    PENDING = "pending"
    """Nobody could be asked: the conversation stops before the call and can be taken up with an answer."""


Ask = Callable[[ToolCall, ToolDefinition], Awaitable[Approval]]
Rule = Literal["never", "always"]
ApprovalPolicy = Rule | Mapping[str, Rule] | Ask
"""When somebody must agree before a tool runs: "never" (all run), "always" (none runs: each call is pending), a rule
for each tool by its name with "*" for the others (absent: "always"), or a callback that decides each call."""


async def decide(policy: ApprovalPolicy, call: ToolCall, definition: ToolDefinition) -> Approval:
    """What a policy says of a call."""
    if callable(policy):
        return await policy(call, definition)
    rule = policy if isinstance(policy, str) else policy.get(call.name, policy.get("*", "always"))
    return Approval.ALLOW if rule == "never" else Approval.PENDING
