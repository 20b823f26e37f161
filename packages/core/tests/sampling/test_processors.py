# SPDX-License-Identifier: MIT
"""Masks, bias and penalties by hand-computed example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from candle_vllm.core.sampling.device_edits import penalised
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.processors import apply_processors
from candle_vllm.core.sampling.state import SamplingState

INF = math.inf


def processed(
    row: Sequence[float],
    output: Sequence[int] = (),
    prompt: Sequence[int] = (),
    bad: Sequence[Sequence[int]] = (),
    **params: Any,
) -> list[float]:
    state = SamplingState(
        SamplingParams(**params), prompt, vocab_size=len(row), eos_token_ids=[0], bad_word_token_ids=bad
    )
    for token in output:
        state.append(token)
    logits = torch.tensor([row])
    apply_processors(logits, [state])
    return logits[0].tolist()


def test_penalties_by_hand() -> None:
    # Token 0 in the prompt, 1 twice in the output, 2 in both, 3 nowhere.
    result = processed(
        [2.0, 4.0, -1.0, 3.0],
        prompt=[0, 2],
        output=[1, 2, 1],
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    assert result == [1.0, 2.0 - 1.0 - 0.25, -2.0 - 0.5 - 0.25, 3.0]


def test_frequency_and_presence_look_at_the_output_only() -> None:
    row = [1.0, 1.0, 1.0]
    assert processed(row, prompt=[0], output=[1, 1], frequency_penalty=1.0) == [1.0, -1.0, 1.0]
    assert processed(row, prompt=[0], output=[1, 1], presence_penalty=-1.5) == [1.0, 2.5, 1.0]


def test_repetition_below_one_and_of_zero_logit() -> None:
    assert processed([1.0, -1.0, 0.0], prompt=[0, 1, 2], repetition_penalty=0.5) == [2.0, -0.5, 0.0]


def test_penalties_never_make_an_infinite_logit_and_keep_masked_ones() -> None:
    logits = torch.tensor([1.0, -1.0, 0.0, -INF, INF])
    ones = torch.ones(5, dtype=torch.float64)
    result = penalised(logits, torch.zeros(5), ones * 1e-300, ones * 0, ones * 0)
    assert result.tolist() == [torch.finfo(torch.float32).max, 0.0, 0.0, -INF, INF]


def test_allowed_keeps_only_those() -> None:
    assert processed([1.0, 2.0, 3.0], allowed_token_ids=[2, 0, 2]) == [1.0, -INF, 3.0]


def test_masks_come_before_bias_and_bias_before_penalties() -> None:
    assert processed([1.0, 2.0], allowed_token_ids=[1], logit_bias={0: 100}) == [-INF, 2.0]
    assert processed([1.0, 2.0], prompt=[0], logit_bias={0: 3}, repetition_penalty=2.0) == [2.0, 2.0]


def test_bad_words_and_min_tokens() -> None:
    assert processed([1.0, 1.0, 1.0], bad=[[2], [1, 1]], output=[1]) == [1.0, -INF, -INF]
    assert processed([1.0, 1.0, 1.0], min_tokens=2, stop_token_ids=[1], output=[2]) == [-INF, -INF, 1.0]
    assert processed([1.0, 1.0, 1.0], min_tokens=2, stop_token_ids=[1], output=[2, 2]) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("poison", [math.nan, INF])
def test_masking_the_broken_token_does_not_heal_the_row(poison: float) -> None:
    assert any(math.isnan(value) for value in processed([1.0, 1.0, poison], allowed_token_ids=[0]))
    assert any(math.isnan(value) for value in processed([1.0, 1.0, poison], bad=[[2]]))


def test_rows_use_their_own_parameters() -> None:
    params: list[dict[str, Any]] = [
        {},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [2]},
        {"presence_penalty": 1.0},
        {"min_tokens": 5},
        {"repetition_penalty": 4.0, "logit_bias": {2: -1.0}},
    ]
    row, states = [1.0, 2.0, 3.0], []
    for entry in params:
        states.append(SamplingState(SamplingParams(**entry), [0], vocab_size=3, eos_token_ids=[0]))
        states[-1].append(1)
    logits = torch.tensor([row] * len(params))
    apply_processors(logits, states)
    assert logits.tolist() == [processed(row, prompt=[0], output=[1], **entry) for entry in params]
