# SPDX-License-Identifier: MIT
"""Run the model over a batch, with its KV cache if it has one, and sample (steps 6 and 7 of a request's life)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.requests import PoolingRequest
from candle_vllm.core.engine.step.batch import AdapterRows, Batch, Ints, StepMemory
from candle_vllm.core.engine.step.sequence import Run, Tokens
from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.sampling.sampler import SampledTokens, Sampler
from candle_vllm.core.sampling.state import SamplingState


class Launched(Protocol):
    """A step that was launched and may still be running."""

    def tokens(self) -> Sequence[SampledTokens]:
        """Wait for the sampled tokens and return them, one entry for each run in `Batch.drawing`. Called once."""


class CacheRunner(Protocol):
    """The memory of a runner: arrays of steps, and the cache."""

    @property
    def step_memory(self) -> StepMemory | None:
        """Memory that batches must use for their arrays; None if batches may allocate them."""

    def drop_cache(self) -> None:
        """Free the memory of the cache; no step may run before `wake_up`."""

    def restore_cache(self) -> None:
        """Allocate the memory of the cache again; its contents are undefined."""

    def wake_up(self) -> None:
        """Prepare for steps after weights and cache were allocated and filled again, maybe at different addresses."""

    def close(self) -> None:
        """End the runner's threads."""


class ModelRunner(CacheRunner, Protocol):
    """Runs the steps of a model and samples tokens: a decoder with its paged cache, or an encoder."""

    overlaps: bool
    """Whether a step may be launched before the sampled tokens of the previous step are collected."""

    in_flight: int
    """Maximum number of steps in flight, whose sequences are disjoint. If it is above 1, a step's tokens are sampled
    when the step is collected, and its rows may be read only after that."""

    fatal: tuple[type[Exception], ...]
    """Errors after which the contents of the device's memory cannot be trusted."""

    def forward(self, batch: Batch, states: Sequence[SamplingState]) -> None:
        """Start the model's part of a step, which writes keys and values to the cache.

        `states` are the sampling states of `batch.drawing`; only their parameters, such as temperature, and the random
        numbers of the sampled positions are read here.
        """

    def draw(self, states: Sequence[SamplingState]) -> Launched:
        """Start sampling for the step that `forward` started last or, with several in flight, `collect` collected last.
        `states` are those that `forward` got; a state with `reads_tokens` now has all earlier tokens."""

    def collect(self) -> None:
        """If several steps may be in flight, collect the hidden states of the oldest; `draw` then samples for it."""

    @abstractmethod
    def score(self, rows: Ints) -> Value:
        """Return logits [len(rows), V] of rows of the last step, at most `MAX_SCORED_ROWS`. Overwrites earlier logits.

        The logits are an array if steps are recorded, else a tensor.
        """

    @abstractmethod
    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        """Return sums [..., E] of fp32 hidden states of rows [..., n] of the last step, at most `MAX_HIDDEN_ROWS`."""


MAX_SCORED_ROWS = 64
MAX_HIDDEN_ROWS = 512  # with 8,192 elements each they take 16 MiB


class SampledStep(msgspec.Struct, frozen=True):
    """The sampled tokens of a step that is complete."""

    drawn: Sequence[SampledTokens]

    def tokens(self) -> Sequence[SampledTokens]:
        return self.drawn


def _nothing(_runner: object) -> None:
    """Do nothing: a step is complete when `forward` returns, and a runner may have no cache and no threads."""


class StepwiseRunner(ModelRunner, ABC):
    """A synchronous `ModelRunner`: each call returns when its work is complete, and the sampler gets the logits."""

    overlaps = False
    in_flight = 1
    fatal: tuple[type[Exception], ...] = ()
    collect = drop_cache = restore_cache = wake_up = close = _nothing

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._sampler = Sampler() if sampler is None else sampler
        self._sampled_from: Value = None
        self._drafts: list[Tokens] | None = None

    @property
    def step_memory(self) -> StepMemory | None:
        return None

    def forward(self, batch: Batch, states: Sequence[SamplingState]) -> None:
        self._drafts = None
        if batch.drafted:
            self._drafts = [run.drafts for run in batch.drawing]
            self._sampler.look_ahead(states, self._drafts)
        self._sampled_from = self.run(batch)

    def draw(self, states: Sequence[SamplingState]) -> SampledStep:
        if self._drafts is not None:
            return SampledStep(self._sampler.sample_runs(self._sampled_from, states, self._drafts))
        return SampledStep(self._sampler.sample(self._sampled_from, states))

    @abstractmethod
    def run(self, batch: Batch) -> Value:
        """Run a step, which writes keys and values to the cache; return logits [len(sampled_rows), V] in fp32.

        The logits are valid until the next call, and may be overwritten by the caller.
        """

    def draw_rows(self, logits: Value, controls: NDArray[np.float64]) -> tuple[Ints, NDArray[np.float32]]:
        """Sample a token for each row; see `kernels.draw`."""
        return kernels.draw(logits, controls)

    def hidden_rows(self, rows: Ints) -> NDArray[np.float32]:
        """Return [len(rows), F] for a draft head: hidden states, or tapped layers' inputs, of rows of the last step."""
        raise NotImplementedError


class HeadRunner(CacheRunner, Protocol):
    """Runs a draft head: like a `StepwiseRunner` (see `ModelRunner`), but with hidden states as input and output."""

    def run_on(self, batch: Batch, states: NDArray[np.float32], *, fused: bool) -> Value:
        """Run a step on token ids and hidden states [T, ...].

        Args:
            batch: the step; its token ids are the tokens at the next positions.
            states: hidden states of the model; with `fused`, hidden states of the head, from `given_back`.

        Returns the logits; see `StepwiseRunner.run`.
        """

    def given_back(self, rows: Ints) -> NDArray[np.float32]:
        """Return the head's hidden states [len(rows), E] of rows of the last step: the input for the next positions."""

    def draw_rows(self, logits: Value, controls: NDArray[np.float64]) -> tuple[Ints, NDArray[np.float32]]: ...


class EncoderRunner(StepwiseRunner):
    """Runs an encoder over whole texts, without a cache and without sampling.

    If the model has a head, `hidden_sum` reads the L logits of the text as the hidden state of each of its positions.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self._config = config
        self._scores = np.empty((0, len(config.labels)))

    @abstractmethod
    def encode(
        self, token_ids: Ints, positions: Ints, types: Ints, query_start: Ints, adapters: AdapterRows | None
    ) -> NDArray[np.float32] | None:
        """Run a step; return logits [R, L] of a head with L labels, or None without a head.

        Args:
            token_ids, positions, types: [T] arguments of `Encoder.forward`.
            query_start: [R + 1] offsets of the texts into T.
            adapters: adapters of rows."""

    @abstractmethod
    def states_sum(self, rows: Ints) -> NDArray[np.float64]:
        """Return `hidden_sum` of the layers' output."""

    def run(self, batch: Batch) -> None:
        """See `StepwiseRunner`; an encoder has no logits of tokens."""
        types = np.concatenate([_token_types(run) for run in batch.runs])
        positions = batch.positions + self._config.first_position
        logits = self.encode(batch.token_ids, positions, types, batch.query_start, batch.adapters)
        if logits is None:
            return
        self._scores = np.repeat(logits.astype(np.float64), np.diff(batch.query_start), axis=0)

    def score(self, rows: Ints) -> Value:
        """See `ModelRunner`; an encoder has no logits of tokens."""
        raise NotImplementedError

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        return self._scores[rows].sum(-2) if self._config.scores else self.states_sum(rows)


def _token_types(run: Run) -> Ints:
    """Return token types [count]: whether each token is in the first (0) or the second (1) text of a pair."""
    request = run.sequence.request
    assert isinstance(request, PoolingRequest)
    return np.array(request.token_type_ids or [0] * run.count, np.int64)
