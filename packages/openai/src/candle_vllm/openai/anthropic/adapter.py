# SPDX-License-Identifier: MIT
"""MessagesAdapter: Anthropic's Messages API, answered by an `OpenAIAdapter`, whole or streamed, without HTTP.

Requests become tasks, and the events of the answer become Anthropic's events (steps 2 and 10 of a request's life).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any

from msgspec.structs import replace

from candle_vllm.core.errors import PromptTooLongError
from candle_vllm.openai.adapter import OpenAIAdapter
from candle_vllm.openai.anthropic.answers import Message, MessageEvent, TokenCount
from candle_vllm.openai.anthropic.request import (
    CountTokensRequest,
    MessagesRequest,
    ThinkingOn,
    parse_count_tokens_request,
    parse_messages_request,
)
from candle_vllm.openai.anthropic.streaming import EventWriter, join_message
from candle_vllm.openai.anthropic.tasks import Reading, read_messages
from candle_vllm.openai.events import Usage
from candle_vllm.openai.fair_threads import apart
from candle_vllm.openai.streams import AnswerStream, ChunkStream
from candle_vllm.openai.task import Task

Fields = Mapping[str, Any]  # a request as a plain object, which is validated when it is used


class MessagesAdapter:
    """Answers Anthropic's requests.

    Requests are plain objects, or come from `parse_messages_request` and `parse_count_tokens_request`. Every method
    raises what `OpenAIAdapter` raises; `to_anthropic_error` converts it to a response.
    """

    def __init__(self, adapter: OpenAIAdapter, *, sampling_defaults: Fields | None = None) -> None:
        """
        Args:
            adapter: answers the tasks.
            sampling_defaults: defaults by name in `SamplingParams`; they take precedence over the model's own.
        """
        self._adapter = adapter
        self._sampling_defaults = dict(sampling_defaults or {})

    async def create(self, request: MessagesRequest | Fields) -> Message:
        """Return the whole answer; the request's `stream` is ignored. Cancelling this coroutine aborts the request."""
        async with aclosing(await self.create_stream(request)) as events:
            return join_message([event async for event in events])

    async def create_stream(self, request: MessagesRequest | Fields) -> MessageStream:
        """Submit the request and stream its events; close the stream to abort the request."""
        parsed = request if isinstance(request, MessagesRequest) else parse_messages_request(request)
        reading = await self._read(parsed)
        with reading.worded():
            try:
                answer, bound = await self._adapter.answer(lambda: reading.task), False
            except PromptTooLongError as error:
                if error.param != "max_tokens":
                    raise
                # As at Anthropic, the answer then continues to the end of the context, and its stop reason says so.
                answer, bound = await self._unbound(reading.task), True
        shown = not (isinstance(parsed.thinking, ThinkingOn) and parsed.thinking.display == "omitted")
        writer = EventWriter(show_thinking=shown, context_bound=bound)
        counts = Usage(prompt_tokens=len(answer.prompt), completion_tokens=0)
        return MessageStream(answer, writer, partial(_worded, reading), writer.start(answer.head, counts))

    async def count_tokens(self, request: CountTokensRequest | Fields) -> TokenCount:
        """Count the prompt tokens that `create` would submit, cached or not; nothing is generated."""
        parsed = request if isinstance(request, CountTokensRequest) else parse_count_tokens_request(request)
        reading = await self._read(parsed)
        with reading.worded():
            return TokenCount(await self._adapter.count_tokens(lambda: reading.task))

    async def _unbound(self, task: Task) -> AnswerStream:
        sampling = {name: value for name, value in task.sampling.items() if name != "max_tokens"}
        try:
            return await self._adapter.answer(lambda: replace(task, sampling=sampling))
        except PromptTooLongError as error:
            error.param = "messages"
            raise

    async def _read(self, request: MessagesRequest | CountTokensRequest) -> Reading:
        """Convert a request in another thread, because conversations may be long."""
        return await apart(read_messages, request, self._sampling_defaults)


class MessageStream(ChunkStream[MessageEvent]):
    """Events of one answer. Close it (`aclose`) if the client disconnects: this aborts the request."""


@contextmanager
def _worded(reading: Reading) -> Iterator[None]:
    with reading.worded(), reading.task.paths.blamed():
        yield
