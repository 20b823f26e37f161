# SPDX-License-Identifier: MIT
"""An OAuth client gets its token from the authorization server that the MCP server names, and sends it there alone."""

from __future__ import annotations

import base64
from urllib.parse import parse_qs

import httpx2
import pytest

from candle_vllm.responses.mcp.http import http_auth
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.server_values import OAuthClient

URL = "https://mcp.test/mcp"
ISSUER = "https://auth.test"


class Servers:
    """An MCP server that wants a token, and an authorization server; notes what each was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(f"{request.method} {request.url}")
        path = request.url.path
        if request.url.host == "mcp.test" and path == "/mcp":
            if request.headers.get("authorization") == "Bearer issued":
                return httpx2.Response(200, text="in")
            return httpx2.Response(401, headers={"www-authenticate": "Bearer"})
        if request.url.host == "mcp.test" and path.startswith("/.well-known/oauth-protected-resource"):
            return httpx2.Response(200, json={"resource": URL, "authorization_servers": [ISSUER]})
        if request.url.host == "auth.test" and path.startswith("/.well-known/oauth-authorization-server"):
            return httpx2.Response(
                200,
                json={
                    "issuer": ISSUER,
                    "authorization_endpoint": f"{ISSUER}/authorize",
                    "token_endpoint": f"{ISSUER}/token",
                    "response_types_supported": ["code"],
                },
            )
        if request.url.host == "auth.test" and path == "/token":
            form = parse_qs(request.content.decode())
            assert form["grant_type"] == ["client_credentials"]
            assert form["scope"] == ["read write"]
            assert request.headers["authorization"] == "Basic " + base64.b64encode(b"me:hush").decode()
            return httpx2.Response(200, json={"access_token": "issued", "token_type": "Bearer", "expires_in": 60})
        return httpx2.Response(404)


@pytest.mark.parametrize("issuer", [ISSUER, None])
async def test_the_token_is_got_once(issuer: str | None) -> None:
    servers = Servers()
    client = OAuthClient(client_id="me", client_secret="hush", scopes=("read", "write"), issuer=issuer)
    auth = http_auth(McpServerConfig(name="test", url=URL, auth=client))
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(servers), auth=auth) as sender:
        for _ in range(2):
            assert (await sender.post(URL)).text == "in"
    assert servers.asked.count(f"POST {ISSUER}/token") == 1
