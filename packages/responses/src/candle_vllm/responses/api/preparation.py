"""Preparation: from a checked request to a chat request, with its history, its servers' tools, and what it must fit.

What is wrong with the chat request is said of what the caller wrote.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from candle_vllm.core.errors import InvalidParameterError, RequestError
from candle_vllm.openai import parse_chat_request
from candle_vllm.openai.anthropic.habits import TemplateHabits
from candle_vllm.openai.protocol.fields import MAX_MESSAGES
from candle_vllm.responses.api.call_results import Placed
from candle_vllm.responses.api.chat_fields import blame, chat_fields
from candle_vllm.responses.api.mcp_source import McpSource, OpenServer
from candle_vllm.responses.api.messages import Translated, translate
from candle_vllm.responses.api.tool_plan import ToolPlan, plan_tools
from candle_vllm.responses.api.turn_model import fewer
from candle_vllm.responses.protocol.request import PromptFields, ResponsesRequest
from candle_vllm.responses.protocol.tools import McpTool

MAX_URLS = 16  # MCP servers that one request names by their URLs; each is a connection of its own


class Prepared(NamedTuple):
    """A request that can be answered.

    Attributes:
        request: as it came.
        plan: its tools.
        made: its conversation as chat messages.
        fields: of the chat request beside messages and tools.
    """

    request: PromptFields
    plan: ToolPlan
    made: Translated
    fields: dict[str, Any]

    def chat(self) -> dict[str, Any]:
        """The chat request."""
        tools = [definition.to_openai() for definition in self.plan.registry.definitions()]
        tools += self.plan.client_tools
        chat = {**self.fields, "messages": self.made.messages}
        return {**chat, "tools": tools} if tools else chat

    def blame(self, error: RequestError) -> None:
        """Makes an error about the chat request one about the request."""
        blame(error, self.made.sources, self.plan.paths())
        limit = getattr(self.request, "max_output_tokens", None)
        if error.param == "max_output_tokens" and limit is None:
            error.param = "input"  # there is no limit to lower


class Preparation:
    """Prepares requests.

    Args:
        servers: where MCP servers come from.
        habits: what the model's template takes; None is everything.
        sampling_defaults: for fields that a request leaves open.
    """

    def __init__(
        self,
        servers: McpSource,
        habits: Callable[[], Awaitable[TemplateHabits]] | None,
        sampling_defaults: Mapping[str, Any],
    ) -> None:
        self._servers = servers
        self._habits = habits
        self._sampling_defaults = sampling_defaults

    def check_servers(self, request: PromptFields) -> None:
        """Refuses MCP servers that are not there or must not be dialled, without dialling any."""
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
            self._servers.check(tool, f"tools.{place}")

    async def prepare(
        self, request: PromptFields, items: Sequence[Placed], stack: AsyncExitStack, *, check: bool
    ) -> Prepared:
        """Opens the MCP servers and translates the request.

        Args:
            request: its servers have been checked.
            items: history and input.
            stack: closes the servers.
            check: check the chat request here, because somebody answers before the model sees it. That is done in any
                case where tools run before the model is asked.

        Raises:
            RequestError: about what the caller wrote.
        """
        servers = await self._open(request, stack)
        plan = plan_tools(request, servers)
        habits = await self._habits() if self._habits is not None else TemplateHabits()
        made = await asyncio.to_thread(translate, items, request.instructions, plan, habits)
        defaults = self._sampling_defaults if isinstance(request, ResponsesRequest) else {}
        prepared = Prepared(request, plan, made, {**defaults, **chat_fields(request, plan.choice)})
        if request.truncation != "auto":
            _check_length(prepared)
        _check_agreements(prepared)
        try:
            if check or made.approved:
                await asyncio.to_thread(_check, prepared)
        except RequestError as error:
            prepared.blame(error)
            raise
        return prepared

    async def _open(self, request: PromptFields, stack: AsyncExitStack) -> dict[int, OpenServer]:
        """All at the same time; where one fails, those that are open are closed with the stack."""
        opening = {
            place: asyncio.ensure_future(stack.enter_async_context(self._servers.open(tool)))
            for place, tool in _servers_of(request).items()
        }
        try:
            return dict(zip(opening, await asyncio.gather(*opening.values()), strict=True))
        except BaseException:
            for task in opening.values():
                task.cancel()
            await asyncio.gather(*opening.values(), return_exceptions=True)
            raise


def has_servers(request: PromptFields) -> bool:
    """Whether it names MCP servers."""
    return bool(_servers_of(request))


def _servers_of(request: PromptFields) -> dict[int, McpTool]:
    return {place: tool for place, tool in enumerate(request.tools or ()) if isinstance(tool, McpTool)}


def _check_length(prepared: Prepared) -> None:
    request, count = prepared.request, len(prepared.made.messages)
    if count > MAX_MESSAGES:
        field = "conversation" if request.conversation is not None else "input"
        field = "previous_response_id" if request.previous_response_id is not None else field
        raise InvalidParameterError(
            f"{field}: with it the model would be shown {count} messages, and at most {MAX_MESSAGES} are possible; "
            "leave the oldest out by truncation: auto, or begin anew with a summary",
            field,
        )


def _check_agreements(prepared: Prepared) -> None:
    """Somebody who has agreed to a call must hear where it cannot run; that its server is gone is told otherwise."""
    plan, made = prepared.plan, prepared.made
    if not made.approved or any(server.error for server in plan.servers):
        return
    calls = [call for message in made.messages for call in message.get("tool_calls") or ()]
    names = {call["id"]: call["function"]["name"] for call in calls}
    for call_id, path in made.approved.items():
        if names[call_id] not in plan.by_name:
            raise InvalidParameterError(
                f"{path} agrees to a call of {names[call_id]!r:.80}, and this request has no such tool: name its "
                "server among the tools as before",
                path,
            )


def _check(prepared: Prepared) -> None:
    """Checks the chat request as a whole; calls that are to be run first are answered for that."""
    chat = prepared.chat()
    if prepared.request.truncation == "auto":  # the oldest are left out when the model is asked
        chat["messages"] = fewer(chat["messages"])
    waiting = [{"role": "tool", "tool_call_id": one, "content": ""} for one in sorted(prepared.made.approved)]
    parse_chat_request({**chat, "messages": [*chat["messages"], *waiting]})
