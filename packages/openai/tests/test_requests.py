# SPDX-License-Identifier: MIT
"""Bodies -> requests: what is accepted, and how each refusal names its field."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.core.errors import RequestError
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.setting_kinds import MAX_TEMPLATE
from candle_vllm.openai import (
    ADVISORY_FIELDS,
    REFUSED_FIELDS,
    ChatCompletionRequest,
    CompletionRequest,
    UnknownParameterError,
    UnsupportedParameterError,
    parse_chat_request,
    parse_completion_request,
    to_error,
    to_sampling_params,
)
from candle_vllm.openai.anthropic import MessagesRequest
from candle_vllm.openai.fim import FimRequest
from candle_vllm.openai.json_body import parse_body
from candle_vllm.openai.llama_server import InfillRequest, LlamaCompletionRequest
from candle_vllm.openai.ollama import ChatRequest, EmbedRequest, GenerateRequest
from candle_vllm.openai.ollama.request import CalledFunction
from candle_vllm.openai.protocol.cohere import CohereEmbedRequest
from candle_vllm.openai.protocol.embeddings import EmbeddingRequest
from candle_vllm.openai.protocol.fields import (
    COMPLETION_REFUSED_FIELDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    WireModel,
)
from candle_vllm.openai.protocol.score import RerankRequest
from candle_vllm.openai.protocol.tokenizing import TokenizeChatRequest, TokenizeContentRequest, TokenizeTextRequest
from candle_vllm.openai.remarks import collect_remarks

HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_chat_request(json.dumps({"messages": HI, **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion_request(json.dumps({"prompt": "hi", **fields}).encode())


def refusal(parse: Any, **fields: Any) -> tuple[str | None, str]:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    return caught.value.param, str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "structural_tag", "structures": [], "triggers": [1] * 200_000}},
        {"response_format": {"type": "structural_tag", "structures": [1] * 200_000, "triggers": []}},
        {"metadata": {str(number): number for number in range(90_000)}},
    ],
    ids=["triggers", "structures", "metadata"],
)
def test_many_wrong_entries_are_not_all_listed(fields: dict[str, Any]) -> None:
    """An error of each would keep the interpreter for a second and more."""
    body = json.dumps({"messages": HI, **fields}).encode()
    begun = time.process_time()
    with pytest.raises(RequestError):
        parse_chat_request(body)
    assert time.process_time() - begun < 0.4


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": "1"}, "temperature", 'must be a number, not "1"'),
        ({"temperature": True}, "temperature", "must be a number, not true"),
        ({"temperature": 10**400}, "temperature", "must be a number"),
        ({"temperature": -0.1}, "temperature", "must be at least 0"),
        ({"temperature": 100.5}, "temperature", "must be at most 100"),
        ({"top_p": 0}, "top_p", "must be above 0"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "here it is called 'reasoning_effort'"),
        ({"n": 1.0}, "n", "must be an integer, not 1.0"),
        ({"n": True}, "n", "must be an integer, not true"),
        ({"n": 129}, "n", "must be at most 128, not 129"),
        ({"n": 10**400}, "n", "must be at most 128"),
        ({"seed": 1 << 64}, "seed", "must be at most"),
        ({"max_tokens": 0}, "max_tokens", "must be at least 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "older name"),
        ({"min_tokens": -1}, "min_tokens", "must be at least 0"),
        ({"stop": 3}, "stop", "must be a string or a list, not 3"),
        ({"stop": ["a", 3]}, "stop.1", "must be a string"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"stop": ""}, "stop", "must not be empty"),
        ({"logit_bias": {"01": 1}}, "logit_bias", "'01' is no token id"),
        ({"logit_bias": {"a": 1, "5": 1, "b": 1}}, "logit_bias", "'a', 'b' are no token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "must be at most 100"),
        ({"logit_bias": {str(i): 1 for i in range(MAX_LOGIT_BIAS + 1)}}, "logit_bias", f"at most {MAX_LOGIT_BIAS}"),
        ({"bad_words": ["a"] * (MAX_BAD_WORDS + 1)}, "bad_words", f"at most {MAX_BAD_WORDS}"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "must be at least 0"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "must not be empty"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag", "include_usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation", "padded"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "without stream"),
        ({"logprobs": 3}, "logprobs", "must be true or false, not 3"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids", "needs logprobs"),
        ({"logprobs": True, "logprob_token_ids": [1] * 129}, "logprob_token_ids", "at most 128"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be at most 20"),
        ({"modalities": ["text", "audio"]}, "modalities", '["text"]'),
        ({"best_of": 2}, "best_of", "equal n"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"xyzzy": None}, "xyzzy", "not a known field"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "'low'"),
        ({"thinking": True, "enable_thinking": False}, "enable_thinking", "contradicts"),
        ({"thinking": True, "reasoning_effort": "none"}, "reasoning_effort", "contradicts"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "cannot be set"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs", "'a b' cannot be one"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "exclude"),
        ({"echo": True}, "echo", "role assistant"),
        ({"request_id": "a\nb"}, "request_id", "letters, digits"),
        ({"request_id": ""}, "request_id", "letters, digits"),
        ({"metadata": {"a": 1}}, "metadata.a", "must be a string"),
        ({"service_tier": "gold"}, "service_tier", "must be one of"),
        ({"priority": 1 << 31}, "priority", "must be at most"),
        ({"documents": ["a"]}, "documents.0", "must be an object"),
        ({"chat_template": ""}, "chat_template", "must not be empty"),
        ({"chat_template": "x" * (MAX_TEMPLATE + 1)}, "chat_template", f"at most {MAX_TEMPLATE} characters"),
        ({"include_reasoning": "no"}, "include_reasoning", "must be true or false"),
        ({"ebnf": "a"}, "ebnf", "use structured_outputs"),
        ({"separate_reasoning": False}, "separate_reasoning", "include_reasoning"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": HI * (MAX_MESSAGES + 1)}, "messages", f"at most {MAX_MESSAGES}"),
        ({"messages": None}, "messages", "must be a list"),
    ],
)  # fmt: skip
def test_chat_refusals_name_the_field(fields: dict[str, Any], param: str, message: str) -> None:
    blamed, text = refusal(chat, **fields)
    assert blamed == param
    assert message in text
    assert text.startswith(param)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": [[]]}, "prompt.0", "must not be empty"),
        ({"prompt": [[1], []]}, "prompt.1", "must not be empty"),
        ({"prompt": ["a", 1]}, "prompt.1", "must be a string"),
        ({"prompt": [1, "a"]}, "prompt.1", "must be an integer"),
        ({"prompt": [1, True]}, "prompt.1", "must be an integer"),
        ({"prompt": [1, 1 << 31]}, "prompt.1", "must be at most"),
        ({"prompt": {"a": 1}}, "prompt", "must be a string or a list, not an object"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt", f"at most {MAX_PROMPTS}"),
        ({"prompt": ["a"] * 100, "n": 3}, "n", "at most 256"),
        ({"logprobs": True}, "logprobs", "must be a number from 0 to 20"),
        ({"logprobs": 21}, "logprobs", "must be at most 20"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "belongs to chat requests"),
        ({"tool_choice": "required"}, "tool_choice", "belongs to chat requests"),
        ({"messages": HI}, "messages", "belongs to chat requests"),
        ({"chat_template": "x"}, "chat_template", "belongs to chat requests"),
        ({"include_reasoning": False}, "include_reasoning", "belongs to chat requests"),
        ({"best_of": 3, "n": 2}, "best_of", "equal n"),
        ({"max_completion_tokens": 3}, "max_completion_tokens", "not a known field"),
    ],
)
def test_completion_refusals_name_the_field(fields: dict[str, Any], param: str, message: str) -> None:
    blamed, text = refusal(completion, **fields)
    assert blamed == param
    assert message in text


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatCompletionRequest, {"messages": HI}),
        (CompletionRequest, {"prompt": "a"}),
        (LlamaCompletionRequest, {"prompt": "a"}),
        (InfillRequest, {"input_prefix": "a", "input_suffix": "b"}),
        (FimRequest, {"prompt": "a"}),
        (TokenizeTextRequest, {"prompt": "a"}),
        (TokenizeChatRequest, {"messages": HI}),
        (TokenizeContentRequest, {"content": "a"}),
        (EmbeddingRequest, {"input": "a"}),
        (CohereEmbedRequest, {"texts": ["a"]}),
        (RerankRequest, {"query": "a", "documents": ["b"]}),
        (ChatRequest, {"model": "m"}),
        (GenerateRequest, {"model": "m"}),
        (EmbedRequest, {"model": "m"}),
        (CalledFunction, {"name": "f"}),
        (MessagesRequest, {"model": "m", "max_tokens": 1, "messages": HI}),
    ],
)
def test_null_means_absent(kind: type[WireModel], body: dict[str, Any]) -> None:
    for name in kind.wire_names() - body.keys():
        parse_body(kind, {**body, name: None})


def test_another_name_of_a_field_that_is_null() -> None:
    assert chat(seed=None, random_seed=7).seed == 7
    given = parse_body(LlamaCompletionRequest, {"prompt": "a", "n_predict": None, "max_tokens": 3})
    assert given.n_predict == 3


@pytest.mark.parametrize("body", [b"[]", b"null", b'"a"', b"3"])
def test_body_must_be_an_object(body: bytes) -> None:
    with pytest.raises(RequestError, match="one JSON object"):
        parse_chat_request(body)


def test_required_fields() -> None:
    assert refusal(lambda: parse_chat_request(b"{}")) == ("messages", "messages is required")
    assert refusal(lambda: parse_completion_request(b"{}")) == ("prompt", "prompt is required")


def test_null_is_absent_everywhere() -> None:
    for kind, given_fields in ((ChatCompletionRequest, {"messages": HI}), (CompletionRequest, {"prompt": "hi"})):
        parse = parse_chat_request if kind is ChatCompletionRequest else parse_completion_request
        nulls = {name: None for name in [*kind.model_fields, *kind.refused_fields] if name not in given_fields}
        assert parse({**nulls, **given_fields}) == parse(given_fields)


def test_every_refused_field_is_refused_by_name_and_its_neutral_values_are_not() -> None:
    for name, entry in REFUSED_FIELDS.items():
        asking: dict[str, Any] = {name: {"asks": "something"}}
        remarks = collect_remarks()
        if entry.idle:
            assert chat(**asking) == chat()
            assert remarks == [f"the field {name!r} has no effect: {entry.reason}"]
        else:
            with pytest.raises(UnsupportedParameterError) as caught:
                chat(**asking)
            assert caught.value.param == name
            assert not remarks
        for neutral in entry.neutral:
            assert chat(**{name: neutral}) == chat()
    for name, entry in COMPLETION_REFUSED_FIELDS.items():
        for neutral in entry.neutral:
            assert completion(**{name: neutral}) == completion()
    assert refusal(chat, watermarking=0)[0] == "watermarking"  # 0 is not false


def test_fields_that_nobody_knows_are_refused_or_warned_of() -> None:
    for asking in ({"made_up": 1}, {"stream": True, "stream_options": {"made_up": 1}}):
        collect_remarks()
        with pytest.raises(UnknownParameterError, match="made_up is not a known field"):
            chat(**asking)
        remarks = collect_remarks(unknown_fields=True)
        assert chat(**asking) == chat(**{name: {} if isinstance(each, dict) else each for name, each in asking.items()
                                         if name != "made_up"})  # fmt: skip
        assert remarks == ["the field 'made_up' is unknown and has no effect"]
    collect_remarks(unknown_fields=True)
    with pytest.raises(UnsupportedParameterError):  # a known name still says what is not there
        chat(audio={"voice": "alloy"})
    collect_remarks()


def test_advisory_fields_are_declared_and_change_nothing() -> None:
    values: dict[str, Any] = {
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "implicit"},
        "verbosity": "low",
    }
    for name in ADVISORY_FIELDS:
        request = chat(**{name: values.get(name, "some text")})
        assert to_sampling_params(request, {}) == to_sampling_params(chat(), {})
        assert request.template_kwargs() == {}
    assert set(ADVISORY_FIELDS) <= set(ChatCompletionRequest.model_fields) & set(CompletionRequest.model_fields)
    assert not set(REFUSED_FIELDS) & set(ChatCompletionRequest.model_fields) & set(CompletionRequest.model_fields)


def test_unknown_and_unsupported_have_their_own_codes() -> None:
    for fields, kind, code in (
        ({"foo": 1}, UnknownParameterError, "unknown_parameter"),
        ({"functions": [1]}, UnsupportedParameterError, "unsupported_parameter"),
    ):
        with pytest.raises(kind) as caught:
            chat(**fields)
        assert to_error(caught.value).body.error.code == code


def test_sampling_values_of_the_request_win_over_the_models_and_those_over_ours() -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    params = to_sampling_params(chat(temperature=0, max_completion_tokens=7), defaults)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0, 20, 1.0, 7)
    assert to_sampling_params(chat(), {}).max_tokens is None
    assert to_sampling_params(completion(), {}).max_tokens == 16
    assert to_sampling_params(completion(), {"max_tokens": 50}).max_tokens == 50
    assert to_sampling_params(chat(max_tokens=5), {"max_tokens": 50}).max_tokens == 5


def test_every_sampling_field_arrives() -> None:
    fields = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.5, "seed": -3, "max_tokens": 9, "min_tokens": 2,
        "stop": ["x"], "stop_token_ids": [4], "ignore_eos": True, "include_stop_str_in_output": True,
        "skip_special_tokens": False, "prompt_logprobs": 2, "allowed_token_ids": [1, 2], "bad_words": ["no"],
        "logprob_token_ids": [8, 9], "cache_salt": "salt", **SAMPLERS,
    }  # fmt: skip
    expected = SamplingParams(**fields, logprobs=3, logit_bias={7: -5.0})
    bias = {"logit_bias": {"7": -5}}
    assert to_sampling_params(chat(**fields, **bias, logprobs=True, top_logprobs=3), {}) == expected
    assert to_sampling_params(completion(**fields, **bias, logprobs=3), {}) == expected
    # skip_reading_prefix_cache and output_kind are the library's own, processors are code; structured output,
    # predictions, thoughts, marks, echoes and progress have tests of their own
    others = {"logprobs", "logit_bias", "structured_outputs", "thoughts", "skip_reading_prefix_cache", "output_kind",
              "logits_processors", "prediction", "thinking_token_budget", "stop_marks", "continues_prompt",
              "prompt_progress"}  # fmt: skip
    assert set(SamplingParams.__struct_fields__) == {*fields, *others}


def test_logprob_counts() -> None:
    assert to_sampling_params(chat(logprobs=True), {}).logprobs == 0
    assert to_sampling_params(chat(logprobs=False), {}).logprobs is None
    assert to_sampling_params(chat(top_logprobs=0), {}).logprobs is None  # 0 is vLLM's default
    assert to_sampling_params(completion(logprobs=0), {}).logprobs == 0
    scored = to_sampling_params(completion(logprobs=2, echo=True, max_tokens=0, prompt_logprobs=1), {})
    assert (scored.logprobs, scored.prompt_logprobs, scored.max_tokens) == (2, 2, 1)


def test_template_variables() -> None:
    assert chat(thinking=False).template_kwargs() == {"thinking": False, "enable_thinking": False}
    assert chat(enable_thinking=True, chat_template_kwargs={"enable_thinking": True, "x": [1]}).template_kwargs() == {
        "enable_thinking": True,
        "x": [1],
        "thinking": True,
    }
    on = {"thinking": True, "enable_thinking": True}
    off = dict.fromkeys(on, False)
    assert chat(reasoning_effort="high").template_kwargs() == {"reasoning_effort": "high", **on}
    assert chat(reasoning_effort="none").template_kwargs() == {"reasoning_effort": "none", **off}
    for more in ({"enable_thinking": False}, {"thinking_token_budget": 0}, {"chat_template_kwargs": off}):
        assert chat(reasoning_effort="low", **more).template_kwargs() == {"reasoning_effort": "low", **off}


KEYS = st.sampled_from([
    *sorted({*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, *REFUSED_FIELDS}),
    *("role", "content", "type", "text", "tool_calls", "tool_call_id", "function", "name", "arguments", "id"),
    *("parameters", "strict", "properties", "json_schema", "schema", "json", "choice", "allowed_tools", "format"),
])  # fmt: skip
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 0.5, 2**31, 2**64, 10**400, 1e308, "", "a", "user", "text", "default", "none"])
    | st.sampled_from(["function", "required", "json_object", "json_schema", "structural_tag", "object", "refusal"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | KEYS, inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | ODD, "content": ODD},
    optional={"tool_calls": ODD, "tool_call_id": ODD, "name": ODD, "reasoning": ODD, "refusal": ODD},
)


FUNCTION = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b", "x y"]) | ODD},
    optional={"parameters": st.dictionaries(KEYS, ODD, max_size=3) | ODD, "strict": ODD, "description": ODD},
)
TOOL = st.fixed_dictionaries({"function": FUNCTION | ODD}, optional={"type": st.sampled_from(["function", "custom"])})
TOOL_FIELDS = st.fixed_dictionaries(
    {"tools": st.lists(TOOL | ODD, max_size=4) | ODD},
    optional={
        "tool_choice": st.sampled_from(["none", "auto", "required"]) | TOOL | ODD,
        "response_format": st.dictionaries(KEYS, ODD, max_size=3) | ODD,
        "structured_outputs": st.dictionaries(KEYS, ODD, max_size=3) | ODD,
    },
)


def check_any(parse: Any, body: object) -> None:
    try:
        to_sampling_params(parse(json.dumps(body).encode()), {})
    except RequestError as error:
        answer = to_error(error)
    else:
        return
    assert answer.status == 400
    assert answer.body.error.message
    assert answer.body.error.type == "invalid_request_error"


@settings(deadline=None, max_examples=150)
@given(ODD | st.dictionaries(KEYS, ODD, max_size=6))
def test_any_json_is_a_request_or_a_request_error(body: object) -> None:
    check_any(parse_chat_request, body)
    check_any(parse_completion_request, body)


@settings(deadline=None, max_examples=150)
@given(st.lists(MESSAGE | ODD, max_size=4), st.dictionaries(KEYS, ODD, max_size=2))
def test_any_messages_are_a_request_or_a_request_error(messages: list[object], more: dict[str, object]) -> None:
    check_any(parse_chat_request, {**more, "messages": messages})


@settings(deadline=None, max_examples=150)
@given(TOOL_FIELDS)
def test_any_tools_and_formats_are_a_request_or_a_request_error(fields: dict[str, object]) -> None:
    check_any(parse_chat_request, {"messages": HI, **fields})
    check_any(parse_completion_request, {"prompt": "hi", **fields})


@settings(deadline=None, max_examples=150)
@given(KEYS, ODD)
def test_one_odd_field_in_a_right_request(name: str, value: object) -> None:
    check_any(parse_chat_request, {"messages": HI, name: value})
    check_any(parse_completion_request, {"prompt": "hi", name: value})


def test_a_million_wrong_entries_cost_one_error() -> None:
    blamed, text = refusal(completion, prompt=[1] + ["x"] * 300_000)
    assert (blamed, len(text) < 200) == ("prompt.1", True)


SAMPLERS = {
    "repeat_last_n": 64, "top_n_sigma": 1.5, "typical_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.2,
    "dynatemp_range": 0.5, "dynatemp_exponent": 2.0, "mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2,
    "dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 3, "dry_penalty_last_n": 128,
    "dry_sequence_breakers": ["x"], "num_speculative_tokens": 3, "stream_interval": 4,
}  # fmt: skip


@pytest.mark.parametrize("make", [chat, completion])
def test_llama_cpps_samplers(make: Any) -> None:
    params = to_sampling_params(make(**SAMPLERS), {"top_k": 40, "temperature": 0.5})
    assert {name: getattr(params, name) for name in SAMPLERS} == SAMPLERS
    assert (params.top_k, params.temperature) == (0, 0.5)  # mirostat takes the place of the model's cuts


@pytest.mark.parametrize("make", [chat, completion])
def test_llama_cpps_name_for_the_most_guesses(make: Any) -> None:
    assert to_sampling_params(make(**{"speculative.n_max": 4}), {}).num_speculative_tokens == 4
    assert to_sampling_params(make(**{"speculative.n_min": 0, "speculative.p_min": 0.0}), {}) == to_sampling_params(
        make(), {}
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_llama_cpps_samplers_are_refused_by_name(name: str) -> None:
    for value in ("1", True, -5, 10**30, [1], {}):
        param, _ = refusal(chat, **{name: value})
        assert (param or "").split(".")[0] == name, value


def test_llama_cpps_own_route_takes_them_too() -> None:
    given = LlamaCompletionRequest.model_validate({"prompt": "x", **SAMPLERS, "repeat_penalty": 1.2}).sampling()
    assert given == {**SAMPLERS, "repetition_penalty": 1.2, "max_tokens": None}
    older = {"slot_id": -1, "tfs_z": 1.0, "typ_p": 0.9}
    assert LlamaCompletionRequest.model_validate({"prompt": "x", **older}).sampling()["typical_p"] == 0.9
    none = LlamaCompletionRequest.model_validate({"prompt": "x", "dry_sequence_breakers": []}).sampling()
    assert none["dry_sequence_breakers"] == []  # no breakers, and not the usual ones


def test_names_of_other_servers() -> None:
    params = to_sampling_params(chat(repeat_penalty=1.3, mirostat_mode=2, tfs_z=1, top_a=0, typ_p=0.9), {})
    assert (params.repetition_penalty, params.mirostat, params.typical_p) == (1.3, 2, 0.9)
    assert [chat(**{name: 7}).seed for name in ("random_seed", "sampling_seed")] == [7, 7]
    assert chat(repeat_penalty=1.3, repetition_penalty=1.3).repetition_penalty == 1.3
    assert refusal(chat, repeat_penalty=1.3, repetition_penalty=1.2)[0] == "repeat_penalty"
    for name in ("repeat_penalty", "n_predict", "typ_p"):
        assert refusal(chat, **{name: -5})[0] == name
        assert refusal(chat, **{name: 1}, temperature=-5)[0] == "temperature"
    assert refusal(chat, repeat_penalty=None, repetition_penalty=-5)[0] == "repetition_penalty"
    assert refusal(chat, random_seed="x", sampling_seed=None)[0] == "random_seed"
    assert refusal(chat, top_a=0.5) == ("top_a", "top_a is not supported: this sampler is not implemented")
    breakers = chat(dry_sequence_breakers='"\\n", ":", "\\"", "*"').dry_sequence_breakers
    assert breakers == ["\n", ":", '"', "*"]
    assert chat(dry_sequence_breakers='["a"]').dry_sequence_breakers == ["a"]
    for wrong in ("\\n", '"a" "b"', "[" * 4000, "1", '""', "x" * 9999):
        assert (refusal(chat, dry_sequence_breakers=wrong)[0] or "").startswith("dry_sequence_breakers")
