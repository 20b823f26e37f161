# SPDX-License-Identifier: MIT
"""A budget of thoughts in an engine: alone, in a batch, behind a cached prompt, and before a form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from candle_vllm.core import (
    EngineConfig,
    InferenceEngine,
    InvalidParameterError,
    SamplingParams,
    StructuredOutputsParams,
)
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


# ---- vLLM's name of it, between marks that the vocabulary has --------------------------------------------------------


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceEngine]:
    folder = write_toy_model(tmp_path_factory.mktemp("thinker") / "toy", toy_config(max_position_embeddings=512))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<think>", "</think>"])  # as Qwen's: no special tokens
    tokenizer.save(str(folder / "tokenizer.json"))
    with InferenceEngine(EngineConfig(model=str(folder), threads=1)) as made:
        yield made


def test_a_budget_by_its_vllm_name_is_the_same_budget(thinker: InferenceEngine) -> None:
    begin, end = (thinker.tokenize(mark, add_special_tokens=False)[0] for mark in ("<think>", "</think>"))
    turn = thinker.model_info.eos_token_ids[0]
    asked: dict[str, Any] = {
        "max_tokens": 12,
        "ignore_eos": True,
        "seed": 1,
        "logit_bias": {begin: -100.0, end: -100.0},
    }

    def drawn(prompt: list[int], **more: Any) -> list[int]:
        [answer] = thinker.generate([{"prompt_token_ids": prompt}], SamplingParams(**{**asked, **more}))
        return list(answer.outputs[0].token_ids)

    within = [*PROMPT, begin, 5]
    free = drawn(within)
    for budget in (0, 4):
        tokens = drawn(within, thinking_token_budget=budget)
        assert tokens[: budget + 1] == [*free[:budget], end]
        marks = ThoughtBudget(tokens=budget, marks={"<think>": "</think>"}, opened="<think>")
        assert tokens == drawn(within, thoughts=marks)
    assert drawn(within, thinking_token_budget=-1) == free
    for closed in ([*within, end], [*within, turn, 7]):  # the thoughts are over, or an earlier turn's
        assert drawn(closed, thinking_token_budget=0) == drawn(closed)
    begun = drawn(PROMPT, thinking_token_budget=2, logit_bias={begin: 100.0, end: -100.0})  # by the model itself
    assert begun.index(end) == 3


def test_a_budget_by_its_vllm_name_needs_tokens_around_thoughts(engine: InferenceEngine) -> None:
    assert len(run(engine, SamplingParams(max_tokens=2, thinking_token_budget=-1))[0]) <= 2
    with pytest.raises(
        InvalidParameterError,
        match=r"this model has no tokens that mark its "
        r"reasoning.*ThoughtBudget",
    ) as caught:
        run(engine, SamplingParams(max_tokens=2, thinking_token_budget=3))
    assert caught.value.param == "thinking_token_budget"
    with pytest.raises(InvalidParameterError, match="two budgets") as caught:
        SamplingParams(thinking_token_budget=3, thoughts=ThoughtBudget(tokens=1, marks={"a": "b"}))
    assert caught.value.param == "thinking_token_budget"
