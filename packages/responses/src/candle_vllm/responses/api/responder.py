"""Responder: the Responses API over a chat model, its tools and a memory, whole or streamed, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, NamedTuple

import msgspec

from candle_vllm.core.errors import InvalidParameterError, RequestError
from candle_vllm.openai import parse_chat_request
from candle_vllm.openai.anthropic.habits import TemplateHabits
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.responses.api.call_results import Placed
from candle_vllm.responses.api.chat_fields import blame, chat_fields
from candle_vllm.responses.api.echo import begin_response
from candle_vllm.responses.api.event_writer import EventWriter
from candle_vllm.responses.api.mcp_source import McpSource, NoServers, OpenServer
from candle_vllm.responses.api.memory import Answered, Memory, gather_items
from candle_vllm.responses.api.messages import Translated, translate
from candle_vllm.responses.api.response_stream import ResponseStream
from candle_vllm.responses.api.stored_items import stored_items
from candle_vllm.responses.api.tool_plan import ToolPlan, offered, plan_tools
from candle_vllm.responses.api.turn_model import TokensSpentError, TurnModel
from candle_vllm.responses.conversation.chat_model import ChatModel
from candle_vllm.responses.conversation.events import ConversationFinished, ToolStarted
from candle_vllm.responses.conversation.loop import ConversationLoop
from candle_vllm.responses.conversation.options import ConversationOptions
from candle_vllm.responses.protocol.request import (
    InputTokensRequest,
    PromptFields,
    ResponsesRequest,
    parse_input_tokens_request,
    parse_responses_request,
)
from candle_vllm.responses.protocol.response import InputTokens, Response
from candle_vllm.responses.protocol.tools import McpTool

Fields = Mapping[str, Any]  # a request as a plain object, checked when it is used
_LOOP_FIELDS = frozenset({"messages", "tools", "stream", "stream_options", "n"})


class ResponderOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of every response, and what it says where the request says nothing.

    Attributes:
        model: the name that is told.
        sampling_defaults: for fields that a request leaves open; sent to the model.
        model_defaults: what the model uses where neither says something; only told.
        max_turns: of the model in one response, where tools run here.
        timeout: seconds for one response, or None.
        tool_timeout: seconds for one call of a tool, or None for the tool's own.
    """

    model: str = "default"
    sampling_defaults: Mapping[str, Any] = msgspec.field(default_factory=dict)
    model_defaults: Mapping[str, Any] = msgspec.field(default_factory=dict)
    max_turns: int = 32
    timeout: float | None = None
    tool_timeout: float | None = None


class _Prepared(NamedTuple):
    request: PromptFields
    plan: ToolPlan
    made: Translated
    fields: dict[str, Any]
    items: Sequence[Placed]


class Responder:
    """Answers requests. Every method raises `RequestError` for a wrong request, and what its model raises.

    Args:
        model: answers chat requests.
        count: how many tokens the prompt of a chat request has; None where that cannot be told.
        habits: what the model's template takes; None is everything.
        servers: where MCP servers come from; None is none.
        memory: keeps responses; None keeps nothing.
        options: limits and defaults.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        count: Callable[[Fields], Awaitable[int]] | None = None,
        habits: Callable[[], Awaitable[TemplateHabits]] | None = None,
        servers: McpSource | None = None,
        memory: Memory | None = None,
        options: ResponderOptions | None = None,
    ) -> None:
        self._model = model
        self._count = count
        self._habits = habits
        self._servers = servers or NoServers()
        self._memory = memory
        self._options = options or ResponderOptions()

    async def create(self, request: ResponsesRequest | Fields, *, owner: str = "") -> Response:
        """The whole response; what `create_stream` would tell in its last event. Cancelling it ends the response.

        Raises:
            CandleVllmError: also where the response failed after it had begun.
        """
        async with aclosing(await self.create_stream(request, owner=owner)) as events:
            async for _ in events:
                pass
            if events.failure is not None:
                raise events.failure
            return events.response

    async def create_stream(self, request: ResponsesRequest | Fields, *, owner: str = "") -> ResponseStream:
        """Submits the request and gives its events as they come; close the stream to end it."""
        stream = await self.prepare(request, owner=owner)
        await stream.start()
        return stream

    async def prepare(
        self, request: ResponsesRequest | Fields, *, owner: str = "", keep: bool = True
    ) -> ResponseStream:
        """Checks a request and gives its events, to be started; close the stream also where it never is.

        Args:
            request: checked, or an object.
            owner: whose response it is, for the memory.
            keep: False where the caller keeps the response.
        """
        parsed = request if isinstance(request, ResponsesRequest) else parse_responses_request(request)
        stored = self._is_stored(parsed)
        async with AsyncExitStack() as stack:
            if parsed.conversation_id is not None and self._memory is not None:
                await stack.enter_async_context(self._memory.turn(owner, parsed.conversation_id))
            prepared = await self._prepare(parsed, owner, stack)
            defaults = {**self._options.model_defaults, **self._options.sampling_defaults}
            response = begin_response(
                parsed, prepared.plan, model=self._options.model, stored=stored, defaults=defaults
            )
            writer = EventWriter(response, prepared.plan, encoded=parsed.wants_encrypted)
            given = [one.item for one in prepared.items if one.path.startswith("input")]

            async def work(stream: ResponseStream) -> None:
                await self._answer(stream, writer, prepared, owner if stored and keep else None)

            return ResponseStream(writer, work, stored_items(given) if stored else (), opened=stack.pop_all())

    async def count_input_tokens(self, request: InputTokensRequest | Fields, *, owner: str = "") -> InputTokens:
        """The tokens of the prompt that `create` would make; nothing is generated."""
        parsed = request if isinstance(request, InputTokensRequest) else parse_input_tokens_request(request)
        if self._count is None:
            raise UnsupportedParameterError("this model's tokens cannot be counted", None)
        async with AsyncExitStack() as stack:
            prepared = await self._prepare(parsed, owner, stack)
            try:
                return InputTokens(input_tokens=await self._count(self._chat(prepared)))
            except RequestError as error:
                self._blame(error, prepared)
                raise

    def _is_stored(self, request: ResponsesRequest) -> bool:
        if self._memory is None:
            for field in ("store", "background"):
                if getattr(request, field):
                    raise UnsupportedParameterError(f"{field} is not supported: this server keeps no responses", field)
            return False
        return request.store is not False

    async def _prepare(self, request: PromptFields, owner: str, stack: AsyncExitStack) -> _Prepared:
        """Reads the history, opens the MCP servers, and checks the whole as a chat request."""
        items = await gather_items(request, self._memory, owner)
        servers = await self._open_servers(request, stack)
        plan = plan_tools(request, servers)
        habits = await self._habits() if self._habits is not None else TemplateHabits()
        made = await asyncio.to_thread(translate, items, request.instructions, plan, habits)
        fields = chat_fields(request, plan.choice)
        fields = {**self._absent(request), **fields}
        prepared = _Prepared(request, plan, made, fields, items)
        try:
            await asyncio.to_thread(_check, self._chat(prepared), made)
        except RequestError as error:
            self._blame(error, prepared)
            raise
        return prepared

    def _absent(self, request: PromptFields) -> dict[str, Any]:
        """The operator's sampling values; they hold for requests that generate."""
        return dict(self._options.sampling_defaults) if isinstance(request, ResponsesRequest) else {}

    async def _open_servers(self, request: PromptFields, stack: AsyncExitStack) -> dict[int, OpenServer]:
        tools = {place: tool for place, tool in enumerate(request.tools or ()) if isinstance(tool, McpTool)}
        labels: set[str] = set()
        for place, tool in tools.items():
            if tool.server_label in labels:
                field = f"tools.{place}.server_label"
                raise InvalidParameterError(
                    f"{field} must be unique, and another tool has {tool.server_label!r:.80}", field
                )
            labels.add(tool.server_label)
            self._servers.check(tool, f"tools.{place}")
        async with asyncio.TaskGroup() as group:
            opened = {
                place: group.create_task(stack.enter_async_context(self._servers.open(tool)))
                for place, tool in tools.items()
            }
        return {place: task.result() for place, task in opened.items()}

    def _chat(self, prepared: _Prepared) -> dict[str, Any]:
        tools = [definition.to_openai() for definition in prepared.plan.registry.definitions()]
        tools += prepared.plan.client_tools
        chat = {**prepared.fields, "messages": prepared.made.messages}
        return {**chat, "tools": tools} if tools else chat

    def _blame(self, error: RequestError, prepared: _Prepared) -> None:
        blame(error, prepared.made.sources, prepared.plan.paths())
        limit = getattr(prepared.request, "max_output_tokens", None)
        if error.param == "max_output_tokens" and limit is None:
            error.param = "input"  # there is no limit to lower

    async def _answer(self, stream: ResponseStream, writer: EventWriter, prepared: _Prepared, keep: str | None) -> None:
        """Puts the events of a response from the first to the last."""
        request, plan = prepared.request, prepared.plan
        assert isinstance(request, ResponsesRequest)
        model = TurnModel(self._model, max_tokens=request.max_output_tokens, truncate=request.truncation == "auto")
        model.entered = stream.begun
        await stream.put(writer.resume())
        for tool in request.tools or ():
            if isinstance(tool, McpTool) and tool.server_label not in prepared.made.listed:
                server = next(one for one in plan.servers if one.label == tool.server_label)
                await stream.put(writer.list_server(server, offered(tool, server)))
        last = []
        try:
            loop = ConversationLoop(model, plan.registry, self._loop_options(request, prepared))
            run = loop.run(prepared.made.messages, client_tools=plan.client_tools, approved=prepared.made.approved)
            async with aclosing(run) as events:
                async for event in events:
                    if isinstance(event, ToolStarted):
                        stream.begun()
                    if isinstance(event, ConversationFinished):
                        last = writer.add(event)
                    else:
                        await stream.put(writer.add(event))
        except TokensSpentError:
            last = writer.cut("max_output_tokens")
        except RequestError as error:
            self._blame(error, prepared)
            raise
        *before, final = last
        await stream.put(before)
        stream.begun()
        try:
            if keep is not None and self._memory is not None:
                answered = Answered(owner=keep, response=writer.response, input_items=stream.input_items)
                await self._memory.keep(answered)
        except BaseException:
            writer.withdraw(final)
            raise
        await stream.put([final])

    def _loop_options(self, request: ResponsesRequest, prepared: _Prepared) -> ConversationOptions:
        options = self._options
        return ConversationOptions(
            max_turns=options.max_turns,
            max_tool_calls=request.max_tool_calls,
            timeout=options.timeout,
            approval=prepared.plan.approval,
            parallel_tools=1 if request.parallel_tool_calls is False else 8,
            tool_timeout=options.tool_timeout,
            request={name: value for name, value in prepared.fields.items() if name not in _LOOP_FIELDS},
        )


def _check(chat: dict[str, Any], made: Translated) -> None:
    """Checks the chat request as a whole; calls that are to be run first are answered for that."""
    waiting = [{"role": "tool", "tool_call_id": one, "content": ""} for one in sorted(made.approved)]
    parse_chat_request({**chat, "messages": [*chat["messages"], *waiting]})
