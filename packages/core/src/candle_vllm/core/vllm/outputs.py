# SPDX-License-Identifier: MIT
"""Output classes of vLLM's library: requests with their texts, embeddings, classes or scores.

The engine's own outputs (`core/engine/outputs.py`) are frozen and hold tuples; these have the types that programs
written for vLLM expect: lists, dicts of log-probabilities by token id, and outputs that may be unfinished.
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
    """Log-probability of one token.

    Attributes:
        logprob: natural logarithm of its probability, before penalties and temperature.
        rank: 1 for the likeliest token; None for tokens that the request named.
        decoded_token: text of this token alone.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass
class CompletionOutput:
    """One sequence of a request: the whole, everything so far, or a delta.

    Attributes:
        index: index among the request's `n` sequences.
        cumulative_logprob: sum over the sampled tokens of the whole sequence so far; None without `logprobs`.
        logprobs: log-probabilities by id for each token of `token_ids`: its own, and the likeliest or named tokens'.
        finish_reason: "stop", "length" or "abort"; None for an unfinished sequence.
        stop_reason: stop string or token id that ended it; None for the model's own end token and other endings.
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
        prompt: text of the prompt, if one was given.
        prompt_logprobs: one entry for each prompt token if requested; None for the first.
        metrics: times of the request, once it has finished.
        num_cached_tokens: number of prompt tokens that were in the prefix cache.
        lora_request: adapter of the request; None without an adapter, or for pairs of adapters and scales.
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
    """Pooled output of one text, float32: an embedding [E] or class probabilities [L], or a row of these per token."""

    data: NDArray[np.float32]


@dataclasses.dataclass(repr=False)
class EmbeddingOutput:
    """Embedding of one text."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Length of the embedding."""
        return len(self.embedding)

    def __repr__(self) -> str:
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


@dataclasses.dataclass(repr=False)
class ClassificationOutput:
    """Probabilities of a classifier's classes, in the order of its labels."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.probs)

    def __repr__(self) -> str:
        return f"ClassificationOutput(num_classes={self.num_classes})"


@dataclasses.dataclass
class ScoringOutput:
    """Similarity score of two texts."""

    score: float


@dataclasses.dataclass
class PoolingRequestOutput(Generic[Output]):
    """A text, or a pair of texts, and its pooled output."""

    request_id: str
    outputs: Output
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """A text and its embedding."""


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """A text and its classes."""


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """Two texts and their score."""


def request_output(given: GenerationOutput) -> RequestOutput:
    """Convert a finished request of the engine to vLLM's format."""
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
    """Convert the log-probabilities of a prompt, if they were requested."""
    return None if entries is None else [None if entry is None else by_token(entry) for entry in entries]


def by_token(entry: PositionLogprobs) -> dict[int, Logprob]:
    """Return the log-probabilities at one position by token id, the sampled token first."""
    return {each.token_id: Logprob(each.logprob, each.rank or None, each.text) for each in (entry.chosen, *entry.top)}


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
