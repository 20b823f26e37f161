# SPDX-License-Identifier: MIT
"""Sampling on a GPU against the reference: draws, cuts, ties, standing, edits, and independence of rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels import dispatch
from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.sampling import reference, triton_draw, triton_edit, triton_rows, triton_stand
from candle_vllm.core.kernels.sampling.contract import DeviceEdits
from candle_vllm.core.sampling.device_edits import apply_in_torch
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.state import SamplingState
from tests.common_run import few

# NumPy, in which Triton's interpreter computes, warns where the kernels mean to get inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INF = math.inf
ROWS = 2


@pytest.fixture(autouse=True)
def package_functions_run_references_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter they would run what they are compared with."""
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)


def noise(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def table(rows: int, temperature: float, min_p: float, top_k: int, top_p: float) -> np.ndarray:
    """Numbers spread evenly from one edge to the other, and not on the edges between equal weights."""
    controls = np.tile(np.array([temperature, min_p, top_k, top_p, 0.0]), (rows, 1))
    controls[:, 4] = (np.arange(rows) + 0.46371) / rows
    return controls


def draw(logits: torch.Tensor, controls: np.ndarray, device: torch.device, **more: bool) -> tuple[Any, Any]:
    arguments = dict(zip(("random", "search"), kernels.asks(controls))) | more
    ids, largest = triton_draw.draw(logits.to(device), torch.from_numpy(controls).to(device), **arguments)
    return ids.cpu().numpy(), largest.cpu().numpy()


LOGITS = {
    "flat": lambda v: noise(ROWS, v, 1, 0.01),
    "usual": lambda v: noise(ROWS, v, 2),
    "ties": lambda v: noise(ROWS, v, 3).bfloat16().float(),
    "equal": lambda v: torch.full((ROWS, v), -7.25),
    "two values": lambda v: (noise(ROWS, v, 4) > 0).float() * 1e-3 + 5,
    "an abyss": lambda v: torch.where(noise(ROWS, v, 5) > -2, noise(ROWS, v, 6), torch.tensor(-3e38)),
    "mostly masked": lambda v: torch.where(noise(ROWS, v, 7) > 5, noise(ROWS, v, 6), torch.tensor(-INF)),
    "wide": lambda v: noise(ROWS, v, 8, 1e30),
    "both zeros": lambda v: torch.where(noise(ROWS, v, 4) > 0, 0.0, torch.tensor(-0.0)),
}
CONTROLS = [
    (0.0, 0, 1.0),
    (0.0, 7, 1.0),
    (0.0, 700, 0.97031),
    (0.0, 0, 0.61093),
    (0.0, 0, 0.99873),
    (0.3, 0, 0.90317),
    (1.0, 0, 1.0),
    (0.02, 30, 0.51713),
]


SIZES = [(1, "equal")] + [(123, kind) for kind in LOGITS] + [(4321, "usual"), (4321, "mostly masked")]
COMMON = [(1, "equal"), (123, "usual"), (123, "ties"), (123, "mostly masked"), (123, "both zeros"), (4321, "usual")]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(("vocabulary", "kind"), few(SIZES, *COMMON))
def test_draws_equal_the_references(device: torch.device, kind: str, vocabulary: int) -> None:
    logits = LOGITS[kind](vocabulary)
    logits[:, 0] = logits[:, 0].clamp(min=-30)  # a token to choose
    # The interpreter takes a second for a few rows.
    whole = device.type == "cuda" or (vocabulary, kind) in ((123, "usual"), (1, "equal"))
    usual = CONTROLS if whole else (CONTROLS[2], CONTROLS[3], CONTROLS[7])
    controls = np.concatenate(
        [
            table(ROWS, temperature, min_p, top_k if top_k < vocabulary else 0, top_p)
            for temperature, of_these in ((0.0, CONTROLS[:1]), (0.7, usual), (30.0, CONTROLS[2 : 5 if whole else 3]))
            for min_p, top_k, top_p in of_these
        ]
    )
    many = logits.repeat(len(controls) // ROWS, 1)
    (ids, largest), (expected, peaks) = draw(many, controls, device), reference.draw(many, controls)
    assert largest.tolist() == peaks.tolist()
    assert (ids != expected).sum() <= 1  # a random number on the very edge of two tokens


def supports(row: torch.Tensor, controls: tuple[float, ...], device: torch.device, draws: int = 20) -> set[int]:
    """The ids that can be drawn from one row, by an even grid of random numbers."""
    return set(draw(row.expand(draws, -1).contiguous(), table(draws, *controls), device)[0].tolist())  # type: ignore


@pytest.mark.parametrize("seed", [1])
def test_the_tokens_that_are_kept_are_exactly_the_references(device: torch.device, seed: int) -> None:
    generator = np.random.default_rng(seed)
    row = torch.from_numpy(generator.integers(-12, 13, (1, int(generator.integers(2, 40))))).float() / 8
    controls = (5.0, 0.0, float(generator.integers(0, row.shape[1])), float(generator.choice([1.0, 0.90317, 0.1391])))
    draws = 20
    wanted = reference.draw(row.expand(draws, -1).contiguous(), table(draws, *controls))[0]  # type: ignore[arg-type]
    assert supports(row, controls, device, draws) == set(wanted.tolist())


def test_ties_at_the_cut_of_top_p_keep_the_lower_ids(device: torch.device) -> None:
    row = torch.full((1, 5000), -50.0)
    row[0, 100:4900] = 0.0
    # 4,800 equal weights: half of the mass is the first 2,400 of them. 0.5 is just reached, 2,399 is the last.
    controls = table(8, 1.0, 0.0, 0, 0.5)
    controls[:, 4] = (1e-9, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-9)
    ids = draw(row.expand(8, -1).contiguous(), controls, device)[0]
    assert (ids.min(), ids.max()) == (100, 2499)
    assert (np.diff(ids) >= 0).all()


@pytest.mark.parametrize("k", few([1, 49, 4096], 1, 4096))
def test_top_k_of_distinct_logits_keeps_k(device: torch.device, k: int) -> None:
    order = torch.randperm(4097, generator=torch.Generator().manual_seed(k))
    row = torch.arange(4097, dtype=torch.float32)[order]
    controls = table(4, 1e9, 0.0, k, 1.0)
    controls[:, 4] = (1e-9, 0.4 / k, 1 - 0.4 / k, 1 - 1e-9)
    kept = (row >= 4097 - k).nonzero().flatten()
    ids = draw(row.expand(4, -1).contiguous(), controls, device)[0]
    assert ids.tolist() == [kept[0], kept[0], kept[-1], kept[-1]]


@pytest.mark.parametrize("limit", [8])
def test_a_row_with_too_many_candidates_is_searched_itself(
    device: torch.device, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda":
        pytest.skip("a compiled kernel keeps the constant it was compiled with")
    logits = noise(1, 4200).repeat(3, 1)
    controls = np.array([(1.0, 0.0, 300, 1.0, 0.7), (3.0, 0.01, 0, 0.9, 0.3), (1.0, 0.0, 90, 0.7, 0.9)])
    wanted = draw(logits, controls, device)[0]
    tokens, tops = torch.arange(3), torch.full((3,), 20)
    before = triton_stand.stand(logits, tokens, tops, 20)
    for module in (triton_rows, triton_draw, triton_stand):
        monkeypatch.setattr(module, "BUFFER", triton_rows.tl.constexpr(limit))
    assert np.array_equal(draw(logits, controls, device)[0], wanted)
    after = triton_stand.stand(logits, tokens, tops, 20)
    assert torch.equal(before.top_ids, after.top_ids)
    assert torch.equal(before.top_logits, after.top_logits)


@pytest.mark.one_of_each
@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
@pytest.mark.parametrize("place", [0, 4095, 4096, 4200])
def test_largest_logits_tell_broken_rows(device: torch.device, poison: float, place: int) -> None:
    logits = noise(3, 4201)
    logits[1] = -INF
    logits[1, place] = poison
    for controls in (table(3, 0.0, 0.0, 0, 1.0), table(3, 1.0, 0.01, 5, 0.9)):
        ids, largest = draw(logits, controls, device)
        np.testing.assert_array_equal(largest, logits.amax(1).numpy())
        assert ids[1] == 0
        assert np.array_equal(ids[[0, 2]], reference.draw(logits, controls)[0][[0, 2]])


def test_a_row_does_not_depend_on_its_neighbours_nor_on_where_it_lies(device: torch.device) -> None:
    wide = torch.full((4, 4300), INF)
    logits = wide[:, :4201]
    logits.copy_(noise(4, 4201))
    controls = np.array([(1.0, 0.0, 0.0, 0.9, 0.3), (0.0, 0, 0, 1, 0.5), (2.0, 0.1, 0, 1, 0.9), (1.0, 0, 40, 0.8, 0.7)])
    together, peaks = draw(logits, controls, device)
    for row in range(4):
        for more in ({}, {"random": True, "search": True}):
            ids, largest = draw(logits[row : row + 1].contiguous(), controls[row : row + 1], device, **more)
            assert (ids[0], largest[0]) == (together[row], peaks[row])


@pytest.mark.parametrize(("vocabulary", "kind"), few(SIZES, *COMMON))
def test_standing_equals_the_references(device: torch.device, kind: str, vocabulary: int) -> None:
    logits = LOGITS[kind](vocabulary)
    logits[:, 0] = logits[:, 0].clamp(min=-30)
    tokens = np.random.default_rng(0).integers(0, vocabulary, ROWS)
    tops = np.array([20, 7])
    place = [torch.from_numpy(x).to(device) for x in (tokens, tops)]
    got = triton_stand.stand(logits.to(device), place[0], place[1], 20)
    wanted = kernels.stand_tensors(logits, torch.from_numpy(tokens), torch.from_numpy(tops), 20)
    np.testing.assert_allclose(got.offsets.cpu(), wanted.offsets, rtol=1e-7, atol=1e-6)
    for name in ("ranks", "logits", "top_ids", "top_logits"):
        assert torch.equal(getattr(got, name).cpu(), getattr(wanted, name)), name


def test_standing_of_a_broken_row_leaves_its_neighbours_alone(device: torch.device) -> None:
    logits = noise(3, 700)
    logits[1, 9] = math.nan
    tokens, tops = torch.tensor([5, 0, 699], device=device), torch.full((3,), 4, device=device)
    got = triton_stand.stand(logits.to(device), tokens, tops, 4)
    assert got.offsets[1].isnan()
    sound = torch.tensor([0, 2])
    wanted = kernels.stand_tensors(logits[sound], tokens[sound.to(device)].cpu(), tops[:2].cpu(), 4)
    assert torch.equal(got.top_ids.cpu()[sound], wanted.top_ids)
    assert torch.equal(got.ranks.cpu()[sound], wanted.ranks)


PARAMS: list[dict[str, Any]] = [
    {},
    {"logit_bias": {3: 2.5, 900: -100.0}},
    {"allowed_token_ids": [899, 0, 5]},
    {"allowed_token_ids": [4], "min_tokens": 9, "stop_token_ids": [4, 7]},
    {"repetition_penalty": 1.3, "frequency_penalty": -0.4, "presence_penalty": 0.7},
    {"repetition_penalty": 1e-300, "logit_bias": {2: 100.0}, "min_tokens": 3},
    {"presence_penalty": 1.5},
]
VOCABULARY = 901


def edits_of(states: list[SamplingState], device: torch.device) -> DeviceEdits:
    """What the states ask for, as the tables of the device."""
    number, words = len(states), -(-VOCABULARY // 32)
    bias_ids, bias = torch.full((number, 40), -1, dtype=torch.int32), torch.zeros(number, 40)
    mask_rows, masks = torch.full((number,), -1, dtype=torch.int32), np.zeros((number, words * 32), bool)
    count_rows, counts = torch.full((number,), -1, dtype=torch.int32), torch.zeros(number, VOCABULARY).int()
    penalties = torch.zeros(number, 3, dtype=torch.float64)
    for row, state in enumerate(states):
        entries = dict(zip(state.bias_ids.tolist(), state.bias_values.tolist()))
        entries |= dict.fromkeys(state.forbidden_ids().tolist() if state.masks_tokens else [], -INF)
        bias_ids[row, : len(entries)] = torch.tensor(list(entries), dtype=torch.int32)
        bias[row, : len(entries)] = torch.tensor(list(entries.values()))
        if state.allowed is not None:
            mask_rows[row] = number - 1 - row
            masks[number - 1 - row, state.allowed] = True
        if state.counts is not None:
            count_rows[row] = number - 1 - row
            counts[number - 1 - row, state.counts.ids] = torch.from_numpy(state.counts.counts).int() + 1
            p = state.params
            penalties[row] = torch.tensor([p.repetition_penalty, p.frequency_penalty, p.presence_penalty])
    packed = torch.from_numpy(np.packbits(masks, axis=1, bitorder="little").view(np.int32))
    parts = (bias_ids, bias, mask_rows, packed, count_rows, counts, penalties)
    return DeviceEdits(*(part.to(device) for part in parts))


def states_of(tokens: tuple[int, ...]) -> list[SamplingState]:
    states = [
        SamplingState(SamplingParams(**entry), [1, 2, 2, 800], vocab_size=VOCABULARY, eos_token_ids=[0, 6])
        for entry in PARAMS
    ]
    for state in states:
        for token in tokens:
            state.append(token)
    return states


@pytest.mark.parametrize("poison", [0.0, -INF, INF, math.nan])
def test_edits_equal_those_of_the_processors(device: torch.device, poison: float) -> None:
    states = states_of((2, 5, 900, 5))
    logits = noise(len(states), VOCABULARY)
    logits[:, 6] = poison
    expected, plain, got = logits.clone(), logits.clone(), logits.to(device)
    apply_in_torch(expected, states)
    kernels.edit_tensors(plain, edits_of(states, torch.device("cpu")))
    triton_edit.edit(got, edits_of(states, device))
    torch.testing.assert_close(got.cpu(), plain, rtol=1e-7, atol=0, equal_nan=True)
    broken = ~(expected.amax(1) < INF)
    assert torch.equal(broken, ~(plain.amax(1) < INF))
    torch.testing.assert_close(plain[~broken], expected[~broken], rtol=1e-7, atol=0)


def test_edits_that_nobody_asks_for_are_left_out(device: torch.device) -> None:
    logits = noise(2, 50).to(device)
    before = logits.clone()
    triton_edit.edit(logits, DeviceEdits())
    none = torch.full((2,), -1, dtype=torch.int32, device=device)
    triton_edit.edit(logits, DeviceEdits(mask_rows=none, masks=torch.zeros(1, 2, dtype=torch.int32, device=device)))
    assert torch.equal(logits, before)
    with pytest.raises(AssertionError, match="must be given together"):
        triton_edit.edit(logits, DeviceEdits(mask_rows=none))


def test_counts_follow_the_tokens(device: torch.device) -> None:
    before, after = (edits_of(states_of(tokens), device) for tokens in ((2, 5), (2, 5, 900)))
    assert before.counts is not None
    assert before.count_rows is not None
    assert after.counts is not None
    tokens = torch.full((len(PARAMS),), 900, device=device)
    plain = before.counts.cpu().clone()
    triton_edit.note(before.counts, before.count_rows, tokens)
    kernels.note_tokens(plain, before.count_rows.cpu(), tokens.cpu())
    assert torch.equal(before.counts, after.counts)
    assert torch.equal(plain, after.counts.cpu())
    triton_edit.note(before.counts, before.count_rows, torch.full_like(tokens, -1))
    assert torch.equal(before.counts, after.counts)


def test_without_a_gpu_the_reference_draws() -> None:
    logits, controls = noise(4, 300), table(4, 1.0, 0.0, 20, 0.9)
    logits[2] = -INF
    ids, largest = kernels.draw_tensors(logits, torch.from_numpy(controls))
    wanted, peaks = reference.draw(logits, controls)
    assert ids[[0, 1, 3]].tolist() == wanted[[0, 1, 3]].tolist()
    assert (ids[2], largest.tolist()) == (0, peaks.tolist())
