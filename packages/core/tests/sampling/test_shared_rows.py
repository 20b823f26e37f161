# SPDX-License-Identifier: MIT
"""Draws from rows that ranks have parts of: those from whole rows, what they leave open, and what they send."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.collectives import VocabularyShare
from candle_vllm.core.kernels.sampling import device_shares
from candle_vllm.core.kernels.sampling.device_shares import DeviceShares, pick_in_units, weigh_in_units
from candle_vllm.core.kernels.sampling.shares import MOST_TOLD, Shares, Wish, pick, tell, told
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.sampler import SampledToken, Sampler
from candle_vllm.core.sampling.shared_rows import draw_shared, sample_some, wishes
from candle_vllm.core.sampling.state import SamplingState
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.thread_ranks import ThreadRanks, in_threads

INF = math.inf
# Temperature, min_p, top_k, top_p.
CONTROLS = [
    (0.0, 0.0, 0.0, 1.0),
    (1.0, 0.0, 0.0, 1.0),
    (0.7, 0.0, 20.0, 1.0),
    (0.7, 0.0, 0.0, 0.9),
    (1.0, 0.1, 0.0, 1.0),
    (0.8, 0.05, 40.0, 0.95),
    (0.6, 0.02, 0.0, 0.3),
    (1.5, 0.0, 127.0, 1.0),
    (2.0, 0.0, 0.0, 1.0),
    (1e-5, 0.0, 0.0, 0.5),
]
LOGPROBS = (None, 0, 5, 20)
LOGITS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "usual": lambda x: x * 3,
    "ties": lambda x: np.round(x * 3),
    "flat": lambda x: x * np.float32(0.01),
    "equal": lambda x: np.full_like(x, -7.25),
    "mostly masked": lambda x: np.where(x > 2, x, -np.inf).astype(np.float32),
    "frequent first": lambda x: np.sort(x * 3, axis=1)[:, ::-1].copy(),
}


def rows_of(kind: str, rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    made = np.random.default_rng([seed, rows, vocabulary]).standard_normal((rows, vocabulary)).astype(np.float32)
    logits = LOGITS[kind](made)
    logits[:, 0] = logits[:, 0].clip(min=-30)  # a token to choose
    return torch.from_numpy(logits)


def asked(rows: int, seed: int = 1) -> NDArray[np.float64]:
    uniforms = np.random.default_rng([seed, rows]).random(rows)
    made = np.empty((rows, 7))
    for row in range(rows):
        control, logprobs = CONTROLS[row % len(CONTROLS)], LOGPROBS[row // len(CONTROLS) % len(LOGPROBS)]
        made[row] = *control, uniforms[row], -1 if logprobs is None else logprobs, told(control, logprobs)
    return made


def share_of(ranks: ThreadRanks, vocabulary: int) -> VocabularyShare:
    most = -(-vocabulary // ranks.size)
    return VocabularyShare(ranks, ranks.rank * most, most, vocabulary)


def own_of(logits: torch.Tensor, share: VocabularyShare) -> torch.Tensor:
    return logits[:, share.first : share.first + share.most].contiguous()


def shared(logits: torch.Tensor, wanted: NDArray[np.float64], size: int) -> Shares:
    """What each of so many ranks draws; it is the same."""

    def work(ranks: ThreadRanks) -> Shares:
        share = share_of(ranks, logits.shape[1])
        return Shares(own_of(logits, share), share, wanted)

    first, *others = in_threads(size, work)
    for other in others:
        np.testing.assert_array_equal(other.ids, first.ids)
        np.testing.assert_array_equal(other.lacking, first.lacking)
    return first


def check_standing(found: Shares, logits: torch.Tensor, wanted: NDArray[np.float64]) -> None:
    sure = np.setdiff1d(np.flatnonzero(wanted[:, Wish.LOGPROBS] >= 0), found.lacking)
    standing, own, top_logits = found.standing(sure)
    tops = wanted[sure, Wish.LOGPROBS].astype(np.int64)
    right = kernels.stand(logits[sure], found.ids[sure], tops)
    most = right.top_ids.shape[1]
    np.testing.assert_array_equal(standing.ranks, right.ranks)
    np.testing.assert_array_equal(standing.top_ids[:, :most], right.top_ids)
    np.testing.assert_array_equal(own, logits[sure, found.ids[sure]].numpy())
    there = right.top_ids >= 0
    np.testing.assert_array_equal(
        top_logits[:, :most][there], np.take_along_axis(logits[sure].numpy(), right.top_ids, 1)[there]
    )
    np.testing.assert_allclose(standing.offsets, right.offsets, rtol=0, atol=1e-6)  # sums of float32 in another order


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize(("size", "vocabulary"), [(2, 1000), (3, 4099), (2, 517), (3, 61)])
def test_draws_are_those_of_whole_rows(kind: str, size: int, vocabulary: int) -> None:
    logits, wanted = rows_of(kind, 80, vocabulary), asked(80)
    found = shared(logits, wanted, size)
    ids, largest = kernels.draw(logits, np.ascontiguousarray(wanted[:, :5]))
    sure = np.setdiff1d(np.arange(80), found.lacking)
    np.testing.assert_array_equal(found.ids[sure], ids[sure])
    np.testing.assert_array_equal(found.largest, largest)
    check_standing(found, logits, wanted)
    assert (found.ids[found.lacking] == -1).all()
    cut = (wanted[:, 0] > 0) & (wanted[:, 1:4] != (0, 0, 1)).any(1)
    assert cut[found.lacking].all(), "what is likeliest, and temperature alone, are never open"
    if kind in ("usual", "frequent first") or vocabulary <= size * 21:
        assert not len(found.lacking)
    if kind == "equal" and vocabulary > size * MOST_TOLD:
        assert set(found.lacking) == set(np.flatnonzero(cut)), "any token might be among the first k"


@pytest.mark.parametrize("kind", ["usual", "ties", "flat"])
def test_a_row_has_the_bits_that_it_has_alone(kind: str) -> None:
    """However many logits are told for the others."""
    logits, wanted = rows_of(kind, 40, 777), asked(40)
    together = shared(logits, wanted, 3)
    for row in range(40):
        alone = shared(logits[row : row + 1], wanted[row : row + 1], 3)
        assert alone.ids[0] == together.ids[row]
        assert (row in together.lacking) == (0 in alone.lacking)
        if wanted[row, Wish.LOGPROBS] >= 0 and not len(alone.lacking):
            (one, *its), (other, *theirs) = alone.standing(np.array([0])), together.standing(np.array([row]))
            width = int(wanted[row, Wish.LOGPROBS])
            assert (one.offsets, one.ranks) == (other.offsets, other.ranks)
            np.testing.assert_array_equal(one.top_ids, other.top_ids[:, :width])
            np.testing.assert_array_equal(its[0], theirs[0])
            np.testing.assert_array_equal(its[1], theirs[1][:, :width])


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_broken_rows_leave_their_neighbours_alone(poison: float) -> None:
    logits, wanted = rows_of("usual", 40, 600), asked(40)
    right = shared(logits, wanted, 2)
    logits[::3, 450] = poison
    if poison < 0:
        logits[::3] = poison  # nothing may be chosen
    found = shared(logits, wanted, 2)
    sound = np.arange(40) % 3 > 0
    np.testing.assert_array_equal(found.ids[sound], right.ids[sound])
    np.testing.assert_array_equal(found.largest[~sound], np.full((~sound).sum(), poison, np.float32))
    assert (found.ids[~sound] == -1).all()
    assert not len(found.lacking)


@pytest.mark.parametrize("size", [2, 3])
def test_the_lowest_id_of_equals_across_borders(size: int) -> None:
    """What is likeliest, and the first that top_p keeps: at the end of one part and the start of the next."""
    vocabulary = 300
    border = -(-vocabulary // size)
    wanted = np.array([[0.0, 0.0, 0.0, 1.0, 0.5, 3, 3], [1.0, 0.0, 0.0, 0.1, 0.9, -1, MOST_TOLD]])
    for first, other in ((border - 1, border), (border, vocabulary - 1), (0, border)):
        logits = rows_of("usual", 1, vocabulary).repeat(2, 1)
        logits[:, [first, other]] = 30.0
        found = shared(logits, wanted, size)
        assert found.ids.tolist() == [first, first]
        assert found.standing(np.array([0]))[0].top_ids[0, :2].tolist() == [first, other]


def test_without_numba_draws_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, wanted = rows_of("usual", 40, 600), asked(40)
    right = shared(logits, wanted, 2)
    monkeypatch.setattr(kernels, "compiled", lambda: False)
    found = shared(logits, wanted, 2)
    np.testing.assert_array_equal(found.ids, right.ids)
    check_standing(found, logits, wanted)


@pytest.mark.parametrize("vocabulary", [1, 63, 513, 4099])
def test_sums_and_tokens_by_integers(vocabulary: int) -> None:
    """As a GPU has them; also where a target is the whole mass."""
    logits = rows_of("usual", 24, vocabulary)
    logits[5, 0] = math.nan
    temperatures = np.tile([0.0, 0.3, 1.0, 2.0], 6)
    hot, largest = torch.from_numpy(temperatures), logits.amax(1)
    masses = weigh_in_units(logits, largest, hot).numpy()
    right = tell(logits, np.stack([np.ones(24), temperatures, np.zeros(24)], 1), 1)[2]
    np.testing.assert_allclose(masses, right, rtol=1e-6)
    assert (masses[temperatures == 0] == 0).all()
    sound = (temperatures > 0) & np.isfinite(largest.numpy())
    shares = np.tile([0.0, 0.2, 0.4637, 0.9, 1.0, 0.1], 4)
    targets = np.where(sound, masses * shares, -1.0)
    chosen = pick_in_units(logits, largest, hot, torch.from_numpy(targets)).numpy()
    targets = np.where(sound, right * shares, -1.0)
    np.testing.assert_array_equal(chosen, pick(logits, temperatures, targets))
    assert (chosen[~sound] == -1).all()


# ---- launched, as on a GPU -------------------------------------------------------------------------------------------


def launched(
    logits: torch.Tensor, wanted: NDArray[np.float64], size: int, *, graphs: bool, padded: int | None = None
) -> Shares:
    rows, vocabulary = logits.shape

    def work(ranks: ThreadRanks) -> Any:
        stream, share = LazyStream(), share_of(ranks, vocabulary)
        own, controls = torch.zeros(padded or rows, min(share.most, vocabulary - share.first)), torch.zeros(99, 5)
        controls = controls.double()
        shares = DeviceShares(stream, share, own, controls, graphs=graphs)
        found = None
        for _ in range(2):  # the second is a replay
            own[:rows], controls[:rows] = own_of(logits, share), torch.from_numpy(wanted[:, :5])
            landing = shares.launch(wanted, padded)
            stream.mark().wait()
            found = None if landing is None else landing.landed()
        assert (stream.captured > 0) == (graphs and padded is not None)
        return found

    first, *others = in_threads(size, work)
    assert others == [None] * (size - 1)
    return first


@pytest.mark.parametrize("kind", ["usual", "ties", "flat", "mostly masked"])
@pytest.mark.parametrize(("graphs", "padded"), [(True, 48), (False, None)])
def test_launched_draws_are_the_same(kind: str, graphs: bool, padded: int | None) -> None:
    logits, wanted = rows_of(kind, 40, 900), asked(40)
    wanted[[3, 14], Wish.TOLD] = 0
    right, found = shared(logits, wanted, 3), launched(logits, wanted, 3, graphs=graphs, padded=padded)
    np.testing.assert_array_equal(found.ids, right.ids)
    np.testing.assert_array_equal(found.largest, right.largest)
    np.testing.assert_array_equal(found.lacking, right.lacking)
    np.testing.assert_array_equal(found.gathered.numpy(), logits[[3, 14]].numpy())
    near = np.ones(40, bool)
    near[[3, 14]] = False
    rows = np.setdiff1d(np.flatnonzero((wanted[:, Wish.LOGPROBS] >= 0) & near), found.lacking)
    (one, *its), (other, *theirs) = found.standing(rows), right.standing(rows)
    np.testing.assert_array_equal(one.ranks, other.ranks)
    np.testing.assert_array_equal(one.top_ids, other.top_ids)
    np.testing.assert_allclose(one.offsets, other.offsets, rtol=0, atol=1e-6)
    for mine, wants in zip(its, theirs, strict=True):
        np.testing.assert_array_equal(mine, wants)


def test_a_rank_all_of_whose_logits_are_minus_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device says of where tokens stand in such a part has no meaning, and spoils nothing of the others'."""
    logits, wanted = rows_of("usual", 40, 900), asked(40)
    logits[:, 600:] = -INF
    stand = kernels.stand_tensors

    def without_meaning(own: torch.Tensor, *given: Any) -> Any:
        found = stand(own, *given)
        return dataclasses.replace(found, offsets=found.offsets.where(own.amax(1).isfinite(), math.nan))

    monkeypatch.setattr(kernels, "stand_tensors", without_meaning)
    for found in (shared(logits, wanted, 3), launched(logits, wanted, 3, graphs=False)):
        np.testing.assert_array_equal(found.ids, kernels.draw(logits, np.ascontiguousarray(wanted[:, :5]))[0])
        check_standing(found, logits, wanted)


@pytest.mark.parametrize("rows", [[0], [0, 1], [0, 10], [1, 11], [2, 3], [4, 5, 1]])
def test_launched_draws_of_every_kind_of_step(rows: list[int]) -> None:
    """With and without logits in numbers, sums, tokens that one rank finds, and their places."""
    logits, wanted = rows_of("usual", 40, 900)[rows], asked(40)[rows]
    np.testing.assert_array_equal(launched(logits, wanted, 2, graphs=True, padded=8).ids, shared(logits, wanted, 2).ids)


# ---- for sequences ---------------------------------------------------------------------------------------------------

PARAMS = [
    SamplingParams(temperature=0.0, logprobs=2),
    SamplingParams(temperature=0.9, seed=1, top_p=0.9, logprobs=0),
    SamplingParams(temperature=1.0, seed=2, logprobs=3),
    SamplingParams(temperature=0.9, seed=3, repetition_penalty=1.3, logprobs=2),
    SamplingParams(temperature=0.0, logit_bias={65: 9.0}),
    SamplingParams(temperature=0.7, seed=4, top_k=300, logprobs=1),
    SamplingParams(temperature=1.5, seed=5, min_p=0.1),
    SamplingParams(temperature=0.7, seed=6, allowed_token_ids=[3, 700]),
]


def states_of(vocabulary: int) -> list[SamplingState]:
    return [SamplingState(each, [1, 2, 3], vocab_size=vocabulary, eos_token_ids=[0]) for each in PARAMS]


@pytest.mark.parametrize("kind", ["usual", "flat"])
@pytest.mark.parametrize("drafted", [False, True])
def test_tokens_of_sequences(kind: str, drafted: bool) -> None:
    """Those of whole logits, drafts that are right included; also of rows that must be put together after all."""
    vocabulary, fetched = 999, list[list[int]]()
    drafts: Sequence[Sequence[int]] | None = None
    logits = rows_of(kind, len(PARAMS), vocabulary)
    right: Sequence[Any] = Sampler().sample(logits.clone(), states_of(vocabulary))
    if drafted:  # each right up to its second row
        drafts = [(SampledToken.of(token).token_id, 7) for token in right]
        logits = rows_of(kind, 3 * len(PARAMS), vocabulary)
        logits[::3] = rows_of(kind, len(PARAMS), vocabulary)
        right = Sampler().sample_runs(logits.clone(), states_of(vocabulary), drafts)

    def work(ranks: ThreadRanks) -> Any:
        share, states = share_of(ranks, vocabulary), states_of(vocabulary)
        shares = Shares(own_of(logits, share), share, wishes(states, drafts))

        def fetch(rows: NDArray[np.int64]) -> torch.Tensor:
            fetched.append(rows.tolist())
            return shares.whole(rows)

        sampler = Sampler()
        return draw_shared(shares, drafts, lambda some, given: sample_some(sampler, some, given, states, drafts), fetch)

    found, other = in_threads(2, work)
    assert other == found
    assert [tokens_in(each) for each in found] == [tokens_in(each, pytest.approx) for each in right]
    assert bool(fetched) == (kind == "flat")
    if drafted:
        assert [len(each) for each in found] == [2] * len(PARAMS)


def tokens_in(drawn: Any, about: Callable[..., Any] = lambda x, **_: x) -> Any:
    """Ids and log-probabilities, which two ways of summing give to the sixth place."""
    if isinstance(drawn, tuple):
        return tuple(tokens_in(each, about) for each in drawn)
    token = SampledToken.of(drawn)
    if token.logprobs is None:
        return token.token_id
    entry = token.logprobs
    return token.token_id, entry.rank, entry.top_ids, about([entry.logprob, *entry.top_logprobs], abs=1e-6)


class Counting(ThreadRanks):
    """Counts the bytes that each rank sends."""

    sent = 0

    def gather(self, x: Any, width: int) -> Any:
        self.sent += x.nbytes
        return super().gather(x, width)


@pytest.mark.parametrize(
    ("params", "most"),
    [
        (SamplingParams(temperature=0.0), 24),
        (SamplingParams(temperature=0.8, seed=1), 24 + 8),
        (SamplingParams(temperature=0.8, seed=1, logprobs=0), 24 + 8 + 8),
        (SamplingParams(temperature=0.8, seed=1, top_k=20), 16 + 8 * 21),
        (SamplingParams(temperature=0.8, seed=1, top_p=0.9), 16 + 8 * MOST_TOLD),
        (SamplingParams(temperature=0.0, presence_penalty=1.0), 4 * 4000),
        (SamplingParams(temperature=0.8, seed=1, top_k=MOST_TOLD), 4 * 4000),
    ],
    ids=lambda each: str(each)[:60],
)
def test_bytes_that_a_rank_sends(params: SamplingParams, most: int) -> None:
    """Of a row; whole logits only where something edits them, or as many are asked for."""
    vocabulary, rows = 8000, 5
    logits = rows_of("usual", rows, vocabulary)

    def work(ranks: ThreadRanks) -> int:
        ranks.__class__ = Counting
        states = [SamplingState(params, [1], vocab_size=vocabulary, eos_token_ids=[0]) for _ in range(rows)]
        share = share_of(ranks, vocabulary)
        shares = Shares(own_of(logits, share), share, wishes(states, None))
        assert not len(shares.lacking)
        assert isinstance(ranks, Counting)
        return ranks.sent

    assert in_threads(2, work) == [rows * most] * 2


def test_widths_hold_what_may_be_told() -> None:
    assert device_shares.KINDS[-1].width == MOST_TOLD
    assert max(told(control, 20) for control in CONTROLS) == MOST_TOLD
    assert told((0.7, 0.0, MOST_TOLD, 1.0), None) == 0
