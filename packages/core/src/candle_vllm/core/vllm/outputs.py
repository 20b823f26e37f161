# SPDX-License-Identifier: MIT
"""What vLLM's library gives back, by its names: requests with their texts, vectors, classes or scores.

The engine's own outputs (`core/engine/outputs.py`) are frozen and hold tuples; these hold what programs written for
vLLM expect: lists, dicts of log-probabilities by token id, and an output that may not have finished yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.outputs import CompletionOutput as Sequence
from candle_vllm.core.engine.outputs import GenerationOutput, PositionLogprobs, RequestMetrics

Output = TypeVar("Output")


@dataclasses.dataclass
class Logprob:
    """The log-probability of one token.

    Attributes:
        logprob: natural logarithm of its probability, before penalties and temperature.
        rank: 1 for the likeliest token.
        decoded_token: the token alone as text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass
class CompletionOutput:
    """One sequence of a request: the whole of it, what there is so far, or what is new.

    Attributes:
        index: which of the request's `n` sequences.
        cumulative_logprob: sum over the chosen tokens, of the whole sequence so far; None unless `logprobs` were asked
            for.
        logprobs: of each token of `token_ids`, by token id: the chosen one and the likeliest ones.
        finish_reason: "stop", "length" or "abort"; None while it goes on.
        stop_reason: the stop string or token id that ended it; None for the model's own end token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None


@dataclasses.dataclass
class RequestOutput:
    """A prompt and its sequences.

    Attributes:
        prompt: the text, where one was given.
        prompt_logprobs: one entry per prompt token when asked for, None for the first.
        metrics: the request's times, once it has finished.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        lora_request: its adapter; None for none, and for a mix of several.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    lora_request: Any = None


@dataclasses.dataclass
class PoolingOutput:
    """Numbers of one text, float32: a vector [E], or the probabilities of its classes [L]."""

    data: NDArray[np.float32]


@dataclasses.dataclass(repr=False)
class EmbeddingOutput:
    """The vector of one text."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Its length."""
        return len(self.embedding)

    def __repr__(self) -> str:
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


@dataclasses.dataclass(repr=False)
class ClassificationOutput:
    """How likely each class of a classifier is, in the order of its labels."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many there are."""
        return len(self.probs)

    def __repr__(self) -> str:
        return f"ClassificationOutput(num_classes={self.num_classes})"


@dataclasses.dataclass
class ScoringOutput:
    """How well two texts belong together."""

    score: float


@dataclasses.dataclass
class PoolingRequestOutput(Generic[Output]):
    """A text, or a pair of them, and the numbers that were asked of it."""

    request_id: str
    outputs: Output
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """A text and its vector."""


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """A text and its classes."""


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """Two texts and their score."""


def request_output(given: GenerationOutput) -> RequestOutput:
    """A finished request of the engine's in vLLM's form."""
    return RequestOutput(
        request_id=given.request_id,
        prompt=given.prompt,
        prompt_token_ids=list(given.prompt_token_ids),
        prompt_logprobs=prompt_logprobs(given.prompt_logprobs),
        outputs=[_completion(each) for each in given.outputs],
        finished=True,
        metrics=given.metrics,
        num_cached_tokens=given.num_cached_tokens,
    )


def prompt_logprobs(entries: Iterable[PositionLogprobs | None] | None) -> list[dict[int, Logprob] | None] | None:
    """Log-probabilities of a prompt, where they were asked for."""
    return None if entries is None else [None if entry is None else by_token(entry) for entry in entries]


def by_token(entry: PositionLogprobs) -> dict[int, Logprob]:
    """The log-probabilities at one position by token id, the chosen token's first."""
    return {each.token_id: Logprob(each.logprob, each.rank, each.text) for each in (entry.chosen, *entry.top)}


def _completion(given: Sequence) -> CompletionOutput:
    return CompletionOutput(
        index=given.index,
        text=given.text,
        token_ids=list(given.token_ids),
        cumulative_logprob=given.cumulative_logprob,
        logprobs=None if given.logprobs is None else [by_token(entry) for entry in given.logprobs],
        finish_reason=str(given.finish_reason),
        stop_reason=given.stop_reason,
    )
