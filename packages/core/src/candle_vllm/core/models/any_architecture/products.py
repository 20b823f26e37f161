# SPDX-License-Identifier: MIT
"""Products by the CPU's compiled kernels for layers that run op by op in torch: one recorded plan for each matrix.

A recorded step is one plan of all operations. Layers of transformers run Python code between their products, so each
product here has a plan of its own. All plans read from the same input buffer and write to the same output buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.recorder import Adapted, Buffer, Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_value, put_value, step_tokens
from candle_vllm.core.kernels.recorded import Matrix

_ROWS = 256  # rows of a plan's buffers; a product with more rows runs the plan several times


class Products:
    """The matrix products of one model.

    Args:
        threads: number of threads.
    """

    def __init__(self, threads: int) -> None:
        limits = StepLimits(_ROWS, sequences=1, logit_rows=1, table_width=1, block_size=16, threads=threads)
        self._recorder = Recorder(limits, host_isa())
        self._team = ThreadTeam(threads, kept_plans=1 << 20)
        self._plans: dict[int, tuple[np.ndarray, int, np.ndarray, np.ndarray]] = {}
        self._buffers: dict[tuple[str, int], Buffer] = {}

    def multiply(self, matrices: Sequence[Matrix], x: torch.Tensor) -> torch.Tensor:
        """Multiply x [T, K] by W^T: [T, N] in fp32, where W is the matrices stacked by rows."""
        key = id(matrices[0])
        if key not in self._plans:
            given, out = self._buffer("x", x.shape[1]), self._buffer("y", sum(matrix.rows for matrix in matrices))
            record = lambda: put_value(buffer_value(self._recorder, given).linear(matrices, None), out)  # noqa: E731
            self._plans[key] = *self._record(record), given.rows, out.rows
        return self._run(*self._plans[key], x.float().numpy())

    def take(self, matrix: Matrix, ids: torch.Tensor) -> torch.Tensor:
        """Look up rows [T, K] of a matrix by their indices [T], in fp32."""
        key = -id(matrix)
        if key not in self._plans:
            given, out = self._recorder.arrays.token_ids, self._buffer("y", matrix.columns)
            record = lambda: put_value(step_tokens(self._recorder).embedding(matrix), out)  # noqa: E731
            self._plans[key] = *self._record(record), given, out.rows
        return self._run(*self._plans[key], ids.numpy())

    def _record(self, record: Callable[[], None]) -> tuple[np.ndarray, int]:
        """Record a plan and return it with its number of operations; the matrices live as long as the plan."""
        self._recorder.begin(Adapted.NOT)
        record()
        return np.array(self._recorder.plan, np.int64), self._recorder.num_rows

    def _run(self, plan: np.ndarray, count: int, given: np.ndarray, out: np.ndarray, inputs: Any) -> torch.Tensor:
        """Run a plan for `inputs`, which are copied to the buffer `given` first."""
        made, sizes = np.empty((len(inputs), out.shape[1]), np.float32), self._recorder.arrays.numbers
        for first in range(0, len(inputs), _ROWS):
            part = inputs[first : first + _ROWS]
            given[: len(part)] = part
            sizes[StepNumber.TOKENS] = len(part)
            self._team.run(plan, count)
            made[first : first + len(part)] = out[: len(part)]
        return torch.from_numpy(made)

    def _buffer(self, name: str, width: int) -> Buffer:
        if (name, width) not in self._buffers:
            self._buffers[name, width] = self._recorder.buffer(width)
        return self._buffers[name, width]


def decoded(matrices: Sequence[Any], dtype: torch.dtype, products: Products | None) -> torch.Tensor:
    """Decode stacked matrices [N, K], by compiled kernels or by torch."""
    if products is None:
        return torch.cat([matrix.decoded(dtype) for matrix in matrices])
    return torch.cat([products.take(matrix, torch.arange(matrix.rows)) for matrix in matrices]).to(dtype)
