# SPDX-License-Identifier: MIT
"""Servers for the tests of this folder: scripted ones on stdio, real ones over HTTP in a thread."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.responses.mcp import processes
from candle_vllm.responses.mcp.server_config import McpServerConfig
from tests.waiting import PATIENCE, until, wait_for

HERE = Path(__file__).parent


def make_config(name: str = "test", **fields: Any) -> McpServerConfig:
    return McpServerConfig(name=name, **({"timeout": PATIENCE, "connect_timeout": PATIENCE} | fields))


@pytest.fixture
def config() -> Callable[..., Any]:
    """`config(name="test", **fields)`: the configuration of a server."""
    return make_config


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that do not end by themselves are not waited for as long as in earnest."""
    monkeypatch.setattr(processes, "GRACE", 0.4)


class Notes:
    """What a scripted server wrote into its file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def count(self, start: str) -> int:
        return sum(line.startswith(start) for line in self.lines)

    @property
    def processes(self) -> list[int]:
        return [int(line.split()[1]) for line in self.lines if line.startswith("process ")]

    @property
    def alive(self) -> list[int]:
        return [pid for pid in self.processes if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Notes]:
    """The notes of scripted servers; at the end no process that stands in them may be left."""
    notes = Notes(tmp_path / "notes")
    yield notes
    left = notes.alive
    for pid in left:
        os.kill(pid, 9)
    assert not left, "the test left processes"


@pytest.fixture
def scripted(notes: Notes) -> Callable[..., Any]:
    """`scripted(mode, **fields)`: the configuration of the scripted server."""

    def scripted(mode: str, **fields: Any) -> Any:
        arguments = ("-S", str(HERE / "scripted_stdio.py"), mode, str(notes.path))
        return make_config(**({"command": sys.executable, "args": arguments} | fields))

    return scripted


@pytest.fixture(autouse=True)
async def no_tasks_left() -> Any:
    """After each test its own task is the only one."""
    before = asyncio.all_tasks()
    yield
    await until(lambda: not asyncio.all_tasks() - before - {asyncio.current_task()})


class HttpServer:
    """An ASGI application on a port of the loopback, in a thread; `stop` and `start` keep the port."""

    def __init__(self, make_app: Callable[[], Any], path: str = "/mcp") -> None:
        self._make_app = make_app
        self._path = path
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self._path}"

    def start(self) -> None:
        import uvicorn

        settings = uvicorn.Config(
            self._make_app(), host="127.0.0.1", port=self.port, log_config=None, timeout_graceful_shutdown=0,
            ws="none", lifespan="auto",
        )  # fmt: skip
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started or not self._thread.is_alive())
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., HttpServer]]:
    """`serve(make_app, path="/mcp")`: a server that ends with the test."""
    servers: list[HttpServer] = []

    def serve(make_app: Callable[[], Any], path: str = "/mcp") -> HttpServer:
        servers.append(HttpServer(make_app, path))
        return servers[-1]

    yield serve
    for server in servers:
        server.stop()
