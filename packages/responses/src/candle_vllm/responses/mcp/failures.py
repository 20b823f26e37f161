"""What went wrong with a server, as one sentence without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

import httpx2
from mcp import MCPError
from mcp.client.streamable_http import StreamableHTTPError
from pydantic import ValidationError

if TYPE_CHECKING:
    from candle_vllm.responses.mcp.server_config import McpServerConfig

MAX_CHARS = 500
_SHORTEST = 6  # characters of a value that is hidden; a shorter one stands in too many words
_TELLING = (httpx2.HTTPError, StreamableHTTPError, OSError, MCPError, ValidationError, ValueError)


class Redactor:
    """Takes the secrets of a server's configuration out of texts.

    Values of its environment and headers, its credentials, and the user, password and query of its address are secrets
    where they have six characters or more.
    """

    def __init__(self, config: McpServerConfig) -> None:
        values: set[str] = set()
        for value in _secrets(config):
            values |= {value, unquote(value), *value.split()}
        longest_first = sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, text: str) -> str:
        """The text with "***" for each secret."""
        return self._pattern.sub("***", text) if self._pattern else text

    def __repr__(self) -> str:
        return "Redactor()"


def _secrets(config: McpServerConfig) -> Iterable[str]:
    yield from config.env.values()
    yield from config.headers.values()
    if config.auth is not None:
        yield config.auth if isinstance(config.auth, str) else config.auth.client_secret
    if config.url:
        parts = urlsplit(config.url)
        yield from (parts.username or "", parts.password or "")
        yield from (value for _, value in parse_qsl(parts.query))


def leaf(error: BaseException) -> BaseException:
    """The failure that tells most among those of a group."""
    leaves = list(_leaves(error))
    for kind in _TELLING:
        for one in leaves:
            if isinstance(one, kind):
                return one
    return leaves[0]


def _leaves(error: BaseException) -> Iterable[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


def sentence(error: BaseException, config: McpServerConfig, redact: Redactor) -> str:
    """Why a connection could not be made or was lost."""
    error = leaf(error)
    text = _sentence(error, config)
    text = " ".join(redact(text).split())
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


def _sentence(error: BaseException, config: McpServerConfig) -> str:
    where = shown_url(config.url) if config.url else repr(config.command)
    if isinstance(error, httpx2.HTTPStatusError):
        return status_sentence(error.response.status_code, where)
    if isinstance(error, httpx2.TimeoutException | TimeoutError):
        return f"{where} did not answer in time"
    if isinstance(error, httpx2.ConnectError):
        return f"nothing answers at {where} ({error}): is the server running?"
    if isinstance(error, httpx2.HTTPError):
        return f"the connection to {where} failed: {type(error).__name__} {error}".rstrip()
    if isinstance(error, OSError) and not config.url:
        return _start_sentence(error, config)
    if isinstance(error, MCPError):
        return f"it answered: {error.message} (code {error.code})"
    if isinstance(error, ValidationError):
        return f"its answer does not fit the protocol: {error.errors()[0]['msg']} ({error.title})"
    return f"{type(error).__name__}: {error}"


def _start_sentence(error: OSError, config: McpServerConfig) -> str:
    if config.cwd is not None and error.filename is not None and str(error.filename) == str(config.cwd):
        return f"its folder {str(config.cwd)!r} is not there or may not be entered: correct `cwd`"
    if isinstance(error, FileNotFoundError):
        return f"the command {config.command!r} was not found: install it, or give its full path in `command`"
    return f"the command {config.command!r} cannot be run: {error.strerror or error}"


def status_sentence(status: int, where: str) -> str:
    """What an HTTP status of a server means for the one who configured it."""
    if status in (401, 403):
        return f"{where} answered {status}: it wants credentials; set `headers` or `auth` for it"
    if status in (404, 405):
        return f"{where} answered {status}: there is no MCP server at this path; look at the end of `url`"
    return f"{where} answered with HTTP status {status}"


def shown_url(url: str) -> str:
    """An address without user, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
