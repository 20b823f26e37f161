"""ObservedEngine: an engine that counts what passes through it. The adapter and the routes do not know the difference.

Steps 4 to 9 of a request's life, seen from outside: what goes in, what comes out, and when.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from candle_vllm.core.engine.request import (
    EmbeddingOutput,
    EngineStats,
    FinishReason,
    ModelInfo,
    ScoreOutput,
    TokenOutput,
)
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.chat_conventions import ChatConventions
from candle_vllm.openai.engine import TokenStream
from candle_vllm.server.models.served_engine import ServedEngine
from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.observing.model_metrics import EngineGauges
from candle_vllm.server.observing.request_record import Operation, RequestInfo, RequestRecord

T = TypeVar("T")


class ObservedEngine:
    """Has the surface of the engine that it wraps.

    Args:
        engine: a loaded engine; `close` closes it.
        metrics: of the application.
        model_name: the label of everything that is counted; None is the model's own name.
        queued: sequences that wait before the engine, read when the gauges are.
    """

    def __init__(
        self,
        engine: ServedEngine,
        metrics: Metrics,
        *,
        model_name: str | None = None,
        queued: Callable[[], int] = lambda: 0,
    ) -> None:
        info = engine.model_info
        self._engine = engine
        self._metrics = metrics.model(model_name or info.name, info.max_model_len)
        self._gauges = EngineGauges(engine, queued)
        self._metrics.attach(self._gauges)

    # ---- what is loaded ----------------------------------------------------------------------------------------------

    @property
    def model_info(self) -> ModelInfo:
        """As of the engine."""
        return self._engine.model_info

    @property
    def chat_conventions(self) -> ChatConventions:
        """As of the engine."""
        return self._engine.chat_conventions

    @property
    def is_alive(self) -> bool:
        """As of the engine."""
        return self._engine.is_alive

    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """Calls back when an engine in a process of its own has died; one in this process does not die by itself."""
        add = getattr(self._engine, "add_death_callback", None)
        if add is not None:
            add(callback)

    def stats(self) -> EngineStats:
        """As of the engine."""
        return self._engine.stats()

    def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
        """As of the engine."""
        self._engine.check_structured_outputs(params)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As of the engine."""
        return self._engine.tokenize(text, add_special_tokens)

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """As of the engine."""
        return self._engine.detokenize(token_ids, skip_special_tokens)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """As of the engine."""
        return self._engine.apply_chat_template(messages, **options)

    def close(self) -> None:
        """Takes the model's gauges away and closes the engine. Closing twice is fine."""
        self._metrics.detach(self._gauges)
        self._engine.close()

    # ---- generation --------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> ObservedStream:
        """As of the engine; the request is counted from here on, unless the engine refuses it."""
        params = self._default_params() if sampling_params is None else sampling_params
        request_id = request_id or uuid.uuid4().hex
        info = RequestInfo(request_id, "generate", params, self._shown(prompt), params.n)
        record = self._metrics.begin(info)
        try:
            stream = self._engine.stream(
                prompt, params, request_id=request_id, priority=priority, add_special_tokens=add_special_tokens
            )
        except Exception as error:
            record.reject(error)
            raise
        return ObservedStream(stream, record)

    # ---- vectors and scores ------------------------------------------------------------------------------------------

    async def aembed(
        self,
        inputs: str | Sequence[int] | Sequence[str | Sequence[int]],
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> list[EmbeddingOutput]:
        """As of the engine."""
        one = isinstance(inputs, str) or all(isinstance(item, int) for item in inputs)
        texts: Any = [inputs] if one else inputs
        return await self._pooled(
            "embed",
            request_id,
            texts,
            self._engine.aembed(
                texts, params, request_id=request_id, priority=priority, add_special_tokens=add_special_tokens
            ),
            lambda outputs: sum(len(output.prompt_token_ids) for output in outputs),
        )

    async def ascore(
        self, pairs: Sequence[tuple[str, str]], *, request_id: str | None = None, priority: int = 0
    ) -> list[ScoreOutput]:
        """As of the engine."""
        return await self._pooled(
            "score",
            request_id,
            pairs,
            self._engine.ascore(pairs, request_id=request_id, priority=priority),
            lambda outputs: sum(output.num_tokens for output in outputs),
        )

    # ---- inside ------------------------------------------------------------------------------------------------------

    async def _pooled(
        self,
        operation: Operation,
        request_id: str | None,
        inputs: Sequence[Any],
        answer: Awaitable[list[T]],
        tokens: Callable[[list[T]], int],
    ) -> list[T]:
        shown = self._shown(inputs[0]) if operation == "embed" and inputs else _no_text
        record = self._metrics.begin(RequestInfo(request_id or "", operation, None, shown, len(inputs)))
        try:
            outputs = await answer
        except asyncio.CancelledError:
            record.close()
            raise
        except Exception as error:
            record.fail(error)
            raise
        self._metrics.pooled(record, tokens(outputs), [FinishReason.STOP.value] * len(outputs))
        return outputs

    def _default_params(self) -> SamplingParams:
        return msgspec.convert(self._engine.model_info.default_sampling, SamplingParams)

    def _shown(self, prompt: str | Sequence[int]) -> Callable[[int], str]:
        """The beginning of a prompt, made into text only when it is wanted."""
        if isinstance(prompt, str):
            return lambda most: prompt[:most]
        return lambda most: self._engine.detokenize(prompt[:most], False)[:most]


def _no_text(most: int) -> str:  # noqa: ARG001
    return ""


class ObservedStream:
    """A stream with the contract of the one that it wraps.

    However it ends - read to its end, closed, cancelled, failed or dropped - its request is counted once.
    """

    __slots__ = ("_inner", "_record")

    def __init__(self, inner: TokenStream, record: RequestRecord) -> None:
        self._inner = inner
        self._record = record

    def __aiter__(self) -> ObservedStream:
        return self

    async def __anext__(self) -> TokenOutput:
        try:
            piece = await self._inner.__anext__()
        except (StopAsyncIteration, asyncio.CancelledError):
            self._record.close()
            raise
        except Exception as error:
            self._record.fail(error)
            raise
        self._record.take(piece)
        return piece

    async def aclose(self) -> None:
        """Aborts the request unless it has finished."""
        self._record.close()
        await self._inner.aclose()

    def __del__(self) -> None:
        self._record.drop()
