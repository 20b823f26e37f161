# SPDX-License-Identifier: MIT
"""Responder: the Responses API over a chat model, its tools and stored responses, whole or streamed, without HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError, RequestError
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.fair_threads import apart
from candle_vllm.openai.json_body import parse_body
from candle_vllm.openai.task import Task, images_of
from candle_vllm.responses.api.call_results import Placed
from candle_vllm.responses.api.connection import ConnectionMemory
from candle_vllm.responses.api.event_writer import EventWriter
from candle_vllm.responses.api.mcp_source import McpSource
from candle_vllm.responses.api.messages import Translated, encode_thoughts
from candle_vllm.responses.api.response_stream import ResponseStream
from candle_vllm.responses.api.stored_items import entry_of, stored_item, stored_items
from candle_vllm.responses.api.task_making import Prepared, TaskMaker, gather_items, has_servers
from candle_vllm.responses.api.turn_items import MAX_SHOWN
from candle_vllm.responses.api.turn_model import TokensSpentError, TurnModel
from candle_vllm.responses.conversation.chat_model import ChatModel, eyes_of
from candle_vllm.responses.conversation.events import Event, ToolStarted
from candle_vllm.responses.conversation.loop import ConversationLoop
from candle_vllm.responses.conversation.options import ConversationOptions
from candle_vllm.responses.conversation.transcript import Transcript
from candle_vllm.responses.protocol.items import MessageItem
from candle_vllm.responses.protocol.request import (
    CompactRequest,
    InputTokensRequest,
    JsonSchemaFormat,
    PromptFields,
    ResponsesRequest,
    parse_responses_request,
)
from candle_vllm.responses.protocol.response import (
    CompactedResponse,
    ConversationOut,
    InputTokens,
    MessageOut,
    OutputText,
    Response,
)
from candle_vllm.responses.protocol.tools import CustomTool, FunctionTool, HostedTool, McpTool, NamespaceTool
from candle_vllm.responses.store.entries import new_id, new_item_id, parts_of
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition

if TYPE_CHECKING:
    from candle_vllm.responses.api.response_store import ResponseStore
    from candle_vllm.responses.store.backend import StoreOptions

Fields = Mapping[str, Any]  # a request as a plain object, which is checked on use


class ResponderOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of every response, and values that a request can replace.

    Attributes:
        model: model name to report if the request does not name one of `names`.
        names: names that the model is served by; if it is empty, the name in the request is reported.
        sampling_defaults: values for fields that a request does not set; sent to the model.
        model_defaults: values that the model uses if nothing else sets them; only reported.
        max_turns: maximum number of the model's turns in one response with tools that run here.
        timeout: seconds for one response, or None.
        tool_timeout: seconds for one call of a tool, or None for the tool's own timeout.
    """

    model: str = "default"
    names: tuple[str, ...] = ()
    sampling_defaults: Mapping[str, Any] = msgspec.field(default_factory=dict)
    model_defaults: Mapping[str, Any] = msgspec.field(default_factory=dict)
    max_turns: int = 32
    timeout: float | None = None
    tool_timeout: float | None = None


class Responder:
    """Answers requests. Every method raises `RequestError` for an invalid request, and the errors of the model.

    Args:
        count: counts the tokens of a task's prompt; None if they cannot be counted.
        servers: source of MCP servers; None allows no server.
        store: store of responses; None stores nothing.
        memory: responses of the client's connection, which requests may continue; None holds none.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        count: Callable[[Callable[[], Task]], Awaitable[int]] | None = None,
        servers: McpSource | None = None,
        store: ResponseStore | None = None,
        memory: ConnectionMemory | None = None,
        options: ResponderOptions | None = None,
    ) -> None:
        self._model = model
        self._count = count
        self._store = store
        self._memory = memory
        self._options = options or ResponderOptions()
        self._task_maker = TaskMaker(servers, self._options.sampling_defaults, eyes_of(model))

    async def create(self, request: ResponsesRequest | Fields, *, owner: str = "") -> Response:
        """Return the whole response; raises CandleVllmError if it fails. A cancelled call ends the response."""
        async with aclosing(await self.create_stream(request, owner=owner)) as events:
            async for _ in events:
                pass
            events.raise_failure()
            return events.response

    async def create_stream(self, request: ResponsesRequest | Fields, *, owner: str = "") -> ResponseStream:
        """Submit the request, and return its events as they occur; close the stream to end the response."""
        stream = await self.prepare(request, owner=owner)
        await stream.start()
        return stream

    async def prepare(
        self, request: ResponsesRequest | Fields, *, owner: str = "", keep: bool = True, at_once: bool = False
    ) -> ResponseStream:
        """Check a request, and return its stream, not yet started; close the stream even if it is never started.

        Args:
            owner: owner of the response if it is stored.
            keep: False if the caller stores the response and adds it to its conversation.
            at_once: whether to return before the conversation's turn and MCP servers are ready. The started stream then
                waits for them, and reports their errors in events.
        """
        parsed = parse_responses_request(request)
        stored = self._is_stored(parsed)
        if parsed.background and not at_once:
            message = "background is not supported: only the server runs responses in the background"
            raise UnsupportedParameterError(message, "background")
        self._task_maker.check_servers(parsed)
        late = at_once and (parsed.conversation_id is not None or has_servers(parsed))
        async with AsyncExitStack() as stack:
            if late:
                prepared, items = None, await gather_items(parsed, self._store, owner, self._memory)
            else:
                prepared, items = await self._ready(parsed, owner, stack, check=at_once)
            defaults = {**self._options.model_defaults, **self._options.sampling_defaults}
            names, model = self._options.names, self._options.model
            if parsed.model is not None and (parsed.model in names or not names):
                model = parsed.model
            response = begin_response(parsed, model=model, stored=stored, defaults=defaults)
            kept = stored or parsed.conversation_id is not None
            given: Sequence[dict[str, Any]] = ()
            if kept or self._memory is not None:
                given = await apart(stored_items, [one.item for one in items if one.path.startswith("input")])
            if self._store is not None and parsed.conversation_id is not None:  # refuse too large items
                await apart(parts_of, given, self._store.options.max_item_bytes, "input")
            room = MAX_SHOWN
            if self._store is not None and stored and has_servers(parsed):
                room = await apart(_room, self._store.options, given)
            writer = EventWriter(
                response,
                encoded=parsed.wants_encrypted,
                tells_drafts=bool(parsed.return_draft_counts),
                room=room,
            )

            async def work(stream: ResponseStream) -> None:
                if at_once:
                    stream.begun()
                ready = prepared or (await self._ready(parsed, owner, stream.opened, check=False))[0]
                await self._answer(stream, writer, parsed, ready, owner if kept and keep else None)

            return ResponseStream(writer, work, given, opened=stack.pop_all())

    async def compact(self, request: CompactRequest | Fields, *, owner: str = "") -> CompactedResponse:
        """Return a conversation in a shorter form: the users' messages, and the model's summary of everything."""
        asked = summary_request(parse_body(CompactRequest, request))
        items = await gather_items(asked, self._store, owner, self._memory)
        size = sum(len(one.item.model_dump_json(exclude_none=True)) for one in items[:-1])
        limit = min(max(size // _SHORTER, MIN_SUMMARY), MAX_SUMMARY)
        limited = asked.model_copy(update={"max_output_tokens": limit})
        try:
            response = await self.create(limited, owner=owner)
        except PromptTooLongError as error:
            if error.param != "max_output_tokens":
                raise
            response = await self.create(asked, owner=owner)  # with as many tokens as fit
        return compacted(response, items[:-1])

    async def count_input_tokens(self, request: InputTokensRequest | Fields, *, owner: str = "") -> InputTokens:
        """Count the tokens of the prompt that `create` would make; nothing is generated."""
        parsed = parse_body(InputTokensRequest, request)
        if self._count is None:
            raise UnsupportedParameterError("this model's tokens cannot be counted", None)
        self._task_maker.check_servers(parsed)
        async with AsyncExitStack() as stack:
            items = await gather_items(parsed, self._store, owner, self._memory)
            prepared = await self._task_maker.prepare(parsed, items, stack, check=False)
            task = await apart(prepared.task)
            if prepared.made.approved:  # the results of these calls would be part of the prompt
                missing = ", ".join(repr(call.id)[:80] for call in _open_calls(task, prepared.made)[:5])
                raise InvalidParameterError(f"input leaves tool calls without a tool message: {missing}", "input")
            return InputTokens(input_tokens=await self._count(lambda: task))

    def _is_stored(self, request: ResponsesRequest) -> bool:
        if self._store is None:
            for field in ("store", "background"):
                if getattr(request, field):
                    raise UnsupportedParameterError(f"{field} is not supported: this server stores no responses", field)
            return False
        return request.store is not False

    async def _ready(
        self, request: ResponsesRequest, owner: str, stack: AsyncExitStack, *, check: bool
    ) -> tuple[Prepared, Sequence[Placed]]:
        """Wait for the conversation's turn, read the history, and open the servers; the stack ends turn and servers."""
        if request.conversation_id is not None and self._store is not None:
            await stack.enter_async_context(self._store.turn(owner, request.conversation_id))
        items = await gather_items(request, self._store, owner, self._memory)
        return await self._task_maker.prepare(request, items, stack, check=check), items

    async def _answer(
        self,
        stream: ResponseStream,
        writer: EventWriter,
        request: ResponsesRequest,
        prepared: Prepared,
        keep: str | None,
    ) -> None:
        """Put the events of a response into the stream, from the first to the last."""
        plan, made = prepared.plan, prepared.made
        model = TurnModel(self._model, max_tokens=request.max_output_tokens, truncate=request.truncation == "auto")
        model.entered = stream.begun
        await stream.put(writer.resume(plan))
        for server in plan.servers:
            if server.error or server.label not in made.listed:
                await stream.put(writer.list_server(server.label, plan.offered[server.label], server.error))
        try:
            limits = self._options
            options = ConversationOptions(
                max_turns=limits.max_turns,
                max_tool_calls=request.max_tool_calls,
                timeout=limits.timeout,
                approval=plan.approval,
                parallel_tools=1 if request.parallel_tool_calls is False else 8,
                tool_timeout=limits.tool_timeout,
            )
            loop = ConversationLoop(model, plan.registry, options)
            async with aclosing(_conversation(loop, model, prepared, await apart(prepared.task))) as events:
                async for event in events:
                    if isinstance(event, ToolStarted):
                        stream.begun()
                    await stream.put(writer.add(event))
        except (TokensSpentError, PromptTooLongError):
            if not model.grew:
                raise
            await stream.put(writer.cut(FinishReason.LENGTH.responses))
        stream.begun()
        if keep is not None and self._store is not None:
            entry = await apart(entry_of, keep, writer.response, stream.input_items)
            if writer.response.store:
                await self._store.put(entry)
            await self._store.add_to_conversation(entry)
        await stream.put(writer.conclude())


def _conversation(loop: ConversationLoop, model: TurnModel, prepared: Prepared, task: Task) -> AsyncGenerator[Event]:
    plan, made = prepared.plan, prepared.made
    ids = {call.id for message in task.messages for call in message.calls}
    ours = {name for name, tool in plan.by_name.items() if tool.kind == "mcp"}
    ran = (call.id for message in task.messages for call in message.calls if call.name in ours)
    transcript = Transcript(_open_calls(task, made), ids, len(images_of(task.messages)), task.messages, ran)
    later = plan.use(plan.choice.freed(), parallel=prepared.request.parallel_tool_calls)

    def ask(_: Sequence[ToolDefinition], *, first: bool) -> Task:
        model.grew = transcript.grew
        return replace(task, messages=(*transcript.earlier, *transcript.added), tools=task.tools if first else later)

    return loop.converse(transcript, ask, plan.by_name.keys() - ours, approved=made.approved)


def _open_calls(task: Task, made: Translated) -> list[ToolCall]:
    """Return the calls of the last answer that have no result and were approved."""
    calls = (call for message in task.messages for call in message.calls if call.id in made.approved)
    return [ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in calls]


def _room(options: StoreOptions, given: Sequence[Mapping[str, Any]]) -> int:
    """Return the maximum bytes of images in an answer, which must fit into the store with the request's items."""
    left = min(options.max_record_bytes, options.max_bytes) - len(msgspec.json.encode(given))
    return max(0, min(MAX_SHOWN, left // 2))


# ---- the initial response --------------------------------------------------------------------------------------------

# This server's defaults, used if neither the request nor the operator nor the model gives a value.
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def begin_response(request: ResponsesRequest, *, model: str, stored: bool, defaults: Mapping[str, Any]) -> Response:
    """Return a response in progress, or queued if it runs in the background; it repeats the request's fields.

    `defaults` are sampling values for fields that the request does not set.
    """
    conversation, config, choice = request.conversation_id, request.reasoning, request.tool_choice
    chosen = choice if choice is None or isinstance(choice, str) else choice.model_dump(exclude_none=True)
    reasoning: dict[str, Any] | None = None
    if config is not None:
        reasoning = {"effort": config.effort, "summary": config.summary or config.generate_summary}
        reasoning |= {} if config.max_tokens is None else {"max_tokens": config.max_tokens}
    used: dict[str, Any] = {}
    for name, plain in _DEFAULTS.items():
        values = (getattr(request, name), defaults.get(name), plain)
        used[name] = float(next(value for value in values if value is not None))
    return Response(
        id=new_id("resp"),
        created_at=int(time.time()),
        status="queued" if request.background else "in_progress",
        model=model,
        previous_response_id=request.previous_response_id,
        conversation=None if conversation is None else ConversationOut(id=conversation),
        instructions=request.instructions,
        tools=tuple(shown_tools(request)),
        tool_choice=chosen or "auto",
        parallel_tool_calls=request.parallel_tool_calls is not False,
        max_tool_calls=request.max_tool_calls,
        max_output_tokens=request.max_output_tokens,
        truncation=request.truncation or "disabled",
        text=_text(request),
        reasoning=reasoning,
        **used,
        top_logprobs=request.top_logprobs or 0,
        store=stored,
        background=bool(request.background),
        metadata=dict(request.metadata or {}),
        safety_identifier=request.safety_identifier,
        prompt_cache_key=request.prompt_cache_key,
        user=request.user,
    )


def _text(request: ResponsesRequest) -> dict[str, Any]:
    config = request.text
    form: dict[str, Any] = {"type": "text"}
    if config is not None and isinstance(config.format, JsonSchemaFormat):
        form = {
            "type": "json_schema",
            "name": config.format.name,
            "description": config.format.description,
            "schema": config.format.json_schema,
            "strict": config.format.strict is not False,  # the answer follows the schema in any case
        }
    elif config is not None and config.format is not None:
        form = config.format.model_dump(by_alias=True, exclude_none=True)
    verbosity = config.verbosity if config is not None else None
    return {"format": form} if verbosity is None else {"format": form, "verbosity": verbosity}


def shown_tools(request: PromptFields) -> list[dict[str, Any]]:
    """Return the tools of a request as its response shows them: in its order, without secrets and `HostedTool`s."""
    return [_shown(tool) for tool in request.tools or () if not isinstance(tool, HostedTool)]


def _shown(tool: FunctionTool | CustomTool | NamespaceTool | McpTool) -> dict[str, Any]:
    if isinstance(tool, McpTool):
        shown = tool.model_dump(exclude={"authorization", "headers", "defer_loading"}, exclude_none=True)
        shown["require_approval"] = shown.get("require_approval", "always")
        if tool.server_url is not None:
            shown["server_url"] = tool.server_url.partition("?")[0]
        return shown
    shown = {"type": tool.type, "name": tool.name, "description": tool.description}
    if isinstance(tool, NamespaceTool):
        return {**shown, "description": tool.description or "", "tools": [_shown(one) for one in tool.tools]}
    if isinstance(tool, FunctionTool):
        return {**shown, "parameters": tool.parameters, "strict": tool.strict}
    return {**shown, "format": {"type": "text"} if tool.format is None else tool.format.model_dump()}


# ---- compaction ------------------------------------------------------------------------------------------------------
# A conversation is replaced by its user messages and a summary that its model generates. The summary is an item of type
# `compaction`, encoded but not encrypted; in a later input, it becomes a part of the prompt.

MIN_SUMMARY, MAX_SUMMARY = 128, 2048  # tokens
_SHORTER = 8  # characters of a conversation per token of its summary, so that the summary is about half as long
_ASKED = (
    "Summarise the conversation up to here for somebody who goes on with it and has not seen it: what was asked, "
    "decided, found and done, the names, numbers, paths and code that still matter, and what is open. Write the "
    "summary and nothing else."
)


def summary_request(request: CompactRequest) -> ResponsesRequest:
    """Return the request for the summary; its last item is the instruction."""
    given: Any = request.model_dump(mode="json", by_alias=True, exclude_none=True).get("input", [])
    items = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
    asked = parse_responses_request(
        {
            "model": request.model,
            "instructions": request.instructions,
            "previous_response_id": request.previous_response_id,
            "input": items,
            "store": False,
            "reasoning": {"effort": "none", "max_tokens": 0},
        }
    )
    return asked.model_copy(update={"input": [*(asked.input or ()), MessageItem(role="user", content=_ASKED)]})


def compacted(response: Response, items: Sequence[Placed]) -> CompactedResponse:
    """Return the compacted conversation; RequestError if the answer has no summary, because the rest would be lost.

    `response` is the answer to `summary_request`; `items` are history and input without the instruction.
    """
    assert response.usage is not None
    said = (item for item in response.output if isinstance(item, MessageOut))
    summary = "\n".join(part.text for item in said for part in item.content if isinstance(part, OutputText)).strip()
    if not summary:
        told = f"in {response.usage.output_tokens} tokens: send the conversation itself"
        raise RequestError(f"The model wrote no summary of the conversation {told}.")
    users = [one for one in items if isinstance(one.item, MessageItem) and one.item.role == "user"]
    item = {"id": new_item_id("compaction"), "type": "compaction", "encrypted_content": encode_thoughts(summary)}
    return CompactedResponse(
        id=new_id("resp"),
        created_at=response.created_at,
        output=(*(stored_item(one.item, one.path) for one in users), item),
        usage=response.usage,
    )
