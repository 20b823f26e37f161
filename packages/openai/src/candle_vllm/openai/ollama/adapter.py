# SPDX-License-Identifier: MIT
"""OllamaAdapter: answers Ollama's requests with an `OpenAIAdapter`, whole or streamed, without HTTP.

Requests become tasks, and the events of the answer become Ollama's lines (steps 2 and 10 of a request's life).
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError, RequestError
from candle_vllm.openai.adapter import OpenAIAdapter
from candle_vllm.openai.answers import AnswerStream, ChunkStream
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.ollama import answers
from candle_vllm.openai.ollama import request as wires
from candle_vllm.openai.protocol.fields import Cut
from candle_vllm.openai.protocol.generation import sampling_names
from candle_vllm.openai.protocol.templating import set_effort
from candle_vllm.openai.protocol.tools import tool_use
from candle_vllm.openai.remarks import remark
from candle_vllm.openai.task import Call, Part, Paths, Task, TextPart
from candle_vllm.openai.task import Message as TaskMessage

_Generating = wires.ChatRequest | wires.GenerateRequest

_SPELLED = {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "logprobs": "top_logprobs",
    **{name: f"options.{name}" for name in sampling_names(wires.Options)},
}
"""Name in `SamplingParams` -> path of the field in the request."""


class LineStream(ChunkStream[answers.Line]):
    """Lines of one answer. Closing it (`aclose`) aborts the request."""


class OllamaAdapter:
    """Answers Ollama's requests; every method raises what `OpenAIAdapter` raises.

    `sampling_defaults` are values, by name in `SamplingParams`, that take precedence over the model's defaults.
    """

    def __init__(self, adapter: OpenAIAdapter, *, sampling_defaults: Mapping[str, Any] | None = None) -> None:
        self._adapter = adapter
        self._defaults = dict(sampling_defaults or {})

    async def chat(self, request: wires.ChatRequest) -> answers.ChatLine:
        """Return the whole answer. Cancelling this coroutine aborts the request."""
        return cast(answers.ChatLine, await (await self.chat_stream(request)).whole(answers.join_lines))

    async def chat_stream(self, request: wires.ChatRequest) -> LineStream:
        """Submit the request and stream its lines; close the stream to abort the request."""
        times = self._begun(request)
        answer = await self._bounded(self._adapter.answer, partial(self._chat_task, request))
        return LineStream(answer, answers.LineWriter(times, chat=True, ends=self._adapter.model_info.eos_token_ids))

    async def generate(self, request: wires.GenerateRequest) -> answers.GenerateLine:
        """Return the whole answer. Cancelling this coroutine aborts the request."""
        return cast(answers.GenerateLine, await (await self.generate_stream(request)).whole(answers.join_lines))

    async def generate_stream(self, request: wires.GenerateRequest) -> LineStream:
        """Submit the request and stream its lines; close the stream to abort the request."""
        times = self._begun(request)
        if request.raw or request.suffix or not self._adapter.model_info.has_chat_template:
            if request.think:
                remark(["think has no effect: without a chat template, the prompt decides whether the model thinks"])
            read = partial(_raw_task, request, self._defaults)
            answer = await self._bounded(lambda task: self._adapter.continued(task()), read)
        else:
            answer = await self._bounded(self._adapter.answer, partial(self._prompt_task, request))
        # With images there is no `context`: the next request could not give their placeholders the images again.
        context = None if request.raw or request.suffix or request.images else answer.prompt
        ends = self._adapter.model_info.eos_token_ids
        return LineStream(answer, answers.LineWriter(times, chat=False, ends=ends, context=context))

    async def _bounded(
        self, start: Callable[[Callable[[], Task]], Awaitable[AnswerStream]], read: Callable[[], Task]
    ) -> AnswerStream:
        """Start an answer; without room for `num_predict` tokens, it ends at the end of the context."""
        try:
            return await start(read)
        except PromptTooLongError as error:
            if error.param != _SPELLED["max_tokens"]:
                raise
        return await start(lambda: read().unlimited())

    async def embed(self, request: wires.EmbedRequest) -> answers.Vectors:
        """Return the embeddings of texts, scaled to length 1. Cancelling aborts the texts that are not embedded yet."""
        times = self._begun(request)
        texts = request.input if request.truncate is False else await self._cut(request.input)
        made = await self._vectors(request.model, texts, "input", normalize=True, dimensions=request.dimensions)
        return answers.Vectors(
            model=made.model,
            embeddings=tuple(cast("list[float]", each.embedding) for each in made.data),
            **times.durations(),
            prompt_eval_count=made.usage.prompt_tokens,
        )

    async def embeddings(self, request: wires.EmbeddingsRequest) -> answers.Vector:
        """Return the embedding of one text, not scaled to length 1. Cancelling this coroutine aborts the request."""
        self._begun(request)
        made = await self._vectors(request.model, [request.prompt or ""], "prompt", normalize=False)
        return answers.Vector(cast("list[float]", made.data[0].embedding))

    def _begun(self, request: Any) -> answers.Times:
        asked = None if request.options is None else request.options.num_ctx
        most = self._adapter.model_info.max_model_len
        if asked is not None and asked > most:
            told = f"this server runs the model with a context of {most} tokens (--max-model-len)"
            remark([f"options.num_ctx is {asked}, but {told}"])
        return answers.Times(request.received, time.perf_counter_ns())

    async def _vectors(self, model: str, texts: Sequence[str | list[int]], field: str, **options: Any) -> Any:
        given = {"model": model} | {name: value for name, value in options.items() if value is not None}
        try:
            return await self._adapter.embed({"input": list(texts), **given})
        except RequestError as error:
            if error.param is not None and error.param.startswith("input"):
                error.param = field + error.param.removeprefix("input")
            raise

    async def _cut(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts; of a text that is too long, remove the last tokens before its final special tokens."""
        most, made = self._adapter.model_info.max_model_len, list[list[int]]()
        around, *tokens = await self._adapter.tokens_of(["", *texts])
        for number, ids in enumerate(tokens):
            if len(ids) > most:
                remark([f"input.{number} has {len(ids)} tokens and was cut to {most}"])
            made.append(list(Cut(most, "right").of(ids, most, around)))
        return made

    def _chat_task(self, request: wires.ChatRequest) -> Task:
        if not request.messages:
            raise InvalidParameterError("messages must not be empty", "messages")
        use = tool_use(request.tools or (), None, None)
        messages = read_messages(request.messages)
        last = messages[-1]
        return Task(
            messages=messages,
            paths=Paths(
                {
                    **_SPELLED,
                    "prompt": "messages",
                    "structured_outputs": "tools" if request.form() is None else "format",
                },
                [f"tools.{number}.function.parameters" for number in range(len(use.shown))],
            ),
            tools=use,
            continued=last.role == "assistant" and bool(last.parts) and not last.calls,
            **self._shared(request),
        )

    def _prompt_task(self, request: wires.GenerateRequest) -> Task:
        system, prompt = ((TextPart(text),) if text else () for text in (request.system, request.prompt))
        said: list[tuple[Literal["system", "user"], tuple[Part, ...]]] = [
            ("system", system),
            ("user", (*wires.image_parts(request.images, "images"), *prompt)),
        ]
        return Task(
            messages=tuple(TaskMessage(role=role, parts=parts) for role, parts in said if parts),
            paths=Paths({**_SPELLED, "structured_outputs": "format"}),
            before=tuple(request.context or ()),
            tell_ids=True,
            **self._shared(request),
        )

    def _shared(self, request: _Generating) -> dict[str, Any]:
        return {
            "model": request.model,
            "form": request.form(),
            "sampling": {**self._defaults, **request.sampling()},
            "variables": self._thinking(request),
            "show_thoughts": request.think is not False,
        }

    def _thinking(self, request: _Generating) -> dict[str, Any]:
        """Return the template's thinking variables; refuse to think with a model without reasoning."""
        think, variables = request.think, dict[str, Any]()
        if think is None:
            return variables
        if think and self._adapter.planner.choice.reasoning is None:
            name = self._adapter.model_info.name
            raise UnsupportedParameterError(f"think is not supported: {name!r} does not support thinking", "think")
        if isinstance(think, str):
            set_effort(variables, think, "think")
        return {**variables, "thinking": bool(think), "enable_thinking": bool(think)}


def read_messages(messages: Sequence[wires.Message]) -> tuple[TaskMessage, ...]:
    """Convert messages to the messages of a `Task`.

    A result belongs to the first call without a result that has its id and name, as far as the result gives them.
    """
    made, count = list[TaskMessage](), 0
    pending = deque[Call]()
    for number, message in enumerate(messages):
        calls = list[Call]()
        images = wires.image_parts(message.images, f"messages.{number}.images")
        silent = not message.content and (message.role == "assistant" or bool(images))
        for call in message.tool_calls or ():
            count += 1
            text = json.dumps(call.function.arguments or {}, ensure_ascii=False)
            calls.append(Call(call.id or f"call{count:05d}", call.function.name, text))
        if message.role == "assistant":
            pending = deque(calls)
        answered = None
        if message.role == "tool":
            given_id, name = message.tool_call_id, message.tool_name or message.name
            answered = next((c for c in pending if given_id in (None, c.id) and name in (None, c.name)), None)
        if answered is not None:
            pending.remove(answered)
        made.append(
            TaskMessage(
                role=message.role,
                parts=images if silent else (*images, TextPart(message.content or "")),
                thoughts=message.thinking,
                calls=tuple(calls),
                call_id=message.tool_call_id if answered is None else answered.id,
                name=(message.tool_name or message.name) if answered is None else answered.name,
            )
        )
    return tuple(made)


def _raw_task(request: wires.GenerateRequest, defaults: Mapping[str, Any]) -> Task:
    if request.images:
        said = "images: the model has no chat template, which would define their place in the prompt"
        raise UnsupportedParameterError(said, "images")
    prompt = request.prompt or ""
    text = f"{request.system}\n{prompt}" if request.system else prompt
    return Task(
        model=request.model,
        prompts=(text,),
        suffix=request.suffix or "",
        before=tuple(request.context or ()),
        paths=Paths({**_SPELLED, "structured_outputs": "format"}),
        form=request.form(),
        # OpenAI's completions have 16 tokens by default; Ollama's have no limit.
        sampling={"max_tokens": None, **defaults, **request.sampling()},
        add_special_tokens=True,
        tell_ids=True,
    )
