# SPDX-License-Identifier: MIT
"""What the tests of this folder share: servers with settings, raw bytes on a socket, and a network that is watched."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx

from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.server import Settings
from candle_vllm.server.app import ServedEngine, create_app
from candle_vllm.server.serve import bind, make_server
from tests.trusted import trusted
from tests.waiting import wait_for

KEY = "client-key"
OPERATOR = "operator-key"
HEALTH = b'{"status":"ok"}'
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]


class Guarded:
    """A server in a thread of this process.

    Attributes:
        app: the application.
        url, port: where it listens.
    """

    def __init__(self, engine: ServedEngine, settings: Settings) -> None:
        self.app = create_app(engine, settings)
        self.server, listener = make_server(self.app, settings), bind(settings.address)
        self.port = int(listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        wait_for(lambda: self.server.started)

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, timeout=300, trust_env=False, headers=headers, verify=trusted())

    def raw(self, data: bytes, patience: float = 20.0) -> bytes:
        """Everything that the server says to these bytes; it may close before it has read them all."""
        with socket.create_connection(("127.0.0.1", self.port), patience) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(1 << 16):
                    answer += part
            return answer

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def guarded(engine: ServedEngine | None = None, **settings: Any) -> Iterator[Guarded]:
    """Serves an engine, or a scripted one, with settings."""
    server = Guarded(engine or ScriptedEngine(), Settings(port=0, shutdown_timeout=1, **settings))
    try:
        yield server
    finally:
        server.stop()


class Answer(NamedTuple):
    """The first answer on a connection."""

    status: int
    head: bytes
    body: bytes


def parse_answer(data: bytes) -> Answer:
    """The answer in what came over a connection."""
    head, _, body = data.partition(b"\r\n\r\n")
    return Answer(int(head.split(b" ", 2)[1]), head.lower(), body)


def chat_body(**fields: Any) -> dict[str, Any]:
    """A right chat request, and what is changed of it."""
    return {"model": "default", "messages": HELLO, "max_tokens": 4, **fields}


def post_bytes(path: str, body: bytes, more: bytes = b"") -> bytes:
    """A request as bytes, on a connection that ends with its answer; `more` are further lines of its head."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + more + b"Connection: close\r\n\r\n" + body


class Watch:
    """Counts what would leave this machine.

    Attributes:
        outgoing: addresses that were asked for or connected to, but for this machine's own.
    """

    def __init__(self) -> None:
        self.outgoing: list[Any] = []

    def note(self, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if isinstance(host, bytes):
            host = host.decode("ascii", "replace")
        if host not in ("127.0.0.1", "localhost", None):
            self.outgoing.append(address)
