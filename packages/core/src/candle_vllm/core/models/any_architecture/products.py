# SPDX-License-Identifier: MIT
"""Matrix products by compiled CPU kernels for layers that run op by op in torch: a recorded plan for each product.

Layers of transformers run Python code between their products. All plans of a width share a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch

from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import Matrix, StepNumber
from candle_vllm.core.kernels.cpu_runtime.recorder import Adapted, Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_value, put_value, step_tokens
from candle_vllm.core.kernels.recorded import Recorded

_Plan: TypeAlias = tuple[np.ndarray, int, np.ndarray, np.ndarray]  # its rows, their number, buffers of input and result
_ROWS = 256  # rows of a plan's buffers; a product with more rows runs the plan several times


class Products:
    """The matrix products of one model, on a team of threads."""

    def __init__(self, threads: int) -> None:
        limits = StepLimits(_ROWS, sequences=1, logit_rows=1, table_width=1, block_size=16, threads=threads)
        self._recorder = Recorder(limits, host_isa())
        self._team = ThreadTeam(threads, kept_plans=1 << 20)
        self._plans: dict[tuple[int, int], _Plan] = {}
        self._buffer = cache(lambda _, width: self._recorder.buffer(width))  # inputs "x", results "y"
        self._groups: dict[Any, list[Any]] = {}
        self._first: tuple[torch.Tensor, torch.Tensor, Any] | None = None
        self.ready: tuple[torch.Tensor | None, dict[Any, torch.Tensor]] = None, {}

    def group(self, layer: Any, x: torch.Tensor) -> list[Any]:
        """`layer`, and the later layers of its parent module that multiply the same x; found in their first run.

        Later runs compute one product: `ready` has the results for x of the layers that have not run yet.
        """
        group = self._groups.get(layer)
        if group is None:
            first, group = self._first, [layer]
            if first is not None and first[0] is x and first[2].parent == layer.parent and torch.equal(first[1], x):
                self._groups[first[2]].append(layer)
            else:
                self._first = x, x.clone(), layer  # a copy, for a model may change x between two products
            self._groups[layer] = group
        return group

    def multiply(self, layers: Sequence[Any], x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply x [T, K] by the matrices of layers and add their biases, if any: [T, N], side by side."""
        key = id(layers[0].matrices[0]), len(layers)
        plan = self._plans.get(key)
        if plan is None:
            matrices, given = [matrix for each in layers for matrix in each.matrices], self._buffer("x", x.shape[1])
            zeros = (torch.zeros(sum(matrix.rows for matrix in each.matrices)) for each in layers)
            bias = torch.cat([zero if each.bias is None else zero + each.bias for each, zero in zip(layers, zeros)])
            added = bias.numpy() if any(each.bias is not None for each in layers) else None
            product = lambda: buffer_value(self._recorder, given).linear(matrices, added)  # noqa: E731
            plan = self._record(key, product, len(bias), given.rows)
        return self._run(plan, x.float(), dtype)

    def take(self, matrix: Matrix, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Look up rows [T, K] of a matrix by their indices [T]."""
        plan = self._plans.get((id(matrix), 0))
        if plan is None:
            rows = lambda: step_tokens(self._recorder).embedding(matrix)  # noqa: E731
            plan = self._record((id(matrix), 0), rows, matrix.columns, self._recorder.arrays.token_ids)
        return self._run(plan, ids, dtype)

    def _record(self, key: tuple[int, int], made: Callable[[], Recorded], width: int, given: np.ndarray) -> _Plan:
        """Record a plan whose result has `width` columns; the matrices live as long as the plan."""
        self._recorder.begin(Adapted.NOT)
        out = self._buffer("y", width)
        put_value(made(), out)
        self._plans[key] = np.array(self._recorder.plan, np.int64), self._recorder.num_rows, given, out.rows
        return self._plans[key]

    def _run(self, plan: _Plan, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Run a plan for `inputs`, which are copied to the plan's buffer first; the result is a copy, too."""
        rows, count, given, out = plan
        values, sizes = inputs.numpy(), self._recorder.arrays.numbers
        made = np.empty((len(values), out.shape[1]), np.float32)
        for first in range(0, len(values), _ROWS):
            part = values[first : first + _ROWS]
            sizes[StepNumber.TOKENS] = size = len(part)
            given[:size] = part
            self._team.run(rows, count)
            made[first : first + size] = out[:size]
        return torch.from_numpy(made).to(dtype)


def decoded(matrices: Sequence[Any], dtype: torch.dtype, products: Products | None) -> torch.Tensor:
    """Decode stacked matrices [N, K], by compiled kernels or by torch."""
    if products is None:
        return torch.cat([matrix.decoded(dtype) for matrix in matrices])
    return torch.cat([products.take(matrix, torch.arange(matrix.rows), dtype) for matrix in matrices])
