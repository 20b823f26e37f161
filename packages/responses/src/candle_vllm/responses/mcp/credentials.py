"""What a client says about who it is: Basic credentials of the address, or a token that it gets by itself (OAuth)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx2

from candle_vllm.responses.mcp.secrets import OAuthClient

if TYPE_CHECKING:
    from mcp.shared.auth import OAuthClientInformationFull, OAuthToken

    from candle_vllm.responses.mcp.server_config import McpServerConfig


class _TokenMemory:
    """Keeps a token for as long as the program runs; it is written nowhere."""

    def __init__(self) -> None:
        self._tokens: OAuthToken | None = None
        self._client: OAuthClientInformationFull | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self._tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self._tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return self._client

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        self._client = client_info


def bare_address(url: str) -> str:
    """The address without user, password and fragment, as it is sent."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, parts.query, ""))


def http_auth(config: McpServerConfig) -> httpx2.Auth | None:
    """The credentials of a server's requests beside its headers, or None. One object serves all its connections."""
    if not config.url:
        return None
    if isinstance(config.auth, OAuthClient):
        return _oauth(config.url, config.auth)
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


def _oauth(url: str, client: OAuthClient) -> Any:
    from mcp.client.auth.extensions.client_credentials import ClientCredentialsOAuthProvider

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the SDK's of an issuer that is not given, of which our configuration speaks
        return ClientCredentialsOAuthProvider(
            bare_address(url),
            _TokenMemory(),
            client.client_id,
            client.client_secret,
            scope=" ".join(client.scopes) or None,
            issuer=client.issuer,
        )
