# SPDX-License-Identifier: MIT
"""An OAuth client gets its token from the authorization server that the MCP server names, and sends it there alone."""

from __future__ import annotations

import asyncio
import base64
import logging
from typing import Any
from urllib.parse import parse_qs

import httpx2
import pytest
from mcp.client.auth.exceptions import OAuthTokenError

from candle_vllm.core import shown
from candle_vllm.responses.mcp.http import http_auth
from candle_vllm.responses.mcp.peer import Peer
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.server_values import OAuthClient
from tests.waiting import PATIENCE

URL = "https://mcp.test/mcp"
ISSUER = "https://auth.test"


class Servers:
    """An MCP server that wants a token, and an authorization server; notes what each was asked.

    `methods` are the ways in which the latter takes the secret; None says nothing of them.
    """

    def __init__(self, methods: list[str] | None = None) -> None:
        self.asked: list[str] = []
        self.methods = methods
        self.token = "issued"

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(f"{request.method} {request.url}")
        path = request.url.path
        if request.url.host == "mcp.test" and path == "/mcp":
            if request.headers.get("authorization") == f"Bearer {self.token}":
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
                    "token_endpoint_auth_methods_supported": self.methods,
                },
            )
        if request.url.host == "auth.test" and path == "/token":
            form = parse_qs(request.content.decode())
            assert form["grant_type"] == ["client_credentials"]
            assert form["scope"] == ["read write"]
            if self.methods is None or "client_secret_basic" in self.methods:
                assert request.headers["authorization"] == "Basic " + base64.b64encode(b"me:hush").decode()
            else:
                assert "authorization" not in request.headers
                assert (form["client_id"], form["client_secret"]) == (["me"], ["hush"])
            return httpx2.Response(200, json={"access_token": self.token, "token_type": "Bearer", "expires_in": 60})
        return httpx2.Response(404)


def auth_of(issuer: str | None = ISSUER) -> httpx2.Auth | None:
    client = OAuthClient(client_id="me", client_secret="hush", scopes=("read", "write"), issuer=issuer)
    return http_auth(McpServerConfig(name="test", url=URL, auth=client))


@pytest.mark.parametrize(
    ("issuer", "methods"),
    [
        (ISSUER, None),
        (None, None),
        (None, ["client_secret_post"]),
        (None, ["client_secret_post", "client_secret_basic"]),
    ],
)
async def test_the_token_is_got_once(issuer: str | None, methods: list[str] | None) -> None:
    servers, auth = Servers(methods), auth_of(issuer)
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(servers), auth=auth) as sender:
        for _ in range(2):
            assert (await sender.post(URL)).text == "in"
    assert servers.asked.count(f"POST {ISSUER}/token") == 1


async def test_requests_with_a_token_do_not_wait_for_each_other() -> None:
    """Neither do those that wait for the token which replaces a revoked one."""
    servers, running, all_run = Servers(), 0, asyncio.Event()

    async def answer(request: httpx2.Request) -> httpx2.Response:
        nonlocal running
        response = servers(request)
        if response.status_code == 200 and request.url == URL and request.content:
            running += 1
            if running == 3:
                all_run.set()
            await all_run.wait()
        return response

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer), auth=auth_of()) as sender:
        await sender.post(URL)
        for token in ("issued", "renewed"):
            servers.token, running = token, 0
            all_run.clear()
            async with asyncio.timeout(PATIENCE):
                sent = await asyncio.gather(*(sender.post(URL, content=b"call") for _ in range(3)))
            assert [each.text for each in sent] == ["in"] * 3
    assert servers.asked.count(f"POST {ISSUER}/token") == 2


@pytest.mark.parametrize(
    ("status", "challenge", "sent"),
    [(200, 'Bearer error="insufficient_scope"', 1), (401, "Bearer", 3), (403, "", 1)],
)
async def test_a_request_is_sent_again_only_if_its_token_is_refused(status: int, challenge: str, sent: int) -> None:
    servers = Servers()

    def answer(request: httpx2.Request) -> httpx2.Response:
        response = servers(request)
        if request.content == b"call":
            return httpx2.Response(status, headers={"www-authenticate": challenge} if challenge else {})
        return response

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer), auth=auth_of()) as sender:
        await sender.post(URL)
        servers.asked.clear()
        assert (await sender.post(URL, content=b"call")).status_code == status
    assert servers.asked.count(f"POST {URL}") == sent


@pytest.mark.parametrize("refreshes", [True, False])
async def test_an_expired_token_is_refreshed_or_replaced(refreshes: bool) -> None:
    servers, made = Servers(), 0

    def answer(request: httpx2.Request) -> httpx2.Response:
        nonlocal made
        if not request.url.path.startswith("/token"):
            return servers(request)
        (kind,) = parse_qs(request.content.decode())["grant_type"]
        servers.asked.append(kind)
        if kind == "refresh_token" and not refreshes:
            return httpx2.Response(400)
        made += 1
        servers.token = f"token {made}"
        held = {"access_token": servers.token, "token_type": "Bearer", "refresh_token": "more"}
        return httpx2.Response(200, json=held | {"expires_in": -1 if made == 1 else 60})

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer), auth=auth_of()) as sender:
        for _ in range(3):
            assert (await sender.post(URL)).text == "in"
        servers.token = "revoked"
        assert (await sender.post(URL)).text == "in"
    kinds = [each for each in servers.asked if each in ("client_credentials", "refresh_token")]
    first = ["client_credentials", "refresh_token"] + ([] if refreshes else ["client_credentials"])
    assert kinds == [*first, "client_credentials"]


@pytest.mark.parametrize("factory", [logging.LogRecord, shown._record])
@pytest.mark.parametrize("status", [200, 400])
async def test_no_log_and_no_sentence_has_a_token(
    status: int, factory: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither with Python's records nor with those of `start_logging`, which have their traceback as text."""
    monkeypatch.setattr(logging, "_logRecordFactory", factory)
    servers, logger = Servers(), logging.getLogger("mcp.client.auth.oauth2")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])  # whatever other tests have set above this logger
    monkeypatch.setattr(logger, "disabled", False)

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/token":
            return httpx2.Response(status, json={"access_token": ["hush"]})
        return servers(request)

    with caplog.at_level(logging.DEBUG, logger.name), pytest.raises(OAuthTokenError) as caught:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer), auth=auth_of()) as sender:
            await sender.post(URL)
    assert "OAuth flow error" in caplog.text
    sentence = Peer(McpServerConfig(name="test", url=URL)).sentence(caught.value)
    start = {200: "Invalid token response: ", 400: "Token exchange failed (400)"}[status]
    assert sentence.startswith(f"OAuthTokenError: {start}")
    assert "hush" not in caplog.text + (sentence if status == 200 else "")
