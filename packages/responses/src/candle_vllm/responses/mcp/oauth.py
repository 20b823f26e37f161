"""OAuth client credentials for a server: a token is got when it asks for one, and again when that has run out."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import httpx2
from mcp.client.auth.extensions.client_credentials import ClientCredentialsOAuthProvider
from mcp.shared.exceptions import MCPDeprecationWarning

from candle_vllm.responses.mcp.secrets import OAuthClient

if TYPE_CHECKING:
    from mcp.shared.auth import OAuthClientInformationFull, OAuthToken


class _Memory:
    """Keeps the token as long as the connection lives; nothing is written to a disk."""

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


class _Provider(ClientCredentialsOAuthProvider):
    """Asks for the scopes of the configuration; the SDK would take those that the servers name in their place."""

    def __init__(self, client: OAuthClient, url: str) -> None:
        self._scopes = " ".join(client.scopes) or None
        super().__init__(
            server_url=url,
            storage=_Memory(),
            client_id=client.client_id,
            client_secret=client.client_secret,
            scope=self._scopes,
            issuer=client.issuer,
        )

    async def _perform_authorization(self) -> httpx2.Request:
        if self._scopes is not None:
            self.context.client_metadata.scope = self._scopes
        return await super()._perform_authorization()


def client_credentials(client: OAuthClient, url: str) -> httpx2.Auth:
    """What signs the requests to the MCP server at `url`; give it to an `httpx2.AsyncClient`."""
    with warnings.catch_warnings():
        # without an issuer the server chooses who gets the secret: mcp.json's documentation says so
        warnings.simplefilter("ignore", MCPDeprecationWarning)
        return _Provider(client, url)
