"""Tools whose calls are counted, whoever makes them: a chat request, `/v1/responses`, or `/v1/mcp/call`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import Report, Tool, ToolError, ToolOutput

Called = Callable[[str, str], object]  # told the server's name and how the call ended

_GRACE = 1.0  # seconds that a caller waits longer than the server's own limit, which then says what happened

logger = logging.getLogger(__name__)


class CountedRegistry(ToolRegistry):
    """The tools of MCP servers.

    Args:
        called: told of every call when it has ended.
    """

    def __init__(self, called: Called) -> None:
        super().__init__()
        self._called = called

    def replace(self, server: str, tools: Sequence[Tool]) -> tuple[str, ...]:
        """As of the registry; the calls of the tools are counted."""
        return super().replace(server, [CountedTool(tool, self._called) for tool in tools])


class CountedTool:
    """A tool of an MCP server, with a line in the log and a count for each call; neither has its arguments."""

    def __init__(self, tool: Tool, called: Called) -> None:
        self._tool = tool
        self._called = called
        self.definition = tool.definition
        own: float | None = getattr(tool, "timeout", None)
        self.timeout = None if own is None else own + _GRACE

    async def run(self, arguments: Mapping[str, Any], report: Report) -> ToolOutput:
        """Runs the tool once."""
        status, started = "failed", time.monotonic()
        try:
            output = await self._tool.run(arguments, report)
            status = "failed" if output.is_error else "completed"
            return output
        except ToolError as error:
            status = error.status
            raise
        except BaseException as error:
            status = "failed" if isinstance(error, Exception) else "cancelled"
            raise
        finally:
            logger.info("MCP tool %s: %s after %.2f s", self.definition.name, status, time.monotonic() - started)
            self._called(self.definition.server or "", status)
