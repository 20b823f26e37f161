# SPDX-License-Identifier: MIT
"""The gated delta rule and Mamba: transformers', plain torch's and the CPU's; the same bits however texts are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.delta_rule import delta_rule, reference
from candle_vllm.core.kernels.delta_rule.layout import DeltaGates, kept_inputs, state_shape
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


class Sizes(NamedTuple):
    """Of a layer: Hk, Hv, Dk, Dv; whether channels decay by themselves, as in Kimi delta attention; or elements.

    `least` is the lower bound of the logs of channels' decays.
    """

    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    channels: bool = False
    elements: bool = False
    least: float = 0.0

    @property
    def state(self) -> tuple[int, ...]:
        return state_shape(self.heads, self.key_dim, self.value_dim)

    @property
    def inputs(self) -> int:
        each = self.value_dim if self.elements else 1 + self.key_dim if self.channels else 2
        return kept_inputs(*self[:4], gates=each)

    @property
    def decays(self) -> int:
        return self.heads * (self.key_dim if self.channels else self.value_dim if self.elements else 1)

    @property
    def strengths(self) -> int:
        return self.heads * (self.value_dim if self.elements else 1)

    @property
    def scale(self) -> float:
        return 1.0 if self.elements else self.key_dim**-0.5

    def gates(self, strength: float = 1.0) -> DeltaGates:
        """Gates of the delta rule, or, where the strength is 0, of Mamba 2, or, of elements, Mamba 1."""
        decays = self.state if self.elements else (self.decays,)
        decay = -np.random.default_rng(7).uniform(0.01, 16, decays).astype(np.float32)
        skip = None if strength else random(9, self.strengths)
        return DeltaGates(decay, random(8, self.decays), strength, skip, self.least if self.channels else 0.0)

    def text(self, length: int, seed: int = 0) -> Inputs:
        """Inputs whose gates are anything from shut to open."""
        shapes = [(self.key_heads, self.key_dim)] * 2 + [
            (self.heads, self.value_dim),
            (self.decays,),
            (self.strengths,),
        ]
        q, k, v, a, b = (random(10 * seed + place, length, *shape) for place, shape in enumerate(shapes))
        return q, k, v, 4 * a - 4, 3 * b


ODD, EVEN = Sizes(2, 6, 19, 21), Sizes(2, 4, 32, 64)
KIMI, SHARED = Sizes(3, 3, 20, 33, channels=True), Sizes(2, 4, 19, 21, channels=True)
BOUNDED = KIMI._replace(least=-5.0)
MAMBA, MAMBAS = Sizes(1, 1, 18, 83, elements=True), Sizes(2, 4, 5, 21, elements=True)
LENGTHS = (33, 50, 9, 41)


def on_torch(gates: DeltaGates) -> DeltaGates:
    """The gates as tensors."""
    decay, bias, skip = (None if x is None else torch.from_numpy(x) for x in (gates.decay, gates.bias, gates.skip))
    return DeltaGates(decay, bias, gates.strength, skip, gates.least)


class Reference:
    """The kernel in plain torch, with states of its own."""

    def __init__(
        self,
        sizes: Sizes,
        slots: int,
        dtype: torch.dtype = torch.float32,
        *,
        normed: bool = True,
        strength: float = 1.0,
    ) -> None:
        self.gates = on_torch(sizes.gates(strength))
        states = torch.full((slots, *sizes.state), torch.nan)
        self.cache = StateCache(states, torch.full((slots, DRAFTS, sizes.inputs), torch.nan))
        self.sizes, self.dtype, self.normed = sizes, dtype, normed

    def run(self, inputs: Inputs, rows: StateRows, positions: np.ndarray) -> np.ndarray:
        given = [torch.from_numpy(x).to(self.dtype) for x in inputs]
        how = {"scale": self.sizes.scale, "normed": self.normed and not self.sizes.elements}
        made = reference.delta_rule(given, self.gates, self.cache, tensors(rows), **how)
        return made.float().numpy()

    def state(self, slot: int) -> np.ndarray:
        return self.cache.states[slot].numpy()


@pytest.mark.parametrize("strength", [1.0, 2.0])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("sizes", "length"), [(ODD, 70), (EVEN, 130), (ODD, 1)], ids=str)
def test_the_reference_is_transformers(sizes: Sizes, length: int, normed: bool, strength: float) -> None:
    transformers = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    inputs = sizes.text(length)
    if not normed:  # or states grow without end
        inputs = (*(x / sizes.key_dim**0.5 for x in inputs[:2]), *inputs[2:])
    ours = Reference(sizes, length, normed=normed, strength=strength)
    found = ours.run(inputs, whole_rows(length), np.arange(length))
    q, k, v, a, b = (torch.from_numpy(x)[None] for x in inputs)
    decay = ours.gates.decay * torch.nn.functional.softplus(a + ours.gates.bias)
    for wanted in (transformers.torch_recurrent_gated_delta_rule, transformers.torch_chunk_gated_delta_rule):
        results, state = wanted(
            q,
            k,
            v,
            g=decay,
            beta=strength * b.sigmoid(),
            initial_state=torch.zeros(1, sizes.heads, sizes.key_dim, sizes.value_dim),
            output_final_state=True,
            use_qk_l2norm_in_kernel=normed,
        )
        assert error(found, results[0].numpy()) < 1e-5
        last = reference.from_tiles(ours.cache.states[length - 1], sizes.value_dim)
        assert error(last.numpy(), state[0].numpy()) < 1e-5


@pytest.mark.parametrize(("sizes", "length"), [(ODD, 70), (EVEN, 130), (ODD, 1)], ids=str)
def test_the_reference_is_mamba_2_of_transformers(sizes: Sizes, length: int) -> None:
    transformers = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    inputs = sizes.text(length)
    ours = Reference(sizes, length, normed=False, strength=0.0)
    found = ours.run(inputs, whole_rows(length), np.arange(length))
    q, k, v, a, _ = (torch.from_numpy(x)[None] for x in inputs)
    wanted, state = transformers.mamba2_chunk_scan(
        v,
        a,
        ours.gates.decay,
        k,
        q * sizes.key_dim**-0.5,
        chunk_size=32,
        D=ours.gates.skip,
        dt_bias=ours.gates.bias,
        dt_softplus=True,
        return_final_states=True,
    )
    assert error(found, wanted[0].numpy()) < 1e-5
    last = reference.from_tiles(ours.cache.states[length - 1], sizes.value_dim)
    assert error(last.numpy(), state[0].transpose(1, 2).numpy()) < 1e-5


@pytest.mark.parametrize("length", [70, 1])
def test_the_reference_is_mamba_1_of_transformers(length: int) -> None:
    transformers = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    inputs, ours = MAMBA.text(length), Reference(MAMBA, length, strength=0.0)
    found = ours.run(inputs, whole_rows(length), np.arange(length))
    q, k, v, a, _ = (torch.from_numpy(x.reshape(length, -1).T.copy())[None] for x in inputs)
    decay = reference.from_tiles(ours.gates.decay, MAMBA.value_dim)[0].T
    more = {"delta_bias": ours.gates.bias, "delta_softplus": True, "return_last_state": True}
    wanted, state = transformers.mamba_selective_scan(v, a, decay, k, q, ours.gates.skip, **more)
    assert error(found[:, 0], wanted[0].T.numpy()) < 1e-5
    last = reference.from_tiles(ours.cache.states[length - 1], MAMBA.value_dim)
    assert error(last[0].numpy(), state[0].T.numpy()) < 1e-5


@pytest.mark.parametrize("sizes", [KIMI, BOUNDED], ids=str)
@pytest.mark.parametrize("length", [70, 130, 1])
def test_the_reference_is_kimi_delta_attention_of_transformers(length: int, sizes: Sizes) -> None:
    transformers = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    inputs, ours = sizes.text(length), Reference(sizes, length)
    found = ours.run(inputs, whole_rows(length), np.arange(length))
    q, k, v, a, b = (torch.from_numpy(x)[None] for x in inputs)
    decay = ours.gates.decay * torch.nn.functional.softplus(a + ours.gates.bias)
    if sizes.least:
        decay = sizes.least * torch.sigmoid(-ours.gates.decay * (a + ours.gates.bias))
    for wanted in (transformers.recurrent_kimi_delta_attention, transformers.chunk_kimi_delta_attention):
        results, state = wanted(
            q,
            k,
            v,
            g=decay.unflatten(-1, (KIMI.heads, -1)),
            beta=b.sigmoid(),
            initial_state=None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        assert error(found, results[0].numpy()) < 1e-5
        last = reference.from_tiles(ours.cache.states[length - 1], KIMI.value_dim)
        assert error(last.numpy(), state[0].numpy()) < 1e-5


def compiled(
    sizes: Sizes,
    slots: int,
    threads: int,
    *,
    normed: bool = True,
    drafts: int = DRAFTS,
    strength: float = 1.0,
    tokens: int = 80,
) -> Compiled:
    """The recorded operations."""
    pytest.importorskip("numba")
    key_heads, heads, key_dim, value_dim = sizes[:4]

    def make(given: list[Any], cache: StateCache) -> Any:
        dims = (key_dim, key_dim, value_dim)
        parts = [x.unflatten(-1, (-1, dim)) for x, dim in zip(given, dims)]
        how = {"scale": sizes.scale, "normed": normed and not sizes.elements}
        return delta_rule(*parts, *given[3:], sizes.gates(strength), cache, None, **how)

    widths = [key_heads * key_dim] * 2 + [heads * value_dim, sizes.decays, sizes.strengths]
    return Compiled(widths, make, sizes.state, sizes.inputs, slots, threads, drafts=drafts, tokens=tokens)


@pytest.fixture
def close() -> Iterator[list[Compiled]]:
    made: list[Compiled] = []
    yield made
    for each in made:
        each.team.close()


@pytest.mark.parametrize("strength", [1.0, 2.0, 0.0])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        (ODD, 70),
        (EVEN, 33),
        (KIMI, 40),
        (SHARED, 9),
        (BOUNDED, 9),
        (MAMBA, 40),
        (MAMBAS, 9),
        (Sizes(1, 1, 1, 1), 5),
        (Sizes(3, 3, 128, 128), 9),
        (Sizes(1, 20, 66, 33), 3),
    ],
    ids=str,
)
def test_the_operations_are_the_reference(
    close: list[Compiled], sizes: Sizes, length: int, normed: bool, strength: float
) -> None:
    strength = 0.0 if sizes.elements else strength
    sizes = sizes._replace(channels=sizes.channels and strength > 0)
    ours = compiled(sizes, length, 2, normed=normed, drafts=0, strength=strength)
    theirs = Reference(sizes, length, normed=normed, strength=strength)
    close.append(ours)
    inputs = sizes.text(length, 3)
    if not normed:
        inputs = (*(x / sizes.key_dim**0.5 for x in inputs[:2]), *inputs[2:])
    found, wanted = (each.run(inputs, whole_rows(length), np.arange(length)) for each in (ours, theirs))
    assert error(found, wanted.reshape(found.shape)) < 2e-6
    for token in range(length):
        assert error(ours.state(token), theirs.state(token)) < 2e-6
        filled = np.swapaxes(ours.state(token), 1, 2).reshape(sizes.heads, sizes.key_dim, -1)
        assert (filled[..., sizes.value_dim :] == 0).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("dtype", "sizes", "strength"),
    [(torch.float32, ODD, 1.0), (torch.bfloat16, ODD, 1.0), (torch.float32, ODD, 0.0), (torch.float32, MAMBA, 0.0)],
)
def test_the_reference_does_not_depend_on_how_texts_are_cut(
    dtype: torch.dtype, sizes: Sizes, strength: float, seed: int
) -> None:
    given = [sizes.text(length, 20 + number) for number, length in enumerate(LENGTHS)]
    made, wanted = Reference(sizes, 20, dtype, strength=strength), []
    for text in given:
        whole = Reference(sizes, len(text[0]), dtype, strength=strength)
        results = whole.run(text, whole_rows(len(text[0])), np.arange(len(text[0])))
        wanted.append((results, np.stack([whole.state(slot) for slot in range(len(text[0]))])))
    check = (
        close_to
        if dtype is torch.float32
        else lambda got, wanted: np.testing.assert_array_less(error(got, wanted), 1e-3)
    )
    Cuts(given, made.run, made.state, 16, wanted, check, check, seed).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("sizes", "strength"),
    [(ODD, 1.0), (EVEN, 1.0), (Sizes(4, 4, 5, 48), 1.0), (ODD, 0.0), (EVEN, 0.0), (KIMI, 1.0), (MAMBA, 0.0)],
    ids=str,
)
def test_the_operations_have_the_same_bits_however_texts_are_cut(
    close: list[Compiled], sizes: Sizes, strength: float, seed: int
) -> None:
    given, wanted = [sizes.text(length, 20 + number) for number, length in enumerate(LENGTHS)], []
    for text in given:
        whole = compiled(sizes, len(text[0]), 1, strength=strength)
        close.append(whole)
        results = whole.run(text, whole_rows(len(text[0])), np.arange(len(text[0]))).copy()
        wanted.append((results, whole.cache.states.copy()))
    made = compiled(sizes, 20, 1 + seed % 3, strength=strength)
    close.append(made)
    Cuts(given, made.run, made.state, 16, wanted, same_bits, same_bits, seed).all()


@pytest.mark.parametrize(("sizes", "strength"), [(ODD, 1.0), (MAMBA, 0.0)], ids=str)
def test_numbers_that_are_not_finite_stay_in_their_text(close: list[Compiled], sizes: Sizes, strength: float) -> None:
    inputs, found = sizes.text(12), []
    rows = StateRows(*(np.array(x) for x in ([0, 4, 8, 12], [0, 1, 2], [-1] * 3, [0] * 3, range(12), [-1] * 12)))
    for part in range(4 if sizes.elements else 5):
        spoilt = [x.copy() for x in inputs]
        spoilt[part][4] = np.nan
        made = compiled(sizes, 12, 2, strength=strength)
        close.append(made)
        found.append(made.run(tuple(spoilt), rows, np.arange(12)).copy())
        assert np.isfinite(found[-1][[0, 1, 2, 3, 8, 9, 10, 11]]).all()
        assert np.isnan(found[-1][4]).all()
        assert np.array_equal(np.isnan(made.state(7)).any(), part != 0)
    assert all(np.array_equal(each[8:], found[0][8:]) for each in found)


@pytest.mark.parametrize("value", [-200.0, -30.0, 0.0, 19.0, 21.0, 90.0, 1e30])
def test_gates_of_any_size(close: list[Compiled], value: float) -> None:
    inputs = (*EVEN.text(3)[:3], *(np.full((3, EVEN.heads), value, np.float32) for _ in range(2)))
    ours, theirs = compiled(EVEN, 3, 1), Reference(EVEN, 3)
    close.append(ours)
    found, wanted = (each.run(inputs, whole_rows(3), np.arange(3)) for each in (ours, theirs))
    np.testing.assert_allclose(found, wanted.reshape(found.shape), rtol=1e-5, atol=1e-6)
