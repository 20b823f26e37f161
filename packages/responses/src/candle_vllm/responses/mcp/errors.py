"""The failure of an MCP server as the program sees it; a model that calls its tools sees a `ToolError`."""

from __future__ import annotations

from candle_vllm.core.errors import CandleVllmError


class McpServerError(CandleVllmError):
    """A server could not be reached or talked to; the message names it and says why.

    Attributes:
        server: the server's name in the configuration.
        why: the message without the name.
    """

    def __init__(self, server: str, why: str) -> None:
        super().__init__(f"MCP server {server!r}: {why}")
        self.server = server
        self.why = why
