# SPDX-License-Identifier: MIT
"""DRY: lengths of repetitions and sequence breakers against what they say, tried out place by place, and its time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from transformers.models.unlimited_ocr.generation_unlimited_ocr import (
    UnlimitedOcrSlidingWindowNoRepeatNgramLogitsProcessor,
)

from candle_vllm.core.kernels.sampling import chain
from candle_vllm.core.kernels.sampling.chain import repeats, z_lengths
from candle_vllm.core.sampling.dry import Breakers, BreakerTable, DryState
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.state import SamplingState, narrow_row
from candle_vllm.core.text.tokenizer import Tokenizer

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def expected(tokens: list[int], params: SamplingParams, breakers: list[tuple[int, ...]]) -> dict[int, float]:
    """What llama.cpp's rules take off, each place by itself."""
    size, window = len(tokens), params.dry_penalty_last_n
    tokens = tokens[max(size - window, 0) :] if window >= 0 else tokens
    size = len(tokens)
    if size <= params.dry_allowed_length:
        return {}
    limit = size
    for start in reversed(range(size)):  # the last breaker
        matches = [len(b) for b in breakers if tuple(tokens[start : start + len(b)]) == b]
        if matches:
            limit = size - start - max(matches)
            break
    longest: dict[int, int] = {}
    for end in range(size - 1):
        length = 0
        while length <= end and tokens[end - length] == tokens[size - 1 - length]:
            length += 1
        length = min(length, limit)
        if length >= params.dry_allowed_length:
            longest[tokens[end + 1]] = max(longest.get(tokens[end + 1], 0), length)
    return {
        token: params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
        for token, length in longest.items()
        if (token,) not in breakers
    }


def taken(state: DryState) -> dict[int, Any]:
    ids, values = state.penalties()
    return dict(zip(ids.tolist(), values.tolist()))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(TEXTS, st.integers(2, 4), st.sampled_from([1, 4, 10, 40]))
def test_it_can_forbid_repetitions_as_transformers_does(tokens: list[int], size: int, window: int) -> None:
    """`no_repeat_ngram_size` and Unlimited-OCR's `no_repeat_ngram_window_size`, by the settings of docs/sampling.md."""
    params = SamplingParams(
        dry_multiplier=1000,
        dry_base=1,
        dry_allowed_length=size - 1,
        dry_penalty_last_n=window,
        dry_sequence_breakers=(),
    )
    processor = UnlimitedOcrSlidingWindowNoRepeatNgramLogitsProcessor(size, window)
    logits = processor(torch.tensor([tokens]), torch.zeros(1, 4))[0]
    forbidden = dict.fromkeys(logits.isinf().nonzero()[:, 0].tolist(), 1000.0)
    assert taken(DryState(params, Breakers([]), tokens)) == forbidden


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    TEXTS,
    st.integers(1, 4),
    st.sampled_from([-1, 0, 3, 10, 40]),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=3),
)
def test_what_is_taken_off(tokens: list[int], allowed: int, window: int, breakers: list[tuple[int, ...]]) -> None:
    params = SamplingParams(
        dry_multiplier=0.8, dry_base=1.75, dry_allowed_length=allowed, dry_penalty_last_n=window, max_tokens=None
    )
    whole = DryState(params, Breakers(breakers), tokens)
    assert taken(whole) == pytest.approx(expected(tokens, params, breakers), rel=1e-6)
    # Token by token, with some that are taken back.
    grown = DryState(params, Breakers(breakers), tokens[:1])
    for token in tokens[1:]:
        for wrong in (0, 1, 2):
            grown.append(wrong)
        grown.rollback(3)
        grown.append(token)
    assert taken(grown) == taken(whole)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(TEXTS)
def test_the_compiled_lengths_are_the_references(tokens: list[int]) -> None:
    pytest.importorskip("numba")
    expected = z_lengths(tokens[::-1])[:0:-1]
    assert repeats(np.array(tokens, np.int64)).tolist() == expected
    with mock.patch.object(chain, "can_compile", return_value=False):
        assert repeats(np.array(tokens, np.int64)).tolist() == expected


@pytest.mark.parametrize("period", [1, 2, 7])
def test_hostile_repetitions_take_linear_time(period: int) -> None:
    def seconds(size: int) -> float:
        tokens, best = np.arange(size) % period, 1e9
        for _ in range(5):
            begin = time.perf_counter()
            repeats(tokens)
            best = min(best, time.perf_counter() - begin)
        return best

    repeats(np.zeros(4, np.int64))  # compiled
    assert seconds(400_000) < 40 * seconds(50_000)  # eight times as many; quadratic would be 64


def test_a_long_repetition_stays_a_number() -> None:
    params = SamplingParams(dry_multiplier=1000, dry_base=1000, dry_allowed_length=1)
    state = DryState(params, Breakers([]), [1] * 5000)
    assert taken(state) == {1: pytest.approx(np.finfo(np.float32).max)}
    sampling = SamplingState(params, [1] * 5000, vocab_size=4, eos_token_ids=[], breakers=Breakers([]))
    row = np.array([1.0, 5.0, -np.inf, 0.0], np.float32)
    narrow_row(row, sampling)
    assert row.tolist() == [1.0, float(np.finfo(np.float32).min), -np.inf, 0.0]


def test_breakers_are_found_in_the_vocabulary(toy_model: Path) -> None:
    tokenizer = Tokenizer.from_folder(toy_model)
    table = BreakerTable(tokenizer, tokenizer.vocab_size)
    texts = [tokenizer.token_text(token) for token in range(tokenizer.vocab_size)]
    found = table.of_request(SamplingParams(dry_multiplier=1, dry_sequence_breakers=["he", "\n"]))
    assert found is not None
    assert found.singles == {i for i, text in enumerate(texts) if "he" in text or "\n" in text}
    tail = tuple(tokenizer.encode("e", add_special_tokens=False))
    assert found.sequences == {(i, *tail) for i, text in enumerate(texts) if text.endswith("h") and "he" not in text}
    default = table.of_request(SamplingParams(dry_multiplier=1))
    assert default is not None
    assert default is table.of_request(SamplingParams(dry_multiplier=2))
    assert all(any(mark in texts[token] for mark in '\n:"*') for token in default.singles)
