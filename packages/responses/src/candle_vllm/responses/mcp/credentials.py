"""What a client says about who it is: Basic credentials of the address, or a token that it gets by itself (OAuth)."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx2

from candle_vllm.responses.mcp.secrets import OAuthClient

if TYPE_CHECKING:
    from candle_vllm.responses.mcp.server_config import McpServerConfig


def bare_address(url: str) -> str:
    """The address without user, password and fragment, as it is sent."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, parts.query, ""))


def http_auth(config: McpServerConfig) -> httpx2.Auth | None:
    """The credentials of a server's requests beside its headers, or None. One object serves all its connections."""
    if not config.url:
        return None
    if isinstance(config.auth, OAuthClient):
        from candle_vllm.responses.mcp.oauth import client_credentials

        return client_credentials(config.auth, bare_address(config.url))
    parts = urlsplit(config.url)
    if parts.username is None:
        return None
    return httpx2.BasicAuth(unquote(parts.username), unquote(parts.password or ""))


def http_headers(config: McpServerConfig) -> dict[str, str]:
    """The headers of a server's requests, with a bearer token where one is configured."""
    headers = dict(config.headers)
    if isinstance(config.auth, str):
        headers["Authorization"] = f"Bearer {config.auth}"
    return headers
