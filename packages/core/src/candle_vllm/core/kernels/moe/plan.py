# SPDX-License-Identifier: MIT
"""Recording a mixture of experts: the operations of `cpu.py`, in order, and the memory for their intermediate results.

A plan may run any step up to its limits, so its memory has k rows for each token of the largest step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, get_args

import numpy as np

from candle_vllm.core.kernels.activation_quant import Prologue
from candle_vllm.core.kernels.activation_rows import InputForm
from candle_vllm.core.kernels.cpu_runtime.matrices import Inputs, linear_call
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, operation, plan_row
from candle_vllm.core.kernels.moe import arguments as given
from candle_vllm.core.kernels.moe.arguments import Activation, Routing, Scoring

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder
    from candle_vllm.core.kernels.recorded import ExpertWeights

PROLOGUES: Mapping[Activation, Prologue] = MappingProxyType({
    "silu": Prologue.SILU, "gelu_tanh": Prologue.GELU_GATE, "swiglu_oai": Prologue.SWIGLU_OAI,
    "relu2": Prologue.RELU2, "gelu": Prologue.GELU, "silu_7": Prologue.SILU_7, "silu_16": Prologue.SILU_16,
    "silu_10": Prologue.SILU_10,
})  # fmt: skip
"""By activation: how the input of the down matrices is computed from the gate and up products."""


@dataclass(frozen=True)
class Pairs:
    """Arrays of a step's pairs; see `RouteArguments`.

    Attributes:
        top_k: k.
        experts, weights: int64 [T, k] and float32 [T, k].
        places: int64 [T, k], `place_of`.
        starts: int64 [X + 1].
        token_of: int64 [T * k].
    """

    top_k: int
    experts: np.ndarray
    weights: np.ndarray
    places: np.ndarray
    starts: np.ndarray
    token_of: np.ndarray


@dataclass(frozen=True)
class Results:
    """Results of experts' matrices: float32 [T * k, width], a row for each place, `stride` floats apart."""

    pairs: Pairs
    rows: np.ndarray
    stride: int
    width: int


def record_sum(
    recorder: Recorder,
    results: Results,
    target: tuple[int, int],
    *,
    accumulate: bool,
    shared: tuple[int, int],
    gate: tuple[int, int],
) -> None:
    """Record the weighted sum; `CombineArguments` describes the pairs of address and stride."""
    pairs = results.pairs
    arguments = given.CombineArguments(
        out=target[0],
        out_stride=target[1],
        onto=accumulate,
        columns=results.width,
        top_k=pairs.top_k,
        weights=address_of(pairs.weights),
        places=address_of(pairs.places),
        results=address_of(results.rows),
        result_stride=results.stride,
        shared=shared[0],
        shared_stride=shared[1],
        gate=gate[0],
        gate_stride=gate[1],
    )
    recorder.add(operation("moe.cpu:combine"), arguments)


def record_route(recorder: Recorder, logits: tuple[int, int], count: int, routing: Routing) -> Pairs:
    """Record the choice of experts and the sorting of pairs; `logits` is address and stride of float32 [T, X]."""
    top_k = routing.top_k
    experts, places, token_of = (recorder.memory(top_k, np.int64) for _ in range(3))
    counters = recorder.memory(-(-(2 * count + 1) // recorder.limits.tokens), np.int64)
    pairs = Pairs(top_k, experts, recorder.memory(top_k), places, counters, token_of)
    arguments = given.RouteArguments(
        logits=logits[0],
        stride=logits[1],
        num_experts=count,
        top_k=top_k,
        groups=routing.groups,
        top_groups=routing.top_groups,
        scoring=get_args(Scoring).index(routing.scoring),
        renormalise=routing.renormalise,
        bias=0 if routing.bias is None else recorder.keep(routing.bias),
        scale=routing.scale,
        experts=address_of(experts),
        weights=address_of(pairs.weights),
        finished=recorder.keep_array(np.zeros(1, np.int64)),
        starts=address_of(pairs.starts),
        token_of=address_of(token_of),
        place_of=address_of(places),
        expert_scale=0 if routing.expert_scale is None else recorder.keep(routing.expert_scale),
        jitter=routing.jitter,
        chosen=0 if routing.chosen is None else recorder.keep_array(routing.chosen),
        token_ids=address_of(recorder.arrays.token_ids),
    )
    recorder.add(operation("moe.cpu:route"), arguments)
    return pairs


def record_products(
    recorder: Recorder, weights: ExpertWeights, inputs: Mapping[InputForm, Inputs], pairs: Pairs, picked: np.ndarray
) -> Results:
    """Record the products of each place's row with its expert's matrices, whose results are side by side in a row.

    Args:
        weights: one list of matrices for each projection; the bias is [X, width] or None.
        inputs: the rows, in the forms that the matrices read.
        picked: int64 [T * k], the number of the row that each place reads.
    """
    matrices, bias, _ = weights
    count, width = len(matrices[0]), sum(of_experts[0].rows for of_experts in matrices)
    rows, stride = recorder.rows(width, pairs.top_k)
    table = np.zeros((count, len(matrices), given.ENTRY), np.int64)
    at_bias = 0 if bias is None else recorder.keep(bias)
    for x in range(count):
        column = 0
        for m, of_experts in enumerate(matrices):
            matrix = of_experts[x]
            product, arguments = linear_call(
                recorder,
                matrix,
                inputs[matrix.input_form],
                out=address_of(rows),
                out_stride=stride,
                column=column,
                bias=at_bias and at_bias + 4 * (x * width + column),
                rows_from=StepNumber.PAIRS,
            )
            table[x, m] = plan_row(product, 0, arguments)
            column += matrix.rows
    arguments = given.ExpertsArguments(
        starts=address_of(pairs.starts),
        table=recorder.keep_array(table),
        num_experts=count,
        matrices=len(matrices),
        picked=address_of(picked),
        ranks=recorder.ranks,
    )
    recorder.add(operation("moe.cpu:experts"), arguments)
    return Results(pairs, rows, stride, width)
