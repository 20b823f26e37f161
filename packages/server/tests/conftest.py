# SPDX-License-Identifier: MIT
"""A real server on loopback, in a thread, around a scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.settings import Settings
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts servers that end with the test: `start(engine, api_key=("k",))`."""
    with contextlib.ExitStack() as stack:

        def start(engine: PacedEngine | ModelManager | None = None, **settings: Any) -> Running:
            running = Running(engine or PacedEngine(), Settings(**{"port": 0, "shutdown_timeout": 1, **settings}))
            stack.callback(running.stop)
            return running

        yield start


@pytest.fixture
def movable_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers run in asyncio's own event loop, whose clock `Running.skip` can move."""
    monkeypatch.setattr("uvicorn.Config.get_loop_factory", lambda _: asyncio.new_event_loop)


@pytest.fixture(scope="module")
def web() -> Iterator[Any]:
    """An MCP server at a URL (`HttpMcpServer`)."""
    from packages.server.tests.mcp_fakes import HttpMcpServer

    server = HttpMcpServer()
    yield server
    server.stop()


@pytest.fixture
def seen(web: Any) -> Any:
    """Return what the MCP server sees from now on."""
    web.seen.clear()
    return web.seen


@pytest.fixture
def start_mcp() -> Iterator[Callable[..., Running]]:
    """Starts servers with MCP servers, connected: `start_mcp(engine, configs, execute=True, api_key=("k",))`."""
    from candle_vllm.server.mcp.options import McpOptions
    from candle_vllm.server.mcp.service import McpService

    with contextlib.ExitStack() as stack:

        def start_mcp(
            engine: PacedEngine, configs: Sequence[Any], *, mailbox: Any = None, settled: bool = True,
            execute: bool = False, mcp_max_turns: int = 8, mcp_max_tool_calls: int = 32, **settings: Any,
        ) -> Running:  # fmt: skip
            service = McpService(McpOptions(tuple(configs), execute, mcp_max_turns, mcp_max_tool_calls))
            settings = {"tool_parser": "hermes", "mcp_execute": execute, **settings}
            running = Running(engine, Settings(port=0, shutdown_timeout=1, **settings), mailbox, service)
            stack.callback(running.stop)
            if settled:
                running.wait_for(lambda: "connecting" not in service.states() and "closed" not in service.states())
                running.wait_for(lambda: len(service.registry) or "ready" not in service.states())
            return running

        yield start_mcp


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub (`FakeHub`) that huggingface_hub uses instead of its own; it has no repositories yet."""
    from packages.server.tests.fake_hub import installed

    yield from installed(monkeypatch)
