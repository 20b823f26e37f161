# SPDX-License-Identifier: MIT
"""Vectors and scores for `ScriptedEngine`: made up from the tokens, the same for the same text, without a model."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.outputs import ClassificationOutput, EmbeddingOutput, ScoreOutput
from candle_vllm.core.engine.requests import LoRARequest, PoolingRequest
from candle_vllm.core.engine.step.admission import check_pooling_request
from candle_vllm.core.engine.step.pooling_calls import Apart
from candle_vllm.core.engine.step.watching import RequestInfo, RequestWatcher, watched_pooling
from candle_vllm.core.errors import CandleVllmError, RequestError
from candle_vllm.core.pooling import ModelPooling, PoolingParams, PoolingPlan
from candle_vllm.core.text.prompts import Prompt, as_prompts, read_prompt

SIZE = 16


class PoolingCall(NamedTuple):
    """What one `aembed` or `ascore` was asked."""

    inputs: list[Prompt] | list[tuple[str, str]]
    params: PoolingParams | None
    request_id: str | None
    priority: int
    lora_request: Sequence[tuple[LoRARequest, float]] = ()
    apart: Apart = asyncio.to_thread


class ScriptedVectors:
    """The part of `ScriptedEngine` that gives vectors and scores.

    A vector counts a text's tokens by their id modulo `SIZE`; it may be cut to any length. A score is the cosine of two
    vectors; that of a cross-encoder (`tasks=("score",)`) is the share of the second text's tokens that the first has.

    Attributes:
        pooling_calls: every call, in order.
    """

    submit_error: Exception | None
    fail_after: int | None
    failure: Exception | str

    def __init__(self) -> None:
        self.pooling_calls: list[PoolingCall] = []

    @property
    def model_info(self) -> ModelInfo:
        """Of the engine that this is a part of."""
        raise NotImplementedError

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Of the engine that this is a part of."""
        raise NotImplementedError

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True, *, whole: bool = True) -> str:
        """Of the engine that this is a part of."""
        raise NotImplementedError

    async def aembed(
        self,
        inputs: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
        watcher: RequestWatcher | None = None,
        lora_request: Sequence[tuple[LoRARequest, float]] = (),
        apart: Apart = asyncio.to_thread,
    ) -> list[EmbeddingOutput]:
        """The vector of every text; refuses what the real engine refuses, or raises the scripted error."""
        info = RequestInfo(request_id or "", "embed", inputs, None, self.detokenize, lora_request)
        with watched_pooling(watcher, info) as answered:
            items = as_prompts(inputs)
            read = map(read_prompt, items)
            texts = [self.tokenize(text or "", add_special_tokens) if ids is None else ids for text, ids in read]
            self.pooling_calls.append(PoolingCall(items, params, request_id, priority, lora_request, apart))
            plan = ModelPooling(SIZE, "mean", matryoshka=True).plan(params or PoolingParams())
            for number, ids in enumerate(texts):
                self._check_text(ids, number, len(texts))
            self._fail()
            made = [
                EmbeddingOutput(
                    request_id=f"{request_id}-{n}", embedding=_vector(ids, plan), prompt_token_ids=tuple(ids)
                )
                for n, ids in enumerate(texts)
            ]
            answered(made)
        return made

    async def aclassify(
        self,
        inputs: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
        watcher: RequestWatcher | None = None,
        lora_request: Sequence[tuple[LoRARequest, float]] = (),
        apart: Apart = asyncio.to_thread,
    ) -> list[ClassificationOutput]:
        """Of every text the shares of its tokens by their id modulo the number of labels."""
        info = RequestInfo(request_id or "", "classify", inputs, None, self.detokenize, lora_request)
        with watched_pooling(watcher, info) as answered:
            items = as_prompts(inputs)
            read = map(read_prompt, items)
            texts = [self.tokenize(text or "", add_special_tokens) if ids is None else ids for text, ids in read]
            self.pooling_calls.append(PoolingCall(items, params, request_id, priority, lora_request, apart))
            for number, ids in enumerate(texts):
                self._check_text(ids, number, len(texts))
            self._fail()
            count = len(self.model_info.labels)
            shares = [
                [sum(token % count == each for token in ids) / len(ids) for each in range(count)] for ids in texts
            ]
            made = [
                ClassificationOutput(
                    request_id=f"{request_id}-{n}", probs=array("f", share), prompt_token_ids=tuple(ids)
                )
                for n, (ids, share) in enumerate(zip(texts, shares))
            ]
            answered(made)
        return made

    async def ascore(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        request_id: str | None = None,
        priority: int = 0,
        watcher: RequestWatcher | None = None,
        lora_request: Sequence[tuple[LoRARequest, float]] = (),
        apart: Apart = asyncio.to_thread,
    ) -> list[ScoreOutput]:
        """The score of every pair."""
        info = RequestInfo(request_id or "", "score", pairs, None, self.detokenize, lora_request)
        with watched_pooling(watcher, info) as answered:
            made = self._scores(pairs, request_id, priority, lora_request, apart)
            answered(made)
        return made

    def _scores(
        self,
        pairs: Sequence[tuple[str, str]],
        request_id: str | None,
        priority: int,
        lora_request: Sequence[tuple[LoRARequest, float]],
        apart: Apart,
    ) -> list[ScoreOutput]:
        self.pooling_calls.append(PoolingCall(list(pairs), None, request_id, priority, lora_request, apart))
        made = []
        for number, pair in enumerate(pairs):
            first, second = (self.tokenize(text) for text in pair)
            if "embed" in self.model_info.tasks:
                self._check_text(first, number, len(pairs), 0)
                self._check_text(second, number, len(pairs), 1)
                plan = PoolingPlan("mean", True, SIZE)
                score = math.fsum(a * b for a, b in zip(_vector(first, plan), _vector(second, plan)))
            else:
                self._check_text(first + second, number, len(pairs))
                score = sum(token in first for token in second) / len(second)
            made.append(ScoreOutput(score=score, num_tokens=len(first) + len(second)))
        self._fail()
        return made

    def _check_text(self, ids: list[int], number: int, count: int, side: int | None = None) -> None:
        info = self.model_info
        request = PoolingRequest(request_id="scripted", prompt_token_ids=ids)
        try:
            check_pooling_request(request, info.vocab_size, info.max_model_len)
        except RequestError as error:
            if count == 1 and side is None:
                raise
            param = f"inputs.{number}" if side is None else f"inputs.{number}.{side}"
            raise type(error)(f"input {number}: {error}", param) from None

    def _fail(self) -> None:
        if self.submit_error is not None:
            raise self.submit_error
        if self.fail_after is not None:
            raise self.failure if isinstance(self.failure, Exception) else CandleVllmError(self.failure)


def _vector(ids: Sequence[int], plan: PoolingPlan) -> array[float]:
    counts = [float(sum(token % SIZE == place for token in ids)) for place in range(plan.dimensions)]
    length = math.sqrt(math.fsum(count * count for count in counts)) if plan.normalize else 1.0
    return array("f", [count / (length or 1.0) for count in counts])
