# SPDX-License-Identifier: MIT
"""MCP servers for the server's tests: one over HTTP in a thread, one as a program on stdio."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from mcp.server import MCPServer

from candle_vllm.responses.mcp.server_config import McpServerConfig

STDIO = """
import os, sys
from pathlib import Path
from mcp.server import MCPServer

Path(sys.argv[1]).write_text(str(os.getpid()))
server = MCPServer("numbers")

@server.tool()
def double(n: int) -> int:
    "Doubles a number."
    return 2 * n

@server.tool()
def die() -> str:
    "Ends the program."
    os._exit(1)

server.run(transport="stdio")
"""


def call_text(name: str, **arguments: object) -> str:
    """Return a call in the text of the scripted model."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def turns(*texts: str) -> Any:
    """Return a script that answers with one text after the other, and then always with the last one."""
    left = list(texts)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


class Seen:
    """Requests that the server over HTTP has received."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget them."""
        self.begun = 0
        self.cancelled = 0
        self.texts: list[str] = []


class HttpMcpServer:
    """MCP server with the tools `echo`, `slow` and `fail` at a port of the loopback, until `stop`."""

    def __init__(self) -> None:
        self.seen = Seen()
        settings = uvicorn.Config(
            _server(self.seen).streamable_http_app(), host="127.0.0.1", port=0, log_config=None,
            timeout_graceful_shutdown=0, ws="none",
        )  # fmt: skip
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the MCP server did not start"
            threading.Event().wait(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/mcp"

    def config(self, name: str = "web", **fields: Any) -> McpServerConfig:
        """Return its configuration, in which all of its tools are approved."""
        return McpServerConfig(name=name, url=self.url, **{"auto_approve": ["*"], "connect_timeout": 60.0, **fields})

    def stop(self) -> None:
        """Ends it; idempotent."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


def _server(seen: Seen) -> MCPServer:
    server = MCPServer("web")

    @server.tool()
    async def echo(text: str) -> str:
        """Says it again."""
        seen.texts.append(text)
        return text

    @server.tool()
    async def slow(seconds: float) -> str:
        """Takes its time."""
        seen.begun += 1
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            seen.cancelled += 1
            raise
        return "at last"

    @server.tool()
    async def fail() -> str:
        """Never works."""
        raise ValueError("it does not go")

    return server


def stdio_config(folder: Path, name: str = "numbers", *, sdk: bool = False, **fields: Any) -> McpServerConfig:
    """Return the configuration of a server that writes its process id to `folder`/pid; all of its tools are approved.

    With `sdk` it is a server of the MCP SDK, otherwise one in plain Python (`plain_mcp.py`).
    """
    path = folder / "numbers_server.py"
    path.write_text(STDIO)
    plain = ["-S", str(Path(__file__).with_name("plain_mcp.py")), str(folder / "pid"), "double", "die"]
    command = {"command": sys.executable, "args": [str(path), str(folder / "pid")] if sdk else plain}
    return McpServerConfig(name=name, **{**command, "auto_approve": ["*"], **fields})


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
