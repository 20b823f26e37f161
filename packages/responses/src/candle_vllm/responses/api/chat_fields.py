"""A response's request -> the fields of a chat request, and blame for chat fields -> the fields of the caller."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from candle_vllm.core.errors import RequestError
from candle_vllm.responses.protocol.request import JsonSchemaFormat, PromptFields, ResponsesRequest

_MESSAGE = re.compile(r"messages\.(\d+)(\..*)?")
_TOOL = re.compile(r"tools\.(\d+)(\..*)?")

LIMIT = "max_completion_tokens"
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "stop", "cache_salt", "priority",
)  # fmt: skip
_FIELDS = (  # the beginning of a path in the chat request, and what stands there in the caller's
    ("response_format.json_schema.schema", "text.format.schema"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("tool_choice.function.name", "tool_choice.name"),
    ("tool_choice.allowed_tools", "tool_choice"),
    ("reasoning_effort", "reasoning.effort"),
    (LIMIT, "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("top_logprobs", "top_logprobs"),
    ("logprobs", "include"),
    ("messages", "input"),
    ("prompt", "input"),
)
_TOOL_PARTS = (("function.parameters", "parameters"), ("function.", ""), ("function", ""))  # the same below a tool


def chat_fields(request: PromptFields, choice: Any) -> dict[str, Any]:
    """The chat request without its messages and tools.

    Args:
        request: checked.
        choice: its `tool_choice` in chat form, or None.
    """
    fields: dict[str, Any] = {"model": request.model, **_form(request)}
    if choice is not None:
        fields["tool_choice"] = choice
    fields["parallel_tool_calls"] = request.parallel_tool_calls
    fields["chat_template_kwargs"] = request.chat_template_kwargs
    if request.reasoning is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    if isinstance(request, ResponsesRequest):
        fields |= {name: getattr(request, name) for name in _SAME}
        fields[LIMIT] = request.max_output_tokens
        if request.wants_logprobs:
            fields |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    return {name: value for name, value in fields.items() if value is not None}


def _form(request: PromptFields) -> dict[str, Any]:
    form = None if request.text is None else request.text.format
    if form is None or form.type == "text":
        return {}
    if isinstance(form, JsonSchemaFormat):
        schema = {"name": form.name, "schema": form.json_schema}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"response_format": {"type": form.type}}


def blame(error: RequestError, messages: Sequence[str], tools: Sequence[str]) -> None:
    """Changes the field and the message of `error` to those that the caller wrote.

    Args:
        error: about a chat request.
        messages, tools: the path of what each of its messages and tools was made of.
    """
    field, text = error.param, str(error)
    if field is None:
        return
    own = _path(field, messages, tools)
    for name in (field, "max_tokens") if own == "max_output_tokens" else (field,):
        pattern = rf"(?<![\w.]){re.escape(name)}(?!\w)"
        text = re.sub(pattern, lambda _: own, text, count=1)
    error.param = own
    error.args = (text, *error.args[1:])


def _path(path: str, messages: Sequence[str], tools: Sequence[str]) -> str:
    if (message := _MESSAGE.fullmatch(path)) is not None:
        number = int(message[1])
        return messages[number] if number < len(messages) else "input"
    if (tool := _TOOL.fullmatch(path)) is not None and int(tool[1]) < len(tools):
        below = (tool[2] or "").removeprefix(".")
        own = next((own + below[len(prefix) :] for prefix, own in _TOOL_PARTS if below.startswith(prefix)), below)
        return ".".join(filter(None, (tools[int(tool[1])], own)))
    for prefix, own in _FIELDS:
        if path == prefix or path.startswith(f"{prefix}."):
            return own + path[len(prefix) :]
    return path
