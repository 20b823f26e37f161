"""JSON of a chat stream -> `ChatCompletionChunk`, as tolerant as OpenAI-compatible servers are different.

Read are: `reasoning` for `reasoning_content`, content as a list of parts, calls without index, usage without details.
What is missing gets the value that says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET

from candle_vllm.openai.protocol.chat import (
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChunkChoice,
    FunctionCallDelta,
    ToolCallDelta,
)
from candle_vllm.openai.protocol.usage import CompletionTokensDetails, PromptTokensDetails, Usage


class ChunkParser:
    """Reads the chunks of one stream.

    Attributes:
        finished: a chunk said why the answer ended.
    """

    def __init__(self) -> None:
        self.finished = False
        self._next_index = 0

    def parse(self, data: Mapping[str, Any]) -> ChatCompletionChunk:
        """One chunk."""
        choices = tuple(self._choice(choice) for choice in _list(data, "choices") if isinstance(choice, dict))
        usage = data.get("usage")
        return ChatCompletionChunk(
            id=_text(data, "id") or "",
            created=_count(data, "created"),
            model=_text(data, "model") or "",
            system_fingerprint=_text(data, "system_fingerprint") or "",
            choices=choices,
            usage=_usage(usage) if isinstance(usage, dict) else None,
        )

    def _choice(self, choice: dict[str, Any]) -> ChunkChoice:
        delta = choice.get("delta")
        reason = _text(choice, "finish_reason") or None  # some servers write "" where there is none
        self.finished = self.finished or reason is not None
        return ChunkChoice(
            index=_count(choice, "index"),
            delta=self._delta(delta) if isinstance(delta, dict) else ChatDelta(),
            logprobs=_logprobs(choice.get("logprobs")),
            finish_reason=reason,
        )

    def _delta(self, delta: dict[str, Any]) -> ChatDelta:
        calls = [call for call in _list(delta, "tool_calls") if isinstance(call, dict)]
        return ChatDelta(
            role=_text(delta, "role"),
            content=_content(delta.get("content")),
            reasoning_content=_text(delta, "reasoning_content") or _text(delta, "reasoning"),
            tool_calls=tuple(map(self._call, calls)) or None,
        )

    def _call(self, call: dict[str, Any]) -> ToolCallDelta:
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        name, arguments = _text(function, "name"), function.get("arguments")
        if isinstance(arguments, str):
            arguments = _whole(arguments)
        elif arguments is not None:
            arguments = json.dumps(arguments)  # some servers send the object itself
        index = call.get("index")
        if not isinstance(index, int):  # a name begins a call, anything else continues the last one
            index = self._next_index if name else max(self._next_index - 1, 0)
        self._next_index = max(self._next_index, index + 1)
        return ToolCallDelta(
            index=index,
            id=_text(call, "id"),
            type="function",
            function=FunctionCallDelta(name=name, arguments=arguments),
        )


def _text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    return _whole(value) if isinstance(value, str) else None


def _whole(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no message can."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _count(data: Mapping[str, Any], name: str) -> int:
    value = data.get(name)
    return int(value) if isinstance(value, (int, float)) and 0 <= value < 1 << 53 else 0


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = data.get(name)
    return value if isinstance(value, list) else []


def _content(value: Any) -> str | None:
    if isinstance(value, list):
        return "".join(_text(part, "text") or "" for part in value if isinstance(part, dict))
    return _whole(value) if isinstance(value, str) else None


def _logprobs(value: Any) -> ChatLogprobs | None:
    """OpenAI's entries; None where the server's have another form."""
    try:
        return msgspec.convert(_with_bytes(value), ChatLogprobs) if isinstance(value, dict) else None
    except msgspec.ValidationError:
        return None


def _with_bytes(value: Any) -> Any:
    """The same with an empty list where `bytes` is null, which it is for tokens that are no text."""
    if isinstance(value, dict):
        return {key: [] if key == "bytes" and item is None else _with_bytes(item) for key, item in value.items()}
    return [_with_bytes(item) for item in value] if isinstance(value, list) else value


def _usage(usage: dict[str, Any]) -> Usage:
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    cached, reasoning = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(
            _count(cached, "cached_tokens") if isinstance(cached, dict) else 0,
        ),
        completion_tokens_details=CompletionTokensDetails(_count(reasoning, "reasoning_tokens"))
        if isinstance(reasoning, dict)
        else UNSET,
    )
