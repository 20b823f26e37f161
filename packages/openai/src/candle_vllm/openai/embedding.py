# SPDX-License-Identifier: MIT
"""EmbeddingAdapter: vectors, scores and rankings by one engine, without HTTP (steps 2, 3 and 10 of a request's life).

A score is what the engine says of a pair: the number of a cross-encoder's head, brought to 0..1 by a sigmoid where the
model's config does not say otherwise; or the cosine of the two texts' vectors, where the model gives vectors.
"""

from __future__ import annotations

import base64
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from msgspec import UNSET

from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.outputs import ClassificationOutput, EmbeddingOutput, ScoreOutput
from candle_vllm.core.engine.step.pooling_calls import Apart
from candle_vllm.core.engine.step.watching import RequestWatcher
from candle_vllm.core.errors import (
    CandleVllmError,
    ConfigError,
    EngineDeadError,
    EngineOverloadedError,
    EngineSleepingError,
    InvalidParameterError,
    RequestAbortedError,
    RequestError,
)
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.openai.errors import (
    GenerationFailedError,
    no_priority,
)
from candle_vllm.openai.protocol.embeddings import (
    Classified,
    ClassifiedList,
    ClassifyRequest,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    Pooled,
    PooledList,
    PoolingRequest,
)
from candle_vllm.openai.protocol.pooling import MAX_POOLED_TOKENS, PoolingFields, PoolingUsage
from candle_vllm.openai.protocol.score import Ranked, RankedText, Ranking, RerankRequest, Score, ScoreList, ScoreRequest
from candle_vllm.openai.serving import AdapterNames, ServedNames, Uses, WorkerThreads, check_length
from candle_vllm.openai.validation import parse_body


class EmbeddingEngineLike(Protocol):
    """What the adapter needs of an engine; `InferenceEngine` and `ScriptedEngine` both have it."""

    @property
    def model_info(self) -> ModelInfo: ...

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    async def aembed(
        self,
        inputs: Sequence[str | Sequence[int]],
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
        watcher: RequestWatcher | None = None,
        lora_request: Uses = (),
        apart: Apart = ...,
    ) -> list[EmbeddingOutput]: ...

    async def aclassify(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
        watcher: RequestWatcher | None = None,
        lora_request: Uses = (),
        apart: Apart = ...,
    ) -> list[ClassificationOutput]: ...

    async def ascore(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        request_id: str | None = None,
        priority: int = 0,
        watcher: RequestWatcher | None = None,
        lora_request: Uses = (),
        apart: Apart = ...,
    ) -> list[ScoreOutput]: ...


def parse_embedding_request(body: bytes | Mapping[str, Any]) -> EmbeddingRequest:
    """A checked request for vectors from the body's bytes or from an object; raises `RequestError`."""
    return parse_body(EmbeddingRequest, body)


def parse_pooling_request(body: bytes | Mapping[str, Any]) -> PoolingRequest:
    """The same in vLLM's words."""
    return parse_body(PoolingRequest, body)


def parse_classify_request(body: bytes | Mapping[str, Any]) -> ClassifyRequest:
    """A checked request for classes from the body's bytes or from an object; raises `RequestError`."""
    return parse_body(ClassifyRequest, body)


def parse_score_request(body: bytes | Mapping[str, Any]) -> ScoreRequest:
    """A checked request for scores from the body's bytes or from an object; raises `RequestError`."""
    return parse_body(ScoreRequest, body)


def parse_rerank_request(body: bytes | Mapping[str, Any]) -> RerankRequest:
    """A checked request for a ranking from the body's bytes or from an object; raises `RequestError`."""
    return parse_body(RerankRequest, body)


class EmbeddingAdapter:
    """Answers requests for vectors, scores and rankings with one engine.

    Every method raises `RequestError` for a wrong request, `EngineOverloadedError` or `EngineDeadError` when the engine
    takes none, and `GenerationFailedError` when it fails on this one. Cancelling a call aborts its texts.
    """

    def __init__(
        self,
        engine: EmbeddingEngineLike,
        *,
        served_model_names: Sequence[str] = (),
        strict_model_names: bool = False,
        allow_priority: bool = True,
        watcher: RequestWatcher | None = None,
        adapters: AdapterNames | None = None,
        work: WorkerThreads | None = None,
    ) -> None:
        """Arguments as of `OpenAIAdapter`; `work` are its threads."""
        self._engine = engine
        self._work = work or WorkerThreads()
        self._watcher = watcher
        names = served_model_names or (engine.model_info.name,)
        self._names = ServedNames(names, strict=strict_model_names, adapters=adapters)
        self._allow_priority = allow_priority

    async def embed(self, request: EmbeddingRequest) -> EmbeddingList:
        """The vectors of the request's texts."""
        self._check(request, "embed")
        name, request_id = self._names.served(request.model), _request_id("embd-", request)
        more = self._more(request, request_id)
        params = request.pooling_params()
        # Tokenizing many texts takes long enough to hold up every stream on the loop.
        texts = await self._work.prepare(self._tokens, request)
        with _failures(lambda number, _: f"input.{number}", "input"):
            outputs = await self._engine.aembed(texts, params, **more)
        encode = _base64 if request.encoding_format == "base64" else array.tolist
        vectors = await self._work.prepare(lambda: [encode(each.embedding) for each in outputs])
        data = [Embedding(index=index, embedding=vector) for index, vector in enumerate(vectors)]
        return EmbeddingList(
            id=request_id,
            created=int(time.time()),
            model=name,
            data=tuple(data),
            usage=_usage(sum(len(text) for text in texts)),
        )

    async def pool(self, request: PoolingRequest) -> PooledList:
        """The same in vLLM's words."""
        made = await self.embed(request)
        return PooledList(
            id=made.id,
            created=made.created,
            model=made.model,
            data=tuple(Pooled(index=each.index, data=each.embedding) for each in made.data),
            usage=made.usage,
        )

    async def classify(self, request: ClassifyRequest) -> ClassifiedList:
        """What the request's texts are, as the model tells them apart."""
        self._check(request, "classify")
        name, request_id = self._names.served(request.model), _request_id("classify-", request)
        more = self._more(request, request_id)
        texts = await self._work.prepare(self._tokens, request)
        with _failures(lambda number, _: f"input.{number}", "input"):
            outputs = await self._engine.aclassify(texts, **more)
        labels = self._engine.model_info.labels
        found = [each.probs.tolist() for each in outputs]
        return ClassifiedList(
            id=request_id,
            created=int(time.time()),
            model=name,
            data=tuple(
                Classified(index=n, label=labels[probs.index(max(probs))], probs=probs, num_classes=len(probs))
                for n, probs in enumerate(found)
            ),
            usage=_usage(sum(len(text) for text in texts)),
        )

    async def score(self, request: ScoreRequest) -> ScoreList:
        """The scores of the request's pairs."""
        self._check(request, "score")
        name, request_id = self._names.served(request.model), _request_id("score-", request)
        more = self._more(request, request_id)
        with _failures(request.blamed, request.blamed(0, 1)):
            await self._work.prepare(self._count_pairs, request.pairs, request.blamed(0, 1).partition(".")[0])
            outputs = await self._engine.ascore(request.pairs, **more)
        return ScoreList(
            id=request_id,
            created=int(time.time()),
            model=name,
            data=tuple(Score(index=index, score=output.score) for index, output in enumerate(outputs)),
            usage=_usage(sum(output.num_tokens for output in outputs)),
        )

    async def rerank(self, request: RerankRequest) -> Ranking:
        """The request's documents, best first; equal ones in the order of the request."""
        self._check(request, "score")
        name, request_id = self._names.served(request.model), _request_id("rerank-", request)
        more = self._more(request, request_id)
        texts = request.texts
        pairs = [(request.query, text) for text in texts]
        with _failures(lambda number, side: f"documents.{number}" if side else "query", "documents.0"):
            await self._work.prepare(self._count_pairs, pairs, "documents")
            outputs = await self._engine.ascore(pairs, **more)
        order = sorted(range(len(outputs)), key=lambda index: -outputs[index].score)[: request.top_n or None]
        shown = request.return_documents is not False
        results = [
            Ranked(
                index=index,
                relevance_score=outputs[index].score,
                document=RankedText(text=texts[index]) if shown else UNSET,
            )
            for index in order
        ]
        usage = _usage(sum(output.num_tokens for output in outputs))
        return Ranking(id=request_id, model=name, results=tuple(results), usage=usage)

    def _more(self, request: PoolingFields, request_id: str) -> dict[str, Any]:
        """What the engine is told of every request."""
        return {
            "request_id": request_id,
            "priority": request.priority or 0,
            "watcher": self._watcher,
            "apart": self._work.prepare,
            **self._names.options(request.model, None, request.lora_path),
        }

    def _check(self, request: PoolingFields, task: str) -> None:
        info = self._engine.model_info
        if (request.priority or 0) < 0 and not self._allow_priority:
            raise no_priority()
        if task not in info.tasks:
            others = ", ".join(_ROUTES[other] for other in info.tasks)
            raise InvalidParameterError(f"{info.name} does not {_VERBS[task]}; it answers {others}", "model")

    def _tokens(self, request: EmbeddingRequest | ClassifyRequest) -> list[list[int]]:
        """Every text as token ids, counted before any of them is run."""
        total, texts = 0, []
        special = request.add_special_tokens is not False
        for number, text in enumerate(request.inputs):
            with _blamed(number, len(request.inputs)):
                ids = self._known(text, special) if isinstance(text, str) else text
            total += len(ids)
            _check_total(total, "input", number)
            texts.append(ids)
        return texts

    def _known(self, text: str, add_special_tokens: bool = True) -> list[int]:
        check_length(self._engine, text)
        return self._engine.tokenize(text, add_special_tokens=add_special_tokens)

    def _count_pairs(self, pairs: Sequence[tuple[str, str]], field: str) -> None:
        """Refuses pairs that have too many tokens in all, before any of them is run.

        A model of vectors reads each text once, a cross-encoder reads it in every pair.
        """
        reads_once = "embed" in self._engine.model_info.tasks
        total, lengths = 0, dict[str, int]()
        for number, pair in enumerate(pairs):
            for side, text in enumerate(pair):
                known = lengths.get(text)
                if known is None:
                    with _blamed(number, len(pairs), f"inputs.{number}.{side}"):
                        known = lengths[text] = len(self._known(text))
                    total += known
                elif not reads_once:
                    total += known
            _check_total(total, field, number)


_VERBS: Mapping[str, str] = {
    "embed": "give vectors",
    "score": "score pairs of texts",
    "classify": "tell classes of texts apart",
}
_ROUTES: Mapping[str, str] = {
    "generate": "/v1/chat/completions and /v1/completions",
    "embed": "/v1/embeddings",
    "score": "/v1/score and /v1/rerank",
    "classify": "/classify",
}


def _request_id(prefix: str, request: PoolingFields) -> str:
    return prefix + (request.request_id or uuid.uuid4().hex)


def _usage(tokens: int) -> PoolingUsage:
    return PoolingUsage(prompt_tokens=tokens, total_tokens=tokens)


def _base64(vector: array[float]) -> str:
    """Little-endian float32, as every machine that the engine runs on has it."""
    return base64.b64encode(vector.tobytes()).decode("ascii")


def _check_total(tokens: int, field: str, number: int) -> None:
    if tokens > MAX_POOLED_TOKENS:
        raise InvalidParameterError(
            f"{field} has more than {MAX_POOLED_TOKENS} tokens in all (text {number} passes that): send fewer texts at "
            "once",
            field,
        )


@contextmanager
def _blamed(number: int, count: int, param: str | None = None) -> Iterator[None]:
    """Puts the number of a text before what is wrong with it, and names the field: `param`, or that of `input`."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise type(error)(str(error), param or "input") from None
        raise type(error)(f"input {number}: {error}", param or f"input.{number}") from None


@contextmanager
def _failures(field: Callable[[int, int], str], only: str) -> Iterator[None]:
    """The engine blames its own names, `inputs.3` or of a pair's text `inputs.3.0`; what it fails on is for the log.

    Args:
        field: the request's name for the input of that number, and of a pair for the text 0 or 1.
        only: the name where there is one input.
    """
    try:
        yield
    except RequestError as error:
        if error.param is not None and error.param.startswith("inputs."):
            number, _, side = error.param.removeprefix("inputs.").partition(".")
            error.param = field(int(number), int(side or 1))
        elif error.param in ("prompt", "pairs"):
            error.param = only
        raise
    except (ConfigError, EngineOverloadedError, EngineDeadError, EngineSleepingError, RequestAbortedError):
        raise
    except CandleVllmError as error:
        raise GenerationFailedError(str(error)) from error
