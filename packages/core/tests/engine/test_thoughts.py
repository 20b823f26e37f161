"""A budget of thoughts in an engine: alone, in a batch, behind a cached prompt, and before a form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams, StructuredOutputsParams
from candle_vllm.core.sampling.thoughts import ThoughtBudget
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model

PROMPT = list(range(1, 40))
END = ". So: "


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceEngine]:
    folder: Path = write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config(max_position_embeddings=512))
    with InferenceEngine(EngineConfig(model=str(folder), threads=1)) as made:
        yield made


def params(tokens: int | None, seed: int = 1, **more: Any) -> SamplingParams:
    budget = None if tokens is None else ThoughtBudget(tokens=tokens, marks={"Hm ": END}, opened="Hm ")
    return SamplingParams(**{"max_tokens": 24, "ignore_eos": True, "seed": seed, "thoughts": budget, **more})


def run(engine: InferenceEngine, *asked: SamplingParams) -> list[list[int]]:
    answers = engine.generate([{"prompt_token_ids": PROMPT}] * len(asked), list(asked))
    return [list(one.token_ids) for answer in answers for one in answer.outputs]


def test_thoughts_are_ended_at_the_very_token_and_the_answer_goes_on(engine: InferenceEngine) -> None:
    end = engine.tokenize(END, add_special_tokens=False)
    free = run(engine, params(None))[0]
    for budget in (0, 1, 7):
        tokens = run(engine, params(budget))[0]
        assert tokens[:budget] == free[:budget]
        assert tokens[budget : budget + len(end)] == end
        assert len(tokens) == 24
    assert end != free[7 : 7 + len(end)]


def test_neighbours_samples_and_a_cached_prompt_change_nothing(engine: InferenceEngine) -> None:
    asked = [params(3), params(None, seed=2), params(5, seed=3, temperature=0.0), params(9, seed=4, n=2)]
    alone = [tokens for one in asked for tokens in run(engine, one)]
    assert run(engine, *asked) == alone
    end = engine.tokenize(END, add_special_tokens=False)
    for tokens in alone[-2:]:
        assert tokens[9 : 9 + len(end)] == end


def test_what_forbids_tokens_does_not_forbid_the_end_of_thoughts(engine: InferenceEngine) -> None:
    end = engine.tokenize(END, add_special_tokens=False)
    bias = {end[0]: -100.0}
    tokens = run(engine, params(2, logit_bias=bias, bad_words=["So"], min_tokens=20, repetition_penalty=1.3))[0]
    assert tokens[2 : 2 + len(end)] == end


def test_a_form_begins_behind_thoughts_that_were_cut(engine: InferenceEngine) -> None:
    form = StructuredOutputsParams(choice=["red", "green"], reasoning_end=END)
    [answer] = engine.generate([{"prompt_token_ids": PROMPT}], params(6, structured_outputs=form, max_tokens=64))
    one = answer.outputs[0]
    thoughts, _, said = one.text.partition(END)
    assert said in ("red", "green")
    assert len(one.token_ids) > 6
    assert thoughts


def test_the_log_probabilities_of_forced_tokens_are_the_model_s(engine: InferenceEngine) -> None:
    [answer] = engine.generate([{"prompt_token_ids": PROMPT}], params(2, logprobs=1))
    logprobs = answer.outputs[0].logprobs
    assert logprobs is not None
    assert all(-100 < entry.chosen.logprob < -0.01 for entry in logprobs[2:4])
