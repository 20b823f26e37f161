# SPDX-License-Identifier: MIT
"""llama.cpp's samplers: the reference against other people's and by hand, the compiled chain against the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from candle_vllm.core.kernels.sampling import chain
from candle_vllm.core.kernels.sampling.chain import narrow_in_numpy, surprise
from candle_vllm.core.kernels.sampling.contract import Link
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.sampler import SampledToken, Sampler
from candle_vllm.core.sampling.state import SamplingState

INF = math.inf


def numbers(**links: float) -> np.ndarray:
    given = {"TEMPERATURE": 1} | links
    return np.array([given.get(link.name, link.neutral or 0.0) for link in Link], np.float64)


def row_of(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


def left(row: np.ndarray, **links: float) -> list[int]:
    copy = row.copy()
    narrow_in_numpy(copy, numbers(**links))
    return np.flatnonzero(copy > -INF).tolist()


# ---- the reference ---------------------------------------------------------------------------------------------------


def test_each_sampler_by_hand() -> None:
    row = row_of(0.1, 0.4, 0.05, 0.2, 0.25)  # entropy 1.415 nats; surprises 2.30, 0.92, 3.00, 1.61, 1.39
    assert left(row, TYPICAL_P=0.2) == [4]
    assert left(row, TYPICAL_P=0.44) == [3, 4]  # 1.39 and 1.61 are the nearest
    assert left(row, TYPICAL_P=0.46) == [1, 3, 4]
    assert left(row, XTC=0.199) == [0, 2, 3]  # 0.4 and 0.25 go, 0.2 stays as the least that is likely enough
    assert left(row, XTC=0.21) == [0, 2, 3, 4]
    assert left(row, XTC=0.3) == [0, 1, 2, 3, 4]  # one alone is kept
    assert left(row, XTC=0.0) == [2]
    assert left(row, MIROSTAT=2, MU=2.01) == [1, 4]  # 0.25 is two bits
    assert left(row, MIROSTAT=2, MU=0.5) == [1]
    assert left(row, TOP_K=2) == [1, 4]
    assert left(row, TOP_P=0.6) == [1, 4]
    assert left(row, MIN_P=0.4) == [1, 3, 4]
    x = row.astype(np.float64)
    sigmas = (x.max() - x) / x.std()
    for n in (0.3, 0.7, 1.2, 5.0):
        assert left(row, TOP_N_SIGMA=n) == np.flatnonzero(sigmas <= n).tolist()


def test_the_order_of_the_chain() -> None:
    """Each looks at what is left: of 0.4, 0.25, 0.2 both XTC and min_p see other shares than of the whole row."""
    row = row_of(0.1, 0.4, 0.05, 0.2, 0.25)
    assert left(row, TOP_K=3, XTC=0.23) == [3]  # 0.2 of the whole is 0.235 of the three
    assert left(row, XTC=0.23) == [0, 2, 3, 4]
    assert left(row, TYPICAL_P=0.2, MIN_P=0.9) == [4]  # the largest is gone when min_p looks
    assert left(row, TOP_K=2, MIROSTAT=2, MU=1.4) == [1, 4]  # 0.25 of 0.65 is 1.38 bits


def test_a_dynamic_temperature_follows_the_entropy() -> None:
    row = row_of(0.1, 0.4, 0.05, 0.2, 0.25)
    p = np.exp(row.astype(np.float64))
    share = -(p * np.log(p)).sum() / math.log(5)
    narrow_in_numpy(row, numbers(LOW=0.5, HIGH=1.5, EXPONENT=2.0))
    expected = np.log(p / p.max()) / (0.5 + share**2)
    np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
    alone = np.array([-INF, 3.0, -INF], np.float32)
    narrow_in_numpy(alone, numbers(LOW=0.5, HIGH=1.5, EXPONENT=1.0))
    assert alone.tolist() == [-INF, 3.0, -INF]
    sure = np.array([-900.0, 3.0, -900.0], np.float32)
    narrow_in_numpy(sure, numbers(LOW=0.0, HIGH=1.5, EXPONENT=1.0))
    assert np.flatnonzero(sure > -INF).tolist() == [1]  # a temperature of 0


def test_typical_p_is_transformers() -> None:
    torch, processors = pytest.importorskip("torch"), pytest.importorskip("transformers.generation.logits_process")
    for seed in range(8):
        row = (np.random.default_rng(seed).standard_normal(700) * (0.1 + seed)).astype(np.float32)
        for mass in (0.1013, 0.5017, 0.9531):
            warped = processors.TypicalLogitsWarper(mass=mass)(None, torch.from_numpy(row[None].copy()))[0]
            assert left(row, TYPICAL_P=mass) == torch.isfinite(warped).nonzero().flatten().tolist()


def test_mirostat_1_finds_zipfs_exponent() -> None:
    """Of weights that are a power of their rank, the k of the paper's formula."""
    row = (-1.3 * np.log(np.arange(1, 5001))).astype(np.float32)
    for mu in (1.0, 4.0, 6.0):
        k = (0.3 * 2**mu / (1 - 5000**-0.3)) ** (1 / 1.3)
        assert len(left(row, MIROSTAT=1, MU=mu)) == max(int(k), 1)
    assert len(left(np.zeros(50, np.float32), MIROSTAT=1, MU=5.0)) == 50  # all alike: the least k has the others' ties
    assert surprise(row_of(0.5, 0.25, 0.25), 1, 1.0) == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("poison", [math.nan, INF])
def test_broken_rows_are_left_alone(poison: float) -> None:
    for narrow in (narrow_in_numpy, chain.narrow):
        row = np.array([1.0, poison, 2.0], np.float32)
        narrow(row, numbers(TYPICAL_P=0.5, TOP_N_SIGMA=1, MIROSTAT=2, MU=1))
        np.testing.assert_array_equal(row, np.array([1.0, poison, 2.0], np.float32))


def test_what_asks_for_the_chain() -> None:
    def state(**given: float) -> SamplingState:
        return SamplingState(SamplingParams(**given), [1], vocab_size=100, eos_token_ids=())

    assert state(top_k=5, top_p=0.5, min_p=0.1, temperature=0.7).chain is None
    assert state(dry_multiplier=1, repeat_last_n=3, xtc_threshold=0.4, top_n_sigma=-1).chain is None
    assert state(xtc_probability=1, xtc_threshold=0.51).chain is None
    for name, value in (("top_n_sigma", 1), ("typical_p", 0.9), ("xtc_probability", 0.1), ("mirostat", 1)):
        assert state(**{name: value}).controls == (1.0, 0.0, 0.0, 1.0)
        assert state(**{name: value}).chain is not None, name
    dynamic = {"dynatemp_range": 0.9, "dynatemp_exponent": 2, "temperature": 0.7}
    asked = state(**dynamic, top_k=5, top_p=0.5, min_p=0.1, top_n_sigma=-1)
    assert asked.chain is not None
    expected = numbers(TOP_K=5, TOP_P=0.5, MIN_P=0.1, TEMPERATURE=0.7, LOW=0, HIGH=0.7 + 0.9, EXPONENT=2)
    assert asked.chain.tolist() == expected.tolist()
    assert asked.controls == (1.0, 0.0, 0.0, 1.0)


# ---- compiled --------------------------------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {"TOP_N_SIGMA": 1.0},
    {"TOP_K": 40},
    {"TYPICAL_P": 0.5071},
    {"TYPICAL_P": 0.9513},
    {"TOP_P": 0.9031},
    {"MIN_P": 0.05},
    {"XTC": 0.1},
    {"XTC": 0.01},
    {"XTC": 0.0},
    {"LOW": 0.5, "HIGH": 1.5, "EXPONENT": 1.0},
    {"LOW": 0.0, "HIGH": 2.0, "EXPONENT": 2.5},
    {"MIROSTAT": 2, "MU": 10.0},
    {"MIROSTAT": 2, "MU": 3.0},
    {"MIROSTAT": 2, "MU": 0.01},
    {"MIROSTAT": 2, "MU": 6.0, "TEMPERATURE": 1.7},
    {"MIROSTAT": 1, "MU": 10.0},
    {"MIROSTAT": 1, "MU": 3.0, "TEMPERATURE": 0.7},
    {"TOP_N_SIGMA": 2.0, "TOP_K": 200, "TYPICAL_P": 0.9, "TOP_P": 0.95, "MIN_P": 0.01, "XTC": 0.1, "LOW": 0.5,
     "HIGH": 1.5, "EXPONENT": 0.7, "MIROSTAT": 2, "MU": 4.0},
]  # fmt: skip


def rows(vocabulary: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(vocabulary)
    usual = draw.standard_normal(vocabulary) * 3
    some = draw.random(vocabulary) < 0.1
    some[0] = True
    made = {
        "usual": usual,
        "peaks": usual + 14 * (draw.random(vocabulary) < 0.02),
        "ties": np.round(usual * 2) / 2,
        "equal": np.full(vocabulary, -7.25),
        "lowest": np.full(vocabulary, np.finfo(np.float32).min),
        "masked": np.where(some, usual, -INF),
        "an abyss": np.where(draw.random(vocabulary) < 0.5, usual, -3e38),
        "flat": usual / 300,
        "steep": usual * 20,
    }
    return {name: row.astype(np.float32) for name, row in made.items()}


@pytest.mark.parametrize("vocabulary", [1, 15, 512, 513, 3001])
def test_the_compiled_chain_is_the_references(vocabulary: int) -> None:
    pytest.importorskip("numba")
    for name, row in rows(vocabulary).items():
        for links in CASES:
            got, expected = row.copy(), row.copy()
            chain.narrow(got, numbers(**links))
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                narrow_in_numpy(expected, numbers(**links))
            assert np.flatnonzero(got > -INF).tolist() == np.flatnonzero(expected > -INF).tolist(), (name, links)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_row_is_not_written_beyond_its_end() -> None:
    memory = np.full(1030, 5.0, np.float32)
    memory[:1027] = rows(1027)["usual"]
    for links in CASES:
        chain.narrow(memory[:1027], numbers(**links))
        assert memory[1027:].tolist() == [5.0] * 3


# ---- drawing ---------------------------------------------------------------------------------------------------------

VOCABULARY = 600
REQUESTS: list[dict[str, Any]] = [
    {"top_n_sigma": 1.5},
    {"typical_p": 0.6},
    {"xtc_probability": 0.5, "xtc_threshold": 0.02},
    {"dynatemp_range": 0.9},
    {"mirostat": 1, "mirostat_tau": 3.0},
    {"mirostat": 2, "mirostat_tau": 3.0},
    {"repetition_penalty": 1.3, "repeat_last_n": 5},
    {},
]


def draw(requests: list[dict[str, Any]], steps: int, *, drafts: bool = False) -> list[list[int]]:
    """Texts drawn side by side; each one's logits follow from its own last token."""
    table = np.random.default_rng(7).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32) * 3
    states = [
        SamplingState(SamplingParams(seed=5, **asked), [3, 4], vocab_size=VOCABULARY, eos_token_ids=[])
        for asked in requests
    ]
    sampler = Sampler()
    while len(states[0].output_token_ids) < steps:
        if not drafts:
            drawn = [(token,) for token in sampler.sample(table[[s.tokens[-1] for s in states]], states)]
        else:  # the right token, a wrong one behind it
            alone = [s.sibling(s.index) if not s.output_token_ids else s for s in states]
            guesses = [sampler.sample(table[[s.tokens[-1]]], [s])[0] for s in alone]
            proposed = [[SampledToken.of(guess).token_id, 1] for guess in guesses]
            lines = [t for s, own in zip(states, proposed) for t in (s.tokens[-1], *own)]
            drawn = sampler.sample_runs(table[lines], states, proposed)
        for state, tokens in zip(states, drawn):
            for token in tokens:
                assert isinstance(token, int)
                state.append(token)
    return [state.output_token_ids[:steps] for state in states]


def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch() -> None:
    together = draw(REQUESTS, 40)
    assert len({tuple(text) for text in together}) == len(REQUESTS)
    for asked, text in zip(REQUESTS, together):
        assert draw([asked], 40)[0] == text


def test_drafts_change_no_token() -> None:
    assert draw(REQUESTS, 30, drafts=True) == draw(REQUESTS, 30)


def test_mirostat_holds_the_surprise() -> None:
    """The mean over a text is what was asked for, where the model leaves it that much."""
    generator = np.random.default_rng(1)
    for mode in (1, 2):
        for tau in (2.0, 4.0):
            asked = SamplingParams(mirostat=mode, mirostat_tau=tau, seed=1, max_tokens=None)
            state = SamplingState(asked, [1], vocab_size=3000, eos_token_ids=[])
            sampler, bits = Sampler(), []
            for _ in range(400):
                row = (generator.standard_normal((1, 3000)) * 2.5).astype(np.float32)
                kept = row[0].copy()
                chain.narrow(kept, state.links())
                (token,) = sampler.sample(row, [state])
                assert isinstance(token, int)
                bits.append(surprise(kept, token, 1.0))
                state.append(token)
            assert np.mean(bits[50:]) == pytest.approx(tau, abs=0.35)


def test_xtc_takes_away_as_often_as_it_is_told() -> None:
    row = np.array([[2.0, 1.9, 1.8, -9.0]], np.float32)
    for probability in (0.0, 0.3, 1.0):
        asked = SamplingParams(xtc_probability=probability, xtc_threshold=0.1, temperature=0, seed=2)
        state = SamplingState(asked, [1], vocab_size=4, eos_token_ids=[])
        sampler, taken = Sampler(), 0
        for _ in range(1000):
            (token,) = sampler.sample(row.copy(), [state])
            assert token in (0, 2)  # the likeliest, or the least likely of the likely ones
            taken += token == 2
            state.append(0)
        assert taken / 1000 == pytest.approx(probability, abs=0.05)


def test_log_probabilities_are_the_models_own() -> None:
    row = np.random.default_rng(3).standard_normal((1, 100)).astype(np.float32)
    asked = SamplingParams(typical_p=0.3, logprobs=2, seed=1)
    (token,) = Sampler().sample(row.copy(), [SamplingState(asked, [1], vocab_size=100, eos_token_ids=[])])
    assert isinstance(token, SampledToken)
    assert token.logprobs is not None
    expected = row[0] - np.log(np.exp(row[0].astype(np.float64)).sum())
    assert token.logprobs.logprob == pytest.approx(expected[token.token_id], abs=1e-5)
    assert token.logprobs.top_logprobs == pytest.approx(sorted(expected, reverse=True)[:2], abs=1e-5)


def test_penalties_look_at_the_last_tokens() -> None:
    """The tokens behind the window are as if they had never been; a window over all is no window."""
    logits = np.random.default_rng(4).standard_normal((1, 50)).astype(np.float32)
    penalties = {"repetition_penalty": 1.7, "frequency_penalty": 0.4, "presence_penalty": 0.3, "temperature": 0}

    def row(prompt: list[int], output: list[int], last: int) -> list[float]:
        state = SamplingState(
            SamplingParams(**penalties, repeat_last_n=last, max_tokens=None), prompt, vocab_size=50, eos_token_ids=[]
        )
        for token in output:
            state.append(token)
        edited = logits.copy()
        Sampler(lambda given, _: (edited.__setitem__(..., given), (np.zeros(1, np.int64), np.zeros(1, np.float32)))[1]
                ).sample(logits.copy(), [state])  # fmt: skip
        return edited[0].tolist()

    assert row([1, 2, 3], [4, 5, 5], 4) == row([3], [4, 5, 5], -1)
    assert row([1, 2, 3], [4, 5, 5], 2) == row([], [5, 5], -1)
    assert row([1, 2, 3], [4, 5, 5], 100) == row([1, 2, 3], [4, 5, 5], 6) == row([1, 2, 3], [4, 5, 5], -1)
    assert row([1, 2, 3], [4, 5, 5], 0) == logits[0].tolist()
