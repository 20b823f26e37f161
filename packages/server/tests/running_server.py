# SPDX-License-Identifier: MIT
"""A real server on loopback, in a thread, and clients for it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import httpx
import openai
from fastapi.routing import iter_route_contexts

from candle_vllm.server.app import create_app
from candle_vllm.server.http.tls import tls_context
from candle_vllm.server.mailbox.service import Mailbox
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.serve import bind, make_server
from candle_vllm.server.settings import Settings
from packages.server.tests.server_fakes import PacedEngine
from tests.trusted import trusted
from tests.waiting import skip, wait_for

if TYPE_CHECKING:
    from candle_vllm.server.mcp.service import McpService


def paths_of(app: Any, method: str) -> set[str]:
    """Return the paths of all routes with a method, with an x for each parameter."""
    contexts = [each for each in iter_route_contexts(app.routes) if method in (each.methods or ())]
    assert len(contexts) > 15
    return {re.sub(r"\{.*?\}", "x", each.path or "") for each in contexts}


class Running:
    """A server in a thread and clients for it."""

    def __init__(
        self,
        engine: PacedEngine | ModelManager,
        settings: Settings,
        mailbox: Mailbox | None = None,
        mcp: McpService | None = None,
    ) -> None:
        self.engine: Any = engine
        self._clients: list[openai.OpenAI] = []
        tls = tls_context(settings)
        self.server = make_server(create_app(engine, settings, mailbox=mailbox, mcp=mcp), settings, tls)
        listener = bind(settings.address)
        self.url = f"http{'' if tls is None else 's'}://127.0.0.1:{listener.getsockname()[1]}"
        self.port = int(listener.getsockname()[1])
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        self.wait_for(lambda: self.server.started)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(**{"base_url": self.url, "timeout": 60, "trust_env": False, "verify": trusted(), **options})

    def openai(self, api_key: str = "none") -> openai.OpenAI:
        http = openai.DefaultHttpxClient(trust_env=False, verify=trusted())
        client = openai.OpenAI(base_url=self.url + "/v1", api_key=api_key, max_retries=0, http_client=http)
        self._clients.append(client)
        return client

    def leave(
        self, path: str, body: Mapping[str, Any], begun: Callable[[], object], headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a POST request, and disconnect without reading the answer when `begun` holds."""
        data = json.dumps(body).encode()
        fields = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
            self.wait_for(begun)

    def skip(self, seconds: float) -> None:
        """Move the clock of the server's event loop, which has to be asyncio's own (the fixture `movable_clock`)."""
        asyncio.run_coroutine_threadsafe(skip(seconds), self.server.servers[0].get_loop()).result()

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    wait_for = staticmethod(wait_for)
