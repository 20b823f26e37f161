# SPDX-License-Identifier: MIT
"""The compiled functions against the reference in torch: cuts, ties, standing, edits, and the way without Numba."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.sampling import reference
from candle_vllm.core.sampling.device_edits import apply_in_torch
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.processors import apply_processors
from candle_vllm.core.sampling.sampler import SampledToken, Sampler
from candle_vllm.core.sampling.state import SamplingState

pytest.importorskip("numba")
INF = math.inf


def noise(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def table(rows: int, temperature: float, min_p: float, top_k: int, top_p: float) -> np.ndarray:
    """Numbers spread evenly from one edge to the other, and not on the edges between equal weights."""
    controls = np.tile(np.array([temperature, min_p, top_k, top_p, 0.0]), (rows, 1))
    controls[:, 4] = (np.arange(rows) + 0.46371) / rows
    return controls


def supports(row: torch.Tensor, controls: list[float], module: Any, draws: int = 400) -> set[int]:
    """The ids that can be drawn from one row, by an even grid of random numbers."""
    logits = row.expand(draws, -1).contiguous()
    return set(module.draw(logits, table(draws, *controls))[0].tolist())  # type: ignore[arg-type]


ROWS = 16
LOGITS = {
    "flat": lambda v: noise(ROWS, v, 1, 0.01),
    "usual": lambda v: noise(ROWS, v, 2),
    "ties": lambda v: noise(ROWS, v, 3).bfloat16().float(),
    "equal": lambda v: torch.full((ROWS, v), -7.25),
    "two values": lambda v: (noise(ROWS, v, 4) > 0).float() * 1e-3 + 5,
    "an abyss": lambda v: torch.where(noise(ROWS, v, 5) > -2, noise(ROWS, v, 6), torch.tensor(-3e38)),
    "mostly masked": lambda v: torch.where(noise(ROWS, v, 7) > 5, noise(ROWS, v, 6), torch.tensor(-INF)),
    "wide": lambda v: noise(ROWS, v, 8, 1e30),
    "denormal": lambda v: noise(ROWS, v, 9, 1e-42),
}


# Not the denormals: as float64 weights they are all equal, as logits they are not.
@pytest.mark.parametrize("kind", sorted(LOGITS.keys() - {"denormal"}))
@pytest.mark.parametrize("vocabulary", [1, 15, 512, 3001])
def test_draws_equal_the_references(kind: str, vocabulary: int) -> None:
    logits = LOGITS[kind](vocabulary)
    logits[:, 0] = logits[:, 0].clamp(min=-30)  # a token to choose
    drawn = wrong = 0
    # Uneven shares keep clear of limits that equal weights just reach: float32 may see them on the other side.
    for temperature in (0.0, 0.7, 30.0):
        for min_p, top_k, top_p in [
            (0.0, 0, 1.0),
            (0.0, 7, 1.0),
            (0.0, 700, 0.97031),
            (0.0, 0, 0.61093),
            (0.0, 0, 0.99873),
            (0.3, 0, 0.90317),
            (1.0, 0, 1.0),
            (0.02, 30, 0.51713),
        ]:
            controls = table(ROWS, temperature, min_p, top_k if top_k < vocabulary else 0, top_p)
            (ids, largest), (expected, peaks) = kernels.draw(logits, controls), reference.draw(logits, controls)
            assert largest.tolist() == peaks.tolist()
            drawn, wrong = drawn + ROWS, wrong + int((ids != expected).sum())
    assert wrong <= drawn // 200  # a random number on the very edge of two tokens


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(st.integers(-12, 12), min_size=1, max_size=300),
    st.integers(0, 400),
    st.sampled_from([1.0, 0.90317, 0.51713, 0.1391]),
)
def test_the_tokens_that_are_kept_are_exactly_the_references(values: list[int], top_k: int, top_p: float) -> None:
    row = torch.tensor([values]) / 8
    controls = [2.0, 0.0, top_k if top_k < len(values) else 0, top_p]
    assert supports(row, controls, kernels) == supports(row, controls, reference)  # type: ignore[arg-type]


def test_ties_at_the_cut_of_top_p_keep_the_lower_ids() -> None:
    row = torch.full((1, 5000), -50.0)
    row[0, 100:4900] = 0.0
    # 4,800 equal weights: half of the mass is the first 2,400 of them.
    ids = kernels.draw(row.expand(900, -1).contiguous(), table(900, 1.0, 0.0, 0, 0.5))[0]
    assert (ids.min(), ids.max()) == (101, 2498)
    assert (np.diff(ids) >= 0).all()


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 49, 600, 4096])
def test_top_k_of_distinct_logits_keeps_k(k: int) -> None:
    row = torch.arange(4097, dtype=torch.float32)[torch.randperm(4097, generator=torch.Generator().manual_seed(k))]
    ids = kernels.draw(row.expand(9000, -1).contiguous(), table(9000, 1e6, 0.0, k, 1.0))[0]
    assert set(row[ids].tolist()) == set(range(4097 - k, 4097))


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
@pytest.mark.parametrize("place", [0, 511, 512, 1030])
def test_largest_logits_tell_broken_rows(poison: float, place: int) -> None:
    logits = noise(3, 1031)
    logits[1] = -INF
    logits[1, place] = poison
    for controls in (table(3, 0.0, 0.0, 0, 1.0), table(3, 1.0, 0.0, 5, 0.9)):
        np.testing.assert_array_equal(kernels.draw(logits, controls)[1], logits.amax(1).numpy())


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("vocabulary", [1, 64, 4097])
def test_standing_equals_the_references(kind: str, vocabulary: int) -> None:
    logits = LOGITS[kind](vocabulary)
    logits[:, 0] = logits[:, 0].clamp(min=-30)
    tokens = np.random.default_rng(0).integers(0, vocabulary, ROWS)
    tops = np.arange(ROWS) * 3 % 21
    got = kernels.stand(logits, tokens, tops)
    offsets, ranks, top_ids = reference.stand(logits, tokens, tops)
    np.testing.assert_allclose(got.offsets, offsets, rtol=1e-7, atol=5e-7)
    assert got.ranks.tolist() == ranks.tolist()
    width = top_ids.shape[1]
    assert got.top_ids[:, :width].tolist() == top_ids.tolist()
    assert (got.top_ids[:, width:] == -1).all()


EDITS: list[dict[str, Any]] = [
    {},
    {"logit_bias": {3: 2.5, 900: -100.0}},
    {"allowed_token_ids": [899, 0, 5]},
    {"allowed_token_ids": [4], "min_tokens": 9, "stop_token_ids": [4, 7]},
    {"repetition_penalty": 1.3, "frequency_penalty": -0.4, "presence_penalty": 0.7},
    {"repetition_penalty": 1e-300, "logit_bias": {2: 100.0}, "min_tokens": 3},
    {"presence_penalty": 1.5},
]


def test_edits_equal_those_in_torch() -> None:
    states = [
        SamplingState(SamplingParams(**entry), [1, 2, 2, 800], vocab_size=901, eos_token_ids=[0, 6]) for entry in EDITS
    ]
    for state in states:
        for token in (2, 5, 900, 5):
            state.append(token)
    for poison in (0.0, -INF, INF, math.nan):
        logits = noise(len(EDITS), 901)
        logits[:, 6] = poison
        expected = logits.clone()
        apply_processors(logits, states)
        apply_in_torch(expected, states)
        broken = ~(expected.amax(1) < INF)
        assert (broken == ~(logits.amax(1) < INF)).all()
        assert torch.equal(logits[~broken], expected[~broken])


def test_without_numba_the_reference_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [
        SamplingParams(temperature=0, logprobs=3),
        SamplingParams(seed=1, top_p=0.8, logit_bias={3: -100}),
        SamplingParams(seed=2, top_k=20, min_p=0.01, repetition_penalty=1.2, logprobs=20),
        SamplingParams(seed=3, allowed_token_ids=[7, 300]),
    ]
    states = [SamplingState(entry, [1, 2], vocab_size=901, eos_token_ids=[0]) for entry in params]
    logits = noise(4, 901)
    compiled = [SampledToken.of(token) for token in Sampler().sample(logits.clone(), states)]
    monkeypatch.setattr(kernels, "can_compile", lambda: False)
    Sampler.prepare(torch.device("cpu"))
    plain = [SampledToken.of(token) for token in Sampler().sample(logits.clone(), states)]
    assert [token.token_id for token in plain] == [token.token_id for token in compiled]
    for ours, theirs in zip(compiled, plain):
        if theirs.logprobs is not None:
            assert ours.logprobs is not None
            assert ours.logprobs.top_ids == theirs.logprobs.top_ids
            assert ours.logprobs.rank == theirs.logprobs.rank
            assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-6)


def test_rows_need_not_follow_each_other() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 1000, generator=generator)
    padded = torch.full((4, 1040), torch.inf)[:, :1000]
    padded.copy_(logits)
    controls = np.array([[1.0, 0.0, 0.0, 0.9, 0.3], [0.0, 0.0, 0.0, 1.0, 0.5]] * 2)
    for got, wanted in zip(kernels.draw(padded, controls), kernels.draw(logits, controls)):
        assert np.array_equal(got, wanted)
    ids, tops = np.arange(4), np.full(4, 5)
    spread, dense = kernels.stand(padded, ids, tops), kernels.stand(logits, ids, tops)
    assert np.array_equal(spread.top_ids, dense.top_ids)
    assert np.array_equal(spread.offsets, dense.offsets)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_team_draws_what_one_thread_draws(threads: int) -> None:
    """Step after step of other rows, fewer than threads too, from logits that stand where they stood."""
    most, vocabulary = 7, 3001
    logits, numbers = np.empty((most, vocabulary), np.float32), np.zeros(StepNumber.COUNT, np.int64)
    team = ThreadTeam(threads)
    try:
        drawn = kernels.RowDraw(logits, numbers, team)
        for seed, rows in enumerate((7, 1, 4, 2, 7)):
            logits[:rows] = noise(rows, vocabulary, seed).numpy()
            given = np.tile(np.array([0.8, 0.01, 40.0, 0.9, 0.0]), (rows, 1))
            given[:, 0], given[:, 4] = np.where(np.arange(rows) % 3, 0.8, 0.0), (np.arange(rows) + 0.5) / rows
            alone = kernels.draw(logits[:rows], given)
            for found, expected in zip(drawn(given), alone, strict=True):
                np.testing.assert_array_equal(found, expected)
    finally:
        team.close()
