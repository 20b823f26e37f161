# SPDX-License-Identifier: MIT
"""TaskMaker: makes a task from a checked request, its history and its MCP servers' tools, and checks their limits."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from candle_vllm.core.errors import InvalidParameterError, RequestError
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.fair_threads import apart
from candle_vllm.openai.json_body import rules_below, to_request_error
from candle_vllm.openai.protocol.fields import MAX_MESSAGES, MAX_TOOLS
from candle_vllm.openai.protocol.generation import sampling_values
from candle_vllm.openai.protocol.structured import JsonObjectFormat
from candle_vllm.openai.protocol.templating import check_variables, close_thoughts, set_effort
from candle_vllm.openai.protocol.tools import check_tools
from candle_vllm.openai.task import Paths, Task, ThinkingLimit, ToolUse
from candle_vllm.responses.api.call_results import Placed
from candle_vllm.responses.api.connection import ConnectionMemory
from candle_vllm.responses.api.mcp_source import McpSource, OpenServer
from candle_vllm.responses.api.messages import Translated, translate
from candle_vllm.responses.api.tool_plan import ToolPlan, plan_tools
from candle_vllm.responses.api.turn_model import check_number, fewer
from candle_vllm.responses.conversation.chat_model import Eyes
from candle_vllm.responses.protocol.items import InputItem, ItemReference, McpCallItem, images_in
from candle_vllm.responses.protocol.request import JsonSchemaFormat, PromptFields, ResponsesRequest
from candle_vllm.responses.protocol.tools import McpTool
from candle_vllm.responses.store.entries import Item, NotStoredError

if TYPE_CHECKING:
    from candle_vllm.responses.api.response_store import ResponseStore

_ITEM = TypeAdapter[InputItem](InputItem)
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
)  # an image of 1 x 1 pixels, to find out whether a template can show images
MAX_URLS = 16  # MCP servers that one request may name by URL; each has a connection of its own


class Prepared(NamedTuple):
    """A request that can be answered; `defaults` are sampling values for fields that it does not set."""

    request: PromptFields
    plan: ToolPlan
    made: Translated
    defaults: Mapping[str, Any]

    def task(self) -> Task:
        """Return the task of the request; raises `RequestError`."""
        request, made = self.request, self.made
        sampled = isinstance(request, ResponsesRequest)
        form, form_path = _form(request)
        paths = self._paths(form_path, request.max_output_tokens if sampled else None)
        # A request that only counts tokens must count all messages.
        kept = fewer(made.messages) if sampled and request.truncation == "auto" else made.messages
        check_number(len(kept) + len(made.approved), paths)  # approved calls have run by then, so each adds a result
        return Task(
            messages=made.messages,
            paths=paths,
            tools=_use(request, self.plan),
            form=form,
            sampling={**self.defaults, **_sampling(request)} if sampled else {},
            model=request.model,
            variables=_variables(request),
            thinking=_thinking(request),
            tell_counts=sampled and bool(request.timings_per_token),
            priority=(request.priority or 0) if sampled else 0,
        )

    def _paths(self, form: str, limit: int | None) -> Paths:
        own = {"messages": "input", "max_tokens": "max_output_tokens", "logprobs": "include"}
        own |= dict.fromkeys(("thinking_token_budget", "thoughts"), "reasoning.max_tokens")
        to_lower = {} if limit is not None else {"max_tokens": "input"}  # without max_output_tokens, name the input
        tools = [self.plan.by_name[tool["function"]["name"]] for tool in self.plan.shown]
        defining = [f"{one.path}.{'format.definition' if one.kind == 'custom' else 'parameters'}" for one in tools]
        return Paths({**own, "prompt": "input", "structured_outputs": form, **to_lower}, defining, own)


@dataclass(eq=False, repr=False)
class TaskMaker:
    """Prepares requests.

    Attributes:
        servers: source of MCP servers; None refuses every server.
        sampling_defaults: values for fields that a request does not set.
        eyes: image input of the model, for images in results of MCP tools; None shows no images.
    """

    servers: McpSource | None
    sampling_defaults: Mapping[str, Any]
    eyes: Eyes | None = None

    def check_servers(self, request: PromptFields) -> None:
        """Refuse MCP servers that do not exist, must not be used or have the same label, and too many URLs."""
        labels: set[str] = set()
        urls = 0
        for place, tool in _servers_of(request).items():
            if tool.server_label in labels:
                field = f"tools.{place}.server_label"
                raise InvalidParameterError(
                    f"{field} must be unique, and another tool has {tool.server_label!r:.80}", field
                )
            labels.add(tool.server_label)
            urls += tool.server_url is not None
            if urls > MAX_URLS:
                field = f"tools.{place}.server_url"
                raise InvalidParameterError(f"{field}: a request may name at most {MAX_URLS} servers by URL", field)
            if self.servers is None:
                field = f"tools.{place}.server_label"
                raise UnsupportedParameterError(f"{field} is not supported: this server has no MCP servers", field)
            self.servers.check(tool, f"tools.{place}")

    async def prepare(
        self, request: PromptFields, items: Sequence[Placed], stack: AsyncExitStack, *, check: bool
    ) -> Prepared:
        """Open the MCP servers of a checked request, and translate the request; raises `RequestError`.

        With `check`, or if approved calls run first, check also that a task can be made.
        """
        plan = plan_tools(request, await self._open(request, stack))
        made = await apart(translate, items, request.instructions, plan, await self._max_images(items))
        defaults = self.sampling_defaults if isinstance(request, ResponsesRequest) else {}
        if request.truncation != "auto":
            _check_length(request, len(made.messages))
        _check_agreements(plan, made)
        prepared = Prepared(request, plan, made, defaults)
        if check or made.approved:
            await apart(prepared.task)
        return prepared

    async def _max_images(self, items: Sequence[Placed]) -> int:
        """Return the model's image limit if results of MCP tools have images that its template shows; else 0."""
        shown = any(isinstance(item, McpCallItem) and images_in(item.content) for item, _ in items)
        if not shown or self.eyes is None or not self.eyes.max_images:
            return 0
        try:
            await self.eyes.try_picture(_PIXEL)
        except RequestError:
            return 0
        return self.eyes.max_images

    async def _open(self, request: PromptFields, stack: AsyncExitStack) -> dict[int, OpenServer]:
        """Open all servers concurrently; if one fails, the stack closes the others."""
        opening = {
            place: asyncio.ensure_future(stack.enter_async_context(self.servers.open(tool)))
            for place, tool in _servers_of(request).items()
            if self.servers is not None
        }
        try:
            return dict(zip(opening, await asyncio.gather(*opening.values()), strict=True))
        except BaseException:
            for task in opening.values():
                task.cancel()
            await asyncio.gather(*opening.values(), return_exceptions=True)
            opening.clear()  # breaks a cycle: the tasks' errors refer to this frame
            raise


async def gather_items(
    request: PromptFields, store: ResponseStore | None, owner: str, memory: ConnectionMemory | None = None
) -> list[Placed]:
    """Return the history and the input of a request; references to items of the history are left out.

    A previous response is looked up in the connection's memory first. Raises RequestError if the request refers to a
    response, conversation or item that is not stored.
    """
    given = request.input or []
    if isinstance(given, str):
        given = [_ITEM.validate_python({"type": "message", "role": "user", "content": given})]
    history = await _history(request, store, owner, memory)
    known = {item.id for item, _ in history}  # references to these are redundant
    wanted = {
        item.id: f"input.{number}.id"
        for number, item in enumerate(given)
        if isinstance(item, ItemReference) and item.id not in known
    }
    found = await store.find_items(owner, list(wanted)) if wanted and store is not None else {}
    for item_id, path in wanted.items():
        if item_id not in found:
            raise InvalidParameterError(f"{path}: there is no item {item_id!r:.80} here; send the item itself", path)
    items: list[Placed] = []
    for number, item in enumerate(given):
        if not isinstance(item, ItemReference):
            items.append(Placed(item, f"input.{number}"))
        elif item.id in wanted:
            items.append(Placed(_checked(found[item.id], wanted[item.id]), f"input.{number}"))
    return [*history, *items]


async def _history(
    request: PromptFields, store: ResponseStore | None, owner: str, memory: ConnectionMemory | None
) -> list[Placed]:
    field = "previous_response_id" if request.previous_response_id is not None else "conversation"
    if getattr(request, field) is None:
        return []
    recent: list[Item] = []
    previous = request.previous_response_id
    if memory is not None and previous is not None:
        recent, before = await memory.history(previous)
        if before is None:
            return await apart(lambda: [Placed(_checked(item, field), field) for item in recent])
        if store is None:
            raise NotStoredError("Previous response", before, field)
        previous = before
    if store is None:
        raise UnsupportedParameterError(
            f"{field} is not supported: this server stores no responses; send the whole conversation as input", field
        )
    if previous is not None:
        items = [*await store.history(owner, previous), *recent]
    else:
        more = 1 if isinstance(request.input, str) else len(request.input or ())
        items = await store.conversation_items(owner, request.conversation_id or "", more)
    return await apart(lambda: [Placed(_checked(item, field), field) for item in items])


def _checked(item: Mapping[str, Any], field: str) -> InputItem:
    try:
        return _ITEM.validate_python({name: value for name, value in item.items() if value is not None})
    except ValidationError as error:
        wrong = to_request_error(error)
        raise InvalidParameterError(f"{field} has an item that cannot be read: {wrong}", field) from None


def has_servers(request: PromptFields) -> bool:
    return bool(_servers_of(request))


def _servers_of(request: PromptFields) -> dict[int, McpTool]:
    return {place: tool for place, tool in enumerate(request.tools or ()) if isinstance(tool, McpTool)}


def _use(request: PromptFields, plan: ToolPlan) -> ToolUse:
    shown = plan.shown
    if len(shown) > MAX_TOOLS:
        raise InvalidParameterError(f"tools must have at most {MAX_TOOLS} entries, not a list of {len(shown)}", "tools")
    with rules_below("tools"):
        check_tools((f"{place}.function.name", tool["function"]["name"], tool) for place, tool in enumerate(shown))
    return plan.use(plan.choice, parallel=request.parallel_tool_calls)


def _sampling(request: ResponsesRequest) -> dict[str, Any]:
    given = sampling_values(request)
    given["max_tokens"] = request.max_output_tokens
    if request.wants_logprobs:
        given["logprobs"] = request.top_logprobs or 0
    if request.return_progress and request.stream:
        given["prompt_progress"] = True
    return {name: value for name, value in given.items() if value is not None}


def _form(request: PromptFields) -> tuple[StructuredOutputsParams | None, str]:
    """Return the answer's format, and the field that errors name; without a format, the tools define the grammar."""
    form = None if request.text is None else request.text.format
    if isinstance(form, JsonSchemaFormat):
        return StructuredOutputsParams(json=form.json_schema), "text.format.schema"
    if isinstance(form, JsonObjectFormat):
        path = "text.format.schema" if form.json_schema else "text.format"
        return StructuredOutputsParams(**form.core_fields()), path
    return None, "tools"


def _variables(request: PromptFields) -> dict[str, Any]:
    variables = dict(request.chat_template_kwargs or {})
    with rules_below("chat_template_kwargs"):
        check_variables(variables)
    if (limit := _thinking(request)) is not None:
        close_thoughts(variables, limit.tokens)
    with rules_below(""):
        set_effort(variables, request.reasoning.effort if request.reasoning else None, "reasoning.effort")
    return variables


def _thinking(request: PromptFields) -> ThinkingLimit | None:
    config = request.reasoning
    if config is None or config.max_tokens is None:
        return None
    # With the effort "none", a model whose thoughts have no known marks counts as one that does not think.
    return ThinkingLimit(config.max_tokens, required=config.effort != "none")


def _check_length(request: PromptFields, count: int) -> None:
    if count > MAX_MESSAGES:
        field = "conversation" if request.conversation is not None else "input"
        field = "previous_response_id" if request.previous_response_id is not None else field
        raise InvalidParameterError(
            f"{field}: the conversation would have {count} messages, and at most {MAX_MESSAGES} are allowed; drop the "
            "oldest with truncation: auto, or start a new conversation with a summary",
            field,
        )


def _check_agreements(plan: ToolPlan, made: Translated) -> None:
    """Refuse approved calls of tools that the request lacks, unless a server failed, which the events report."""
    if not made.approved or any(server.error for server in plan.servers):
        return
    names = {call.id: call.name for message in made.messages for call in message.calls}
    for call_id, path in made.approved.items():
        if names[call_id] not in plan.by_name:
            raise InvalidParameterError(
                f"{path} approves a call of {names[call_id]!r:.80}, and this request has no such tool: name its "
                "server among the tools as before",
                path,
            )
