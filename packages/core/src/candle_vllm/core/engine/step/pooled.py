# SPDX-License-Identifier: MIT
"""A text that is pooled or scored, from its preparation to its only output (steps 6 and 8 of a request's life).

The hidden states of its positions may be computed in chunks. They are added in float64, so that the rounding errors of
these sums rarely change the float32 result.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.outputs import FinishReason, TokenOutput
from candle_vllm.core.engine.requests import PoolingRequest
from candle_vllm.core.engine.runners.model_runner import MAX_HIDDEN_ROWS, MAX_SCORED_ROWS, ModelRunner
from candle_vllm.core.engine.step.live import Live
from candle_vllm.core.engine.step.sequence import Run, Sequence
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.layers.parameters import on_host
from candle_vllm.core.pooling import PoolingPlan
from candle_vllm.core.sampling.params import SamplingParams

Reader: TypeAlias = Callable[[NDArray[np.float32]], object]  # takes logits [n, V], which are overwritten later

_SMALLEST_NORM = 1e-12

assert sys.byteorder == "little"  # vectors are sent as their bytes in memory


class PooledText(Live):
    """One text whose hidden states are pooled by `plan`; no token follows the prompt of its `sequence`."""

    def __init__(self, sequence: Sequence, plan: PoolingPlan) -> None:
        super().__init__(sequence)
        sequence.max_length = sequence.num_prompt_tokens + 1
        self._plan = plan
        self._rows: list[NDArray[np.float64]] = []
        self._sum: NDArray[np.float64] | None = None
        self._next = sequence.num_prompt_tokens - 1 if plan.method.positions == "last" else 0
        self._end = 1 if plan.method.positions == "first" else sequence.num_prompt_tokens

    @property
    def reads_rows(self) -> bool:
        return True

    def read_rows(self, run: Run, offset: int, runner: ModelRunner) -> None:
        wanted = range(max(run.start, self._next), min(run.start + run.count, self._end))  # a preempted text runs again
        assert not wanted or wanted.start == self._next, "a needed position was left out"
        for first in range(0, len(wanted), MAX_HIDDEN_ROWS):
            rows = np.array(wanted[first : first + MAX_HIDDEN_ROWS], np.int64) + (offset - run.start)
            self._add(runner.hidden_sum(rows[:, None] if self._plan.reads_states else rows), len(rows))

    def _add(self, total: NDArray[np.float64], positions: int) -> None:
        """Add the sum [E] of the next positions' hidden states; if the plan `reads_states`, states [positions, E]."""
        if self._plan.by_token:
            self._rows.append(total)
        else:
            if (weights := self._plan.method.weights) is not None:
                total = weights(np.arange(self._next, self._next + positions)) @ total
            self._sum = total if self._sum is None else self._sum + total
        self._next += positions

    def finish(self) -> TokenOutput:
        """Return the only output, once the last token has run; raises CandleVllmError if a vector is not finite."""
        vector, plan = self._vector(), self._plan
        vectors = len(vector) // plan.dimensions if plan.method.gives == "vectors" else None
        return msgspec.structs.replace(self.end(FinishReason.STOP), pooled=vector, vectors=vectors)

    def _vector(self) -> array[float]:
        """Return the vector, or the concatenated vectors of all positions, float32; raises as `finish`."""
        assert self._next >= self._end, "a needed position was not added"
        plan, head = self._plan, self._plan.head
        if plan.by_token:
            pooled, sparse = np.concatenate(self._rows), plan.method.gives == "weights"
            if head is not None:
                pooled = head.by_token(pooled, self.request.prompt_token_ids, activate=plan.activate, sparse=sparse)
        else:
            assert self._sum is not None
            pooled = self._sum / plan.method.divisor(self.sequence.num_prompt_tokens)
            if head is not None:
                pooled = head(pooled, activate=plan.activate)
        pooled = pooled[..., : plan.dimensions]
        if plan.normalize:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), _SMALLEST_NORM)
        with np.errstate(over="ignore"):
            numbers = pooled.astype(np.float32)
        if not np.isfinite(numbers).all():
            raise CandleVllmError(
                "the model returned values that are not finite (NaN or infinite): its weights are damaged"
            )
        made = array("f")
        made.frombytes(numbers.tobytes())
        return made


class ScoredText(PooledText):
    """A text that is not pooled: `read`, if given, gets the logits of the positions from `first` on."""

    def __init__(self, token_ids: Seq[int], read: Reader | None, first: int) -> None:
        params = SamplingParams(seed=0, skip_reading_prefix_cache=True)
        request = PoolingRequest(request_id="scored", prompt_token_ids=token_ids, params=params)
        Live.__init__(self, Sequence(request, 0, order=-1))
        self.sequence.max_length = len(token_ids) + 1
        self._read, self._next = read, first

    def read_rows(self, run: Run, offset: int, runner: ModelRunner) -> None:
        while self._read is not None and self._next < run.start + run.count:  # a preempted text is run again
            rows = np.arange(self._next, min(self._next + MAX_SCORED_ROWS, run.start + run.count))
            self._read(on_host(runner.score(rows + (offset - run.start))))
            self._next += len(rows)

    def finish(self) -> TokenOutput:
        return self.end(FinishReason.STOP)
