# SPDX-License-Identifier: MIT
"""Products by the CPU's compiled kernels for layers that run op by op in torch: one recorded plan for each matrix.

A recorded step is one plan of all operations. Layers of transformers run Python code between their products, so each
product here has a plan of its own. All plans read from the same input buffer and write to the same output buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.recorder import Adapted, Buffer, Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_value, put_value, step_tokens
from candle_vllm.core.kernels.recorded import Matrix, Recorded

_ROWS = 256  # rows of a plan's buffers; a product with more rows runs the plan several times


class _Plan(NamedTuple):
    """A recorded product, and the buffers of its input and its result as tensors."""

    rows: np.ndarray
    count: int
    given: torch.Tensor
    made: torch.Tensor


class Products:
    """The matrix products of one model.

    Args:
        threads: number of threads.
    """

    def __init__(self, threads: int) -> None:
        limits = StepLimits(_ROWS, sequences=1, logit_rows=1, table_width=1, block_size=16, threads=threads)
        self._recorder = Recorder(limits, host_isa())
        self._team = ThreadTeam(threads, kept_plans=1 << 20)
        self._plans: dict[int, _Plan] = {}
        self._buffers: dict[tuple[str, int], Buffer] = {}

    def multiply(
        self, matrices: Sequence[Matrix], x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply x [T, K] by W^T, and add a bias [N]: [T, N], where W is the matrices stacked by rows."""
        plan = self._plans.get(id(matrices[0]))
        if plan is None:
            given, added = self._buffer("x", x.shape[1]), None if bias is None else bias.float().numpy()
            product = lambda: buffer_value(self._recorder, given).linear(matrices, added)  # noqa: E731
            plan = self._record(id(matrices[0]), product, sum(each.rows for each in matrices), given.rows)
        return self._run(plan, x, dtype)

    def take(self, matrix: Matrix, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Look up rows [T, K] of a matrix by their indices [T]."""
        plan = self._plans.get(-id(matrix))
        if plan is None:
            rows = lambda: step_tokens(self._recorder).embedding(matrix)  # noqa: E731
            plan = self._record(-id(matrix), rows, matrix.columns, self._recorder.arrays.token_ids)
        return self._run(plan, ids, dtype)

    def _record(self, key: int, made: Callable[[], Recorded], width: int, given: np.ndarray) -> _Plan:
        """Record a plan whose result has `width` columns; the matrices live as long as the plan."""
        self._recorder.begin(Adapted.NOT)
        out = self._buffer("y", width)
        put_value(made(), out)
        tensors = torch.from_numpy(given), torch.from_numpy(out.rows)
        self._plans[key] = plan = _Plan(np.array(self._recorder.plan, np.int64), self._recorder.num_rows, *tensors)
        return plan

    def _run(self, plan: _Plan, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Run a plan for `inputs`, which are copied to the plan's buffer first; the result is a copy, too."""
        rows, count, given, out = plan
        made, sizes = list[torch.Tensor](), self._recorder.arrays.numbers
        for part in (inputs,) if len(inputs) <= _ROWS else inputs.split(_ROWS):
            sizes[StepNumber.TOKENS] = size = len(part)
            given[:size].copy_(part)
            self._team.run(rows, count)
            made.append(out[:size].to(dtype, copy=True))
        return made[0] if len(made) == 1 else torch.cat(made)

    def _buffer(self, name: str, width: int) -> Buffer:
        if (name, width) not in self._buffers:
            self._buffers[name, width] = self._recorder.buffer(width)
        return self._buffers[name, width]


def decoded(matrices: Sequence[Any], dtype: torch.dtype, products: Products | None) -> torch.Tensor:
    """Decode stacked matrices [N, K], by compiled kernels or by torch."""
    if products is None:
        return torch.cat([matrix.decoded(dtype) for matrix in matrices])
    return torch.cat([products.take(matrix, torch.arange(matrix.rows), dtype) for matrix in matrices])
