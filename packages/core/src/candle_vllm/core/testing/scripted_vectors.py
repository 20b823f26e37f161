# SPDX-License-Identifier: MIT
"""Vectors and scores for `ScriptedEngine`: computed from the tokens without a model, equal for equal texts."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Unpack

from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.outputs import ClassificationOutput, EmbeddingOutput, ScoreOutput
from candle_vllm.core.engine.requests import LoraChoice, PoolingRequest
from candle_vllm.core.engine.step.preparation import check_pooling_request
from candle_vllm.core.engine.step.request_watchers import (
    Apart,
    Operation,
    PoolingOptions,
    RequestInfo,
    ScoreOptions,
    watched_pooling,
)
from candle_vllm.core.errors import CandleVllmError, RequestError
from candle_vllm.core.pooling import POOLING_METHODS, ModelPooling, PoolingParams, PoolingPlan
from candle_vllm.core.text.prompts import Prompt, as_prompts, read_prompt

SIZE = 16


class PoolingCall(NamedTuple):
    """Arguments of one call of `aembed`, `aclassify` or `ascore`."""

    inputs: list[Prompt] | list[tuple[str, str]]
    params: PoolingParams | None
    request_id: str | None
    priority: int
    lora_request: LoraChoice = ()
    apart: Apart = asyncio.to_thread


class ScriptedVectors:
    """The part of `ScriptedEngine` that returns vectors and scores.

    A vector counts tokens by their id modulo `SIZE`; by default its length is 1, and `dimensions` truncates it. A score
    is the cosine of two vectors, or without the task "embed" the share of the second text's tokens that the first has.

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
        """Implemented by the engine."""
        raise NotImplementedError

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Implemented by the engine."""
        raise NotImplementedError

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True, *, whole: bool = True) -> str:
        """Implemented by the engine."""
        raise NotImplementedError

    async def aembed(
        self, inputs: Prompt | Sequence[Prompt], params: PoolingParams | None = None, **call: Unpack[PoolingOptions]
    ) -> list[EmbeddingOutput]:
        """Return the vector of every text; raises the real engine's errors of texts, `submit_error` or `failure`."""
        with self._watched("embed", inputs, call) as answered:
            texts = self._texts(inputs, params, call)
            plan = ModelPooling(SIZE, "mean", matryoshka=True).plan(params or PoolingParams())
            request_id = call.get("request_id")
            made = [
                EmbeddingOutput(
                    request_id=f"{request_id}-{n}", embedding=_vector(ids, plan), prompt_token_ids=tuple(ids)
                )
                for n, ids in enumerate(texts)
            ]
            answered(made)
        return made

    async def aclassify(
        self, inputs: Prompt | Sequence[Prompt], params: PoolingParams | None = None, **call: Unpack[PoolingOptions]
    ) -> list[ClassificationOutput]:
        """Return each label's share of a text's tokens; a token's label is its id modulo the number of labels."""
        with self._watched("classify", inputs, call) as answered:
            texts = self._texts(inputs, params, call)
            count, request_id = len(self.model_info.labels), call.get("request_id")
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

    async def ascore(self, pairs: Sequence[tuple[str, str]], **call: Unpack[ScoreOptions]) -> list[ScoreOutput]:
        """Return the score of every pair."""
        with self._watched("score", pairs, call) as answered:
            self._note(list(pairs), None, call)
            made = [self._score(pair, number, len(pairs)) for number, pair in enumerate(pairs)]
            self._fail()
            answered(made)
        return made

    def _watched(
        self, operation: Operation, inputs: Any, call: ScoreOptions
    ) -> AbstractContextManager[Callable[[Any], None]]:
        request_id = call.get("request_id") or ""
        info = RequestInfo(request_id, operation, inputs, None, self.detokenize, call.get("lora_request", ()))
        return watched_pooling(call.get("watcher"), info)

    def _note(self, items: Any, params: PoolingParams | None, call: ScoreOptions) -> None:
        uses, apart = call.get("lora_request", ()), call.get("apart", asyncio.to_thread)
        self.pooling_calls.append(
            PoolingCall(items, params, call.get("request_id"), call.get("priority", 0), uses, apart)
        )

    def _texts(
        self, inputs: Prompt | Sequence[Prompt], params: PoolingParams | None, call: PoolingOptions
    ) -> list[list[int]]:
        """Return the checked tokens of every text."""
        items = as_prompts(inputs)
        special = call.get("add_special_tokens", True)
        read = (read_prompt(item, sees=True) for item in items)
        texts = [self.tokenize(text or "", special) if ids is None else ids for text, ids, _ in read]
        self._note(items, params, call)
        for number, ids in enumerate(texts):
            self._check_text(ids, number, len(texts))
        self._fail()
        return texts

    def _score(self, pair: tuple[str, str], number: int, count: int) -> ScoreOutput:
        first, second = (self.tokenize(text) for text in pair)
        if "embed" in self.model_info.tasks:
            self._check_text(first, number, count, 0)
            self._check_text(second, number, count, 1)
            plan = PoolingPlan(POOLING_METHODS["mean"], True, SIZE)
            score = math.fsum(a * b for a, b in zip(_vector(first, plan), _vector(second, plan)))
        else:
            self._check_text(first + second, number, count)
            score = sum(token in first for token in second) / len(second)
        return ScoreOutput(score=score, num_tokens=len(first) + len(second))

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
