# SPDX-License-Identifier: MIT
"""Add tools of MCP servers to chat requests without tools (steps 1 and 2 of a request's life).

`tools: []`, `tool_choice: "none"` and, unless a call is required, a required form of the answer (`response_format`)
leave them out. Calls are sent to the client like calls of its own tools, or run here (`--mcp-execute`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.responses import Response

from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError
from candle_vllm.openai import ChatCompletionRequest, parse_chat_request
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.fair_threads import apart
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.remarks import remark
from candle_vllm.server.answering import GenerationApi, answer_parsed, deadline_of, parsed
from candle_vllm.server.http.body import unless_disconnected
from candle_vllm.server.mailbox.policy import refuse_headers
from candle_vllm.server.models.slot import ServedModel

if TYPE_CHECKING:
    from candle_vllm.server.mcp.service import McpService, Offer

_MANY = 64  # tools or messages; more are checked in a thread, so that other streams do not wait
_LEAVE_OUT = "send tools: [] to leave the tools of this server's MCP servers out"
_NOT_TOGETHER = f"is not supported while the server runs tools itself: {_LEAVE_OUT}"

logger = logging.getLogger(__name__)


async def answer_with_tools(request: Request, service: McpService, api: GenerationApi) -> Response:
    """Read and answer a chat request; every failure is an exception."""
    deadline = deadline_of(request)
    payload = await parsed(request, _payload)
    if payload.get("tools") is None and payload.get("tool_choice") != "none":
        await unless_disconnected(service.settled(), request.receive)
        offer = service.offer()
        _check_choice(payload.get("tool_choice"), service)
        if offer.tools:
            return await _answer(request, service, api, payload, offer, deadline)
    return await answer_parsed(request, api, await _checked(payload), deadline)


async def _answer(
    request: Request, service: McpService, api: GenerationApi, payload: dict[str, Any], offer: Offer, deadline: float
) -> Response:
    wire = await _checked({**payload, "tools": list(offer.tools)}, many=len(offer.tools) > _MANY)
    whole, streamed = api.whole, api.streamed
    if service.options.execute:
        refuse_headers(request.scope["headers"], None if request.app.state.mailbox is None else _NOT_TOGETHER)
        whole, streamed = partial(_executed, service, offer), partial(_executed_stream, service, offer)
        api = replace(api, stored=None)
    api = replace(
        api,
        whole=_with_tools(service, offer, api.whole, whole),
        streamed=_with_tools(service, offer, api.streamed, streamed),
    )
    return await answer_parsed(request, api, wire, deadline)


_Answer = Callable[[ServedModel, Any], Awaitable[Any]]  # makes the whole answer, or its stream


def _with_tools(service: McpService, offer: Offer, plain: _Answer, with_tools: _Answer) -> _Answer:
    """Return `with_tools` for models that get the tools; for others `plain`, with the request without the tools."""

    async def answer(model: ServedModel, wire: ChatCompletionRequest) -> Any:
        if not _fits(model, wire, service):
            return await plain(model, wire.model_copy(update={"tools": None, "tool_choice": None}))
        try:
            return await with_tools(model, wire)
        except PromptTooLongError as error:  # the client did not send the tools
            count = len(offer.tools)
            error.args = (f"{error} ({count} tools of MCP servers are part of the prompt: {_LEAVE_OUT})",)
            raise

    return answer


async def _executed(service: McpService, offer: Offer, model: ServedModel, wire: ChatCompletionRequest) -> Any:
    from candle_vllm.server.mcp.chat_execution import Execution, executed

    _check_executable(wire)
    return await executed(Execution(service, offer, model, wire))


async def _executed_stream(
    service: McpService, offer: Offer, model: ServedModel, wire: ChatCompletionRequest
) -> AsyncIterator[Any]:
    from candle_vllm.server.mcp.chat_execution import ExecutedStream, Execution

    _check_executable(wire)
    execution = Execution(service, offer, model, wire)
    await execution.start()
    return ExecutedStream(execution, include_usage=wire.include_usage)


def _payload(body: bytes) -> dict[str, Any]:
    value = decode_json(body)
    if not isinstance(value, dict):
        parse_chat_request(body)  # refuses it
    return value


def _check_choice(choice: object, service: McpService) -> None:
    """Raise InvalidParameterError if the request requires a call of a tool that models do not get (`refusal`)."""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if isinstance(name, str) and (why := service.refusal(name)) is not None:
        raise InvalidParameterError(f"tool_choice cannot require {name!r:.80}: {why}", "tool_choice.function.name")


async def _checked(payload: Mapping[str, Any], *, many: bool = False) -> ChatCompletionRequest:
    messages = payload.get("messages")
    many = many or (isinstance(messages, list) and len(messages) > _MANY)
    return await apart(parse_chat_request, payload) if many else parse_chat_request(payload)


def _fits(model: ServedModel, wire: ChatCompletionRequest, service: McpService) -> bool:
    """Whether the model gets the tools: if its answer may be a call, and its prompts show them or a call is required.

    InvalidParameterError if the request asks for a call, and the model's calls cannot be parsed.
    """
    if wire.tool_choice in (None, "auto") and wire.structured() is not None:
        return False
    if model.adapter.planner.choice.shows_tools:
        return True
    name = model.entry.names[0]
    if wire.tool_choice in (None, "auto"):
        if name not in service.warned:
            service.warned.add(name)
            logger.info("the model %s gets no MCP tools: its prompts show none, or its calls cannot be parsed", name)
        return False
    if model.adapter.planner.choice.tools is None:
        raise InvalidParameterError(
            f"tool_choice cannot require a call: no format of tool calls is known for {name!r:.80} (--tool-parser)",
            "tool_choice",
        )
    return True


def _check_executable(wire: ChatCompletionRequest) -> None:
    """Raise a 400 that names a field which an answer of several turns cannot serve; warn of fields without effect."""
    wrong = {
        "n": wire.sequences > 1,
        "echo": bool(wire.echo),
        "continue_final_message": bool(wire.continue_final_message),
        "add_generation_prompt": wire.add_generation_prompt is False,
        "prompt_logprobs": wire.prompt_logprobs is not None,
        "return_token_ids": bool(wire.return_token_ids),
        "stream_options.continuous_usage_stats": wire.continuous_usage,
    }
    for field, asked in wrong.items():
        if asked:
            raise UnsupportedParameterError(f"{field} {_NOT_TOGETHER}", field)
    idle = [name for name in ("timings_per_token", "verbose", "return_tokens_as_token_ids") if getattr(wire, name)]
    remark(f"{name} has no effect on an answer whose tools run in the server" for name in idle)
