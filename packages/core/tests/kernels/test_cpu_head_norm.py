"""The norm of heads on the CPU against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.rms_norm.cpu import head_norm_operation, head_norm_row
from candle_vllm.core.kernels.rms_norm.reference import rms_norm


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_head_norm(threads: int, head_dim: int) -> None:
    rows, heads, before = 5, 3, 7
    x = np.random.default_rng(0).standard_normal((rows, before + heads * head_dim + 2)).astype(np.float32)
    weight = np.random.default_rng(1).random(head_dim, dtype=np.float32)
    wanted = x.copy()
    middle = torch.from_numpy(x[:, before:-2].copy()).unflatten(-1, (heads, head_dim))
    wanted[:, before:-2] = rms_norm(middle, torch.from_numpy(weight), 1e-6).flatten(1).numpy()
    numbers = np.zeros(StepNumber.COUNT, np.int64)
    numbers[StepNumber.TOKENS] = rows
    arguments = head_norm_row(
        x=address_of(x) + 4 * before,
        stride=x.shape[1],
        heads=heads,
        head_dim=head_dim,
        weight=address_of(weight),
        eps=1e-6,
    )
    team = ThreadTeam(threads)
    team.run(np.array([head_norm_operation(), (3 + len(arguments)) * 8 << 8, address_of(numbers), *arguments]), 1)
    team.close()
    np.testing.assert_allclose(x, wanted, rtol=1e-5)
