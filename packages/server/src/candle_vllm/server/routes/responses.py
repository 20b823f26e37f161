# SPDX-License-Identifier: MIT
"""`/v1/responses` and the routes below it: steps 1 and 10 of a request's life.

Further routes fetch, cancel and delete stored responses; a caller sees only its own. `responder_of` makes what
answers a request, and `response_servers` returns the MCP servers that requests may name.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.requests import HTTPConnection
from starlette.responses import Response as HttpResponse

from candle_vllm.core.errors import EngineDeadError, EngineOverloadedError, InvalidParameterError
from candle_vllm.openai.errors import ErrorBody, UnsupportedParameterError, to_error
from candle_vllm.openai.fair_threads import RequestBytes, apart, request_bytes
from candle_vllm.openai.json_body import parse_body
from candle_vllm.responses.api.mcp_source import McpServers, McpSource, OpenServer
from candle_vllm.responses.api.response_stream import ResponseStream
from candle_vllm.responses.api.stored_items import ItemList, entry_of
from candle_vllm.responses.protocol import request as requests
from candle_vllm.responses.protocol.events import EVENTS, StreamEvent
from candle_vllm.responses.protocol.items import ItemReference
from candle_vllm.responses.protocol.response import CompactedResponse, InputTokens, Response, ResponseDeleted
from candle_vllm.responses.protocol.tools import McpTool
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import ToolDefinition
from candle_vllm.server import answering, store_access
from candle_vllm.server.http.body import unless_disconnected
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.routing import caller_of
from candle_vllm.server.http.sse import DONE, StreamForm
from candle_vllm.server.mailbox.policy import refuse_headers
from candle_vllm.server.models.admission import RetiredError
from candle_vllm.server.models.manager import Turn, enter, take_turn
from candle_vllm.server.models.slot import Lease, ServedModel
from candle_vllm.server.openapi.operation import COUNTED, KEPT, QUEUED, RESPONSES, routing
from candle_vllm.server.outliving import NOT_HERE
from candle_vllm.server.settings.table import ToolOptions

if TYPE_CHECKING:
    from candle_vllm.responses.api.connection import ConnectionMemory
    from candle_vllm.responses.api.responder import Responder
    from candle_vllm.responses.api.response_store import ResponseStore
    from candle_vllm.server.mcp.service import McpService

router, route = routing(tag="responses", naming=RESPONSES)
stored_route = functools.partial(route, errors=KEPT)
_MAX_EVENT = 999_999_999


def responder_of(state: Any, model: ServedModel, name: str | None, memory: ConnectionMemory | None = None) -> Responder:
    """Return the object that answers with this model.

    Args:
        state: state of the application: `response_store`, None if nothing is stored, and `response_servers`, the source
            of the MCP servers of requests, None if no server is allowed.
        model: the loaded model; a request that generates has taken its turn at this model.
        name: the name in the request, which may be an adapter's.
        memory: memory of the client's WebSocket connection; None for a request over HTTP.
    """
    from candle_vllm.responses.api.responder import Responder, ResponderOptions
    from candle_vllm.responses.conversation.chat_model import InProcessModel

    adapter, settings = model.adapter, model.entry.settings
    options = ResponderOptions(
        model=adapter.served_name(name),
        names=model.entry.names,
        sampling_defaults=settings.default_sampling,
        model_defaults=model.engine.model_info.default_sampling,
        timeout=settings.request_timeout,
    )
    return Responder(
        InProcessModel(adapter),
        count=adapter.count_tokens,
        servers=state.response_servers,
        store=state.response_store,
        memory=memory,
        options=options,
    )


@route(
    "POST /v1/responses",
    body=requests.ResponsesRequest,
    example={"input": "What is the capital of France?", "max_output_tokens": 64},
    answer=Response,
    events=EVENTS,
    errors=(*QUEUED, 409),
)
async def create_response(request: Request) -> HttpResponse:
    """Answer an input, with tools and stored conversations: whole, streamed or in the background."""
    deadline = answering.deadline_of(request)
    wire = await answering.parsed(request, requests.parse_responses_request)
    if wire.background:
        return await _in_background(request, wire, deadline)
    state = request.app.state
    events, stream = store_access.ResponseEvents(), None

    async def whole(model: ServedModel, wire: requests.ResponsesRequest) -> Response:
        return await responder_of(state, model, wire.model).create(wire, owner=await owner_of(request, wire))

    async def streamed(model: ServedModel, wire: requests.ResponsesRequest) -> ResponseStream:
        nonlocal stream
        owner = await owner_of(request, wire)
        stream = await responder_of(state, model, wire.model).create_stream(wire, owner=owner)
        return stream

    def error_events(failure: Exception) -> bytes:
        """Return the last events of a stream that the server ends: the response fails; event numbers continue."""
        assert stream is not None
        return b"".join(map(events.write, stream.stop(detail_of(failure)))) + DONE

    api = answering.GenerationApi(
        parse=requests.parse_responses_request,
        whole=whole,
        streamed=streamed,
        form=StreamForm(events.write, error_events, silence=events.silence),
        defaults=False,  # `Responder` fills them in
    )
    return await answering.answer_parsed(request, api, wire, deadline)


@route(
    "POST /v1/responses/input_tokens",
    tag="tokens",
    body=requests.InputTokensRequest,
    example={"input": "What is the capital of France?"},
    answer=InputTokens,
    errors=COUNTED,
)
async def count_response_tokens(request: Request) -> HttpResponse:
    """Count the tokens of a response's prompt."""
    parse = functools.partial(parse_body, requests.InputTokensRequest)

    async def count(model: ServedModel, wire: Any) -> InputTokens:
        responder = responder_of(request.app.state, model, wire.model)
        return await responder.count_input_tokens(wire, owner=await owner_of(request, wire))

    return await answering.answer_with(request, parse, count, queued=False)


@route(
    "POST /v1/responses/compact",
    body=requests.CompactRequest,
    example={"model": "default", "input": [{"role": "user", "content": "We launch on Tuesday."}]},
    answer=CompactedResponse,
    errors=QUEUED,
)
async def compact_response(request: Request) -> HttpResponse:
    """Return a conversation in a shorter form, with a summary."""
    deadline = answering.deadline_of(request)
    wire = await answering.parsed(request, functools.partial(parse_body, requests.CompactRequest))
    refuse_headers(request.scope["headers"], NOT_HERE)
    async with answering.in_time(deadline, request):
        turn = await unless_disconnected(take_turn(request.scope, wire.model), request.receive, Turn.release)
        try:
            responder = responder_of(request.app.state, turn.model, wire.model)
            made = responder.compact(wire, owner=await owner_of(request, wire))
            compacted = await unless_disconnected(made, request.receive)
        finally:
            turn.release()
    return answering.json_answer(compacted)


def detail_of(failure: Exception) -> ErrorBody:
    """Return the error of a response that failed, also for an error of this server."""
    if isinstance(failure, HttpError):
        return ErrorBody(type="server_error", code=failure.code, message=str(failure), param=failure.param)
    return to_error(failure).body.error


async def _in_background(request: Request, wire: requests.ResponsesRequest, deadline: float) -> HttpResponse:
    """Begin a response that a disconnect does not end; a task of the application waits for its turn."""
    state = request.app.state
    refuse_headers(request.scope["headers"], NOT_HERE)
    async with answering.in_time(deadline, request) as size:
        await state.manager.reach(wire.model, caller_of(request.scope))
        state.manager.find(wire.model, caller=caller_of(request.scope))  # an unknown model does not count as a request
        with state.limits.counted(caller_of(request.scope)):
            lease = await unless_disconnected(
                state.manager.acquire(wire.model), request.receive, lambda taken: taken.release()
            )
        stream = waiting = None
        try:
            owner = await owner_of(request, wire)
            responder = responder_of(state, lease.model, wire.model)
            stream = await responder.prepare(wire, owner=owner, keep=False, at_once=True)
            queued = stream.response
            entry = await apart(entry_of, owner, queued, stream.input_items)
            waiting = size.moved()
            work = _work(stream, lease, request, wire.priority or 0, waiting)
            events = await state.background.begin(entry, work, state.settings.request_timeout)
        except BaseException:
            if stream is not None:
                await stream.aclose()
            if waiting is not None:
                waiting.release()
            lease.release()
            raise
    if not wire.stream:
        return answering.json_answer(queued)
    return store_access.event_stream(events)


async def _work(
    stream: ResponseStream, lease: Lease, request: Request, priority: int, size: RequestBytes
) -> AsyncGenerator[StreamEvent, None]:
    """Wait for a response's turn, and yield its events; `size` counts in `Held` until the prompt is tokenized."""
    request_bytes.set(size)
    with ExitStack() as held:
        held.callback(lease.release)
        held.callback(size.release)
        async with aclosing(stream):
            for event in stream.opening():
                yield event
            try:
                place = await enter(lease, caller_of(request.scope), 1, priority)
            except HttpError as full:
                raise EngineOverloadedError(str(full)) from None
            except RetiredError:
                raise EngineDeadError("the model was unloaded while a response waited for a place in it") from None
            held.callback(place.leave)
            await stream.start()
            async for event in stream:
                yield event


async def owner_of(request: HTTPConnection, wire: requests.PromptFields | requests.CompactRequest) -> str:
    """Return the owner of the response; "" if the store is not needed, so that it is not opened."""
    store: ResponseStore | None = request.app.state.response_store
    stored = isinstance(wire, requests.ResponsesRequest) and wire.store is not False
    given = wire.input if isinstance(wire.input, list) else ()
    refers = wire.previous_response_id is not None or getattr(wire, "conversation", None) is not None
    refers = refers or any(isinstance(item, ItemReference) for item in given)
    if store is None or not (stored or refers):
        return ""
    return await store.owner(caller_of(request.scope).key)


def response_servers(service: McpService | None, settings: ToolOptions, *, keys: bool) -> McpSource | None:
    """Return the operator's MCP servers and allowed URLs, None without either; `keys` as in `ConfiguredServers`."""
    urls = settings.mcp_allow_urls
    if service is None:
        return McpServers(ToolRegistry(), allowed_urls=urls) if urls else None
    servers = McpServers(service.registry, service.errors, allowed_urls=urls)
    return ConfiguredServers(servers, keys=keys, approved=service.auto_approves if settings.mcp_execute else None)


class ConfiguredServers:
    """Gives clients access to the operator's servers and allowed URLs; `keys` is whether clients need an API key.

    With API keys, a client may use all tools, because its request sets which calls need approval. Without keys, it may
    use only the tools that mcp.json approves, and only with `--mcp-execute`; `approved` returns whether it does, and is
    None without that flag.
    """

    def __init__(self, servers: McpServers, *, keys: bool, approved: Callable[[ToolDefinition], bool] | None) -> None:
        self._servers = servers
        self._keys = keys
        self._approved = approved

    def check(self, tool: McpTool, path: str) -> None:
        if tool.server_url is None and not self._keys and self._approved is None:
            field = f"{path}.server_label"
            raise UnsupportedParameterError(
                f"{field} is not supported: this server runs tools of its MCP servers for clients with a key "
                "(--api-key), or those that mcp.json approves (--mcp-execute)",
                field,
            )
        self._servers.check(tool, path)

    @asynccontextmanager
    async def open(self, tool: McpTool) -> AsyncGenerator[OpenServer]:
        async with self._servers.open(tool) as server:
            yield self._approved_part(server) if tool.server_url is None and not self._keys else server

    def _approved_part(self, server: OpenServer) -> OpenServer:
        approved = self._approved
        tools = [tool for tool in server.tools if approved is not None and approved(tool.definition)]
        if server.tools and not tools:
            return server._replace(tools=(), error="mcp.json approves none of its tools, and there is no API key")
        others = [tool.definition.original_name for tool in server.tools if tool not in tools]
        return server._replace(tools=tools, unapproved=others)


# ---- stored responses ------------------------------------------------------------------------------------------------


@stored_route(
    "GET /v1/responses/{response_id}",
    answer=Response,
    events=EVENTS,
    query={
        **store_access.INCLUDE,
        "stream": {"enum": ["true", "false"], "default": "false", "description": "Send the events."},
        "starting_after": {
            "type": "integer",
            "minimum": 0,
            "maximum": _MAX_EVENT,
            "description": "With stream=true: the number of the last event that is known already.",
        },
        "include_obfuscation": {"enum": ["false"], "default": "false"},
    },
)
async def get_response(request: Request, response_id: str) -> HttpResponse:
    """A response, or with stream=true the events of a background response."""
    store, owner = await store_access.store_and_owner(request)
    query = store_access.query_of(request, "stream", "starting_after", "include", "include_obfuscation")
    if store_access.switch_of(query, "include_obfuscation"):
        message = "include_obfuscation must be false: events are never padded with random characters"
        raise InvalidParameterError(message, "include_obfuscation")
    after = query.get("starting_after")
    number = -1 if after is None else store_access.number_of("starting_after", after, 0, _MAX_EVENT)
    if not store_access.switch_of(query, "stream"):
        if after is not None:
            raise InvalidParameterError("starting_after needs stream=true", "starting_after")
        return HttpResponse((await store.get(owner, response_id)).body, media_type=answering.JSON)
    return store_access.event_stream(await request.app.state.background.stream(owner, response_id, number))


@stored_route("DELETE /v1/responses/{response_id}", answer=ResponseDeleted)
async def delete_response(request: Request, response_id: str) -> HttpResponse:
    """Delete a response; a running response is ended."""
    _, owner = await store_access.store_and_owner(request)
    store_access.query_of(request)
    return answering.json_answer(await request.app.state.background.delete(owner, response_id))


@stored_route("POST /v1/responses/{response_id}/cancel", answer=Response)
async def cancel_response(request: Request, response_id: str) -> HttpResponse:
    """End a response that runs in the background."""
    _, owner = await store_access.store_and_owner(request)
    store_access.query_of(request)
    return HttpResponse(await request.app.state.background.cancel(owner, response_id), media_type=answering.JSON)


@stored_route("GET /v1/responses/{response_id}/input_items", answer=ItemList, query=store_access.ITEM_PAGE)
async def list_input_items(request: Request, response_id: str) -> HttpResponse:
    """The items in the request of a response."""
    store, owner = await store_access.store_and_owner(request)
    return answering.json_answer(await store.input_items(owner, response_id, store_access.page_request(request)))
