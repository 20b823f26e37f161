# SPDX-License-Identifier: MIT
"""A receiver of webhooks on loopback, and stores in SQLite and in a real PostgreSQL."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from candle_vllm.server.mailbox.options import MailboxOptions, WebhookOptions
from candle_vllm.server.mailbox.service import Mailbox
from tests.postgres_server import new_database, postgres_server


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    body: bytes
    time: float  # of the machine's steady clock


class Receiver:
    """An HTTP server that notes what it gets and answers what it is told; 200 when it is told nothing more."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.statuses: list[int] = []
        self.headers: dict[str, str] = {}
        self.answer = b"thanks"
        self.pause = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                names = {name.lower(): value for name, value in self.headers.items()}
                outer.received.append(Received(self.path, names, body, time.monotonic()))
                status = outer.statuses.pop(0) if outer.statuses else 200
                time.sleep(outer.pause)
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in outer.headers.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(outer.answer)))
                    self.end_headers()
                    self.wfile.write(outer.answer)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}/hook"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join(60)
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server on loopback, without the database; it ends with the tests."""
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/mailbox.sqlite"
    return new_database(request.getfixturevalue("postgres"))


@pytest_asyncio.fixture
async def open_mailbox(tmp_path: Path, receiver: Receiver) -> AsyncIterator[Callable[..., Any]]:
    """Opens mailboxes that end with the test; webhooks may go to the receiver, and are retried at once."""
    opened: list[Mailbox] = []

    async def open_mailbox(webhook: dict[str, Any] | None = None, **options: Any) -> Mailbox:
        options.setdefault("url", f"sqlite:///{tmp_path}/mailbox.sqlite")
        options.setdefault("webhook_allowed_hosts", (receiver.host,))
        options.setdefault("webhook_allow_private", True)
        hook = WebhookOptions(**{"retry_delay_ms": 10, "timeout_secs": 5.0, **(webhook or {})})
        mailbox = Mailbox(MailboxOptions(webhook=hook, **options))
        opened.append(mailbox)
        await mailbox.start()
        return mailbox

    yield open_mailbox
    for mailbox in opened:
        await mailbox.close()
