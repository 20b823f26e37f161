# SPDX-License-Identifier: MIT
"""Steps 6 and 7: the model with its KV cache if it has one, and the draw. A batch goes in, tokens come out."""

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
from candle_vllm.core.sampling.sampler import Drawn, Sampler
from candle_vllm.core.sampling.state import SamplingState


class Launched(Protocol):
    """A step that was launched and may still be running."""

    def tokens(self) -> Sequence[Drawn]:
        """What it drew, one entry per item of `Batch.drawing`; waits for it. Called once."""
        ...


class ModelRunner(Protocol):
    """Runs a model and draws tokens, one step at a time: a decoder with its paged cache, or an encoder."""

    overlaps: bool
    """Whether a step may be launched before the tokens of the one before are taken."""

    in_flight: int
    """Steps of disjoint sequences that may be under way at once; above 1 a step's tokens are drawn as they are taken,
    and its rows may be read from then on."""

    fatal: tuple[type[Exception], ...]
    """Errors after which nothing that is on the device can be trusted."""

    @property
    def step_memory(self) -> StepMemory | None:
        """Where batches must have their arrays; None for anywhere."""
        ...

    def forward(self, batch: Batch, states: Sequence[SamplingState]) -> None:
        """Starts the model's part of a step: its keys and values will be in the cache when it is over.

        Args:
            batch: the step.
            states: how the next tokens of `batch.drawing` are drawn. Only temperature and the like, and the random
                numbers of these positions, are read here.
        """
        ...

    def draw(self, states: Sequence[SamplingState]) -> Launched:
        """Starts the draw of the step that `forward` started last; must follow it.

        Args:
            states: the same, now with all that they say of their next tokens: the tokens before those are known on the
                host where `reads_tokens` asks for it.
        """
        ...

    def land(self) -> None:
        """Where several steps are in flight, waits for the first of them, of which `draw` is then."""
        ...

    def score(self, rows: Ints) -> Value:
        """Logits [len(rows), V] of any rows of the last step; at most `MAX_SCORED_ROWS`. Overwrites earlier logits.

        An array where steps are recorded, else a tensor.
        """
        ...

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        """Sums [..., E] of the hidden states, in fp32, of rows [..., n] of the last step; at most `MAX_HIDDEN_ROWS`."""
        ...

    def drop_cache(self) -> None:
        """Gives the memory of the cache back; nothing may run before `wake_up`."""
        ...

    def restore_cache(self) -> None:
        """The cache has memory again; what it holds means nothing."""
        ...

    def wake_up(self) -> None:
        """Weights and cache are there again, elsewhere maybe."""
        ...

    def close(self) -> None:
        """Ends what runs beside the caller's thread."""
        ...


MAX_SCORED_ROWS = 64
MAX_HIDDEN_ROWS = 512  # of 8,192 numbers they take 16 MiB


class Landed(msgspec.Struct, frozen=True):
    """A step that was over when it was drawn."""

    drawn: Sequence[Drawn]

    def tokens(self) -> Sequence[Drawn]:
        """See `Launched`."""
        return self.drawn


class StepwiseRunner(ABC):
    """A `ModelRunner` that has finished what it starts when it returns; the sampler gets its logits."""

    overlaps = False
    in_flight = 1
    fatal: tuple[type[Exception], ...] = ()

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._sampler = Sampler() if sampler is None else sampler
        self._drawn_from: Value = None
        self._drafts: list[Tokens] | None = None

    @property
    def step_memory(self) -> StepMemory | None:
        """See `ModelRunner`."""
        return None

    def forward(self, batch: Batch, states: Sequence[SamplingState]) -> None:
        """See `ModelRunner`."""
        self._drafts = None
        if batch.drafted:
            self._drafts = [run.drafts for run in batch.drawing]
            self._sampler.look_ahead(states, self._drafts)
        self._drawn_from = self.run(batch)

    def draw(self, states: Sequence[SamplingState]) -> Landed:
        """See `ModelRunner`."""
        if self._drafts is not None:
            return Landed(self._sampler.sample_runs(self._drawn_from, states, self._drafts))
        return Landed(self._sampler.sample(self._drawn_from, states))

    def land(self) -> None:  # noqa: B027  # one step at a time is over when it is launched
        """See `ModelRunner`."""

    @abstractmethod
    def run(self, batch: Batch) -> Value:
        """Runs a step: its keys and values are in the cache afterwards. Returns logits [len(drawn_rows), V] in fp32.

        The logits are valid until the next call, and may be overwritten by the caller.
        """

    def draw_rows(self, logits: Value, controls: NDArray[np.float64]) -> tuple[Ints, NDArray[np.float32]]:
        """As `kernels.draw`."""
        return kernels.draw(logits, controls)

    @abstractmethod
    def score(self, rows: Ints) -> Value:
        """See `ModelRunner`."""

    @abstractmethod
    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        """See `ModelRunner`."""

    def hidden_rows(self, rows: Ints) -> NDArray[np.float32]:
        """Hidden states [len(rows), F] of rows of the last step: what a head that drafts for the model is given."""
        raise NotImplementedError

    def drop_cache(self) -> None:  # noqa: B027  # an encoder has none
        """See `ModelRunner`."""

    def restore_cache(self) -> None:  # noqa: B027
        """See `ModelRunner`."""

    def wake_up(self) -> None:  # noqa: B027  # most have everything where it was
        """See `ModelRunner`."""

    def close(self) -> None:  # noqa: B027  # most have nothing to end
        """See `ModelRunner`."""


class HeadRunner(Protocol):
    """Runs a head that drafts for a model: as a `StepwiseRunner`, but for hidden states that go in and come out."""

    @property
    def step_memory(self) -> StepMemory | None:
        """See `ModelRunner`."""
        ...

    def run_on(self, batch: Batch, states: NDArray[np.float32], *, fused: bool) -> Value:
        """Runs a step of token ids and hidden states [T, ...].

        Args:
            batch: its token ids are those behind the positions.
            states: as the model has them; where `fused` is set, as `given_back` gave them.
            fused: see `states`.

        Returns:
            Logits, as `StepwiseRunner.run`.
        """
        ...

    def given_back(self, rows: Ints) -> NDArray[np.float32]:
        """Hidden states [len(rows), E] for the positions behind rows of the last step."""
        ...

    def draw_rows(self, logits: Value, controls: NDArray[np.float64]) -> tuple[Ints, NDArray[np.float32]]:
        """See `StepwiseRunner`."""
        ...

    def drop_cache(self) -> None:
        """See `ModelRunner`."""
        ...

    def restore_cache(self) -> None:
        """See `ModelRunner`."""
        ...

    def wake_up(self) -> None:
        """See `ModelRunner`."""
        ...

    def close(self) -> None:
        """See `ModelRunner`."""
        ...


class EncoderRunner(StepwiseRunner):
    """Runs an encoder over whole texts; there is no cache, and nothing to draw.

    Where a model has a head, the hidden state of each position is what that says of its text, [L].
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self._config = config
        self._scores = np.empty((0, len(config.labels)))

    @abstractmethod
    def encode(
        self, token_ids: Ints, positions: Ints, types: Ints, query_start: Ints, adapters: AdapterRows | None
    ) -> NDArray[np.float32] | None:
        """Runs a step: numbers [T] of its tokens, as `Encoder.forward` takes them, and where texts begin [R + 1].

        Args:
            token_ids, positions, types, query_start: see above.
            adapters: which rows have which.

        Returns logits [R, L] of a model with L labels.
        """

    @abstractmethod
    def states_sum(self, rows: Ints) -> NDArray[np.float64]:
        """`hidden_sum` of what the layers gave."""

    def run(self, batch: Batch) -> None:
        """See `StepwiseRunner`; there are no logits of tokens."""
        types = np.concatenate([_token_types(run) for run in batch.runs])
        positions = batch.positions + self._config.first_position
        logits = self.encode(batch.token_ids, positions, types, batch.query_start, batch.adapters)
        if logits is None:
            return
        self._scores = np.repeat(logits.astype(np.float64), np.diff(batch.query_start), axis=0)

    def score(self, rows: Ints) -> Value:
        """An encoder has no logits."""
        raise NotImplementedError

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        """See `ModelRunner`."""
        return self._scores[rows].sum(-2) if self._config.scores else self.states_sum(rows)


def _token_types(run: Run) -> Ints:
    """[count] which of a pair's texts each token belongs to."""
    request = run.sequence.request
    assert isinstance(request, PoolingRequest)
    return np.array(request.token_type_ids or [0] * run.count, np.int64)
