# SPDX-License-Identifier: MIT
"""The initial response: the request's fields with their defaults, which the response repeats.

Its tools are the request's, without secrets, and without tools that OpenAI would run (`HostedTool`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from candle_vllm.responses.api.item_writers import new_id
from candle_vllm.responses.protocol.request import JsonSchemaFormat, PromptFields, ResponsesRequest
from candle_vllm.responses.protocol.response import ConversationOut, Response
from candle_vllm.responses.protocol.tools import CustomTool, FunctionTool, HostedTool, McpTool, NamespaceTool

# This server's defaults, used if neither the request nor the operator nor the model gives a value.
_DEFAULTS: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def begin_response(request: ResponsesRequest, *, model: str, stored: bool, defaults: Mapping[str, Any]) -> Response:
    """Return a response in progress, or queued if it runs in the background.

    Args:
        defaults: sampling values for fields that the request does not set.
    """
    conversation = request.conversation_id
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
        tool_choice=_choice(request),
        parallel_tool_calls=request.parallel_tool_calls is not False,
        max_tool_calls=request.max_tool_calls,
        max_output_tokens=request.max_output_tokens,
        truncation=request.truncation or "disabled",
        text=_text(request),
        reasoning=_reasoning(request),
        **used,
        top_logprobs=request.top_logprobs or 0,
        store=stored,
        background=bool(request.background),
        metadata=dict(request.metadata or {}),
        safety_identifier=request.safety_identifier,
        prompt_cache_key=request.prompt_cache_key,
        user=request.user,
    )


def _choice(request: ResponsesRequest) -> str | dict[str, Any]:
    choice = request.tool_choice
    return (
        choice.model_dump(exclude_none=True) if choice is not None and not isinstance(choice, str) else choice or "auto"
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


def _reasoning(request: ResponsesRequest) -> dict[str, Any] | None:
    config = request.reasoning
    if config is None:
        return None
    said = {"effort": config.effort, "summary": config.summary or config.generate_summary}
    return said if config.max_tokens is None else {**said, "max_tokens": config.max_tokens}


def shown_tools(request: PromptFields) -> list[dict[str, Any]]:
    """Return the tools of a request in the response's form, in the request's order."""
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
