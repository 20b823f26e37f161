# SPDX-License-Identifier: MIT
"""Experts that the CPU computes within the steps of a GPU (CPU offloading of experts).

The experts' matrices are in main memory, in the layout of the CPU's compiled kernels. The GPU copies a layer's input
and the router's logits of all tokens to pinned memory. The CPU routes the tokens, multiplies, and writes the weighted
sums to pinned memory, from which the GPU copies them. Meanwhile the stream computes the shared expert.

The host waits once in each such layer, so a captured step is split into several graphs, see `DeviceStream.between`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_first, operation
from candle_vllm.core.kernels.cpu_runtime.recorder import Adapted, Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import CODE, ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_value, put_value
from candle_vllm.core.kernels.device_stream import DeviceStream, copy
from candle_vllm.core.kernels.recorded import Recorded
from candle_vllm.core.kernels.torch_numbers import NAMES
from candle_vllm.core.quantization.plain import ELEMENTS, convert

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.numa import CpuRanks

Record: TypeAlias = Callable[[Recorded, Recorded], Recorded]
"""Function (x [T, E], router logits [T, X]) -> weighted sums [T, E] that records a layer's experts."""

MOST_ROWS = 512
"""Maximum number of tokens that are computed at once: a longer step is divided."""


class HostExperts:
    """Mixture-of-experts layers with experts in main memory.

    Args:
        layers: recording functions of the layers; all layers have the same size.
        size: E, elements of a hidden state.
        experts: X, number of experts.
        tokens: maximum number of tokens of a step.
        threads, ranks: threads and ranks of the CPU's team, see `ThreadTeam`.

    Attributes:
        layers: for each layer, the function that a step calls.
    """

    def __init__(
        self,
        stream: DeviceStream,
        layers: Sequence[Record],
        *,
        size: int,
        experts: int,
        tokens: int,
        dtype: torch.dtype,
        threads: int,
        ranks: CpuRanks | None = None,
    ) -> None:
        self._stream, self._dtype = stream, NAMES[dtype]
        limits = StepLimits(
            tokens=min(tokens, MOST_ROWS),
            sequences=1,
            logit_rows=1,
            table_width=0,
            block_size=1,
            threads=threads,
            ranks=ranks,
        )

        def compile_all() -> None:
            self._record(Recorder(limits, host_isa()), layers, size, experts)
            operation(CODE)

        compile_first(compile_all)
        self._recorder = Recorder(limits, host_isa())
        self._plans = self._record(self._recorder, layers, size, experts)
        self._team = ThreadTeam(threads, ranks, kept_plans=len(layers))
        self._x = _Staged(stream, tokens, size, dtype)
        self._logits = _Staged(stream, tokens, experts, torch.float32)
        self._sums = _Staged(stream, tokens, size, torch.float32)
        self._tokens, self._sent = 0, stream.mark()
        self.layers = [functools.partial(self.step, number) for number in range(len(layers))]

    def begin(self, tokens: int) -> None:
        """Set how many leading rows of the following steps are tokens, before padding. Call as the stream's work."""
        self._tokens = tokens

    def close(self) -> None:
        """End the threads."""
        self._team.close()

    def step(
        self, number: int, x: torch.Tensor, logits: torch.Tensor, meanwhile: Callable[[], torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute layer `number`: return sums [T, E] in x's dtype, 0 for padding rows, and the result of `meanwhile`.

        Call as the stream's work.
        """
        rows = len(x)
        copy(self._x.tensor[:rows], x)
        copy(self._logits.tensor[:rows], logits)
        other = None
        if meanwhile is not None:
            self._stream.between(self._mark)
            other = meanwhile()
        self._stream.between(functools.partial(self._compute, number, rows, marks=meanwhile is None))
        sums = torch.empty(rows, x.shape[1], dtype=torch.float32, device=x.device)
        copy(sums, self._sums.tensor[:rows])
        return sums.to(x.dtype), other

    def _mark(self) -> None:
        self._sent = self._stream.mark()

    def _compute(self, number: int, rows: int, *, marks: bool) -> None:
        """Run the CPU's part of a layer; with `marks`, first mark the stream, because the inputs were just copied."""
        if marks:
            self._mark()
        self._sent.wait()
        given, logits, sums = (each.array for each in (self._x, self._logits, self._sums))
        counted, most = min(rows, self._tokens), self._recorder.limits.tokens
        for first in range(0, counted, most):
            some = slice(first, min(first + most, counted))
            count = some.stop - first
            convert(given[some], self._dtype, self._inputs[0].rows[:count], "F32")
            self._inputs[1].rows[:count] = logits[some]
            self._recorder.arrays.numbers[StepNumber.TOKENS] = count
            self._team.run(*self._plans[number])
            sums[some] = self._out.rows[:count]
        sums[counted:rows] = 0

    def _record(
        self, recorder: Recorder, layers: Sequence[Record], size: int, experts: int
    ) -> list[tuple[np.ndarray, int]]:
        """Record each layer's plan; all plans share memory, because they run one after another."""
        self._inputs = recorder.buffer(size), recorder.buffer(experts)
        self._out = recorder.buffer(size)
        plans: list[tuple[np.ndarray, int]] = []
        for record in layers:
            recorder.begin(Adapted.NOT)
            put_value(record(*(buffer_value(recorder, each) for each in self._inputs)), self._out)
            plans.append((np.array(recorder.plan, np.int64), recorder.num_rows))
        return plans


class _Staged:
    """Rows in pinned memory, as a tensor for the stream and an array for the host."""

    def __init__(self, stream: DeviceStream, rows: int, width: int, dtype: torch.dtype) -> None:
        memory = stream.staged(rows * width * dtype.itemsize)
        self.tensor = memory.view(dtype).view(rows, width)
        self.array = memory.numpy().view(ELEMENTS[NAMES[dtype]]).reshape(rows, width)
