# SPDX-License-Identifier: MIT
"""Raw log-probabilities: values, ranks, order, memory, and what they leave alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from candle_vllm.core.errors import RequestError
from candle_vllm.core.sampling import sampler as module
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.sampler import SampledToken, Sampler, logprob_rows
from candle_vllm.core.sampling.state import SamplingState


def noise(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 1000, 4097])
def test_equal_log_softmax_of_the_raw_logits(vocabulary: int) -> None:
    logits = noise(5, vocabulary)
    tokens = [int(token) % vocabulary for token in (0, 1, 7, 500, 4096)]
    exact = logits.double().log_softmax(1)
    for at, row in enumerate(logprob_rows(logits, tokens, [0, 1, 3, 20, 20])):
        top = min([0, 1, 3, 20, 20][at], vocabulary)
        assert row.token_id == tokens[at]
        assert row.logprob == pytest.approx(exact[at, tokens[at]].item(), abs=1e-6)
        assert row.rank == 1 + int((logits[at] > logits[at, tokens[at]]).sum())
        assert row.top_ids == logits[at].argsort(descending=True)[:top].tolist()
        assert row.top_logprobs == pytest.approx(exact[at, row.top_ids].tolist(), abs=1e-6)


def test_ties_rank_by_id_and_match_the_top_list() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 0.0]])
    order = [1, 2, 4, 0, 3, 5]
    for rank, token in enumerate(order, start=1):
        (row,) = logprob_rows(logits, [token], [4])
        assert row.rank == rank
        assert row.top_ids == order[:4]


def test_never_above_zero_and_impossible_tokens_are_not_listed() -> None:
    logits = torch.tensor([[5.0, -math.inf, -math.inf]])
    (row,) = logprob_rows(logits, [0], [3])
    assert (row.logprob, row.rank, row.top_ids, row.top_logprobs) == (0.0, 1, [0], [0.0])
    (row,) = logprob_rows(torch.tensor([[40.0, 0.0]]), [0], [2])
    assert row.logprob <= 0


def test_sampled_logprobs_are_raw_and_only_where_asked() -> None:
    logits = noise(4, 300)
    params = [
        SamplingParams(temperature=0, logprobs=0),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logprobs=3, logit_bias={7: 100}, repetition_penalty=2.0, allowed_token_ids=[7]),
        SamplingParams(temperature=2.0, top_k=5, logprobs=5),
    ]
    states = [SamplingState(entry, [7], vocab_size=300, eos_token_ids=[]) for entry in params]
    exact = logits.double().log_softmax(1)
    rows = [SampledToken.of(token) for token in Sampler().sample(logits.clone(), states)]
    assert rows[1].logprobs is None
    for at, count in ((0, 0), (2, 3), (3, 5)):
        entry = rows[at].logprobs
        assert entry is not None
        assert entry.token_id == rows[at].token_id
        assert entry.logprob == pytest.approx(exact[at, entry.token_id].item(), abs=1e-6)
        assert entry.top_ids == exact[at].argsort(descending=True)[:count].tolist()
    assert rows[2].token_id == 7


def test_tokens_that_a_request_names_are_reported_beside_the_sampled_one() -> None:
    logits = noise(2, 300)
    params = [SamplingParams(temperature=0, logprob_token_ids=[299, 0, 299]), SamplingParams(temperature=0, logprobs=2)]
    states = [SamplingState(entry, [7], vocab_size=300, eos_token_ids=[]) for entry in params]
    first, second = (SampledToken.of(token) for token in Sampler().sample(logits.clone(), states))
    assert first.logprobs is not None
    assert second.logprobs is not None
    exact = logits.double().log_softmax(1)
    assert first.logprobs.top_ids == [first.token_id, 299, 0]
    assert first.logprobs.top_logprobs == pytest.approx(exact[0, first.logprobs.top_ids].tolist(), abs=1e-6)
    assert second.logprobs.top_ids == exact[1].argsort(descending=True)[:2].tolist()


def test_a_broken_row_has_no_logprobs_and_does_not_disturb_others() -> None:
    logits = noise(3, 50)
    logits[1, 4] = math.nan
    states = [SamplingState(SamplingParams(logprobs=2, seed=1), [], vocab_size=50, eos_token_ids=[]) for _ in range(3)]
    rows = [SampledToken.of(token) for token in Sampler().sample(logits.clone(), states)]
    assert rows[1].error
    assert rows[1].logprobs is None
    assert rows[0] == Sampler().sample(logits[:1].clone(), states[:1])[0]
    assert rows[2] == Sampler().sample(logits[2:].clone(), states[2:])[0]


def test_prompt_logprobs_in_chunks_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = noise(23, 100)
    tokens = np.random.default_rng(0).integers(0, 100, 23).tolist()
    whole = Sampler().prompt_logprobs(logits, tokens, 4)
    monkeypatch.setattr(module, "LOGPROB_CHUNK", 350)  # three rows at a time
    assert Sampler().prompt_logprobs(logits, tokens, 4) == whole
    assert [row.token_id for row in whole] == tokens
    assert Sampler().prompt_logprobs(logits[:0], [], 4) == []


def test_prompt_logprobs_of_a_broken_model_are_an_error() -> None:
    logits = noise(3, 10)
    logits[2, 0] = math.nan
    with pytest.raises(RequestError, match="NaN"):
        Sampler().prompt_logprobs(logits, [0, 1, 2], 1)
