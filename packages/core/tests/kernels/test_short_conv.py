# SPDX-License-Identifier: MIT
"""The convolution with a state: transformers', plain torch's and the CPU's, and the same bits however texts are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.short_conv import reference, short_conv, state_shape
from candle_vllm.core.kernels.states import StateCache, StateRows
from packages.core.tests.kernels.state_steps import (
    DRAFTS,
    Compiled,
    Cuts,
    Inputs,
    close_to,
    error,
    random,
    same_bits,
    tensors,
    whole_rows,
)

TAPS, CHANNELS = 4, 37


class Reference:
    """The kernel in plain torch, with states of its own."""

    def __init__(
        self, channels: int, taps: int, slots: int, dtype: torch.dtype = torch.float32, *, bias: bool = True
    ) -> None:
        self.weight, self.bias = random(1, channels, taps), random(2, channels) if bias else None
        states = torch.full((slots, *state_shape(channels, taps)), torch.nan, dtype=dtype)
        self.cache, self.dtype = StateCache(states, torch.full((slots, DRAFTS, channels), torch.nan)), dtype

    def run(self, inputs: Inputs, rows: StateRows, positions: np.ndarray, *, silu: bool = True) -> np.ndarray:
        weights = [None if x is None else torch.from_numpy(x).to(self.dtype) for x in (self.weight, self.bias)]
        x, *gates = (torch.from_numpy(part).to(self.dtype) for part in inputs)
        how = {"silu": silu, "gates": tuple(gates) or None}
        return reference.short_conv(x, *weights, self.cache, tensors(rows), **how).float().numpy()

    def state(self, slot: int) -> np.ndarray:
        return self.cache.states[slot].float().numpy()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("taps", "length"), [(4, 30), (3, 2), (2, 7), (1, 5), (4, 1)])
def test_the_reference_is_transformers(taps: int, length: int, bias: bool, silu: bool, gated: bool) -> None:
    transformers = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    made, inputs = Reference(CHANNELS, taps, length, bias=bias), text(3, length, CHANNELS, gated=gated)
    found = made.run(inputs, whole_rows(length), np.arange(length), silu=silu)
    x = inputs[0] * inputs[1] if gated else inputs[0]
    whole, weight, added = torch.from_numpy(x).T[None], torch.from_numpy(made.weight), made.bias
    wanted = transformers.causal_conv1d_fn(
        whole, weight, None if added is None else torch.from_numpy(added), activation="silu" if silu else None
    )
    assert error(found, wanted[0].T.numpy() * (inputs[2] if gated else 1)) < 1e-6
    before = np.concatenate([np.zeros((taps - 1, CHANNELS), np.float32), x])
    for token in range(length):
        assert np.array_equal(made.state(token), before[token + 1 : token + taps])


def text(seed: int, length: int, channels: int, *, gated: bool = False) -> Inputs:
    """x, and its gates."""
    return tuple(random(seed + part, length, channels) for part in range(0, 300 if gated else 100, 100))


def compiled(channels: int, taps: int, slots: int, threads: int, *, bias: bool = True, gated: bool = False) -> Compiled:
    """The recorded operation."""
    pytest.importorskip("numba")
    weight, added = random(1, channels, taps), random(2, channels) if bias else None

    def make(given: list[Any], cache: StateCache) -> Any:
        x, *gates = given
        return short_conv(x, weight, added, cache, None, silu=True, gates=tuple(gates) or None)

    return Compiled([channels] * (3 if gated else 1), make, state_shape(channels, taps), channels, slots, threads)


@pytest.fixture
def close() -> Iterator[list[Any]]:
    made: list[Any] = []
    yield made
    for each in made:
        each.team.close()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("channels", "taps", "length"), [(1, 4, 9), (37, 3, 2), (64, 4, 70), (4099, 2, 5), (16, 1, 3)])
def test_the_operation_is_the_reference(
    close: list[Any], channels: int, taps: int, length: int, bias: bool, gated: bool
) -> None:
    ours = compiled(channels, taps, length, 2, bias=bias, gated=gated)
    theirs, inputs = Reference(channels, taps, length, bias=bias), text(5, length, channels, gated=gated)
    close.append(ours)
    found, wanted = (each.run(inputs, whole_rows(length), np.arange(length)) for each in (ours, theirs))
    assert error(found, wanted) < 1e-6
    for token in range(length):
        assert np.array_equal(ours.state(token), theirs.state(token))


def texts(channels: int, lengths: tuple[int, ...], *, gated: bool = False) -> list[Inputs]:
    return [text(10 + number, length, channels, gated=gated) for number, length in enumerate(lengths)]


LENGTHS = (33, 50, 9, 41)


@pytest.mark.parametrize(("seed", "gated"), [(0, False), (1, False), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_does_not_depend_on_how_texts_are_cut(dtype: torch.dtype, seed: int, gated: bool) -> None:
    given = [
        tuple(torch.from_numpy(x).to(dtype).float().numpy() for x in inputs)
        for inputs in texts(CHANNELS, LENGTHS, gated=gated)
    ]
    made, wanted = Reference(CHANNELS, TAPS, 20, dtype), []
    for inputs in given:
        whole, length = Reference(CHANNELS, TAPS, len(inputs[0]), dtype), len(inputs[0])
        results = whole.run(inputs, whole_rows(length), np.arange(length))
        wanted.append((results, np.stack([whole.state(slot) for slot in range(length)])))
    Cuts(given, made.run, made.state, 16, wanted, close_to, same_bits, seed).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("channels", "taps", "gated"), [(37, 4, False), (80, 3, True), (2070, 2, False)])
def test_the_operation_has_the_same_bits_however_texts_are_cut(
    close: list[Any], channels: int, taps: int, gated: bool, seed: int
) -> None:
    given, wanted = texts(channels, LENGTHS, gated=gated), []
    for inputs in given:
        whole, length = compiled(channels, taps, len(inputs[0]), 1, gated=gated), len(inputs[0])
        close.append(whole)
        results = whole.run(inputs, whole_rows(length), np.arange(length)).copy()
        wanted.append((results, whole.cache.states.copy()))
    made = compiled(channels, taps, 20, 1 + seed % 3, gated=gated)
    close.append(made)
    Cuts(given, made.run, made.state, 16, wanted, same_bits, same_bits, seed).all()
