"""A receiver of webhooks on loopback, and stores in SQLite and in a real PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
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


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    body: bytes


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
                outer.received.append(Received(self.path, names, body))
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
        self._thread.join(10)
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


def _postgres_folder() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


def _unprivileged() -> dict[str, Any]:
    """PostgreSQL does not run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server on loopback, without the database; it ends with the tests."""
    pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    programs = _postgres_folder()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    user = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="mailbox-postgres-"))
    password = secrets.token_hex(8)
    secret = folder / "password"
    secret.write_text(password)
    if user:
        for path in (folder, secret):
            os.chown(path, user["user"], user["group"])
    data = str(folder / "data")
    make = ["initdb", "-D", data, "-U", "mailbox", "-A", "scram-sha-256", "--pwfile", str(secret), "--no-sync"]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    try:
        subprocess.run(
            [str(programs / make[0]), *make[1:]], check=True, capture_output=True, timeout=120, cwd=folder,
            env=environment, **user,
        )  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings = ["listen_addresses=127.0.0.1", f"port={port}", "unix_socket_directories=", "fsync=off"]
        command = [str(programs / "postgres"), "-D", data, *(part for each in settings for part in ("-c", each))]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, **user)
        try:
            url = f"postgresql://mailbox:{password}@127.0.0.1:{port}"
            _wait_for(url, server)
            yield url
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    import psycopg

    end = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(f"{url}/postgres", connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None, "PostgreSQL ended"
            assert time.monotonic() < end, "PostgreSQL does not start"
            time.sleep(0.1)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/mailbox.sqlite"
    return new_database(request.getfixturevalue("postgres"))


def new_database(server: str) -> str:
    import psycopg
    from psycopg import sql

    name = f"mailbox_{secrets.token_hex(6)}"
    with contextlib.closing(psycopg.connect(f"{server}/postgres", autocommit=True)) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return f"{server}/{name}"


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
