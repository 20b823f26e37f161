# SPDX-License-Identifier: MIT
"""Tools for these tests: of a function, with any name, server and schema."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from candle_vllm.responses.tools.tool import Report, ToolCall, ToolDefinition, ToolOutput

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
