# SPDX-License-Identifier: MIT
"""OpenAI's chat format: messages that a library's user gives, and tasks that become requests to other servers."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.task import Message, Part, Task, TextPart, ToolUse, text_of
from candle_vllm.responses.conversation.transcript import Transcript
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition

ChatMessage = dict[str, Any]

_UNSAID = {  # fields of a task that a chat request cannot express: their names in the API, and why
    "prompts": ("prompt", "a chat request has messages, not a prompt that is continued as it is"),
    "tell_ids": ("return_token_ids", "its answer is read as text"),
    "tell_counts": ("stream_options", "the tokens of its answer are counted at the end"),
}


class ChatTranscript(Transcript):
    """A conversation whose first messages were given in OpenAI's format; they are copied and not changed.

    Raises InvalidParameterError if `messages` is no list of JSON objects, or an id or a call in it is invalid.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]] = ()) -> None:
        check_is_list(messages)
        self._given = [_checked_message(message, place) for place, message in enumerate(messages)]
        calls = [call for message in self._given for call in _calls_of(message) if isinstance(call, Mapping)]
        ids = {call["id"] for call in calls if isinstance(call.get("id"), str)}
        super().__init__(_last_calls(self._given), ids, sum(map(_images_in, self._given)))

    @property
    def messages(self) -> list[ChatMessage]:
        copied = json.loads(json.dumps(self._given, ensure_ascii=False))  # several times faster than `copy.deepcopy`
        return [*copied, *map(chat_message, self.added)]

    def request(
        self, fields: Mapping[str, Any], client_tools: Sequence[Mapping[str, Any]], tools: Sequence[ToolDefinition],
        *, first: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the next turn's chat request: `fields`, messages and tools; only the `first` turn can force a call."""
        request: dict[str, Any] = {**fields, "messages": self.messages}
        if tools or client_tools:
            request["tools"] = [*(one.to_openai() for one in tools), *map(dict, client_tools)]
        if not first and (choice := request.pop("tool_choice", None)) and "tools" in request:
            request["tool_choice"] = _free_choice(choice, set(map(_name_of, request["tools"])))
        return request


def _images_in(message: Mapping[str, Any]) -> int:
    parts = message.get("content")
    kinds = [part.get("type") for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
    return sum(kind in ("image_url", "input_image") for kind in kinds)


def chat_message(message: Message) -> ChatMessage:
    """Convert a message of a task to OpenAI's format; content is null if the message has only reasoning or calls."""
    content = _content(message.parts) or (None if message.thoughts or message.calls else "")
    more = {
        "tool_call_id": message.call_id,
        "reasoning_content": message.thoughts or None,
        "tool_calls": [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
        or None,
        "name": message.name,
    }
    return {"role": message.role, "content": content, **{k: v for k, v in more.items() if v is not None}}


def chat_request(task: Task) -> dict[str, Any]:
    """Convert a task to the body of a chat request for other servers; fields without a value are left out.

    Raises UnsupportedParameterError if a chat request or its answer cannot express a feature of the task.
    """
    for name, (param, reason) in _UNSAID.items():
        if getattr(task, name):
            raise UnsupportedParameterError(f"{param} is not supported with another server: {reason}", param)
    if task.echo and task.echo != text_of(task.messages[-1]):
        message = "echo is not supported with another server, unless it is the text of the last message"
        raise UnsupportedParameterError(message, "echo")
    variables = dict(task.variables)
    effort = variables.pop("reasoning_effort", None)
    if effort is not None:  # a server derives the variables `implied` from the effort
        implied = ("thinking", "enable_thinking")
        variables = {k: value for k, value in variables.items() if k not in implied or value is not (effort != "none")}
    sampling = dict(task.sampling)
    logprobs, predicted = sampling.pop("logprobs", None), sampling.pop("prediction", None)
    use = task.tools
    fields = {
        "model": task.model,
        "messages": list(map(chat_message, task.messages)),
        "n": None if task.choices == 1 else task.choices,
        "tools": use.as_template(),
        "tool_choice": _choice(use),
        "parallel_tool_calls": None if use.parallel or use.named is not None else False,
        **_form(task.form),
        "reasoning_effort": effort,
        "thinking_token_budget": None if task.thinking is None else task.thinking.tokens,
        "reasoning_budget_message": None if task.thinking is None else task.thinking.message,
        "chat_template_kwargs": variables or None,
        "chat_template": task.chat_template,
        "documents": None if task.documents is None else list(task.documents),
        "add_generation_prompt": task.opens_answer,
        "continue_final_message": task.continued or None,
        "add_special_tokens": task.add_special_tokens or None,
        "include_reasoning": None if task.show_thoughts else False,
        "echo": bool(task.echo) or None,
        "lora_path": task.adapter,
        "lora": None if task.lora is None else [{"id": id_, "scale": scale} for id_, scale in task.lora.items()],
        "return_progress": sampling.pop("prompt_progress", None),
        "max_completion_tokens": sampling.pop("max_tokens", None),
        **sampling,
        "logprobs": None if logprobs is None else True,
        "top_logprobs": logprobs,
        "prediction": None if predicted is None else {"type": "content", "content": predicted},
        "priority": task.priority or None,
        "use_beam_search": None if task.beam_penalty is None else True,
        "length_penalty": task.beam_penalty,
        "request_id": task.request_id,
    }
    if task.cut is not None:
        fields |= task.cut.written()
    return {name: value for name, value in fields.items() if value is not None}


def _form(form: StructuredOutputsParams | None) -> dict[str, Any]:
    if form is None:
        return {}
    if isinstance(form.json, Mapping):
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.json}}}
    if form.json_object:
        return {"response_format": {"type": "json_object"}}
    return {"structured_outputs": {form.kind: getattr(form, form.kind)}}


def _choice(use: ToolUse) -> Any:
    names = [{"type": "function", "function": {"name": tool.name}} for tool in use.tools]
    if use.named is not None:
        return names[0]
    if len(use.tools) < len(use.shown):
        return {"type": "allowed_tools", "allowed_tools": {"mode": use.mode, "tools": names}}
    return "required" if use.mode == "required" else None


def _content(parts: Sequence[Part]) -> Any:
    """Return the content of a message: its text, or a list of parts if it has more than text."""
    if all(isinstance(part, TextPart) for part in parts):
        return "\n".join(part.text for part in parts if isinstance(part, TextPart))
    return list(map(_chat_part, parts))


def _chat_part(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if part.stored:
        return {"type": "input_image", "file_id": part.source}
    image = {"url": part.source} if part.detail is None else {"url": part.source, "detail": part.detail}
    return {"type": "image_url", "image_url": image}


def _free_choice(choice: Any, names: Collection[str]) -> Any:
    """Return the choice for later turns, of the tools that are left: required calls would leave the model no answer."""
    if isinstance(choice, Mapping) and isinstance(choice.get("allowed_tools"), Mapping):
        left = [one for one in choice["allowed_tools"]["tools"] if _name_of(one) in names]
        return {**choice, "allowed_tools": {"mode": "auto", "tools": left}} if left else "none"
    return "none" if choice == "none" else "auto"


def _name_of(tool: Any) -> str:
    """Return the name of a function or custom tool in OpenAI's format."""
    return (tool.get("function") or tool["custom"])["name"]


def allowed_names(request: Task | Mapping[str, Any]) -> Collection[str] | None:
    """Return the names of the tools that a request's tool choice lets the model call; None means all."""
    if isinstance(request, Task):
        return {tool.name for tool in request.tools.tools}
    try:
        return set(map(_name_of, request["tool_choice"]["allowed_tools"]["tools"]))
    except (AttributeError, KeyError, TypeError):
        return None


def client_names(client_tools: Sequence[Mapping[str, Any]], tools: ToolRegistry) -> frozenset[str]:
    """Return the names of the caller's tools; InvalidParameterError if one is missing or a tool here has it."""
    names: set[str] = set()
    for number, tool in enumerate(client_tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        field = f"tools.{number}.function.name"
        if not isinstance(name, str):
            raise InvalidParameterError(f"{field} must be a text", field)
        if tools.find(name) is not None:
            said = f"{field} {name!r:.80} is the name of a tool that runs here: rename one of them"
            raise InvalidParameterError(said, field)
        names.add(name)
    return frozenset(names)


def check_is_list(messages: object) -> None:
    """Raise `InvalidParameterError` if the value cannot be a list of messages."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InvalidParameterError(
            f"messages must be a list of objects with a role and content, not a {type(messages).__name__}", "messages"
        )


def _checked_message(message: Any, place: int) -> ChatMessage:
    """Return a copy of a message that a caller gave."""
    where = f"messages.{place}"
    if not isinstance(message, Mapping):
        raise InvalidParameterError(
            f"{where} must be an object with a role and content, not a {type(message).__name__}", where
        )
    try:
        text = json.dumps(dict(message), ensure_ascii=False, allow_nan=False)
        text.encode()  # a lone surrogate is not valid text
        checked = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(f"{where} must be JSON: {error!s:.200}", where) from None
    if not isinstance(checked.get("tool_call_id"), str | None):
        raise InvalidParameterError(f"{where}.tool_call_id must be a text", f"{where}.tool_call_id")
    return checked


def _last_calls(messages: Sequence[ChatMessage]) -> tuple[ToolCall, ...]:
    """Return the calls without results of the last assistant message, if only tool messages follow it."""
    answered: set[object] = set()
    for place in range(len(messages) - 1, -1, -1):
        message = messages[place]
        if message.get("role") != "tool":
            calls = _calls_of(message) if message.get("role") == "assistant" else ()
            read = [_call(call, place) for call in calls]
            ids = [call.id for call in read]
            if len(set(ids)) < len(ids):
                twice = next(one for one in ids if ids.count(one) > 1)
                where = f"messages.{place}.tool_calls"
                raise InvalidParameterError(f"{where}: {twice!r:.80} is the id of two calls", where)
            return tuple(call for call in read if call.id not in answered)
        answered.add(message.get("tool_call_id"))
    return ()


def _calls_of(message: ChatMessage) -> Sequence[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else ()


def _call(call: Any, place: int) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not all(
        isinstance(text, str) for text in (call.get("id"), function.get("name"), function.get("arguments"))
    ):
        raise InvalidParameterError(
            f"messages.{place}.tool_calls must have an id and a function with a name and arguments, which are texts",
            f"messages.{place}.tool_calls",
        )
    return ToolCall(id=call["id"], name=function["name"], arguments=function["arguments"])
