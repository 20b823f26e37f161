# SPDX-License-Identifier: MIT
"""Which tool calls need approval: none, all, by a rule for each tool, or by the decision of a callback."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from typing import Any, Literal

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition


class Approval(StrEnum):
    """Decision whether a call may run."""

    ALLOW = "allow"
    DENY = "deny"
    PENDING = "pending"
    """There is no decision yet: the conversation stops before the call and can be resumed with a decision."""


Ask = Callable[[ToolCall, ToolDefinition], Awaitable[Approval] | Approval]
Rule = Literal["never", "always"]
ApprovalPolicy = Rule | Mapping[str, Rule] | Ask
"""When a tool call needs approval: "never" (every call runs), "always" (every call is pending), a mapping of tool names
to these rules, with "*" for other tools (default: "always"), or a callback that decides each call. Without a policy,
tools of MCP servers need approval, and other tools do not. A `ConversationLoop` asks its `auto_approve` first."""

_RULES = ("never", "always")


def policy_fault(policy: Any) -> str | None:
    """Return why a policy is invalid, or None."""
    if policy is None or callable(policy) or policy in _RULES:
        return None
    if not isinstance(policy, Mapping):
        return f"must be 'never', 'always', such a rule for each tool, or a callback, not {policy!r:.60}"
    wrong = next((name for name, rule in policy.items() if not isinstance(name, str) or rule not in _RULES), None)
    return None if wrong is None else f"must have the rule 'never' or 'always' for {wrong!r:.60}"


async def decide(policy: ApprovalPolicy | None, call: ToolCall, definition: ToolDefinition) -> Approval:
    """Decide by the policy whether a call may run; InvalidParameterError if its callback returns no `Approval`."""
    if policy is None:
        policy = "never" if definition.server is None else "always"
    if not callable(policy):
        rule = policy if isinstance(policy, str) else policy.get(call.name, policy.get("*", "always"))
        return Approval.ALLOW if rule == "never" else Approval.PENDING
    answer: Any = policy(call, definition)
    if inspect.isawaitable(answer):
        answer = await answer
    try:
        return Approval(answer)
    except ValueError:
        raise InvalidParameterError(
            f"the approval callback must return Approval.ALLOW, DENY or PENDING, not {answer!r:.60}", "approval"
        ) from None
