# SPDX-License-Identifier: MIT
"""OpenAIAdapter: answers OpenAI's requests with an engine, whole or streamed, without HTTP.

It performs steps 2, 3 and 10 of a request's life; the engine performs the steps between.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from candle_vllm.core.arguments import ExplainedAttributes, explained
from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step.request_watchers import RequestInfo, RequestWatcher, watched_submit
from candle_vllm.core.errors import ChatTemplateError, InvalidParameterError
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.vision.fetching import ImageSources
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.openai.answers import AnswerPlan, AnswerReader, AnswerStream, ChunkStream
from candle_vllm.openai.chat_answers import ChatWriter, CustomCallWriter, join_chat
from candle_vllm.openai.completion_answers import CompletionWriter, EchoedPrompt, join_completion
from candle_vllm.openai.embedding import (
    EmbeddingAdapter,
    parse_embedding_request,
    parse_rerank_request,
    parse_score_request,
)
from candle_vllm.openai.engine import EngineLike, TokenStream
from candle_vllm.openai.events import Head
from candle_vllm.openai.planning import AnswerPlanner
from candle_vllm.openai.preparation import PreparedChat, TaskPreparation
from candle_vllm.openai.protocol import embeddings, tokenizing
from candle_vllm.openai.protocol.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from candle_vllm.openai.protocol.completions import Completion, CompletionRequest
from candle_vllm.openai.protocol.models import ModelCard, ModelList
from candle_vllm.openai.protocol.score import Ranking, RerankRequest, ScoreList, ScoreRequest
from candle_vllm.openai.remarks import remark
from candle_vllm.openai.requests import parse_chat_request, parse_completion_request, read_chat, read_completion
from candle_vllm.openai.serving import AdapterNames, WorkerThreads
from candle_vllm.openai.task import MEDIA_MARK, Task, ThinkingLimit
from candle_vllm.openai.tokenizing import TokenizingAdapter, parse_detokenize_request, parse_tokenize_request

Fields = Mapping[str, Any]  # a request as a plain object, validated when it is used


class _Ready(NamedTuple):
    task: Task
    model: str  # the model name in the response
    prepared: PreparedChat


class OpenAIAdapter(ExplainedAttributes):
    """Answers OpenAI requests with one engine.

    Requests are plain objects, or come from `parse_chat_request` and similar functions. Methods raise `RequestError`
    for an invalid request, and `EngineOverloadedError`, `EngineSleepingError` or `EngineDeadError` if the engine
    accepts none; methods and streams raise `GenerationFailedError` or `RequestAbortedError` if a request fails later.
    `to_error` converts errors to responses. `SyncOpenAIAdapter` is for programs without an event loop.

    Attributes:
        embedding: answers requests for vectors, classes and scores, also in the forms of other APIs than OpenAI's.
    """

    def __init__(
        self,
        engine: EngineLike,
        *,
        served_model_names: Sequence[str] = (),
        strict_model_names: bool = False,
        allow_priority: bool = True,
        allow_chat_template: bool = True,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        reasoning_budget: int = -1,
        reasoning_budget_message: str | None = None,
        default_chat_template_kwargs: Mapping[str, Any] | None = None,
        watcher: RequestWatcher | None = None,
        salted: Callable[[str], str] | None = None,
        adapters: AdapterNames | None = None,
        images: ImageSources | None = None,
    ) -> None:
        """
        Args:
            engine: a loaded engine.
            served_model_names: names of the model, by default its own; the first is for requests without a name.
            strict_model_names: whether a request with an unknown name is refused instead of answered.
            allow_priority: whether requests may have a priority below 0 (overtake others); False for untrusted clients.
            allow_chat_template: whether requests may bring a chat template, which is a program in a sandbox.
            tool_parser, reasoning_parser: names of formats (docs/tool-calling.md); None uses the model's own.
            reasoning_budget: default for the maximum number of reasoning tokens; -1 means no limit.
            reasoning_budget_message: text inserted when a budget ends the reasoning; None uses the model's own.
            default_chat_template_kwargs: default values of chat template variables.
            watcher: is notified of every request that is submitted to the engine.
            salted: converts a request's `cache_salt` to one that no other caller can send; None keeps it as it is.
            adapters: LoRA adapters, whose names are served as well.
            images: allowed sources of images; None allows only images inside the request.

        Raises:
            ConfigError: the name of a parser is unknown, or a default of the model or of its template is invalid.
        """
        info = engine.model_info
        self._engine = engine
        self._watcher = watcher
        self._salted = salted
        self._created = int(time.time())
        self._fingerprint = _fingerprint(info)
        self.planner = AnswerPlanner(
            engine.chat_conventions,
            info.architecture,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
            thinking=ThinkingLimit(reasoning_budget, reasoning_budget_message, required=False),
        )
        self._preparation = TaskPreparation(
            engine,
            self.planner,
            allow_priority=allow_priority,
            allow_chat_template=allow_chat_template,
            template_defaults=default_chat_template_kwargs,
            images=images,
        )
        self._work = WorkerThreads()
        self.embedding = EmbeddingAdapter(
            engine,
            served_model_names=served_model_names,
            strict_model_names=strict_model_names,
            allow_priority=allow_priority,
            watcher=watcher,
            adapters=adapters,
            work=self._work,
        )
        self._names = self.embedding.names
        self._tokenizing = TokenizingAdapter(engine, self._preparation, self._names, self._work)

    def __repr__(self) -> str:
        return f"<OpenAIAdapter of {', '.join(self._names.all):.80}>"

    @property
    def model_info(self) -> ModelInfo:
        """Description of the model."""
        return self._engine.model_info

    def rename(self, names: Sequence[str]) -> None:
        """Replace the names of the model, of which the first is for requests without a name."""
        self._names.all = tuple(names)

    def served_name(self, name: str | None) -> str:
        """Return the model name for the response to a request with this name; raises `ModelNotServedError`."""
        return self._names.served(name)

    @property
    def beginning(self) -> str:
        """Text of the model's beginning-of-sequence token; empty for a model without one."""
        return self._engine.chat_conventions.token_names.get("bos_token") or ""

    @property
    def max_images(self) -> int:
        """Maximum number of images of a request; 0 if the model reads text only."""
        return self._engine.model_info.max_images

    async def try_picture(self, data: bytes) -> None:
        """Raise `RequestError` if the model cannot read an image file, given as bytes, in a tool's result."""
        await self._work.look(self._preparation.try_picture, data)

    async def tokens_of(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Tokenize each text, with or without special tokens around it."""
        return await self._work.prepare(lambda: [self._engine.tokenize(text, add_special_tokens) for text in texts])

    def models(self) -> ModelList:
        """Return a card for each name of the model; LoRA adapters have no cards."""
        info, choice = self._engine.model_info, self.planner.choice
        return ModelList(
            data=tuple(
                ModelCard(
                    id=name,
                    created=self._created,
                    root=info.name,
                    max_model_len=info.max_model_len,
                    modalities=info.modalities,
                    tool_parser=choice.tools.name if choice.tools else UNSET,
                    reasoning_parser=choice.reasoning.name if choice.reasoning else UNSET,
                    default_sampling=info.default_sampling or UNSET,
                )
                for name in self._names.all
            )
        )

    @explained(**{"the request, as in chat({...})": ChatCompletionRequest.wire_names()})
    async def chat(self, request: ChatCompletionRequest | Fields) -> ChatCompletion:
        """Return the whole answer; a request with `stream` is refused. Cancelling this coroutine aborts the request."""
        return await (await self._start_chat(request, whole=True)).whole(join_chat)

    @explained(**{"the request, as in chat({...})": ChatCompletionRequest.wire_names()})
    async def chat_stream(self, request: ChatCompletionRequest | Fields) -> ChunkStream[ChatCompletionChunk]:
        """Submit the request and stream its chunks; close the stream to abort the request."""
        return await self._start_chat(request, whole=False)

    async def chat_events(self, request: ChatCompletionRequest | Fields) -> AnswerStream:
        """Submit the request and stream the events of its answer; close the stream to abort the request."""
        return await self.answer(partial(read_chat, parse_chat_request(request)))

    async def answer(self, read: Callable[[], Task]) -> AnswerStream:
        """Submit a task and stream the events of its answer; close the stream to abort the request.

        `read` returns the task. It is called in another thread, because reading a conversation may take long.
        """
        return self._submitted(await self._ready(read, bounded=True))

    async def count_tokens(self, read: Callable[[], Task]) -> int:
        """Count the prompt tokens that `answer` would submit; nothing is generated."""
        return len((await self._ready(read)).prepared.prompt)

    async def apply_template(self, request: ChatCompletionRequest) -> tokenizing.RenderedPrompt:
        """Render the prompt of a chat request, with a `MEDIA_MARK` for each image; nothing is generated."""
        self._names.served(request.model)
        prepared = (await self._ready(partial(read_chat, request))).prepared
        text, mark = prepared.text, self._engine.model_info.image_text
        return tokenizing.RenderedPrompt(prompt=text.replace(mark, MEDIA_MARK) if prepared.images else text)

    @explained(**{"the request, as in complete({...})": CompletionRequest.wire_names()})
    async def complete(self, request: CompletionRequest | Fields) -> Completion:
        """Return the whole answer; a request with `stream` is refused. Cancelling this coroutine aborts the request."""
        return await (await self._start_completion(request, whole=True)).whole(join_completion)

    @explained(**{"the request, as in complete({...})": CompletionRequest.wire_names()})
    async def complete_stream(self, request: CompletionRequest | Fields) -> ChunkStream[Completion]:
        """Submit the request and stream its chunks; close the stream to abort the request."""
        return await self._start_completion(request, whole=False)

    async def embed(self, request: embeddings.EmbeddingRequest | Fields) -> embeddings.EmbeddingList:
        """Return the embeddings of texts, or of a conversation. Cancelling aborts texts that are not embedded yet."""
        parsed = parse_embedding_request(request)
        if not isinstance(parsed, embeddings.EmbeddingChatRequest):
            return await self.embedding.embed(parsed)
        if parsed.chat_template is None and not self.model_info.has_chat_template:
            said = f"{self.model_info.name} has no chat template: send input, or start it with --chat-template"
            raise ChatTemplateError(said, "messages")

        def read() -> Task:
            return replace(read_chat(parse_chat_request(parsed.chat_fields())), cut=parsed.cut("right"), reserve=0)

        ready = await self._ready(read, bounded=True)
        prompt, images = ready.prepared.prompt, ready.prepared.images
        return await self.embedding.embed(parsed, {"prompt_token_ids": prompt, "multi_modal_data": {"image": images}})

    async def score(self, request: ScoreRequest | Fields) -> ScoreList:
        """Return the scores of pairs of texts. Cancelling this coroutine aborts the pairs that are not scored yet."""
        return await self.embedding.score(parse_score_request(request))

    async def rerank(self, request: RerankRequest | Fields) -> Ranking:
        """Return documents ranked by relevance to a query. Cancelling aborts the documents that are not scored yet."""
        return await self.embedding.rerank(parse_rerank_request(request))

    async def tokenize(
        self, request: tokenizing.TokenizeRequest | Fields
    ) -> tokenizing.Tokenized | tokenizing.TokenizedContent:
        """Return the tokens of a text or of a conversation; nothing is generated."""
        return await self._tokenizing.tokenize(parse_tokenize_request(request))

    async def detokenize(self, request: tokenizing.DetokenizeRequest | Fields) -> tokenizing.Detokenized:
        """Return the text of tokens."""
        return await self._tokenizing.detokenize(parse_detokenize_request(request))

    async def _start_chat(
        self, given: ChatCompletionRequest | Fields, *, whole: bool
    ) -> ChunkStream[ChatCompletionChunk]:
        request = parse_chat_request(given)
        if whole and request.stream:
            raise InvalidParameterError(_STREAMED.format("chat"), "stream")
        ready = await self._ready(partial(read_chat, request), bounded=True)
        prepared = ready.prepared
        writes = CustomCallWriter if request.custom_tools else ChatWriter
        calls = bool(prepared.answers.tools)
        writer = writes(request, prepared.prompt, prepared.text, calls=calls, whole=whole)
        return ChunkStream(self._submitted(ready), writer)

    async def _ready(self, read: Callable[[], Task], *, bounded: bool = False) -> _Ready:
        task, model, prepared = await self._work.prepare(self._prepared, read, bounded)
        if prepared.unseen is not None:
            prepared = await self._preparation.see(task, prepared, prepared.unseen, self._work, bounded=bounded)
        grammars = any(tool.grammar is not None for tool in task.tools.tools)
        if prepared.params.structured_outputs is not None or task.form is not None or grammars:
            prepared = await self._work.compile(self._preparation.hold, task, prepared)
            remark(prepared.remarks)
        return _Ready(task, model, prepared)

    def _prepared(self, read: Callable[[], Task], bounded: bool) -> _Ready:
        task = read()
        return _Ready(task, self._names.served(task.model), self._preparation.chat(task, bounded=bounded))

    def _submitted(self, ready: _Ready) -> AnswerStream:
        task, model, prepared = ready
        head = self._head("chatcmpl-", task.request_id, model)
        with task.paths.blamed():
            source = self._submit(task, prepared.prompt, prepared.params, head.id, "messages", prepared.images)
        return AnswerStream([source], AnswerReader(head, prepared.answers, task), prepared.prompt)

    async def _start_completion(self, given: CompletionRequest | Fields, *, whole: bool) -> ChunkStream[Completion]:
        request = parse_completion_request(given)
        if whole and request.stream:
            raise InvalidParameterError(_STREAMED.format("complete"), "stream")
        answer, prompts = await self._continued(read_completion(request))
        return ChunkStream(answer, CompletionWriter(request, prompts, whole=whole))

    async def continued(self, task: Task) -> AnswerStream:
        """Submit a task with prompts and stream the events of its answers; close the stream to abort the request."""
        answer, _ = await self._continued(task)
        return answer

    async def _continued(self, task: Task) -> tuple[AnswerStream, Sequence[EchoedPrompt]]:
        head = self._head("cmpl-", task.request_id, self._names.served(task.model))
        prepared = await self._work.prepare(self._preparation.prompts, task)
        prompts, params, images, _ = await self._preparation.see_prompt(task, prepared, self._work)
        if task.form is not None:
            remark(await self._work.compile(self._preparation.check_form, task))
        sources: list[TokenStream] = []
        try:
            for number, prompt in enumerate(prompts):
                request_id = head.id if len(prompts) == 1 else f"{head.id}-{number}"
                with task.paths.blamed():
                    sources.append(self._submit(task, prompt.token_ids, params, request_id, "prompt", images))
        except BaseException:
            for source in sources:
                source.close()
            raise
        return AnswerStream(sources, AnswerReader(head, AnswerPlan(), task), prompts[0].token_ids), prompts

    def _submit(
        self,
        task: Task,
        prompt: Sequence[int],
        params: SamplingParams,
        request_id: str,
        field: str,
        images: Sequence[ImageInput] = (),
    ) -> TokenStream:
        if not prompt:
            raise InvalidParameterError(f"{field}: the prompt is empty; it needs at least one token", field)
        if params.cache_salt is not None and self._salted is not None:
            params = replace(params, cache_salt=self._salted(params.cache_salt))
        more = self._names.options(task.model, task.lora, task.adapter) | {"priority": task.priority}
        if task.beam_penalty is None:
            given = _with_images(prompt, images)
            return self._engine.stream(given, params, request_id=request_id, watcher=self._watcher, **more)
        from candle_vllm.openai.beams import beam_stream  # imported here because few requests use it

        def step(tokens: Sequence[int], params: SamplingParams, request_id: str) -> TokenStream:
            return self._engine.stream(_with_images(tokens, images), params, request_id=request_id, **more)

        info = RequestInfo(request_id, "generate", prompt, params, self._engine.detokenize, more.get("lora_request"))
        with watched_submit(self._watcher, info) as watch:
            request = GenerationRequest(request_id=request_id, prompt_token_ids=prompt, params=params)
            return beam_stream(self._engine, request, task.beam_penalty, step, self._work, watch)

    def _head(self, prefix: str, request_id: str | None, model: str) -> Head:
        return Head(
            id=prefix + (request_id or uuid.uuid4().hex),
            created=int(time.time()),
            model=model,
            system_fingerprint=self._fingerprint,
        )


_STREAMED = "stream is true, but {0} returns the whole answer: call {0}_stream, or leave stream out"


def _with_images(tokens: Sequence[int], images: Sequence[ImageInput]) -> Any:
    return {"prompt_token_ids": tokens, "multi_modal_data": {"image": images}} if images else tokens


def _fingerprint(info: ModelInfo) -> str:
    """Hash of the software version and the model's description; if it changes, answers with equal seeds may differ."""
    configuration = msgspec.json.encode([importlib.metadata.version("candle-vllm-openai"), info])
    return "fp_" + hashlib.blake2s(configuration, digest_size=6).hexdigest()
