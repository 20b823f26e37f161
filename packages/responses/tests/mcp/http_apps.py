# SPDX-License-Identifier: MIT
"""MCP servers over HTTP: the SDK's own in both eras, and applications that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

MEGA = 1 << 20


class Seen:
    """What the servers of a test saw."""

    def __init__(self) -> None:
        self.calls = 0
        self.cancelled = 0
        self.headers: list[dict[str, str]] = []
        self.methods: list[str] = []
        self.refused = False  # whether a message was refused
        self.streams = 0  # for notices, as the older era has them


def good_server(seen: Seen) -> MCPServer:
    """Tools that are slow, large, structured, or change the list of tools."""
    server = MCPServer("good", instructions="Be good.")

    @server.tool()
    async def echo(text: str) -> str:
        seen.calls += 1
        return text

    @server.tool()
    async def slow(seconds: float, ctx: Context) -> str:
        seen.calls += 1
        try:
            for step in range(20):
                await ctx.report_progress(step, 20)
                await asyncio.sleep(seconds / 20)
        except asyncio.CancelledError:
            seen.cancelled += 1
            raise
        return "at last"

    @server.tool()
    async def large(megabytes: int) -> str:
        return "x" * megabytes * MEGA

    @server.tool()
    async def fail() -> str:
        raise ValueError("it does not go")

    @server.tool()
    async def numbers() -> dict[str, int]:
        return {"one": 1}

    @server.tool()
    async def grow(ctx: Context) -> str:
        async def grown() -> str:
            return "grown"

        server.add_tool(grown, name="grown")
        if (ctx.protocol_version or "") >= "2026":
            await ctx.notify_tools_changed()
        else:
            await ctx.session.send_tool_list_changed()
        return "done"

    return server


def legacy_only(app: Callable[..., Awaitable[None]], seen: Seen) -> Callable[..., Awaitable[None]]:
    """The application behind a door that knows nothing of the newer era, as servers of the older one do."""

    async def door(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        if headers.get(b"mcp-method") == b"server/discover":
            error = {"jsonrpc": "2.0", "id": "discover", "error": {"code": -32601, "message": "Method not found"}}
            await JSONResponse(error, 404)(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            await send(message)
            seen.streams += scope["type"] == "http" and scope["method"] == "GET" and "status" in message

        await app(scope, receive, counted)

    return door


def moved(app: Callable[..., Awaitable[None]], old: str, new: str) -> Callable[..., Awaitable[None]]:
    """The application, with a redirect from an old path of the same origin."""

    async def door(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") == old:
            await Response(status_code=307, headers={"location": new})(scope, receive, send)
            return
        await app(scope, receive, send)

    return door


def refusing(app: Callable[..., Awaitable[None]], method: str, seen: Seen) -> Callable[..., Awaitable[None]]:
    """The application, which refuses the first message of a method."""

    async def door(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and method and not seen.refused:
            message = await receive()
            if f'"{method}"'.encode() in message["body"]:
                seen.refused = True
                await PlainTextResponse("full", 507)(scope, receive, send)
                return
            given = [message]

            async def receive_again() -> Any:
                return given.pop() if given else await receive()

            await app(scope, receive_again, send)
            return
        await app(scope, receive, send)

    return door


def scripted_app(mode: str, seen: Seen) -> Starlette:
    """Answers requests of the older era as the mode says."""
    session = uuid.uuid4().hex

    async def answer(request: Request) -> Response:
        seen.methods.append(request.method)
        seen.headers.append(dict(request.headers))
        if request.method != "POST":
            return Response(status_code=405)
        if mode == "forgets" and request.headers.get("mcp-session-id", session) != session:
            return PlainTextResponse("Bad Request: No valid session ID provided", 400)
        if mode.isdigit():
            return PlainTextResponse("go away", int(mode))
        if mode == "html":
            return Response("<html>Welcome</html>", media_type="text/html")
        if mode == "redirect":
            return Response(status_code=307, headers={"location": "http://elsewhere.invalid/mcp?key=1"})
        message = json.loads(await request.body())
        if mode == "hang" or "method" not in message:  # a response to the server's ping
            await asyncio.sleep(1000)
        if "id" not in message:
            return Response(status_code=202)
        return await reply(message)

    async def reply(message: dict[str, Any]) -> Response:
        result: dict[str, Any]
        match message["method"]:
            case "initialize":
                info = {"name": "scripted", "version": "1"}
                result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": info}
            case "tools/list":
                schema = {"type": "object"}
                result = {"tools": [{"name": "echo", "inputSchema": schema}]}
            case "tools/call":
                return await call(message)
            case _:
                error = {"code": -32601, "message": "Method not found"}
                return JSONResponse({"jsonrpc": "2.0", "id": message["id"], "error": error})
        headers = {"mcp-session-id": session} if mode == "forgets" else None
        return JSONResponse({"jsonrpc": "2.0", "id": message["id"], "result": result}, headers=headers)

    async def call(message: dict[str, Any]) -> Response:
        seen.calls += 1
        done = {"jsonrpc": "2.0", "id": message["id"], "result": {"content": []}}
        if mode == "large":
            done["result"]["content"] = [{"type": "text", "text": "x" * 11 * MEGA}]
        if mode == "zipped":
            return Response(
                b"\x1f\x8b" + os.urandom(20), headers={"content-encoding": "gzip"}, media_type="application/json"
            )
        if mode == "endless":
            return StreamingResponse(endless(b"x" * MEGA), media_type="application/json")
        if mode == "endless-events":
            return StreamingResponse(endless(b"data: " + b"x" * MEGA), media_type="text/event-stream")
        if mode == "pings":
            ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
            events = "".join(f"data: {json.dumps(one)}\n\n" for one in (ping, done))
            return Response(events, media_type="text/event-stream")
        if mode == "status":
            return PlainTextResponse("broken", 500)
        if mode == "no-json":
            return Response(b"{nothing", media_type="application/json")
        return JSONResponse(done)

    async def endless(piece: bytes) -> Any:
        for _ in range(100):
            yield piece
            await asyncio.sleep(0)

    return Starlette(routes=[Route("/mcp", answer, methods=["GET", "POST", "DELETE"])])
