# SPDX-License-Identifier: MIT
"""EmbeddingAdapter: embeddings, classes, scores and rankings from one engine (steps 2, 3 and 10 of a request's life).

The score of a pair is the logit of a cross-encoder, after a sigmoid unless the model's config names another activation;
with an embedding model, it is the cosine similarity of the two embeddings.
"""

from __future__ import annotations

import base64
import json
import math
import re
import time
import uuid
from array import array
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET

from candle_vllm.core.engine.outputs import ClassificationOutput, EmbeddingOutput, ScoreOutput
from candle_vllm.core.engine.step.request_watchers import RequestWatcher
from candle_vllm.core.errors import (
    CandleVllmError,
    ConfigError,
    EngineDeadError,
    EngineOverloadedError,
    EngineSleepingError,
    InvalidParameterError,
    PromptTooLongError,
    RequestAbortedError,
    RequestError,
)
from candle_vllm.core.pooling import BY_TOKEN, PoolingParams
from candle_vllm.core.quantization.plain import ELEMENTS, read_plain
from candle_vllm.openai.errors import GenerationFailedError, no_priority
from candle_vllm.openai.json_body import decode_json, parse_body
from candle_vllm.openai.protocol import embeddings
from candle_vllm.openai.protocol.cohere import INPUT_TYPES, CohereEmbeddings, CohereEmbedRequest, cohere_answer
from candle_vllm.openai.protocol.fields import Cut
from candle_vllm.openai.protocol.pooling import MAX_NUMBERS, MAX_POOLED_TOKENS, PoolingFields, PoolingUsage
from candle_vllm.openai.protocol.score import Ranked, RankedText, Ranking, RerankRequest, Score, ScoreList, ScoreRequest
from candle_vllm.openai.serving import AdapterNames, ServedNames, Tokenizes, WorkerThreads, check_length


class EmbeddingEngineLike(Tokenizes, Protocol):
    """Engine methods that the adapter needs; `InferenceEngine` and `ScriptedEngine` have them."""

    @property
    def aembed(self) -> Callable[..., Awaitable[list[EmbeddingOutput]]]: ...

    @property
    def aclassify(self) -> Callable[..., Awaitable[list[ClassificationOutput]]]: ...

    @property
    def ascore(self) -> Callable[..., Awaitable[list[ScoreOutput]]]: ...


def parse_embedding_request(
    body: bytes | Mapping[str, Any] | embeddings.EmbeddingRequest,
) -> embeddings.EmbeddingRequest:
    """Parse and validate a request from a body or an object, unless it is one already; raises `RequestError`."""
    value = decode_json(body) if isinstance(body, bytes) else body
    kind = embeddings.EmbeddingRequest
    if isinstance(value, Mapping) and value.get("input") is None:
        forms = (("messages", embeddings.EmbeddingChatRequest), ("content", embeddings.ContentRequest))
        kind = next((form for name, form in forms if value.get(name) is not None), kind)
    return parse_body(kind, value if isinstance(value, Mapping) else body)


parse_pooling_request = partial(parse_body, embeddings.PoolingRequest)
parse_classify_request = partial(parse_body, embeddings.ClassifyRequest)
parse_score_request = partial(parse_body, ScoreRequest)
parse_rerank_request = partial(parse_body, RerankRequest)
"""Parsers of the other requests; arguments and errors are as for `parse_embedding_request`."""


class EmbeddingAdapter:
    """Answers requests for embeddings, classes, moderation, scores and rankings with one engine.

    Its methods raise the errors that `OpenAIAdapter` lists. Cancelling a call aborts its sequences.

    Attributes:
        names: names of the model, which `OpenAIAdapter` shares.
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
        """The arguments are as in `OpenAIAdapter`; `work` are the threads for work that would block the event loop."""
        self._engine = engine
        self._work = work or WorkerThreads()
        self._watcher = watcher
        names = served_model_names or (engine.model_info.name,)
        self.names = ServedNames(names, strict=strict_model_names, adapters=adapters)
        self._allow_priority = allow_priority

    async def embed(
        self, request: embeddings.EmbeddingRequest, prompt: Mapping[str, Any] | None = None
    ) -> embeddings.EmbeddingList:
        """Return the embeddings of the request's texts, or of `prompt`, which was rendered from its messages."""
        self._check(request, "embed")
        name, request_id = self.names.served(request.model), _request_id("embd-", request)
        outputs = await self._embedded(request, request_id, request.pooling_params(), prompt=prompt)
        vectors = await self._work.prepare(
            lambda: [_numbers(request, each.embedding, each.vectors) for each in outputs]
        )
        data = (embeddings.Embedding(index=index, embedding=vector) for index, vector in enumerate(vectors))
        return _listed(embeddings.EmbeddingList, request_id, name, data, outputs)

    async def embed_cohere(self, request: CohereEmbedRequest, version: str) -> CohereEmbeddings:
        """Return embeddings in Cohere's form, for version "1" or "2" of its API."""
        self._check(request, "embed")
        if self._engine.model_info.pooling in BY_TOKEN:
            raise InvalidParameterError("the model returns a vector for each token: use /v1/embeddings", "model")
        inner, request_id = request.inner(), _request_id("", request)
        self.names.served(request.model)
        try:
            outputs = await self._embedded(inner, request_id, inner.pooling_params(), "texts")
        except RequestError as error:
            error.param = "output_dimension" if error.param == "dimensions" else error.param
            raise
        return await self._work.prepare(cohere_answer, request, request_id, outputs, version)

    async def pool(self, request: embeddings.PoolingRequest) -> embeddings.PooledList:
        """Return the pooled outputs of the request's texts or of their tokens, in vLLM's form."""
        info = self._engine.model_info
        single, does = info.pooling in BY_TOKEN, [task for task in ("embed", "classify") if task in info.tasks]
        task = request.task or ("token_" * single + does[0] if does else "embed")
        wanted = "embed" if task.endswith("embed") else "classify"
        params = request.pooling_params()
        if not does:
            self._check(request, wanted)  # names the routes of a model that pools nothing
        # Every embedding model can return a vector for each token; other tasks depend on the model's head.
        if wanted not in does or (task != "token_embed" and task.startswith("token") != single):
            known = [f"token_{each}" if single else each for each in does]
            known += ["token_embed"] if "embed" in known else []
            raise InvalidParameterError(f"{info.name} supports {' and '.join(known)}, not {task}", "task")
        other = _OF_VECTORS if wanted == "classify" else ("activation",)
        if given := next((field for field in other if getattr(request, field) is not None), None):
            raise InvalidParameterError(f"{given} has no effect on the task {task}: leave it out", given)
        if task == "token_embed":
            params = msgspec.structs.replace(params, pooling="all")
        name, request_id = self.names.served(request.model), _request_id("pool-", request)
        if wanted == "embed":
            self._check(request, wanted)
            outputs = await self._embedded(request, request_id, params)
            found = [(each.embedding, each.vectors) for each in outputs]
        else:
            outputs = await self._classified(request, request_id, request.activated())
            found = [(each.probs, each.vectors) for each in outputs]
        data = await self._work.prepare(lambda: [_numbers(request, *each) for each in found])
        pooled = (embeddings.Pooled(index=index, data=each) for index, each in enumerate(data))
        return _listed(embeddings.PooledList, request_id, name, pooled, outputs)

    async def _embedded(
        self,
        request: embeddings.EmbeddingRequest,
        request_id: str,
        params: PoolingParams,
        field: str | None = None,
        prompt: Any = None,
    ) -> list[EmbeddingOutput]:
        more, field = self._more(request, request_id), field or request.texts
        if prompt is None:  # tokenizing many texts would block the event loop
            texts = prompts = await self._work.prepare(self._tokens, request, field)
        else:
            texts, prompts, field = [prompt["prompt_token_ids"]], [prompt], "messages"
        self._check_size(sum(map(len, texts)), len(texts), params.pooling, field)
        with _failures(lambda number, _: f"{field}.{number}", field):
            return await self._engine.aembed(prompts, params, **more)

    async def _classified(
        self, request: embeddings.ClassifyRequest | embeddings.PoolingRequest, request_id: str, params: PoolingParams
    ) -> list[ClassificationOutput]:
        self._check(request, "classify")
        more = self._more(request, request_id)
        texts = await self._work.prepare(self._tokens, request)
        self._check_size(sum(map(len, texts)), len(texts), None, "input")
        with _failures(lambda number, _: f"input.{number}", "input"):
            return await self._engine.aclassify(texts, params, **more)

    async def classify(self, request: embeddings.ClassifyRequest) -> embeddings.ClassifiedList:
        """Return the class of each of the request's texts."""
        self._check(request, "classify")
        if self._engine.model_info.pooling in BY_TOKEN:
            raise InvalidParameterError(
                "the model classifies tokens, not texts: use POST /pooling with the task token_classify", "model"
            )
        name, request_id = self.names.served(request.model), _request_id("classify-", request)
        outputs = await self._classified(request, request_id, request.activated())
        labels = self._engine.model_info.labels
        data = (
            embeddings.Classified(index=n, label=labels[probs.index(max(probs))], probs=probs, num_classes=len(probs))
            for n, probs in enumerate(each.probs.tolist() for each in outputs)
        )
        return _listed(embeddings.ClassifiedList, request_id, name, data, outputs)

    async def moderate(self, request: embeddings.ModerationRequest) -> embeddings.Moderation:
        """Return whether the request's texts are harmful, by the labels of a classifier."""
        fields = {name: getattr(request, name) for name in ("model", "lora_path", "priority", "input")}
        name, request_id = self.names.served(request.model), _request_id("modr-", request)
        self._check(request, "classify")
        labels = self._engine.model_info.labels
        harm = embeddings.moderated(labels, [0.0] * len(labels)).category_scores
        if self._engine.model_info.pooling in BY_TOKEN or not harm or all(_NAMELESS.fullmatch(label) for label in harm):
            raise InvalidParameterError(
                f"{self._engine.model_info.name} is not a moderation model: none of its labels names a harm "
                f"({', '.join(labels)!s:.80})",
                "model",
            )
        outputs = await self._classified(embeddings.ClassifyRequest(**fields), request_id, PoolingParams())
        results = tuple(embeddings.moderated(labels, each.probs.tolist()) for each in outputs)
        return embeddings.Moderation(id=request_id, model=name, results=results)

    async def score(self, request: ScoreRequest) -> ScoreList:
        """Return the scores of the request's pairs."""
        self._check(request, "score")
        name, request_id = self.names.served(request.model), _request_id("score-", request)
        more = self._more(request, request_id)
        with _failures(request.blamed, request.blamed(0, 1)):
            pairs = await self._work.prepare(self._shortened, request, request.pairs)
            await self._work.prepare(self._count_pairs, pairs, request.blamed(0, 1).partition(".")[0])
            outputs = await self._engine.ascore(pairs, **more)
        data = (Score(index=index, score=output.score) for index, output in enumerate(outputs))
        return _listed(ScoreList, request_id, name, data, outputs)

    async def rerank(self, request: RerankRequest) -> Ranking:
        """Rank the request's documents, best first; documents with equal scores keep their order."""
        self._check(request, "score")
        name, request_id = self.names.served(request.model), _request_id("rerank-", request)
        more = self._more(request, request_id)
        texts = request.texts
        with _failures(lambda number, side: f"documents.{number}" if side else "query", "documents.0"):
            pairs = await self._work.prepare(self._shortened, request, [(request.query, text) for text in texts])
            await self._work.prepare(self._count_pairs, pairs, "documents")
            outputs = await self._engine.ascore(pairs, **more)
        order = sorted(range(len(outputs)), key=lambda index: -outputs[index].score)[: request.top_n or None]
        results = [
            Ranked(
                index=index,
                relevance_score=outputs[index].score,
                document=RankedText(text=texts[index]) if request.return_documents is not False else UNSET,
            )
            for index in order
        ]
        return Ranking(id=request_id, model=name, results=tuple(results), usage=_usage(outputs))

    def _more(self, request: PoolingFields, request_id: str) -> dict[str, Any]:
        """Return the engine arguments that requests of every kind need."""
        return {
            "request_id": request_id,
            "priority": request.priority or 0,
            "watcher": self._watcher,
            "apart": self._work.prepare,
            **self.names.options(request.model, None, request.lora_path),
        }

    def _check(self, request: PoolingFields, task: str) -> None:
        info = self._engine.model_info
        if (request.priority or 0) < 0 and not self._allow_priority:
            raise no_priority()
        if task not in info.tasks:
            others = ", ".join(_ROUTES[other] for other in info.tasks)
            raise InvalidParameterError(f"{info.name} does not {_VERBS[task]}: use {others}", "model")

    def _tokens(
        self, request: embeddings.EmbeddingRequest | embeddings.ClassifyRequest, field: str = "input"
    ) -> list[list[int]]:
        """Tokenize the texts, each after the model's prompt, truncate them if requested, and check their total."""
        total, texts, front = 0, [], self._prompt(request)
        special, cut = request.add_special_tokens is not False, request.cut("right")
        around = self._engine.tokenize("", add_special_tokens=special) if cut is not None else ()
        for number, text in enumerate(request.inputs):
            with _blamed(number, len(request.inputs), field=field):
                if front and not isinstance(text, str):
                    raise InvalidParameterError("input_type and task need texts, but this input is token ids", field)
                ids = text if not isinstance(text, str) else self._tokenized(front + text, special, bounded=cut is None)
            if cut is not None:
                ids = list(cut.of(ids, self._engine.model_info.max_model_len, around if isinstance(text, str) else ()))
            total += len(ids)
            _check_total(total, field, number)
            texts.append(ids)
        return texts

    def _prompt(self, request: embeddings.EmbeddingRequest | embeddings.ClassifyRequest) -> str:
        """Return the model's prompt for the request's input_type, else for its Jina task; "" without such a prompt."""
        prompts, wanted = self._engine.model_info.prompts, getattr(request, "input_type", None)
        if wanted is None and not getattr(request, "own_tasks", True):
            return prompts.get(getattr(request, "task", None) or "", "")
        if wanted is None or not any(prompts.values()):
            return ""
        names = (wanted, *INPUT_TYPES.get(wanted, ()))
        found = next((prompts[name] for name in names if name in prompts), None)
        if found is None:
            known = ", ".join(prompts)
            raise InvalidParameterError(
                f"input_type {wanted!r:.60} is not a prompt of the model, which has {known}", "input_type"
            )
        return found

    def _check_size(self, tokens: int, texts: int, kind: str | None, field: str) -> None:
        """Refuse a request before it runs if its response would be too large."""
        info, kind = self._engine.model_info, kind or self._engine.model_info.pooling
        width = len(info.labels) or info.embedding_size
        count = tokens * width if kind in BY_TOKEN else texts * info.vocab_size if kind == "sparse" else 0
        if count > MAX_NUMBERS:
            raise InvalidParameterError(
                f"the answer to {field} would have {count} numbers, and at most {MAX_NUMBERS} are allowed: send fewer "
                "texts at once",
                field,
            )

    def _tokenized(self, text: str, add_special_tokens: bool = True, *, bounded: bool = True) -> list[int]:
        if bounded:
            check_length(self._engine, text)
        return self._engine.tokenize(text, add_special_tokens=add_special_tokens)

    def _shortened(self, request: ScoreRequest | RerankRequest, pairs: list[_Pair]) -> list[_Pair]:
        """Truncate the texts of pairs as the request asks; pairs that are still too long are refused later."""
        most, document = request.truncate_prompt_tokens, request.max_tokens_per_doc or math.inf
        if most is None and document == math.inf:
            return pairs
        info, tokenize = self._engine.model_info, self._engine.tokenize
        room = math.inf if most is None else len(Cut(most, "right").of(range(info.max_model_len), info.max_model_len))
        plain = partial(tokenize, add_special_tokens=False)
        if "embed" in info.tasks:  # it reads each text for itself
            room -= len(tokenize("a")) - len(plain("a"))  # tokens that mark the text's ends
            return [(self._beginning(a, room), self._beginning(b, min(room, document))) for a, b in pairs]
        return [(a, self._beginning(b, min(room - info.pair_marks - len(plain(a)), document))) for a, b in pairs]

    def _beginning(self, text: str, most: float) -> str:
        """Return the longest beginning of a text with at most `most` tokens, and at least one character."""

        def tokens(end: int) -> int:
            return len(self._engine.tokenize(text[:end], add_special_tokens=False))

        fits = tokens(len(text)) <= most
        return text if fits else text[: max(1, bisect_right(range(len(text)), most, key=tokens) - 1)]

    def _count_pairs(self, pairs: Sequence[tuple[str, str]], field: str) -> None:
        """Refuse pairs before they run if they have too many tokens together."""
        most = self._engine.model_info.max_model_len
        reads_once = "embed" in self._engine.model_info.tasks  # a cross-encoder reads a text again in every pair
        total, lengths = 0, dict[str, int]()
        for number, pair in enumerate(pairs):
            for side, text in enumerate(pair):
                known = lengths.get(text)
                if known is None:
                    with _blamed(number, len(pairs), f"inputs.{number}.{side}"):
                        known = lengths[text] = len(self._tokenized(text))
                        if not (reads_once or side) and known >= most:
                            said = f"the query has {known} tokens and the model takes at most {most} with a document"
                            raise PromptTooLongError(f"{said}: shorten it", "prompt")
                    total += known
                elif not reads_once:
                    total += known
            _check_total(total, field, number)
        if reads_once:
            self._check_size(total, len(lengths), None, field)


_OF_VECTORS = ("dimensions", "normalize", "normalized", "pooling", "embedding_type", "return_multivector", "input_type")
_List = TypeVar("_List", embeddings.EmbeddingList, embeddings.PooledList, embeddings.ClassifiedList, ScoreList)
_Pair = tuple[str, str]
_NAMELESS = re.compile(r"LABEL_\d+")  # transformers' default names of classes
_VERBS: Mapping[str, str] = {
    "embed": "embed texts",
    "score": "score pairs of texts",
    "classify": "classify texts",
}
_ROUTES: Mapping[str, str] = {
    "generate": "/v1/chat/completions and /v1/completions",
    "embed": "/v1/embeddings",
    "score": "/v1/score and /v1/rerank",
    "classify": "/classify and /v1/moderations",
}


def _request_id(prefix: str, request: PoolingFields) -> str:
    return prefix + (request.request_id or uuid.uuid4().hex)


def _usage(outputs: Sequence[EmbeddingOutput | ClassificationOutput | ScoreOutput]) -> PoolingUsage:
    tokens = sum(each.num_tokens for each in outputs)
    return PoolingUsage(prompt_tokens=tokens, total_tokens=tokens)


def _listed(kind: type[_List], request_id: str, name: str, data: Iterable[Any], outputs: Sequence[Any]) -> _List:
    return kind(data=tuple(data), id=request_id, created=int(time.time()), model=name, usage=_usage(outputs))


def _numbers(request: embeddings.EmbeddingRequest, flat: array[float], vectors: int | None) -> embeddings.Numbers:
    """Encode the vector `flat`, or each of the `vectors` that are concatenated in it, as the request asks."""
    plain = request.encoding_format in (None, "float")
    encode: Callable[[array[float]], Any] = array.tolist if plain else partial(_base64, request)
    if vectors is None:
        return encode(flat)
    size = len(flat) // max(vectors, 1)
    return [encode(flat[first : first + size]) for first in range(0, size * vectors, max(size, 1))]


_ELEMENTS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}


def _base64(request: embeddings.EmbeddingRequest, vector: array[float]) -> str:
    """Encode a vector in the type and byte order of the request; the engine runs only on little-endian machines."""
    stored = _ELEMENTS[request.embed_dtype or "float32"]
    elements = read_plain(np.frombuffer(vector, np.uint8), "F32", (len(vector),), stored)
    return base64.b64encode((elements.byteswap() if request.endianness == "big" else elements).tobytes()).decode()


def octets(
    request: embeddings.EmbeddingRequest, made: embeddings.EmbeddingList | embeddings.PooledList
) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of an answer with `encoding_format` bytes or bytes_only."""
    body, data, dtype = bytearray(), list[dict[str, Any]](), request.embed_dtype or "float32"
    form = {"embed_dtype": dtype, "endianness": request.endianness or "native"}
    for item in made.data:
        given = item.embedding if isinstance(item, embeddings.Embedding) else item.data
        rows = [base64.b64decode(str(each)) for each in ([given] if isinstance(given, str) else given)]
        body += b"".join(rows)
        width = len(rows[0]) // ELEMENTS[_ELEMENTS[dtype]].itemsize if rows else 0
        shape = (len(rows), width)[isinstance(given, str) :]
        place = {"start": len(body) - sum(map(len, rows)), "end": len(body), "shape": shape}
        data.append({"index": item.index, **form, **place})
    answer = {name: getattr(made, name) for name in ("id", "created", "model", "usage")} | {"data": data}
    described = json.dumps(msgspec.to_builtins(answer), separators=(",", ":"))  # ASCII, as headers must be
    return bytes(body), {"metadata": described} if request.encoding_format == "bytes" else {}


def _check_total(tokens: int, field: str, number: int) -> None:
    if tokens > MAX_POOLED_TOKENS:
        raise InvalidParameterError(
            f"{field} has more than {MAX_POOLED_TOKENS} tokens in all (with text {number}): send fewer texts at once",
            field,
        )


@contextmanager
def _blamed(number: int, count: int, param: str | None = None, *, field: str = "input") -> Iterator[None]:
    """Context manager that names `param`, or the path of text `number` of `count`, as the field of a `RequestError`."""
    try:
        yield
    except RequestError as error:
        # The error is changed, not replaced: as its context the old one would be in a cycle with this frame.
        if count == 1:
            error.param = param or field
        else:
            error.param, error.args = param or f"{field}.{number}", (f"input {number}: {error}", *error.args[1:])
        raise


@contextmanager
def _failures(field: Callable[[int, int], str], only: str) -> Iterator[None]:
    """Context manager that names the request's field in the engine's errors; failures become `GenerationFailedError`.

    `field` returns the field for `inputs.number` or, for a text of a pair, `inputs.number.side`; `only` is the field if
    there is one input.
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
