# SPDX-License-Identifier: MIT
"""Norms of heads, and norms onto a residual, on the CPU against the references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, operation, plan_row
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.layer_norm import layer_norm
from candle_vllm.core.kernels.rms_norm import (
    HeadNormArguments,
    NormOntoArguments,
)
from candle_vllm.core.kernels.rms_norm.reference import rms_norm

EPS = 1e-6


@pytest.fixture(scope="module")
def teams() -> Iterator[dict[int, ThreadTeam]]:
    made = {threads: ThreadTeam(threads) for threads in (1, 2, 3)}
    yield made
    for team in made.values():
        team.close()


def run(team: ThreadTeam, operation: int, arguments: tuple[Any, ...], rows: int) -> None:
    numbers = np.zeros(StepNumber.COUNT, np.int64)
    numbers[StepNumber.TOKENS] = rows
    team.run(np.array(plan_row(operation, address_of(numbers), arguments)), 1)


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("head_dim", [8, 16, 18, 32, 64, 72, 80, 128])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_head_norm(teams: dict[int, ThreadTeam], threads: int, head_dim: int, layer: bool, own: bool) -> None:
    """With a weight for all heads, or one for each; what stands beside the heads is not touched, nor counted."""
    rows, heads, before, behind = 5, 3, 7, 33
    x = random(0, rows, before + heads * head_dim + behind) + 2
    weight = torch.from_numpy(random(1, heads, head_dim) if own else random(1, head_dim))
    wanted = x.copy()
    middle = torch.from_numpy(x[:, before:-behind].copy()).unflatten(-1, (heads, head_dim))
    normed = layer_norm(middle, weight, None, EPS) if layer else rms_norm(middle, weight, EPS)
    wanted[:, before:-behind] = normed.flatten(1).numpy()
    arguments = HeadNormArguments(
        x=address_of(x) + 4 * before,
        stride=x.shape[1],
        heads=heads,
        head_dim=head_dim,
        weight=weight.data_ptr(),
        eps=EPS,
        weight_step=4 * head_dim if own else 0,
    )
    run(teams[threads], operation("rms_norm.cpu:make_head_norm", layer), arguments, rows)
    np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("columns", [1, 31, 45, 96, 577])
@pytest.mark.parametrize("layer", [False, True])
def test_norm_onto_a_residual(teams: dict[int, ThreadTeam], rows: int, columns: int, layer: bool) -> None:
    """Added to rows, or written there."""
    x, target = random(0, rows, columns + 5) + 2, random(1, rows, columns + 3)
    weight, bias = (torch.from_numpy(random(seed, columns)) for seed in (2, 3))
    both = torch.cat([weight, bias])
    wide = torch.from_numpy(x[:, :columns].copy())
    normed = layer_norm(wide, weight, bias, EPS) if layer else rms_norm(wide, weight, EPS)
    wanted = target.copy()
    wanted[:, :columns] += normed.numpy()
    found = []
    for threads in (1, 2, 3):
        result = target.copy()
        arguments = NormOntoArguments(
            x=address_of(x),
            stride=x.shape[1],
            columns=columns,
            weight=both.data_ptr(),
            eps=EPS,
            target=address_of(result),
            target_stride=result.shape[1],
        )
        run(teams[threads], operation("rms_norm.cpu:make_norm_onto", layer), arguments, rows)
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)
        found.append(result)
        fresh = target.copy()
        run(
            teams[threads],
            operation("rms_norm.cpu:make_norm_onto", layer),
            arguments._replace(target=address_of(fresh), accumulate=0),
            rows,
        )
        np.testing.assert_allclose(fresh[:, :columns], normed.numpy(), rtol=1e-5, atol=1e-5)
        assert np.array_equal(fresh[:, columns:], target[:, columns:])
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
