"""OpenAIAdapter: OpenAI's chat and completion requests answered by an engine, whole or streamed, without HTTP.

It covers steps 2, 3 and 10 of a request's life and calls the engine for those between.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec

from candle_vllm.core.engine.request import ModelInfo
from candle_vllm.core.errors import ConfigError, InvalidParameterError, RequestError
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.openai.completion_streaming import CompletionChunker, EchoedPrompt, join_completion
from candle_vllm.openai.conversation import template_messages
from candle_vllm.openai.engine import EngineLike, TokenStream
from candle_vllm.openai.errors import ModelNotServedError, UnsupportedParameterError
from candle_vllm.openai.piece_streams import ChunkStream, PieceStream
from candle_vllm.openai.protocol.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from candle_vllm.openai.protocol.completions import Completion, CompletionRequest
from candle_vllm.openai.protocol.fields import MAX_PROMPT_LOGPROBS
from candle_vllm.openai.protocol.generation import GenerationFields
from candle_vllm.openai.protocol.models import ModelCard, ModelList
from candle_vllm.openai.requests import to_sampling_params
from candle_vllm.openai.streaming import ChatChunker, Head, join_chat

ANY_MODEL = "default"  # the name that always means the served model


class OpenAIAdapter:
    """Answers OpenAI requests with one engine.

    Requests come from `parse_chat_request` and `parse_completion_request`. Every method raises `RequestError` for a
    wrong request, `EngineOverloadedError` or `EngineDeadError` when the engine takes none, and
    `GenerationFailedError` when it fails on this one; `to_error` turns them into answers.
    """

    def __init__(
        self, engine: EngineLike, *, served_model_names: Sequence[str] = (), allow_priority: bool = True
    ) -> None:
        """
        Args:
            engine: a loaded engine.
            served_model_names: default to the model's own name; the first one is used where a request names none.
            allow_priority: whether requests may go before others; False where strangers send them.
        """
        info = engine.model_info
        self._engine = engine
        self._allow_priority = allow_priority
        self._names = tuple(served_model_names) or (info.name,)
        self._created = int(time.time())
        self._fingerprint = _fingerprint(info)
        self._defaults = _checked_defaults(info.default_sampling)

    def models(self) -> ModelList:
        """The served names."""
        info = self._engine.model_info
        return ModelList(
            data=tuple(
                ModelCard(id=name, created=self._created, root=info.name, max_model_len=info.max_model_len)
                for name in self._names
            )
        )

    async def chat(self, request: ChatCompletionRequest) -> ChatCompletion:
        """The whole answer; `stream` of the request does not matter. Cancelling it aborts the request."""
        async with aclosing(await self._start_chat(request, whole=True)) as chunks:
            return join_chat([chunk async for chunk in chunks])

    async def chat_stream(self, request: ChatCompletionRequest) -> ChunkStream[ChatCompletionChunk]:
        """Submits the request and gives its chunks as they come; close the stream to abort it."""
        return await self._start_chat(request, whole=False)

    async def complete(self, request: CompletionRequest) -> Completion:
        """The whole answer; `stream` of the request does not matter. Cancelling it aborts the request."""
        async with aclosing(await self._start_completion(request, whole=True)) as chunks:
            return join_completion([chunk async for chunk in chunks])

    async def complete_stream(self, request: CompletionRequest) -> ChunkStream[Completion]:
        """Submits the request and gives its chunks as they come; close the stream to abort it."""
        return await self._start_completion(request, whole=False)

    async def _start_chat(self, request: ChatCompletionRequest, *, whole: bool) -> ChunkStream[ChatCompletionChunk]:
        head = self._head("chatcmpl-", request)
        with _blamed_as_spelled(request):
            params = self._params(request)
            # Rendering and tokenizing a long prompt takes long enough to hold up every other stream on the loop.
            prompt = await asyncio.to_thread(self._chat_prompt, request)
            _check_prompt_logprobs(request, len(prompt))
            source = self._submit(prompt, params, head.id, request, "messages")
        return ChunkStream(PieceStream([source]), ChatChunker(head, request, prompt, whole=whole))

    async def _start_completion(self, request: CompletionRequest, *, whole: bool) -> ChunkStream[Completion]:
        head = self._head("cmpl-", request)
        params = self._params(request)
        prompts = await asyncio.to_thread(self._completion_prompts, request)
        _check_prompt_logprobs(request, sum(len(prompt.token_ids) for prompt in prompts))
        sources: list[TokenStream] = []
        try:
            for number, prompt in enumerate(prompts):
                request_id = head.id if len(prompts) == 1 else f"{head.id}-{number}"
                sources.append(self._submit(prompt.token_ids, params, request_id, request, "prompt"))
        except BaseException:
            for source in sources:
                await source.aclose()
            raise
        return ChunkStream(PieceStream(sources), CompletionChunker(head, request, prompts, whole=whole))

    def _params(self, request: ChatCompletionRequest | CompletionRequest) -> SamplingParams:
        """The sampling parameters, and the rules that depend on the model and on this adapter."""
        if request.priority and not self._allow_priority:
            raise UnsupportedParameterError(
                "priority is not supported: this server lets no request go before others, unless it is started with "
                "--enable-request-priority",
                "priority",
            )
        vocabulary, allowed = self._engine.model_info.vocab_size, request.allowed_token_ids or ()
        if len(allowed) > vocabulary:
            raise InvalidParameterError(
                f"allowed_token_ids has {len(allowed)} entries, but the model's vocabulary has {vocabulary}",
                "allowed_token_ids",
            )
        return to_sampling_params(request, self._defaults)

    def _submit(
        self, prompt: Sequence[int], params: SamplingParams, request_id: str, request: GenerationFields, field: str
    ) -> TokenStream:
        if not prompt:
            raise InvalidParameterError(f"{field} gives an empty prompt; it needs at least one token", field)
        return self._engine.stream(prompt, params, request_id=request_id, priority=request.priority or 0)

    def _chat_prompt(self, request: ChatCompletionRequest) -> list[int]:
        continued = bool(request.continue_final_message)
        generation = request.add_generation_prompt
        text = self._engine.apply_chat_template(
            template_messages(request.messages),
            documents=request.documents,
            add_generation_prompt=not continued if generation is None else generation,
            continue_final_message=continued,
            **request.template_kwargs(),
        )
        # Templates write the special tokens themselves.
        return self._engine.tokenize(text, add_special_tokens=bool(request.add_special_tokens))

    def _completion_prompts(self, request: CompletionRequest) -> list[EchoedPrompt]:
        return [self._completion_prompt(request, prompt) for prompt in request.prompts]

    def _completion_prompt(self, request: CompletionRequest, prompt: str | list[int]) -> EchoedPrompt:
        engine, special = self._engine, request.add_special_tokens is not False
        ids = engine.tokenize(prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt
        self._check_known(ids)
        text = first = ""
        if request.echo:
            text = prompt if isinstance(prompt, str) else engine.detokenize(ids, skip_special_tokens=False)
            first = engine.detokenize(ids[:1], skip_special_tokens=False) if request.logprobs is not None else ""
        return EchoedPrompt(text, first, tuple(ids))

    def _check_known(self, ids: Sequence[int]) -> None:
        """Refuses ids beyond the vocabulary before a detokenizer sees them."""
        vocabulary = self._engine.model_info.vocab_size
        largest = max(ids, default=0)
        if largest >= vocabulary:
            raise InvalidParameterError(
                f"prompt has token id {largest}, but the model's vocabulary ends at {vocabulary - 1}", "prompt"
            )

    def _head(self, prefix: str, request: GenerationFields) -> Head:
        return Head(
            id=prefix + (request.request_id or uuid.uuid4().hex),
            created=int(time.time()),
            model=self._served_name(request.model),
            system_fingerprint=self._fingerprint,
        )

    def _served_name(self, name: str | None) -> str:
        if name is not None and name in self._names:
            return name
        if name is None or name == ANY_MODEL:
            return self._names[0]
        served = ", ".join(self._names)
        raise ModelNotServedError(f"The model {name!r} is not served here; served are: {served}.", "model")


@contextmanager
def _blamed_as_spelled(request: ChatCompletionRequest) -> Iterator[None]:
    """The engine blames its own names; a chat has `messages` for a prompt, and two names for the limit."""
    spelled = {"prompt": "messages"}
    if request.max_completion_tokens is not None:
        spelled["max_tokens"] = "max_completion_tokens"
    try:
        yield
    except RequestError as error:
        error.param = spelled.get(error.param or "", error.param)
        raise


def _check_prompt_logprobs(request: ChatCompletionRequest | CompletionRequest, tokens: int) -> None:
    """Refuses answers that would be made of too many log-probabilities of their `tokens` prompt tokens."""
    asked = {"prompt_logprobs": 0 if request.prompt_logprobs is None else tokens * (request.prompt_logprobs + 1)}
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        asked["logprobs"] = tokens * request.sequences * (request.logprobs + 1)
    for field, entries in asked.items():
        if entries > MAX_PROMPT_LOGPROBS:
            raise InvalidParameterError(
                f"{field} asks for {entries} log-probabilities of {tokens} prompt tokens (tokens x n x (logprobs + 1))"
                f" and at most {MAX_PROMPT_LOGPROBS} are allowed: send shorter prompts, or lower n or {field}",
                field,
            )


def _checked_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own sampling values, refused now rather than at every request."""
    request_only = {"n", "logprobs", "prompt_logprobs", "logit_bias"}
    unusable = sorted(name for name in defaults if name in request_only or name not in SamplingParams.__struct_fields__)
    if unusable:
        raise ConfigError(f"default_sampling has names that are no sampling defaults: {', '.join(unusable)}")
    try:
        SamplingParams(**{"max_tokens": None, **defaults})
    except InvalidParameterError as error:
        raise ConfigError(f"the model's default_sampling cannot be used: {error}") from error
    return dict(defaults)


def _fingerprint(info: ModelInfo) -> str:
    """Changes when the software or the model's configuration does, so that equal seeds may give other answers."""
    version = importlib.metadata.version("candle-vllm-openai")
    configuration = msgspec.json.encode([version, info])
    return "fp_" + hashlib.blake2s(configuration, digest_size=6).hexdigest()
