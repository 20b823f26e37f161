# SPDX-License-Identifier: MIT
"""Every field of SamplingParams: its bounds, its types, and the field that the error names."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import msgspec
import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.params import (
    BIAS,
    BOUNDS,
    DEFAULT_SAMPLING,
    MAX_ALLOWED_TOKENS,
    MAX_BREAKER_LENGTH,
    MAX_BREAKERS,
    MAX_DRAFT_TOKENS,
    MAX_LOGPROBS,
    MAX_LOOKBACK,
    MAX_NAMED_LOGPROBS,
    MAX_PREDICTION,
    MAX_PROCESSORS,
    MAX_SEQUENCES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_TOKEN_LIST,
    MAX_TOKENS,
    RequestOutputKind,
    SamplingParams,
)
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.sampling.thoughts import ThoughtBudget
from candle_vllm.core.text.detokenizer import StopMarks

GOOD: dict[str, list[Any]] = {
    "n": [1, MAX_SEQUENCES],
    "temperature": [0, 0.0, 1, 100.0],
    "top_p": [1e-9, 1, 1.0],
    "top_k": [-1, 0, 1, (1 << 24)],
    "min_p": [0, 1, 0.5],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2.0, 2],
    "repetition_penalty": [1e-6, 1, 100],
    "seed": [None, 0, -1, -(1 << 63), (1 << 64) - 1],
    "max_tokens": [None, 1, MAX_TOKENS],
    "min_tokens": [0, 16],
    "stop": [None, "x", ["x", "y" * MAX_STOP_LENGTH], ["x"] * MAX_STOP_STRINGS, ("a",), []],
    "stop_marks": [None, StopMarks(states={"": {"<a>": "a"}, "a": {"</a>": ""}})],
    "stop_token_ids": [None, [], [0, (1 << 31) - 1], (3,), [0] * MAX_TOKEN_LIST],
    "ignore_eos": [True, False],
    "include_stop_str_in_output": [True, False],
    "skip_special_tokens": [True, False],
    "continues_prompt": [True, False],
    "prompt_progress": [True, False],
    "skip_reading_prefix_cache": [True, False],
    "output_kind": list(RequestOutputKind),
    "logprobs": [None, 0, MAX_LOGPROBS],
    "prompt_logprobs": [None, 0, MAX_LOGPROBS],
    "logit_bias": [None, {}, {0: -100, 5: 100.0}],
    "allowed_token_ids": [None, [0], (1, 2)],
    "logprob_token_ids": [None, [], [0] * MAX_NAMED_LOGPROBS, (3,)],
    "bad_words": [None, [], ["x", "y" * MAX_STOP_LENGTH]],
    "structured_outputs": [None, StructuredOutputsParams(json_object=True)],
    "thoughts": [None, ThoughtBudget(tokens=1, marks={"<a>": "</a>"})],
    "thinking_token_budget": [None, -1, 0, 1 << 24],
    "cache_salt": [None, "s", "s" * 256],
    "num_speculative_tokens": [0, 1, MAX_DRAFT_TOKENS],
    "stream_interval": [None, 1, 4],
    "prediction": [None, "", "x" * 1000],
    "repeat_last_n": [-1, 0, 64, MAX_LOOKBACK],
    "top_n_sigma": [-1, 0, 1.5, 100],
    "typical_p": [1e-9, 0.5, 1],
    "xtc_probability": [0, 0.5, 1],
    "xtc_threshold": [0, 0.1, 1.0],
    "dynatemp_range": [0, 100.0],
    "dynatemp_exponent": [0, 1.5, 100],
    "mirostat": [0, 1, 2],
    "mirostat_tau": [0, 5.0, 100],
    "mirostat_eta": [0, 0.1, 10],
    "dry_multiplier": [0, 0.8, 1000],
    "dry_base": [1, 1.75, 1000],
    "dry_allowed_length": [1, 2, MAX_LOOKBACK],
    "dry_penalty_last_n": [-1, 0, MAX_LOOKBACK],
    "dry_sequence_breakers": [None, [], ["x", "y" * MAX_BREAKER_LENGTH], ["x"] * MAX_BREAKERS],
    "logits_processors": [None, [], [lambda tokens, row: row]],
}

NO_INTEGER: list[Any] = ["1", 1.0, True, [1], None]
NO_NUMBER: list[Any] = ["1", True, [1.0], None, math.nan, math.inf, -math.inf]
NO_BOOL: list[Any] = [1, 0, "true", None]
NO_IDS: list[Any] = ["12", b"12", 5, [-1], [1 << 31], [1.0], [True], ["1"], {1, 2}]

BAD: dict[str, list[Any]] = {
    "n": [0, MAX_SEQUENCES + 1, *NO_INTEGER],
    "temperature": [-0.01, 100.01, *NO_NUMBER],
    "top_p": [0, 0.0, -0.1, 1.0001, *NO_NUMBER],
    "top_k": [-2, (1 << 24) + 1, *NO_INTEGER],
    "min_p": [-0.1, 1.1, *NO_NUMBER],
    "presence_penalty": [-2.1, 2.1, *NO_NUMBER],
    "frequency_penalty": [-2.1, 2.1, *NO_NUMBER],
    "repetition_penalty": [0, -1, 100.1, *NO_NUMBER],
    "seed": [-(1 << 63) - 1, 1 << 64, "1", 1.0, True],
    "max_tokens": [0, -1, MAX_TOKENS + 1, "1", 1.5, True],
    "min_tokens": [-1, 17, MAX_TOKENS + 1, *NO_INTEGER],
    "stop": ["", "y" * (MAX_STOP_LENGTH + 1), ["x", ""], ["x", 1], ["x"] * (MAX_STOP_STRINGS + 1), [None]],
    "stop_token_ids": [[0] * (MAX_TOKEN_LIST + 1), *NO_IDS],
    "ignore_eos": NO_BOOL,
    "include_stop_str_in_output": NO_BOOL,
    "skip_special_tokens": NO_BOOL,
    "continues_prompt": NO_BOOL,
    "prompt_progress": NO_BOOL,
    "skip_reading_prefix_cache": NO_BOOL,
    "output_kind": [0, 1, "delta", None],
    "logprobs": [-1, MAX_LOGPROBS + 1, "1", 1.0, True],
    "prompt_logprobs": [-1, MAX_LOGPROBS + 1, "1", 1.0, True],
    "logit_bias": [{0: 101}, {0: -101}, {0: math.nan}, {0: "1"}, {-1: 1}, {"0": 1}, {1 << 31: 1}, [1], "x"],
    "allowed_token_ids": [[], *NO_IDS],
    "logprob_token_ids": [[0] * (MAX_NAMED_LOGPROBS + 1), *NO_IDS],
    "structured_outputs": [{"json_object": True}, "json", True],
    "bad_words": ["x", [""], ["y" * (MAX_STOP_LENGTH + 1)], [1], ["x"] * (MAX_TOKEN_LIST + 1), 5],
    "stop_marks": [5, {"states": {}}],
    "thoughts": [5, {"tokens": 1, "marks": {"<a>": "</a>"}}],
    "thinking_token_budget": [-2, (1 << 24) + 1, "1", 1.0, True],
    "cache_salt": ["", "s" * 257, 5],
    "num_speculative_tokens": [-1, MAX_DRAFT_TOKENS + 1, *NO_INTEGER],
    "stream_interval": [0, MAX_TOKENS + 1, "1", 1.5, True],
    "prediction": [5, b"x", ["x"], "x" * (MAX_PREDICTION + 1)],
    "repeat_last_n": [-2, MAX_LOOKBACK + 1, *NO_INTEGER],
    "top_n_sigma": [-1.1, 100.1, *NO_NUMBER],
    "typical_p": [0, 1.1, *NO_NUMBER],
    "xtc_probability": [-0.1, 1.1, *NO_NUMBER],
    "xtc_threshold": [-0.1, 1.1, *NO_NUMBER],
    "dynatemp_range": [-0.1, 100.1, *NO_NUMBER],
    "dynatemp_exponent": [-0.1, 100.1, *NO_NUMBER],
    "mirostat": [-1, 3, *NO_INTEGER],
    "mirostat_tau": [-0.1, 100.1, *NO_NUMBER],
    "mirostat_eta": [-0.1, 10.1, *NO_NUMBER],
    "dry_multiplier": [-0.1, 1000.1, *NO_NUMBER],
    "dry_base": [0.9, 1000.1, *NO_NUMBER],
    "dry_allowed_length": [0, MAX_LOOKBACK + 1, *NO_INTEGER],
    "dry_penalty_last_n": [-2, MAX_LOOKBACK + 1, *NO_INTEGER],
    "dry_sequence_breakers": ["x", [""], ["y" * (MAX_BREAKER_LENGTH + 1)], [1], ["x"] * (MAX_BREAKERS + 1), 5],
    "logits_processors": [["x"], [None], 5, [print] * (MAX_PROCESSORS + 1)],
}


def _cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}-{repr(value)[:30]}") for name, row in table.items() for value in row]


def test_the_documented_bounds_are_those_of_the_table() -> None:
    text = " " + " ".join((SamplingParams.__doc__ or "").partition("Attributes:")[2].split())
    said = re.findall(r" (\w+): (?:(?! \w+: ).)*?([\[(])(-?\d+), (-?\d+)\]", text)
    assert len(said) > 18
    for name, mark, low, high in said:
        kind = BOUNDS.get(name, BIAS)
        assert (int(low), int(high), mark == "(") == (kind.low, kind.high, getattr(kind, "open_low", False)), name


def test_every_field_is_covered() -> None:
    fields = set(SamplingParams.__struct_fields__)
    assert fields == set(GOOD) == set(BAD)


@pytest.mark.parametrize(("name", "value"), _cases(GOOD))
def test_allowed(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), _cases(BAD))
def test_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300  # a message never echoes a whole input


def test_lists_have_caps() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        SamplingParams(allowed_token_ids=[0] * (MAX_ALLOWED_TOKENS + 1))
    assert caught.value.param == "allowed_token_ids"
    with pytest.raises(InvalidParameterError) as caught:
        SamplingParams(logit_bias=dict.fromkeys(range(MAX_TOKEN_LIST + 1), 1.0))
    assert caught.value.param == "logit_bias"


def test_min_tokens_against_max_tokens() -> None:
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000
    with pytest.raises(InvalidParameterError, match="must not exceed max_tokens") as caught:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert caught.value.param == "min_tokens"


def test_mirostat_takes_the_place_of_cuts_that_are_left_open() -> None:
    cuts = {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.7, "temperature": 0.6}
    filled = SamplingParams(mirostat=2, top_p=0.5).filled(cuts)
    assert (filled.top_k, filled.top_p, filled.min_p, filled.typical_p, filled.temperature) == (0, 0.5, 0.0, 1.0, 0.6)
    assert SamplingParams().filled(cuts).top_k == 40


def test_stop_strings_and_greedy() -> None:
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError):
        SamplingParams(best_of=2)  # type: ignore[call-arg]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"best_of": 2}, SamplingParams)


def test_a_field_that_is_set_is_checked_like_one_that_is_given() -> None:
    params = SamplingParams(max_tokens=4)
    params.max_tokens = 5
    params.temperature = 1.0
    assert params == SamplingParams(max_tokens=5, temperature=1.0)
    for name, wrong in (("max_tokens", 0), ("min_tokens", 6), ("top_p", 2.0)):
        before = getattr(params, name)
        with pytest.raises(InvalidParameterError) as caught:
            setattr(params, name, wrong)
        assert caught.value.param == name
        assert getattr(params, name) == before
    with pytest.raises(AttributeError, match="'max_new_tokens': it is called max_tokens"):
        params.max_new_tokens = 5  # type: ignore[attr-defined]


def test_what_an_engine_fills_is_a_copy() -> None:
    params = SamplingParams(temperature=0, top_p=1, top_k=0, min_p=0, typical_p=1, repetition_penalty=1, max_tokens=4)
    filled = params.filled({})
    params.max_tokens = 5
    assert filled.max_tokens == 4
    copied = params.clone()
    params.max_tokens = 6
    assert copied.max_tokens == 5


def test_what_is_open_stays_open_in_json_and_in_copies() -> None:
    params = SamplingParams(seed=1, temperature=1.0)
    text = msgspec.json.encode(params)
    assert text == b'{"temperature":1.0,"seed":1}'
    again = msgspec.json.decode(text, type=SamplingParams)
    assert again == params
    assert again.leaves_open("top_p")
    assert not again.leaves_open("temperature")
    for copied in (copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert copied == params
        assert msgspec.json.decode(msgspec.json.encode(copied), type=SamplingParams) == params
    assert msgspec.structs.replace(params, seed=2) == SamplingParams(seed=2, temperature=1.0)


def test_equal_parameters_sample_alike() -> None:
    assert SamplingParams() == SamplingParams()
    assert SamplingParams() != SamplingParams(temperature=1.0)
    assert SamplingParams(temperature=1.0) == SamplingParams(temperature=1)
    assert SamplingParams(max_tokens=16) != SamplingParams()
    assert SamplingParams() != 5
    assert SamplingParams(seed=1).filled(DEFAULT_SAMPLING) == SamplingParams(seed=1).filled(DEFAULT_SAMPLING)


def test_an_assignment_that_fails_in_any_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("a package with a processor is broken")

    params = SamplingParams(temperature=0.5)
    monkeypatch.setattr("candle_vllm.core.sampling.params.installed_processors", broken)
    with pytest.raises(ImportError):
        params.logits_processors = ["name"]
    assert params.logits_processors is None
    params.temperature = 0.7
