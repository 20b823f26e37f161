# SPDX-License-Identifier: MIT
"""What a sequence's state refuses, counts and forbids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.random import seed_words, uniforms
from candle_vllm.core.sampling.state import SamplingState, uniforms_ahead


def make(
    prompt: Sequence[int] = (1, 2), bad: Sequence[Sequence[int]] = (), index: int = 0, **params: Any
) -> SamplingState:
    return SamplingState(
        SamplingParams(**params), prompt, vocab_size=10, eos_token_ids=[9, 99], index=index, bad_word_token_ids=bad
    )


@pytest.mark.parametrize("name", ["allowed_token_ids", "stop_token_ids"])
def test_ids_outside_the_vocabulary_are_refused_by_name(name: str) -> None:
    allowed: dict[str, Any] = {name: [0, 9]}
    wrong: dict[str, Any] = {name: [0, 10]}
    assert make(**allowed)
    with pytest.raises(InvalidParameterError, match=f"{name} holds token id 10, .* 10 ids, 0 to 9") as caught:
        make(**wrong)
    assert caught.value.param == name


def test_bias_words_and_prompt_outside_the_vocabulary_are_refused_by_name() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        make(logit_bias={10: 1.0})
    assert caught.value.param == "logit_bias"
    for word in ([3, 10], [-1]):
        with pytest.raises(InvalidParameterError) as caught:
            make(bad=[word])
        assert caught.value.param == "bad_words"
    with pytest.raises(InvalidParameterError, match="no token"):
        make(bad=[[]])
    with pytest.raises(InvalidParameterError) as caught:
        make(prompt=[10], repetition_penalty=1.5)
    assert caught.value.param == "prompt_token_ids"


def test_counts_of_prompt_and_output() -> None:
    state = make(prompt=[5, 2, 5], repetition_penalty=1.5)
    for token in (3, 2, 3):
        state.append(token)
    assert state.counts is not None
    assert dict(zip(state.counts.ids.tolist(), state.counts.counts.tolist())) == {2: 1, 5: 0, 3: 2}
    assert state.output_token_ids == [3, 2, 3]


def test_counts_leave_out_the_prompt_where_it_does_not_matter() -> None:
    state = make(frequency_penalty=1.0)
    state.append(4)
    assert state.counts is not None
    assert state.counts.ids.tolist() == [4]
    assert make().counts is None


def test_counts_grow_past_their_first_size() -> None:
    state = SamplingState(SamplingParams(presence_penalty=1.0), [], vocab_size=1000, eos_token_ids=[])
    for token in range(1000):
        state.append(token)
    assert state.counts is not None
    assert state.counts.ids.tolist() == list(range(1000))
    assert state.counts.counts.tolist() == [1.0] * 1000


def test_min_tokens_holds_back_every_stop_token_even_under_ignore_eos() -> None:
    for ignore in (False, True):
        state = make(min_tokens=2, stop_token_ids=[4], ignore_eos=ignore)
        for _ in range(2):
            assert state.masks_tokens
            assert state.forbidden_ids().tolist() == [4, 9]  # 99 lies outside the vocabulary
            state.append(0)
        assert not state.masks_tokens
        assert state.forbidden_ids().tolist() == []


def test_bad_words_forbid_the_token_that_completes_them() -> None:
    state = make(bad=[[7], [1, 2, 3], [2, 4], [2, 2, 5]], prompt=[1, 2])
    assert state.forbidden_ids().tolist() == [7]  # the prompt is not looked at, as in vLLM
    state.append(2)
    assert sorted(state.forbidden_ids().tolist()) == [4, 7]
    state.append(1)
    assert state.forbidden_ids().tolist() == [7]
    state.append(2)
    assert sorted(state.forbidden_ids().tolist()) == [3, 4, 7]


def test_top_k_that_keeps_all_is_no_top_k() -> None:
    assert [make(top_k=k).controls[2] for k in (-1, 0, 1, 9, 10, 11)] == [0, 0, 1, 9, 0, 0]


def test_uniform_follows_position_seed_and_index() -> None:
    state = make(seed=-5, index=2)
    (expected,) = uniforms([seed_words(-5, 2)], [0], 200)
    for number in expected:
        assert state.uniform() == state.uniform() == number
        state.append(0)


def test_random_numbers_ahead_are_those_that_come() -> None:
    """Of sequences at different positions: some have numbers left, some none, and some had tokens taken back."""
    rng = random.Random(2)
    states = [make(seed=seed, index=seed) for seed in range(4)]
    expected = uniforms([seed_words(seed, seed) for seed in range(4)], [0] * 4, 400)
    lengths = set()
    for _ in range(60):
        for state in states:
            for _ in range(rng.randrange(6)):
                state.append(0)
            state.rollback(min(rng.randrange(4), state.position))
            assert rng.random() < 0.8 or state.uniform() == expected[state.index, state.position]
        ahead = uniforms_ahead(states)
        lengths.add(len(ahead))
        for state, numbers in zip(states, ahead.T, strict=True):
            assert np.array_equal(numbers, expected[state.index, state.position :][: len(numbers)])
    assert len(lengths) > 5


def test_unseeded_states_differ() -> None:
    assert make().uniform() != make().uniform()


def test_tokens_that_are_taken_back_leave_nothing_behind() -> None:
    """Counts, forbidden words, random numbers and what `min_tokens` holds back are those of the tokens left."""
    params: dict[str, Any] = {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "min_tokens": 4,
        "seed": 3,
        "temperature": 1.0,
    }
    rng = random.Random(5)
    state, left = make(bad=[[3, 4]], **params), list[int]()
    for _ in range(300):
        back = rng.randrange(min(3, len(left)) + 1) if rng.random() < 0.4 else 0
        state.rollback(back)
        del left[len(left) - back :]
        if not back:
            left.append(rng.randrange(9))
            state.append(left[-1])
        fresh = make(bad=[[3, 4]], **params)
        for token in left:
            fresh.append(token)
        assert state.output_token_ids == left
        assert state.counts is not None
        assert fresh.counts is not None
        assert state.counts.ids.tolist() == fresh.counts.ids.tolist()
        assert state.counts.counts.tolist() == fresh.counts.counts.tolist()
        assert state.forbidden_ids().tolist() == fresh.forbidden_ids().tolist()
        assert (state.uniform(), state.masks_tokens) == (fresh.uniform(), fresh.masks_tokens)
