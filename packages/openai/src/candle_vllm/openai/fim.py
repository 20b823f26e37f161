# SPDX-License-Identifier: MIT
"""Fill-in-the-middle in the form of Mistral's `/v1/fim/completions`, without HTTP (steps 2 and 10 of a request's life).

A request is converted to a task that an `OpenAIAdapter` answers; the response has the form of a chat completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from msgspec import UNSET, UnsetType

from candle_vllm.openai.adapter import OpenAIAdapter
from candle_vllm.openai.answers import ChunkStream, Writer
from candle_vllm.openai.chat_answers import join_chat, wire_usage
from candle_vllm.openai.events import Begun, Ended, Event, Head, Text, Usage
from candle_vllm.openai.protocol import usage as wire
from candle_vllm.openai.protocol.chat import ChatCompletion, ChatCompletionChunk, ChatDelta, ChunkChoice
from candle_vllm.openai.protocol.fields import ModelName, Refusal, WireModel, bounded
from candle_vllm.openai.protocol.generation import MaxTokens, Stop, sampling_values
from candle_vllm.openai.task import Paths, Task


class FimRequest(WireModel):
    """A gap that a model trained for fill-in-the-middle fills; without a suffix the model continues the prompt.

    Attributes:
        prompt, suffix: text before and after the gap.
        max_tokens: maximum number of tokens; None means up to the end of the context.
        metadata: no effect, because nothing is stored.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "seed": Refusal("here it is called random_seed"),
        "n": Refusal("for several answers use /v1/completions", (1,)),
    }

    model: ModelName | None = None
    prompt: str
    suffix: str | None = None
    temperature: Annotated[float, bounded("temperature")] | None = None
    top_p: Annotated[float, bounded("top_p")] | None = None
    max_tokens: MaxTokens | None = None
    min_tokens: Annotated[int, bounded("min_tokens")] | None = None
    stream: bool | None = None
    stop: Stop | None = None
    random_seed: Annotated[int, bounded("seed", ge=0)] | None = None
    metadata: dict[str, Any] | None = None

    def task(self, defaults: Mapping[str, Any]) -> Task:
        """Convert the request to a task; `defaults` are values, by name in `SamplingParams`, for absent fields."""
        given = sampling_values(self)
        if self.random_seed is not None:
            given["seed"] = self.random_seed
        return Task(
            prompts=(self.prompt,),
            suffix=self.suffix or "",
            model=self.model,
            paths=Paths({"seed": "random_seed"}),
            sampling={**defaults, **given, "max_tokens": self.max_tokens},
            add_special_tokens=True,
        )


async def fim_stream(
    adapter: OpenAIAdapter, request: FimRequest, defaults: Mapping[str, Any] | None = None
) -> ChunkStream[ChatCompletionChunk]:
    """Submit the request and stream its chunks; raises what the adapter's methods raise. A close aborts the request.

    `defaults` are sampling values, by name in `SamplingParams`, that take precedence over the model's defaults.
    """
    return ChunkStream(await adapter.continued(request.task(defaults or {})), _Writer())


async def fim_answer(
    adapter: OpenAIAdapter, request: FimRequest, defaults: Mapping[str, Any] | None = None
) -> ChatCompletion:
    """Return the whole answer, joined from a stream's chunks. Cancelling this coroutine aborts the request."""
    return await (await fim_stream(adapter, request, defaults)).whole(join_chat)


class _Writer(Writer[ChatCompletionChunk]):
    """Writes the chunks of one answer; the last chunk has the finish reason and the usage, as in Mistral's API."""

    def __init__(self) -> None:
        self._head: Head | None = None
        self._ended: Ended | None = None

    def write(self, events: Sequence[Event]) -> list[ChatCompletionChunk]:
        made: list[ChatCompletionChunk] = []
        for event in events:
            match event:
                case Begun():
                    self._head = event.head
                    made.append(self._chunk(ChunkChoice(index=0, delta=ChatDelta(role="assistant", content=""))))
                case Text(text=text) if text:
                    made.append(self._chunk(ChunkChoice(index=0, delta=ChatDelta(content=text))))
                case Ended():
                    self._ended = event
                case Usage(final=True):
                    assert self._ended is not None
                    last = ChunkChoice(
                        index=0,
                        delta=ChatDelta(content=""),
                        finish_reason=self._ended.reason.openai,
                        stop_reason=self._ended.stop,
                    )
                    made.append(self._chunk(last, usage=wire_usage(event)))
                case _:
                    pass
        return made

    def _chunk(self, choice: ChunkChoice, usage: wire.Usage | UnsetType = UNSET) -> ChatCompletionChunk:
        assert self._head is not None
        return ChatCompletionChunk(**self._head._asdict(), choices=(choice,), usage=usage)
