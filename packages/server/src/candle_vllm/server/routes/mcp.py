# SPDX-License-Identifier: MIT
"""`/v1/mcp`: the MCP servers, their tools, and calls that a client such as the web UI makes directly.

Not a step of a request's life: no model runs here.
"""

from __future__ import annotations

import asyncio
import hmac
import uuid
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.setting_kinds import nearest
from candle_vllm.openai import to_json_bytes
from candle_vllm.openai.protocol.fields import MAX_TOOL_NAME, WireModel
from candle_vllm.responses.tools.execution import check, run
from candle_vllm.responses.tools.tool import ContentPart, ToolCall, ToolResult
from candle_vllm.server.answering import body_of, deadline_of, in_time, json_answer
from candle_vllm.server.http.body import unless_disconnected
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.routing import may_manage
from candle_vllm.server.openapi.operation import routing

if TYPE_CHECKING:
    from candle_vllm.server.mcp.service import McpService

MAX_CALLS = 32  # maximum number of calls that run at the same time, for all clients together
JSON = "application/json"
_LINES = 50  # last lines of a server's log that are shown

router, route = routing(tag="mcp")


class McpCallRequest(WireModel):
    """A call of a tool.

    Attributes:
        name: the tool's name in `/v1/mcp/tools`.
        arguments: arguments that are valid by the tool's schema.
        approved: whether the user has approved this call.
    """

    name: Annotated[str, Field(min_length=1, max_length=MAX_TOOL_NAME)]
    arguments: dict[str, Any] | None = None
    approved: bool | None = None


class McpServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The current state of an MCP server.

    Attributes:
        name: the server's name in mcp.json.
        transport: stdio, http or sse.
        state: connecting, ready, failed, closed or disabled.
        error: why there is no connection, or null.
        protocol_version: the negotiated version, or null.
        tools_count: number of its tools.
        reconnects: number of connections after the first.
        log: the last lines of its log; empty if the client's key may not see them.
    """

    name: str
    transport: str
    state: str
    error: str | None
    protocol_version: str | None
    tools_count: int
    reconnects: int
    log: tuple[str, ...]


class McpFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A tool in the form of a chat request; `parameters` is a JSON schema."""

    name: str
    description: str
    parameters: dict[str, Any]


class McpToolInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A tool of an MCP server.

    Attributes:
        function: the function as models get it.
        server: name of its server in mcp.json.
        original_name: the tool's name at its server.
        read_only: whether its server declares it read-only.
        auto_approve: whether mcp.json lets it run without approval.
    """

    type: str = "function"
    function: McpFunction
    server: str
    original_name: str
    read_only: bool
    auto_approve: bool


class McpCallResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a call.

    Attributes:
        status: completed; failed if the tool failed or its output is refused; otherwise why there is no output:
            invalid_arguments, timed_out, unavailable or unknown.
        content: the parts of the output.
        structured: structured content, or null.
        is_error: whether the tool failed or did not run.
        text: the output as a model sees it.
        seconds: duration of the call.
    """

    status: str
    content: tuple[ContentPart, ...]
    structured: Any
    is_error: bool
    text: str
    seconds: float


@route("GET /v1/mcp/servers", answer=McpServerInfo, errors=(404,), listed=True)
async def list_mcp_servers(request: Request) -> Response:
    """The MCP servers and their states.

    If clients need no key or have several, only keys that open operators' routes get the logs, which show all calls.
    """
    keys = request.app.state.keys
    logged = may_manage(request.scope) or (keys.guards(operators=False) and not keys.are_several)
    found = [
        McpServerInfo(
            name=one.name,
            transport=one.transport,
            state=one.state,
            error=one.error,
            protocol_version=one.protocol_version,
            tools_count=len(one.tools),
            reconnects=one.reconnects,
            log=one.log[-_LINES:] if logged else (),
        )
        for one in _service(request).status()
    ]
    return json_answer({"object": "list", "data": found})


@route("GET /v1/mcp/tools", answer=McpToolInfo, errors=(404,), listed=True)
async def list_mcp_tools(request: Request) -> Response:
    """The tools of all MCP servers."""
    service = _service(request)
    found = [
        McpToolInfo(
            function=McpFunction(name=one.name, description=one.description, parameters=dict(one.parameters)),
            server=one.server or "",
            original_name=one.original_name,
            read_only=one.read_only,
            auto_approve=service.auto_approves(one),
        )
        for one in service.registry.definitions()
    ]
    return json_answer({"object": "list", "data": found})


@route(
    "POST /v1/mcp/call",
    body=McpCallRequest,
    example={"name": "time__get_current_time", "arguments": {"timezone": "UTC"}, "approved": True},
    answer=McpCallResult,
    errors=(404, 429, 504),
)
async def call_mcp_tool(request: Request) -> Response:
    """Call a tool once; needs a key and the user's approval."""
    service = _service(request)
    _check_client(request)
    deadline = deadline_of(request)
    wire: McpCallRequest = await body_of(request, McpCallRequest)
    if wire.approved is not True:
        raise InvalidParameterError("approved must be true: a user must approve the call first", "approved")
    if service.registry.find(wire.name) is None:
        await unless_disconnected(service.settled(), request.receive)
    if service.registry.find(wire.name) is None:
        near = nearest(wire.name, service.registry.names())
        raise HttpError(404, f"There is no tool {wire.name!r}{near}.", "tool_not_found", param="name")
    if service.calls >= MAX_CALLS:
        message = f"{MAX_CALLS} tool calls are already running: try again when some of them have ended."
        raise HttpError(429, message, "rate_limit_exceeded", {"retry-after": "1"})
    service.calls += 1
    try:
        async with in_time(deadline, request):
            result = await unless_disconnected(_call(service, wire), request.receive)
    finally:
        service.calls -= 1
    return Response(await asyncio.to_thread(_encoded, result), media_type=JSON)


async def _call(service: McpService, wire: McpCallRequest) -> ToolResult:
    text = msgspec.json.encode(wire.arguments or {}).decode()
    checked = await check(service.registry, ToolCall(id=f"call_{uuid.uuid4().hex}", name=wire.name, arguments=text))
    return checked if isinstance(checked, ToolResult) else await run(checked)


def _encoded(result: ToolResult) -> bytes:
    output = result.output
    return to_json_bytes(
        McpCallResult(
            status=result.status,
            content=output.content,
            structured=output.structured,
            is_error=result.status != "completed",
            text=result.text,
            seconds=round(result.seconds, 3),
        )
    )


def _service(request: Request) -> McpService:
    service: McpService | None = request.app.state.mcp
    if service is None:
        message = "This server has no MCP servers: start it with --mcp-config, or put mcp.json into ~/.candle-vllm."
        raise HttpError(404, message, "mcp_off")
    return service


def _check_client(request: Request) -> None:
    """Refuse a client without a key, because a call may do anything that its tool can do; raises HttpError 403."""
    if not (request.app.state.settings.has_api_keys or _has_page_key(request)):
        message = (
            "Only clients with an API key may call tools. In the web UI: open the address that the server printed at "
            "its start, which ends in #key=... Otherwise start the server with --api-key."
        )
        raise HttpError(403, message, "api_key_needed")


def _has_page_key(request: Request) -> bool:
    """Whether the request has the key in the web UI's printed address, if the server made such a key."""
    key: str | None = request.app.state.page_key
    given = request.headers.getlist("authorization")
    if key is None or len(given) != 1:
        return False
    scheme, _, text = given[0].partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(text.strip().encode("latin-1"), key.encode())
