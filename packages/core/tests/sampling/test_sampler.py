# SPDX-License-Identifier: MIT
"""The sampler against a literal reference, against its own rows alone, and against the distributions it promises."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.sampling import reference
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.sampler import SampledToken, Sampler, controls
from candle_vllm.core.sampling.state import SamplingState

INF = math.inf
EOS = [0]


def make(
    vocabulary: int, output: Sequence[int] = (), bad: Sequence[Sequence[int]] = (), **params: Any
) -> SamplingState:
    state = SamplingState(
        SamplingParams(**params), [0, 0], vocab_size=vocabulary, eos_token_ids=EOS, bad_word_token_ids=bad
    )
    for token in output:
        state.append(token % vocabulary)
    return state


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[SampledToken]:
    return [SampledToken.of(token) for token in Sampler().sample(logits.clone(), states)]


# --- a literal reference, one row at a time, plain Python and float64 ------------------------------------------------


def reference_logits(row: list[float], state: SamplingState, bad: Sequence[Sequence[int]]) -> list[float]:
    p, out = state.params, state.output_token_ids
    if p.allowed_token_ids is not None:
        row = [x if i in p.allowed_token_ids else -INF for i, x in enumerate(row)]
    row = list(row)
    for word in bad:
        prefix = list(word[:-1])
        if not prefix or out[-len(prefix) :] == prefix:
            row[word[-1]] = -INF
    if len(out) < p.min_tokens:
        for token in [*EOS, *(p.stop_token_ids or ())]:
            row[token] = -INF
    for token, bias in (p.logit_bias or {}).items():
        row[token] += bias
    for token in {0, *out}:  # the prompt is all zeros
        row[token] = row[token] / p.repetition_penalty if row[token] > 0 else row[token] * p.repetition_penalty
    return [x - p.frequency_penalty * out.count(i) - p.presence_penalty * (i in out) for i, x in enumerate(row)]


def reference_weights(row: list[float], p: SamplingParams) -> list[float]:
    largest = max(row)
    weights = [math.exp((x - largest) / p.temperature) for x in row]
    weights = [w if w >= p.min_p else 0.0 for w in weights]
    if 0 < p.top_k < len(row):
        kth = sorted(row, reverse=True)[p.top_k - 1]
        weights = [w if x >= kth else 0.0 for w, x in zip(weights, row)]
    if p.top_p < 1:
        mass, before, kept = sum(weights), 0.0, set()
        for i in sorted(range(len(row)), key=lambda i: (-weights[i], i)):
            if kept and before >= p.top_p * mass:
                break
            kept.add(i)
            before += weights[i]
        weights = [w if i in kept else 0.0 for i, w in enumerate(weights)]
    return weights


def check_against_reference(
    row: list[float], state: SamplingState, bad: Sequence[Sequence[int]], got: SampledToken
) -> None:
    expected = reference_logits(row, state, bad)
    if max(expected) == -INF:
        assert got.token_id == -1
        assert got.error
        return
    assert got.error is None
    if state.params.greedy:
        assert expected[got.token_id] == pytest.approx(max(expected), abs=1e-5)
        return
    weights = reference_weights(expected, state.params)
    cumulated = np.cumsum(weights) / sum(weights)
    assert weights[got.token_id] > 0
    # float32 against float64: a draw may fall on either side of an edge that it all but touches.
    near = {bisect.bisect_right(cumulated.tolist(), state.uniform() + shift) for shift in (-1e-5, 0.0, 1e-5)}
    assert got.token_id in near or cumulated[got.token_id] == cumulated[min(max(near), len(row) - 1)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], dict[str, Any], list[int], list[list[int]]]:
    vocabulary = draw(st.integers(1, 40))
    token = st.integers(0, vocabulary - 1)
    # Quarters make ties common, as bfloat16 logits do.
    row = draw(
        st.lists(st.integers(-40, 40).map(lambda x: x / 4) | st.just(-INF), min_size=vocabulary, max_size=vocabulary)
    )
    params: dict[str, Any] = {
        "seed": draw(st.integers(-(1 << 63), (1 << 64) - 1)),
        "temperature": draw(st.sampled_from([0, 1e-4, 0.3, 1.0, 1.7, 100.0])),
        # Uneven shares keep clear of exact ties between the mass and the limit, where rounding decides.
        "top_p": draw(st.sampled_from([1.0, 1.0, 0.90317, 0.51713, 0.1391, 1e-9])),
        "top_k": draw(st.sampled_from([0, 0, -1, 1, 2, 5, 39, 1000])),
        "min_p": draw(st.sampled_from([0.0, 0.0, 0.0517, 0.3713])),
    }
    if draw(st.booleans()):
        params["repetition_penalty"] = draw(st.sampled_from([1.0, 1.3, 0.7]))
        params["frequency_penalty"] = draw(st.sampled_from([0.0, 0.37, -1.1]))
        params["presence_penalty"] = draw(st.sampled_from([0.0, 0.43, -2.0]))
    if draw(st.booleans()):
        params["min_tokens"] = draw(st.integers(0, 4))
        params["stop_token_ids"] = draw(st.lists(token, max_size=2))
        params["logit_bias"] = draw(st.dictionaries(token, st.sampled_from([-100.0, -1.3, 2.9]), max_size=3))
    if draw(st.booleans()):
        params["allowed_token_ids"] = draw(st.lists(token, min_size=1, max_size=5))
    output = draw(st.lists(token, max_size=5))
    return row, params, output, draw(st.lists(st.lists(token, min_size=1, max_size=3), max_size=2))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(cases(), min_size=1, max_size=4))
def test_against_the_literal_reference(
    batch: list[tuple[list[float], dict[str, Any], list[int], list[list[int]]]],
) -> None:
    for row, params, output, bad in batch:
        state = make(len(row), output, bad, **params)
        (got,) = sample(torch.tensor([row]), [state])
        check_against_reference(row, state, bad, got)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(cases(), min_size=2, max_size=6), st.integers(1, 40))
def test_rows_are_bitwise_independent_of_their_neighbours(batch: list[Any], vocabulary: int) -> None:
    rows, states = [], []
    for row, params, output, _ in batch:
        for name in ("stop_token_ids", "allowed_token_ids"):
            params[name] = [token % vocabulary for token in params.get(name, ())] or None
        params["logit_bias"] = {token % vocabulary: bias for token, bias in params.get("logit_bias", {}).items()}
        rows.append((row * vocabulary)[:vocabulary])
        states.append(make(vocabulary, output, logprobs=3, **params))
    logits = torch.tensor(rows)
    assert sample(logits, states) == [sample(logits[at : at + 1], [state])[0] for at, state in enumerate(states)]


SHAPES: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"min_p": 0.02},
    {"top_k": 50},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 3},
    {"top_k": 3000, "top_p": 0.99},
    {"top_p": 0.95},
    {"top_p": 0.999, "temperature": 5.0},
    {"top_p": 0.9, "min_p": 0.01},
    {"top_p": 0.01},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.2, "top_p": 0.8},
]


def wide(vocabulary: int, seed: int = 0) -> tuple[torch.Tensor, list[SamplingState]]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2 * len(SHAPES), vocabulary, generator=generator) * 3
    logits[::3] = logits[::3].bfloat16().float()  # many ties
    logits[5] = 1.0
    states = [make(vocabulary, range(9), seed=at, logprobs=2, **params) for at, params in enumerate(SHAPES * 2)]
    return logits, states


@pytest.mark.parametrize("vocabulary", [511, 4097, 32003, 50048])
def test_wide_rows_are_bitwise_independent_of_their_neighbours(vocabulary: int) -> None:
    logits, states = wide(vocabulary)
    together = sample(logits, states)
    assert all(token.error is None for token in together)
    assert together == [sample(logits[at : at + 1], [state])[0] for at, state in enumerate(states)]
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(1)).tolist()
    assert sample(logits[order], [states[at] for at in order]) == [together[at] for at in order]


@pytest.mark.parametrize("vocabulary", [1, 2, 64, 511, 4097, 20011])
def test_cpu_draws_what_the_dense_reference_draws(vocabulary: int) -> None:
    logits, states = wide(vocabulary, seed=vocabulary)
    drawn = [state for state in states if not state.params.greedy]
    logits = logits[[at for at, state in enumerate(states) if not state.params.greedy]]
    expected, got = [], []
    for _ in range(4):
        expected += reference.draw(logits, controls(drawn))[0].tolist()
        bare = [make(vocabulary, state.output_token_ids, **_drawing_only(state.params)) for state in drawn]
        got += [token.token_id for token in sample(logits, bare)]
        for state in drawn:
            state.append(0)
    wrong = sum(a != b for a, b in zip(expected, got))
    assert wrong <= len(expected) // 100  # only a draw on the very edge may differ, by float32 against float64


def _drawing_only(p: SamplingParams) -> dict[str, Any]:
    return {"seed": p.seed, "temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p, "min_p": p.min_p}


# --- distributions ---------------------------------------------------------------------------------------------------

DRAWS = 4000
CHI_SQUARE_999 = {0: 0.0, 1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88}


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 100.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
    ],
)
def test_frequencies_follow_the_distribution(params: dict[str, Any]) -> None:
    row = [1.0, -0.5, 2.0, 0.3, 1.9, -3.0, 0.0, 1.1, -1.0, 0.7]
    weights = np.array(reference_weights(row, SamplingParams(**params)))
    states = [make(len(row), seed=seed, **params) for seed in range(DRAWS)]
    tokens = [token.token_id for token in sample(torch.tensor([row]).expand(DRAWS, -1), states)]
    seen = np.bincount(tokens, minlength=len(row))
    assert not seen[weights == 0].any()
    expected = DRAWS * weights[weights > 0] / weights.sum()
    chi_square = ((seen[weights > 0] - expected) ** 2 / expected).sum()
    assert chi_square < CHI_SQUARE_999[len(expected) - 1]


def test_frequencies_along_one_sequence_of_a_wide_vocabulary() -> None:
    row = torch.full((1, 5000), -INF)
    row[0, [3, 511, 512, 4999]] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    state, tokens = make(5000, seed=11), []
    for _ in range(2000):
        tokens.append(sample(row, [state])[0].token_id)
        state.append(tokens[-1])
    seen = np.array([tokens.count(token) for token in (3, 511, 512, 4999)])
    expected = 2000 * np.array([0.1, 0.2, 0.3, 0.4])
    assert seen.sum() == 2000
    assert ((seen - expected) ** 2 / expected).sum() < CHI_SQUARE_999[3]


# --- seeds -----------------------------------------------------------------------------------------------------------


def run(state: SamplingState, steps: int, sampler: Sampler) -> list[int]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        row = torch.randn(1, 1000, generator=generator)
        state.append(SampledToken.of(sampler.sample(row, [state])[0]).token_id)
    return state.output_token_ids


def test_a_seed_repeats_and_seeds_signs_and_sequences_differ() -> None:
    texts = {}
    for seed in (0, 1, -1, (1 << 64) - 1, -(1 << 63), 1 << 63):
        for index in (0, 1):
            states = [
                SamplingState(SamplingParams(seed=seed), [], vocab_size=1000, eos_token_ids=[], index=index)
                for _ in range(2)
            ]
            first, again = (run(state, 8, Sampler()) for state in states)
            assert first == again
            texts[seed, index] = tuple(first)
    assert len(set(texts.values())) == len(texts)


def test_unseeded_sequences_differ() -> None:
    assert run(make(1000), 8, Sampler()) != run(make(1000), 8, Sampler())


# --- edges -----------------------------------------------------------------------------------------------------------


def only(row: list[float], **params: Any) -> int:
    return sample(torch.tensor([row]), [make(len(row), seed=1, **params)])[0].token_id


@pytest.mark.parametrize("params", SHAPES)
def test_one_token_left_is_the_token(params: dict[str, Any]) -> None:
    assert only([0.5], **params) == 0
    row = [-INF] * 700
    row[699] = -12.0
    assert only(row, **params) == 699


def test_greedy_takes_the_lowest_id_on_ties_and_sees_penalties() -> None:
    assert only([0.0, 2.0, 2.0], temperature=0) == 1
    state = make(3, [1, 1], temperature=0, frequency_penalty=0.5)
    assert sample(torch.tensor([[0.0, 2.0, 1.5]]), [state])[0].token_id == 2


def test_tiny_top_p_and_top_k_one_keep_the_likeliest() -> None:
    row = [0.0, 3.0, 3.0, 1.0]
    assert {only(row, top_p=1e-12, temperature=100.0)} == {1}
    for seed in range(20):
        state = make(4, temperature=100.0, top_k=1, seed=seed)
        assert sample(torch.tensor([row]), [state])[0].token_id in (1, 2)  # ties at the k-th are kept
    assert {sample(torch.tensor([row]), [make(4, top_k=1, seed=s)])[0].token_id for s in range(20)} == {1, 2}


def test_extreme_logits_and_temperatures_stay_defined() -> None:
    for temperature in (1e-5, 1.0, 100.0):
        for params in ({}, {"top_k": 2}, {"top_p": 0.5}):
            assert only([3e38, -3e38, -INF], temperature=temperature, **params) == 0


@pytest.mark.parametrize("module", [kernels, reference])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1700, 1.0), (0, 1 - 1e-12)])
def test_a_target_rounded_up_to_the_whole_mass_takes_no_token_of_weight_zero(
    module: Any, top_k: int, top_p: float
) -> None:
    # A uniform of 1 is outside the contract, and what `uniform * mass` amounts to when it rounds up to the mass.
    table = np.array([[1.0, 0.0, top_k, top_p, 1.0]])
    logits = torch.full((1, 3000), -INF)
    logits[0, :1700] = torch.randn(1700, generator=torch.Generator().manual_seed(0))
    assert module.draw(logits, table)[0].tolist() == [1699]


# --- rows that cannot be drawn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, INF])
def test_processors_do_not_hide_a_broken_model(poison: float) -> None:
    state = make(3, logits_processors=[lambda tokens, row: np.nan_to_num(row, posinf=0.0)])
    (token,) = sample(torch.tensor([[0.0, poison, 1.0]]), [state])
    assert "NaN or infinite" in (token.error or "")
    assert not token.by_request


@pytest.mark.parametrize("params", SHAPES)
@pytest.mark.parametrize(("poison", "says"), [(math.nan, "NaN"), (INF, "NaN or infinite"), (-INF, "no token")])
def test_a_hopeless_row_fails_alone(params: dict[str, Any], poison: float, says: str) -> None:
    logits, states = wide(700)
    states[4] = make(700, **params)
    healthy = sample(logits, states)
    if poison == -INF:
        logits[4] = poison
    else:
        logits[4, 77] = poison
    tokens = sample(logits, states)
    assert tokens[4].token_id == -1
    assert says in (tokens[4].error or "")
    assert [t for at, t in enumerate(tokens) if at != 4] == [t for at, t in enumerate(healthy) if at != 4]


def test_masks_that_leave_nothing_are_an_error_of_their_row() -> None:
    states = [make(3, [[1]][0], bad=[[2]], allowed_token_ids=[0, 2], min_tokens=5, seed=1), make(3, temperature=0)]
    tokens = sample(torch.tensor([[1.0, 2.0, 3.0]] * 2), states)
    assert "allowed_token_ids" in (tokens[0].error or "")
    assert tokens[1] == SampledToken(2)


def test_no_rows() -> None:
    assert Sampler().sample(torch.zeros(0, 10), []) == []


def test_padded_logits_are_accepted() -> None:
    padded = torch.zeros(2, 16)
    padded[:, 10:] = 99.0
    padded[:, 7] = 5.0
    states = [make(10, temperature=0), make(10, temperature=0)]
    assert Sampler().sample(padded[:, :10], states) == [7, 7]
