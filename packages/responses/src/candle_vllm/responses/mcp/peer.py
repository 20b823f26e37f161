# SPDX-License-Identifier: MIT
"""Peer: one MCP server, its log, and its errors as one sentence without secrets."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import httpx2
from mcp import MCPError
from mcp.client.streamable_http import StreamableHTTPError
from pydantic import ValidationError

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.responses.mcp.processes import inherited_secrets
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.server_values import redactor

logger = logging.getLogger(__name__)

MAX_LINES = 200  # lines of a log; the oldest are dropped
MAX_LINE_CHARS = 1000  # a longer line is truncated
MAX_SENTENCE_CHARS = 500
_INFORMATIVE = (httpx2.HTTPError, StreamableHTTPError, OSError, MCPError, ValidationError, ValueError)


class McpServerError(CandleVllmError):
    """A server could not be reached, or the connection failed; a call of a tool raises `ToolError` instead.

    `server` is its name in the configuration; `why` is the message without the name.
    """

    def __init__(self, server: str, why: str) -> None:
        super().__init__(f"MCP server {server!r}: {why}")
        self.server = server
        self.why = why


class Peer:
    """State that all connections to one server share.

    Attributes:
        config, server, public_only: as in `McpLink`.
        auth: credentials for HTTP requests, shared by all connections.
        redact: removes the secrets of the configuration from a text.
    """

    def __init__(
        self, config: McpServerConfig, server: Any = None, *, auth: httpx2.Auth | None = None, public_only: bool = False
    ) -> None:
        self.config = config
        self.server = server
        self.auth = auth
        self.public_only = public_only
        self.redact = redactor([*config.secrets(), *(inherited_secrets() if config.command is not None else ())])
        self._lines: deque[str] = deque(maxlen=MAX_LINES)

    def log(self, line: str) -> str:
        """Add a line to the server's log; return it without secrets and without control characters except tabs."""
        line = self.redact(line[: 4 * MAX_LINE_CHARS])
        clean = _cut("".join(char for char in line.rstrip() if char.isprintable() or char == "\t"), MAX_LINE_CHARS)
        if clean:
            self._lines.append(clean)
        return clean

    def note(self, line: str) -> None:
        """Add a line about the connection to the server's log, and to the program's log."""
        logger.info("MCP server %.100r: %s", self.config.name, self.log(line))

    def log_lines(self) -> list[str]:
        """Return the last lines, the oldest first."""
        return list(self._lines)

    def sentence(self, error: BaseException) -> str:
        """Return a sentence: why a connection could not be opened or was lost, or a request failed."""
        return _cut(" ".join(self.redact(self._sentence(leaf(error))).split()), MAX_SENTENCE_CHARS)

    def status_sentence(self, status: int) -> str:
        """Return a sentence that explains an HTTP status to the person who configured the server."""
        where = self._where
        if status in (401, 403):
            return f"{where} answered {status}: it needs credentials: set `headers` or `auth`"
        if status in (404, 405):
            return f"{where} answered {status}: there is no MCP server at this path: check the end of `url`"
        return f"{where} answered with HTTP status {status}"

    @property
    def _where(self) -> str:
        """The command, or the address without user, password, query and fragment."""
        if not self.config.url:
            return repr(self.config.command)
        parts = urlsplit(self.config.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def _sentence(self, error: BaseException) -> str:
        config = self.config
        if isinstance(error, httpx2.HTTPStatusError):
            return self.status_sentence(error.response.status_code)
        where = self._where
        if isinstance(error, httpx2.TimeoutException | TimeoutError):
            return f"{where} did not answer in time"
        if isinstance(error, httpx2.ConnectError):
            return f"nothing answers at {where} ({error}): is the server running?"
        if isinstance(error, httpx2.HTTPError):
            return f"the connection to {where} failed: {type(error).__name__} {error}".rstrip()
        if isinstance(error, OSError) and not config.url:
            if config.cwd is not None and error.filename is not None and str(error.filename) == str(config.cwd):
                return f"its folder {str(config.cwd)!r} does not exist or may not be entered: correct `cwd`"
            if isinstance(error, FileNotFoundError):
                return f"the command {config.command!r} was not found: install it, or give its full path in `command`"
            return f"the command {config.command!r} cannot be run: {error.strerror or error}"
        if isinstance(error, MCPError):
            return f"it answered: {error.message} (code {error.code})"
        if isinstance(error, ValidationError):
            return f"its answer does not fit the protocol: {error.errors()[0]['msg']} ({error.title})"
        text = str(error)
        if "input_value=" in text:  # pydantic's lines after the first show values, such as a token
            text = text.partition("\n")[0]
        return f"{type(error).__name__}: {text}"


def leaf(error: BaseException) -> BaseException:
    """Return the most informative error of a group; another error stays unchanged."""
    leaves = list(_leaves(error))
    return next((one for kind in _INFORMATIVE for one in leaves if isinstance(one, kind)), leaves[0])


def _leaves(error: BaseException) -> Iterable[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
