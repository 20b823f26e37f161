"""Anthropic's requests -> OpenAI's, and blame for OpenAI's fields -> Anthropic's (step 2).

What OpenAI's request has, it checks: names, caps, schemas, the choice among tools. What it refuses is blamed on the
field that the caller wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from candle_vllm.core.errors import PromptTooLongError, RequestError
from candle_vllm.openai.anthropic.habits import TemplateHabits
from candle_vllm.openai.anthropic.request import CountTokensRequest, MessagesRequest, ThinkingOn
from candle_vllm.openai.anthropic.tools import AutoChoice, SearchTool, Tool, ToolChoice, ToolNameChoice
from candle_vllm.openai.anthropic.turns import openai_turns
from candle_vllm.openai.field_paths import FieldPaths, message_path
from candle_vllm.openai.protocol.chat import ChatCompletionRequest
from candle_vllm.openai.requests import parse_chat_request

_ALL_TAKEN = TemplateHabits()
_FORMAT_NAME = "answer"  # OpenAI's schemas need a name; the model does not see it
_PATHS = FieldPaths(
    fields=(
        ("response_format.json_schema.schema", "output_config.format.schema"),
        ("response_format", "output_config.format"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
        ("stop", "stop_sequences"),
        ("enable_thinking", "thinking"),
        ("include_reasoning", "thinking"),
        ("prompt", "messages"),
    ),
    tool_parts=(("function.parameters", "input_schema"), ("function.", ""), ("function", "")),
)
_PREFILL = "continue_final_message"


class Translation(NamedTuple):
    """A request of OpenAI's, and where its parts come from.

    Attributes:
        chat: the request.
        messages: for each of its messages the path of the message that it begins with.
        tools: for each of its tools the number of the tool given.
    """

    chat: ChatCompletionRequest
    messages: Sequence[str]
    tools: Sequence[int]


def translate(
    request: MessagesRequest | CountTokensRequest,
    *,
    habits: TemplateHabits = _ALL_TAKEN,
    sampling_defaults: Mapping[str, Any] | None = None,
) -> Translation:
    """The same request in OpenAI's words; raises `RequestError`.

    Args:
        request: checked.
        habits: what the model's template takes.
        sampling_defaults: for OpenAI's sampling fields that the request leaves open.
    """
    turns, prefilled = openai_turns(request.system, request.messages, habits)
    numbers = [number for number, tool in enumerate(request.tools or ()) if isinstance(tool, Tool)]
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": [turn.message for turn in turns],
        **_tool_fields(request),
        **_thinking_fields(request),
    }
    if prefilled:
        fields[_PREFILL] = True
    if request.output_config is not None and request.output_config.format is not None:
        schema = {"name": _FORMAT_NAME, "schema": request.output_config.format.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(request, MessagesRequest):
        fields |= _sampling_fields(request, sampling_defaults or {})
    sources = [turn.source for turn in turns]
    with blamed_on(sources, numbers):
        return Translation(parse_chat_request(fields), sources, numbers)


def _sampling_fields(request: MessagesRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = {
        "max_tokens": request.max_tokens,
        "stop": request.stop_sequences or None,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
    }
    return {**defaults, **{name: value for name, value in given.items() if value is not None}}


def _thinking_fields(request: MessagesRequest | CountTokensRequest) -> dict[str, Any]:
    """Without `thinking` it is up to the model's template."""
    if request.thinking is None:
        return {}
    if isinstance(request.thinking, ThinkingOn):
        return {"enable_thinking": True}
    return {"enable_thinking": False, "include_reasoning": False}


def _tool_fields(request: MessagesRequest | CountTokensRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    tools = [tool for tool in request.tools or () if isinstance(tool, Tool)]
    skipped = {tool.name for tool in request.tools or () if isinstance(tool, SearchTool)}
    if tools:
        fields["tools"] = [{"type": "function", "function": _function(tool)} for tool in tools]
    choice = request.tool_choice
    if choice is None or (isinstance(choice, AutoChoice) and choice.type == "auto" and not tools and skipped):
        return fields
    fields["tool_choice"] = _choice(choice)
    if getattr(choice, "disable_parallel_tool_use", None):
        fields["parallel_tool_calls"] = False
    return fields


def _function(tool: Tool) -> dict[str, Any]:
    given = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
    return {name: value for name, value in given.items() if value is not None}


def _choice(choice: ToolChoice) -> Any:
    if isinstance(choice, ToolNameChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


@contextmanager
def blamed_on(messages: Sequence[str], tools: Sequence[int]) -> Iterator[None]:
    """Errors that blame a field of OpenAI's request come out blaming the field that it was made of."""
    try:
        yield
    except RequestError as error:
        blame(error, messages, tools)
        raise


def blame(error: RequestError, messages: Sequence[str], tools: Sequence[int]) -> None:
    """Changes the field and the message of `error`."""
    text, field = str(error), error.param
    if messages and (_PREFILL in text or field == _PREFILL):
        field = messages[-1]
        text = (
            f"{field} has role assistant, so the answer would begin with it, but the model's template does not write "
            "it as it is: end with a user message"
        )
    elif field is not None:
        new = _anthropic_path(field, messages, tools)
        if new != field and text.startswith(field):
            text = new + text[len(field) :]
        field = new
    if isinstance(error, PromptTooLongError) and field != "max_tokens":
        text = f"prompt is too long: {text}"  # by these words clients know that they must shorten it
    error.param = field
    error.args = (text, *error.args[1:])


def _anthropic_path(path: str, messages: Sequence[str], tools: Sequence[int]) -> str:
    message = message_path(path)
    if message is not None and message.number < len(messages):
        source = messages[message.number]
        return source if source == "system" or not message.inside else f"{source}.content"
    return _PATHS.respelled(path, [f"tools.{number}" for number in tools])
