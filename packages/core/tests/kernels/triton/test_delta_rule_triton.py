# SPDX-License-Identifier: MIT
"""The gated delta rule by Triton, against the reference: tokens one by one, whole chunks, and texts cut into steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.delta_rule import triton
from candle_vllm.core.kernels.delta_rule.layout import DeltaGates
from candle_vllm.core.kernels.delta_rule.triton_chunks import in_chunks
from candle_vllm.core.kernels.states import StateCache, StateRows
from packages.core.tests.kernels.state_steps import DRAFTS, Cuts, Inputs, error, tensors, whole_rows
from packages.core.tests.kernels.test_delta_rule import Reference, Sizes, on_torch
from tests.common_run import few

# NumPy, in which Triton's interpreter computes, warns where the kernels mean to get 0 or infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
SMALL, ODD, EVEN = Sizes(1, 2, 8, 8), Sizes(2, 4, 19, 37), Sizes(1, 2, 32, 32)
BOUNDED = Sizes(2, 2, 19, 37, channels=True, least=-5.0)
KIMI, MAMBA = Sizes(2, 2, 19, 37, channels=True), Sizes(1, 1, 16, 37, elements=True)


class Kernel:
    """The kernels, with states and kept rows between NaN."""

    def __init__(
        self,
        device: torch.device,
        sizes: Sizes,
        slots: int,
        dtype: torch.dtype = torch.float32,
        *,
        normed: bool = True,
        strength: float = 1.0,
        chunks: bool = False,
        drafts: int = DRAFTS,
    ) -> None:
        gates = on_torch(sizes.gates(strength))
        self.gates = DeltaGates(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in gates))
        states = torch.full((slots, 2, *sizes.state), math.nan, device=device)
        kept = torch.full((slots, drafts, sizes.inputs + 3), math.nan, device=device)
        self.cache, self.all = StateCache(states[:, 1], kept[:, :, : sizes.inputs]), (states, kept)
        self.sizes, self.dtype, self.device, self.normed, self.chunks = sizes, dtype, device, normed, chunks
        self.chunked = 0  # steps

    def run(self, inputs: Inputs, rows: StateRows, positions: np.ndarray) -> np.ndarray:
        given = []
        for part in inputs:  # strides of their own
            wide = torch.full((*part.shape[:-1], part.shape[-1] + 3), math.nan, dtype=self.dtype, device=self.device)
            wide[..., :-3] = torch.from_numpy(part)
            given.append(wide[..., :-3])
        tables = StateRows(**{name: x.to(self.device, torch.int32) for name, x in tensors(rows).tables.items()})
        if self.chunks:
            tables = tables._replace(positions=torch.from_numpy(positions).to(self.device, torch.int32))
        normed = self.normed and not self.sizes.elements
        self.chunked += in_chunks(given[0], tables.positions, normed=normed)
        found = triton.delta_rule(
            given,
            self.gates,
            self.cache,
            tables,
            scale=self.sizes.scale,
            normed=normed,
        )
        assert self.all[0][:, 0].isnan().all()
        assert self.all[1][:, :, self.sizes.inputs :].isnan().all()
        return found.float().cpu().numpy()

    def state(self, slot: int) -> np.ndarray:
        return self.cache.states[slot].cpu().numpy()


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", full)


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("strength", [1.0, 2.0, 0.0])
@pytest.mark.parametrize("sizes", [ODD, EVEN, KIMI, BOUNDED, MAMBA, Sizes(1, 1, 1, 1), Sizes(1, 1, 100, 17)], ids=str)
def test_a_text(device: torch.device, sizes: Sizes, strength: float, normed: bool, dtype: torch.dtype) -> None:
    strength = 0.0 if sizes.elements else strength
    sizes = sizes._replace(channels=sizes.channels and strength > 0)
    ours, theirs = (
        make(sizes, 12, dtype, normed=normed, strength=strength)
        for make in (lambda *given, **more: Kernel(device, *given, **more), Reference)
    )
    inputs = sizes.text(12, 3)
    if not normed:
        inputs = (*(x / sizes.key_dim**0.5 for x in inputs[:2]), *inputs[2:])
    found, wanted = (each.run(inputs, whole_rows(12), np.arange(12)) for each in (ours, theirs))
    assert error(found, wanted) < TOLERANCE[dtype]
    states = (np.stack([each.state(token) for token in range(12)]) for each in (ours, theirs))
    assert error(*states) < 1e-5  # of the same numbers, rounded to 16 bits


def closeness(dtype: torch.dtype) -> Callable[[np.ndarray, np.ndarray], None]:
    def close(got: np.ndarray, wanted: np.ndarray) -> None:
        assert error(got, wanted) < TOLERANCE[dtype]

    return close


def wholes(
    sizes: Sizes, texts: list[Inputs], dtype: torch.dtype, strength: float = 1.0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the reference makes of each text."""
    found = []
    for text in texts:
        length = len(text[0])
        whole = Reference(sizes, length, dtype, strength=strength)
        results = whole.run(text, whole_rows(length), np.arange(length))
        found.append((results, np.stack([whole.state(slot) for slot in range(length)])))
    return found


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("seed", few(range(4), 0))
@pytest.mark.parametrize(
    ("sizes", "strength"),
    [
        (SMALL, 1.0),
        (SMALL, 0.0),
        (SMALL._replace(channels=True), 1.0),
        (SMALL._replace(channels=True, least=-5.0), 1.0),
        (Sizes(1, 1, 4, 19, elements=True), 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], torch.bfloat16))
def test_texts_are_cut(device: torch.device, dtype: torch.dtype, sizes: Sizes, strength: float, seed: int) -> None:
    texts = [sizes.text(length, 20 + number) for number, length in enumerate((23, 30, 9))]
    wanted, made = wholes(sizes, texts, dtype, strength), Kernel(device, sizes, 19, dtype, strength=strength)
    Cuts(texts, made.run, made.state, 16, wanted, closeness(dtype), closeness(torch.float32), seed).all()


# ---- chunks ----------------------------------------------------------------------------------------------------------


def one_step(lengths: tuple[int, ...], firsts: tuple[int, ...]) -> tuple[StateRows, np.ndarray]:
    """Texts that go on from `firsts` tokens, which slots of their own hold; each stores its state."""
    ends = np.cumsum([0, *lengths])
    stores, keeps = np.full((2, ends[-1]), -1)
    stores[ends[1:] - 1] = np.arange(len(lengths))
    rows = StateRows(
        query_start=ends,
        slots=np.arange(len(lengths)),
        sources=np.array([-1 if first == 0 else number for number, first in enumerate(firsts)]),
        replays=np.zeros(len(lengths), np.int64),
        stores=stores,
        keeps=keeps,
    )
    positions = [np.arange(first, first + length) for first, length in zip(firsts, lengths)]
    return rows, np.concatenate(positions)


def check_step(
    device: torch.device,
    sizes: Sizes,
    lengths: tuple[int, ...],
    firsts: tuple[int, ...],
    dtype: torch.dtype,
    *,
    change: Callable[[StateRows], None] = lambda rows: None,
    likeness: float = 0.0,
    strength: float = 1.0,
    normed: bool = True,
) -> Kernel:
    """A step with chunks against the reference; keys are the more alike, the greater `likeness` is."""
    texts = [sizes.text(first + length, 5 + n) for n, (first, length) in enumerate(zip(firsts, lengths))]
    texts = [(q, k + likeness, *rest) for q, k, *rest in texts]
    more = 3
    how: dict[str, Any] = {"strength": strength, "normed": normed}
    ours = Kernel(device, sizes, len(texts) + more, dtype, chunks=True, **how)
    theirs = Reference(sizes, len(texts) + more, dtype, **how)
    for number, (text, first) in enumerate(zip(texts, firsts)):
        if first:
            rows = StateRows(*(np.array(x) for x in ([0, first], [number], [-1], [0])), *np.full((2, first), -1))
            rows.stores[-1] = number
            theirs.run(tuple(part[:first] for part in text), rows, np.arange(first))
            ours.cache.states[number] = theirs.cache.states[number].to(device)
    rows, positions = one_step(lengths, firsts)
    change(rows)
    inputs = tuple(np.concatenate([part[-length:] for part, length in zip(parts, lengths)]) for parts in zip(*texts))
    found, wanted = (each.run(inputs, rows, positions) for each in (ours, theirs))
    assert ours.chunked == 1
    assert error(found, wanted) < TOLERANCE[dtype]
    for slot in range(len(texts) + more):
        if slot in rows.stores:
            assert error(ours.state(slot), theirs.state(slot)) < 1e-5
        else:
            assert np.isnan(ours.state(slot)).all()
    return ours


# Lengths, and tokens before them: whole chunks, ends and beginnings of others, sequences too short for any, and one
# token. Few tokens are outside of whole chunks: each of them is interpreted by itself, for every head.
PARTS = (70, 73, 9, 1, 14), (0, 60, 50, 64, 120)


@pytest.mark.parametrize("dtype", few([torch.bfloat16, torch.float16], torch.bfloat16))
def test_prompts_in_chunks(device: torch.device, dtype: torch.dtype) -> None:
    check_step(device, Sizes(1, 2, 19, 21), *PARTS, dtype)


@pytest.mark.parametrize(
    "sizes", few([(KIMI,), (BOUNDED,), (Sizes(2, 2, 128, 32, channels=True),)], (KIMI,), (BOUNDED,)), ids=str
)
@pytest.mark.parametrize("likeness", few([0.0, 3.0], 3.0))
def test_kimi_delta_attention_in_chunks(device: torch.device, sizes: Sizes, likeness: float) -> None:
    """Each row of its state has its own decay."""
    check_step(device, sizes, *PARTS, torch.bfloat16, likeness=likeness)


@pytest.mark.parametrize("sizes", few([(EVEN,), (Sizes(2, 4, 16, 21),), (Sizes(1, 2, 128, 80),)], (EVEN,)), ids=str)
def test_mamba_2_in_chunks(device: torch.device, sizes: Sizes) -> None:
    """Its chunks have no inverse; D times the values is added."""
    check_step(device, sizes, *PARTS, torch.bfloat16, strength=0.0, normed=False)


@pytest.mark.parametrize("sizes", few([(EVEN,), (Sizes(1, 3, 5, 3),), (Sizes(1, 1, 128, 128),)], (EVEN,)), ids=str)
def test_sizes_of_chunks(device: torch.device, sizes: Sizes) -> None:
    check_step(device, sizes, (64, 65), (0, 128), torch.bfloat16)


def test_keys_that_are_alike(device: torch.device) -> None:
    """Where an inverse made of powers would be of numbers far too large."""
    check_step(device, EVEN, (64, 128), (0, 64), torch.bfloat16, likeness=3.0)


def test_a_checkpoint_or_a_draft_within_a_chunk(device: torch.device) -> None:
    """Such a chunk is scanned, and what is asked for is there; one at its end is stored behind the chunk."""

    def change(rows: StateRows) -> None:
        rows.stores[10], rows.stores[127] = 2, 3
        rows.keeps[200] = 1

    made = check_step(device, EVEN, (192, 64), (0, 64), torch.bfloat16, change=change)
    assert not made.cache.kept[1, 1].isnan().any()
    assert made.cache.kept[0].isnan().all()


def test_neighbours_that_look_like_one_text(device: torch.device) -> None:
    """A sequence's rows up to position 31, then another one's from 32 on: no chunk."""
    check_step(device, EVEN, (32, 40, 64), (0, 32, 64), torch.bfloat16)


@pytest.mark.parametrize("seed", few(range(3), 0))
def test_texts_are_cut_into_chunks(device: torch.device, seed: int) -> None:
    dtype, texts = torch.bfloat16, [SMALL.text(length, 20 + number) for number, length in enumerate((200, 150))]
    wanted, made = wholes(SMALL, texts, dtype), Kernel(device, SMALL, 18, dtype, chunks=True)
    Cuts(
        texts, made.run, made.state, 16, wanted, closeness(dtype), closeness(torch.float32), seed, most=7, grain=16
    ).all()
    assert made.chunked


def test_what_is_not_chunked(device: torch.device) -> None:
    """Short steps, steps whose positions nobody says, and numbers of 32 bits."""
    q, positions = torch.empty((64, 1, 8), dtype=torch.bfloat16, device=device), torch.arange(64, device=device)
    assert in_chunks(q, positions)
    assert not in_chunks(q[:63], positions[:63])
    assert not in_chunks(q, None)
    assert not in_chunks(q.float(), positions)
    assert in_chunks(q.half(), positions)
    assert in_chunks(q, positions, normed=False)
    assert not in_chunks(q.half(), positions, normed=False)
