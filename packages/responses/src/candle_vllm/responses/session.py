"""ResponsesSession: a conversation that remembers what was said. Tools come to it from MCP servers later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai import OpenAIAdapter, parse_chat_request


class ConversationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one call of `run_conversation` is answered.

    Attributes:
        request: further fields of a chat completion request (`temperature`, `max_tokens`, `seed`, ...).
    """

    request: Mapping[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = {"messages", "stream", "stream_options", "n"} & set(self.request)
        if taken:
            raise InvalidParameterError(f"request must not set {', '.join(sorted(taken))}: the session does", "request")


class ConversationResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a call of `run_conversation` came to.

    Attributes:
        final_message: the model's last words.
        turns_taken: model turns.
        completed: the model ended by itself.
        stop_reason: "stop", or "length" when the answer was cut at `max_tokens` or the context.
        prompt_tokens, completion_tokens: of all turns together.
    """

    final_message: str
    turns_taken: int
    completed: bool
    stop_reason: str
    prompt_tokens: int
    completion_tokens: int


class ResponsesSession:
    """A conversation over an adapter; each call continues where the last one ended.

    Args:
        adapter: answers the chat requests.
        messages: what was said before, in OpenAI's form.
    """

    def __init__(self, adapter: OpenAIAdapter, messages: Sequence[Mapping[str, Any]] = ()) -> None:
        self._adapter = adapter
        self._messages = [dict(message) for message in messages]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The transcript so far, a copy; a new session made with it goes on from here."""
        return [dict(message) for message in self._messages]

    async def run_conversation(
        self, messages: Sequence[Mapping[str, Any]], options: ConversationOptions | None = None
    ) -> ConversationResult:
        """Adds `messages` and lets the model answer. The transcript changes only when it has.

        Raises:
            RequestError: a message or option is wrong, or the conversation is too long.
            CandleVllmError: the engine failed.
        """
        options = options or ConversationOptions()
        said = [*self._messages, *(dict(message) for message in messages)]
        answer = await self._adapter.chat(parse_chat_request({**options.request, "messages": said}))
        choice = answer.choices[0]
        content = choice.message.content or ""
        self._messages = [*said, {"role": "assistant", "content": content}]
        return ConversationResult(
            final_message=content,
            turns_taken=1,
            completed=choice.finish_reason == "stop",
            stop_reason=choice.finish_reason,
            prompt_tokens=answer.usage.prompt_tokens,
            completion_tokens=answer.usage.completion_tokens,
        )
