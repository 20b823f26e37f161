# SPDX-License-Identifier: MIT
"""Products by the CPU's compiled kernels for layers that run op by op in torch: a recorded plan for each matrix.

A recorded step is one plan of all operations. Layers of transformers are Python code between their products, so each
product is a plan of its own here. All plans read their input from the same buffer and write to the same buffer.
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

_ROWS = 256  # of a plan's buffers; more rows are several runs


class Products:
    """The products of one model.

    Args:
        threads: number of threads.
    """

    def __init__(self, threads: int) -> None:
        limits = StepLimits(_ROWS, sequences=1, logit_rows=1, table_width=1, block_size=16, threads=threads)
        self._recorder = Recorder(limits, host_isa())
        self._team = ThreadTeam(threads, kept_plans=1 << 20)
        self._plans: dict[tuple[str, int], tuple[np.ndarray, int]] = {}
        self._buffers: dict[tuple[str, int], Buffer] = {}

    def multiply(self, matrices: Sequence[Matrix], x: torch.Tensor) -> torch.Tensor:
        """x [T, K] to x W^T [T, N] in fp32, where W is matrices above each other."""
        given, out = self._buffer("x", x.shape[1]), self._buffer("y", sum(matrix.rows for matrix in matrices))
        numbers = x.detach().float().numpy()

        def record() -> None:
            put_value(buffer_value(self._recorder, given).linear(matrices, None), out)

        def lay_out(rows: slice) -> None:
            given.rows[: rows.stop - rows.start] = numbers[rows]

        return self._run(("product", id(matrices[0])), record, lay_out, len(x), out)

    def take(self, matrix: Matrix, ids: torch.Tensor) -> torch.Tensor:
        """The rows [T, K] of a matrix by their numbers [T], in fp32."""
        out, numbers, tokens = self._buffer("y", matrix.columns), ids.numpy(), self._recorder.arrays.token_ids

        def record() -> None:
            put_value(step_tokens(self._recorder).embedding(matrix), out)

        def lay_out(rows: slice) -> None:
            tokens[: rows.stop - rows.start] = numbers[rows]

        return self._run(("rows", id(matrix)), record, lay_out, len(ids), out)

    def _run(
        self,
        key: tuple[str, int],
        record: Callable[[], None],
        lay_out: Callable[[slice], None],
        count: int,
        out: Buffer,
    ) -> torch.Tensor:
        """Run a plan, which is recorded the first time, for `count` rows; matrices live as long as the plans."""
        if key not in self._plans:
            self._recorder.begin(Adapted.NOT)
            record()
            self._plans[key] = np.array(self._recorder.plan, np.int64), self._recorder.num_rows
        plan, operations = self._plans[key]
        made = torch.empty(count, out.width)
        rows, sizes = made.numpy(), self._recorder.arrays.numbers
        for first in range(0, count, _ROWS):
            part = slice(first, min(first + _ROWS, count))
            lay_out(part)
            sizes[StepNumber.TOKENS] = part.stop - first
            self._team.run(plan, operations)
            rows[part] = out.rows[: part.stop - first]
        return made

    def _buffer(self, name: str, width: int) -> Buffer:
        if (name, width) not in self._buffers:
            self._buffers[name, width] = self._recorder.buffer(width)
        return self._buffers[name, width]


def decoded(matrices: Sequence[Any], dtype: torch.dtype, products: Products | None) -> torch.Tensor:
    """The numbers [N, K] of matrices above each other, of either kind."""
    if products is None:
        return torch.cat([matrix.decoded(dtype) for matrix in matrices])
    return torch.cat([products.take(matrix, torch.arange(matrix.rows)) for matrix in matrices]).to(dtype)
