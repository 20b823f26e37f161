# SPDX-License-Identifier: MIT
"""The convolution with a state by Triton, against the reference, and however texts are cut into steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.short_conv import state_shape, triton
from candle_vllm.core.kernels.states import StateCache, StateRows
from packages.core.tests.kernels.state_steps import DRAFTS, Cuts, Inputs, error, random, same_bits, tensors, whole_rows
from packages.core.tests.kernels.test_short_conv import LENGTHS, Reference, text, texts
from tests.common_run import few

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 5e-3}


class Kernel:
    """The kernel, with states between NaN."""

    def __init__(
        self, device: torch.device, channels: int, taps: int, slots: int, dtype: torch.dtype, *, bias: bool = True
    ) -> None:
        given = [random(1, channels, taps), *([random(2, channels)] if bias else [])]
        self.weight, self.bias, *_ = *(torch.from_numpy(x).to(device, dtype) for x in given), None
        states = torch.full((slots, 2, *state_shape(channels, taps)), math.nan, dtype=dtype, device=device)
        kept = torch.full((slots, DRAFTS, channels + 3), math.nan, device=device)
        self.cache, self.all = StateCache(states[:, 1], kept[:, :, :channels]), (states, kept)
        self.channels, self.dtype, self.device = channels, dtype, device

    def run(
        self, inputs: Inputs, rows: StateRows, positions: np.ndarray, *, silu: bool = True, single: bool = False
    ) -> np.ndarray:
        x, *gates = (self.columns(part, len(inputs)) for part in inputs)
        tables = {name: table.to(self.device, torch.int32) for name, table in tensors(rows).tables.items()}
        how = {"silu": silu, "gates": tuple(gates) or None}
        found = triton.short_conv(x, self.weight, self.bias, self.cache, StateRows(**tables, single=single), **how)
        assert found.is_contiguous()
        assert self.all[0][:, 0].isnan().all()
        assert self.all[1][:, :, self.channels :].isnan().all()
        return found.float().cpu().numpy()

    def columns(self, part: np.ndarray, beside: int) -> torch.Tensor:
        """An input between NaN, whose rows are farther from each other the more there are."""
        made = torch.full((len(part), self.channels + 8 + beside), math.nan, dtype=self.dtype, device=self.device)
        made[:, 5 : 5 + self.channels] = torch.from_numpy(part)
        return made[:, 5 : 5 + self.channels]

    def state(self, slot: int) -> np.ndarray:
        return self.cache.states[slot].float().cpu().numpy()


@pytest.mark.one_of_each
@pytest.mark.parametrize(("bias", "gated"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("channels", "taps", "length"),
    few([(37, 3, 2), (64, 4, 70), (16, 1, 3), (1, 4, 9), (1030, 2, 5)], (37, 3, 2), (64, 4, 70), (16, 1, 3)),
)
def test_a_text(
    device: torch.device, channels: int, taps: int, length: int, dtype: torch.dtype, bias: bool, gated: bool
) -> None:
    ours, theirs = (
        Kernel(device, channels, taps, length, dtype, bias=bias),
        Reference(channels, taps, length, dtype, bias=bias),
    )
    inputs = text(5, length, channels, gated=gated)
    found, wanted = (each.run(inputs, whole_rows(length), np.arange(length), silu=not bias) for each in (ours, theirs))
    assert error(found, wanted) < TOLERANCE[dtype]
    for token in range(length):
        assert np.array_equal(ours.state(token), theirs.state(token))


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize(("seed", "gated"), few([(0, False), (1, True), (2, False), (3, True)], (0, False), (1, True)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_cut(device: torch.device, dtype: torch.dtype, seed: int, gated: bool) -> None:
    given = [
        tuple(torch.from_numpy(x).to(dtype).float().numpy() for x in inputs)
        for inputs in texts(37, LENGTHS, gated=gated)
    ]
    wanted = []
    for inputs in given:
        whole, length = Reference(37, 4, len(inputs[0]), dtype), len(inputs[0])
        results = whole.run(inputs, whole_rows(length), np.arange(length))
        wanted.append((results, np.stack([whole.state(slot) for slot in range(length)])))

    def close(got: np.ndarray, wanted: np.ndarray) -> None:
        assert error(got, wanted) < TOLERANCE[dtype]

    made = Kernel(device, 37, 4, 20, dtype)
    Cuts(given, made.run, made.state, 16, wanted, close, same_bits, seed).all()


def test_a_decoding_step_has_the_bits_of_a_prompt(device: torch.device) -> None:
    """One launch and two; rows without a sequence, which captured steps have, write nothing."""
    given = texts(37, (20, 20, 20), gated=True)
    made, whole, wanted = Kernel(device, 37, 4, 4, torch.float32), Kernel(device, 37, 4, 20, torch.float32), []
    for number, inputs in enumerate(given):
        wanted.append(whole.run(inputs, whole_rows(20), np.arange(20)))
        rows = StateRows(
            query_start=np.array([0, 12]),
            slots=np.array([number]),
            sources=np.array([-1]),
            replays=np.array([0]),
            stores=np.array([-1] * 11 + [number]),
            keeps=np.full(12, -1),
        )
        assert np.array_equal(made.run(tuple(part[:12] for part in inputs), rows, np.arange(12)), wanted[-1][:12])
    for token in range(12, 20):
        drafted = token % 2  # of the second sequence: it is kept, and taken in by the next step
        rows = StateRows(
            query_start=np.arange(5),
            slots=np.array([0, 1, 2, 0]),
            sources=np.array([0, 1, 2, -1]),
            replays=np.array([0, int(token > 12 and not drafted), 0, 0]),
            stores=np.array([0, -1 if drafted else 1, 2, -1]),
            keeps=np.array([-1, 0 if drafted else -1, -1, -1]),
        )
        parts = ([*(part[token : token + 1] for part in of_all), random(0, 1, 37)] for of_all in zip(*given))
        found = made.run(tuple(map(np.concatenate, parts)), rows, np.full(4, token), single=True)
        assert np.array_equal(found[:3], np.stack([each[token] for each in wanted]))
    assert np.isnan(made.state(3)).all()
