# SPDX-License-Identifier: MIT
"""Tools for these tests: of a function, with any name, server and schema."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from candle_vllm.responses.tools.approval import Approval, ApprovalPolicy, decide
from candle_vllm.responses.tools.execution import Checked, check, denied, run
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import Report, ToolCall, ToolDefinition, ToolOutput, ToolResult

Work = Callable[[Mapping[str, Any], Report], Awaitable[Any]]


class FakeTool:
    """A tool that does what `work` does."""

    def __init__(self, name: str = "fake", work: Work | None = None, server: str | None = None, **fields: Any) -> None:
        self.definition = ToolDefinition(name=name, server=server, **{"original_name": name, **fields})
        self._work = work

    async def run(self, arguments: Mapping[str, Any], report: Report) -> ToolOutput:
        return ToolOutput.of_text("done") if self._work is None else await self._work(arguments, report)


def call(name: str = "fake", arguments: str = "{}") -> ToolCall:
    return ToolCall(id="c1", name=name, arguments=arguments)


async def execute(
    registry: ToolRegistry, asked: ToolCall, *, approval: ApprovalPolicy = "never", **options: Any
) -> ToolResult | Checked:
    """Check a call, decide by the approval policy, and run it; a `Checked` means that the approval is pending.

    `options` are those of `run`.
    """
    most = {name: options[name] for name in ("max_chars",) if name in options}
    checked = await check(registry, asked, **most)
    if isinstance(checked, ToolResult):
        return checked
    answer = await decide(approval, asked, checked.definition)
    if answer is Approval.PENDING:
        return checked
    if answer is Approval.DENY:
        return denied(checked, **most)
    return await run(checked, **options)
