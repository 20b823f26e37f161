# SPDX-License-Identifier: MIT
"""Ollama's requests: durations, options, and what is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from candle_vllm.core.errors import RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.ollama import (
    ADVISORY_OPTIONS,
    ChatRequest,
    GenerateRequest,
    OllamaAdapter,
    Options,
    ollama_parser,
)
from candle_vllm.openai.ollama.adapter import read_messages
from candle_vllm.openai.ollama.request import seconds_of
from candle_vllm.openai.protocol.generation import SamplerFields

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
parse = ollama_parser(ChatRequest)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (0, 0), (300, 300), (1.5, 1.5), (-1, math.inf), ("5m", 300), ("1h30m", 5400), ("1.5h", 5400), ("500ms", 0.5),
        ("-1", math.inf), ("-1m", math.inf), ("0", 0), ("0s", 0), (1e300, math.inf), (".5s", 0.5), ("5", 5),
    ],
)  # fmt: skip
def test_durations_are_go_s(given: Any, seconds: float) -> None:
    assert seconds_of(given) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "given", ["", "5 minutes", "m5", "5mm", "1h 30m", "9" * 99, pytest.param(10**400, id="long"), True, [1], math.nan]
)
def test_what_is_no_duration(given: Any) -> None:
    with pytest.raises((ValueError, OverflowError)):
        seconds_of(given)
    with pytest.raises(RequestError, match="keep_alive must be"):
        parse({**ASK, "keep_alive": given})


def test_hostile_durations_take_no_time() -> None:
    with pytest.raises(ValueError):
        seconds_of("1" * 1_000_000 + "x")


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({"num_predict": 9, "temperature": 0.5, "top_k": 3}, {"max_tokens": 9, "temperature": 0.5, "top_k": 3}),
        ({"num_predict": -1}, {"max_tokens": None}),
        ({"num_predict": 0}, {"max_tokens": None}),
        ({"seed": -1, "stop": []}, {}),
        ({"seed": 7, "stop": "x"}, {"seed": 7, "stop": "x"}),
        ({"repeat_penalty": 1.1, "repeat_last_n": 64}, {"repetition_penalty": 1.1, "repeat_last_n": 64}),
        ({"mirostat": 2, "mirostat_tau": 4, "typical_p": 0.9}, {"mirostat": 2, "mirostat_tau": 4.0, "typical_p": 0.9}),
        ({"dry_sequence_breakers": []}, {"dry_sequence_breakers": []}),
        ({"tfs_z": 1.0, "num_gpu": -1, "numa": False, "draft_num_predict": 4}, {}),
    ],
)
def test_options_are_sampling_parameters(options: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert parse({**ASK, "options": options}).sampling() == sampling


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"options": {"mirostat": 3}}, "options.mirostat"),
        ({"options": {"typical_p": 1.5}}, "options.typical_p"),
        ({"options": {"temprature": 1}}, "options.temprature"),
        ({"options": {"repeat_penalty": 1.1, "repeat_last_n": -2}}, "options.repeat_last_n"),
        ({"options": {"num_predict": -3}}, "options.num_predict"),
        ({"options": {"top_p": 2}}, "options.top_p"),
        ({"format": "yaml"}, "format"),
        ({"think": "hard"}, "think"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "x", "images": "a"}]}, "messages.0.images"),
        ({"messages": [{"role": "developer", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
         "messages.0.tool_calls.0.function.name"),
        ({"model": ""}, "model"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refusal:
        parse({**ASK, **change})
    assert refusal.value.param == param


@pytest.mark.parametrize(("name", "value"), [("raw", True), ("suffix", "x")])
def test_a_prompt_without_a_template_has_no_system_message(name: str, value: Any) -> None:
    ask = {"model": "m", "prompt": "a", "system": "b"}
    with pytest.raises(RequestError, match=f"{name} cannot be combined with system"):
        ollama_parser(GenerateRequest)({**ask, name: value})
    assert ollama_parser(GenerateRequest)({**ask, "raw": False, "suffix": ""}).system == "b"


async def test_a_conversation_without_messages_is_refused() -> None:
    adapter = OllamaAdapter(OpenAIAdapter(ScriptedEngine()))
    for fields in ({}, {"messages": []}):
        with pytest.raises(RequestError, match="messages must not be empty"):
            await adapter.chat(parse({"model": "m", **fields}))


def test_every_option_has_an_effect_or_a_reason() -> None:
    acting = {"num_predict", "repeat_penalty", *SamplerFields.wire_names()}
    assert Options.wire_names() == acting | set(ADVISORY_OPTIONS)


def _call(name: str) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("results", "answered"),
    [
        ([{}, {}], [1, 2]),
        ([{"tool_name": "g"}, {"tool_name": "f"}], [2, 1]),
        ([{"name": "g"}, {}], [2, 1]),  # as the examples of older clients spell it
        ([{"tool_call_id": "own"}, {}], [None, 1]),
        ([{"tool_name": "h"}], [None]),
    ],
)
def test_results_find_their_calls(results: list[dict[str, Any]], answered: list[int | None]) -> None:
    said = [{"role": "assistant", "content": "", "tool_calls": [_call("f"), _call("g")]}]
    said += [{"role": "tool", "content": "x", **result} for result in results]
    call, *found = read_messages(parse({**ASK, "messages": said}).messages)
    ids = [each.id for each in call.calls]
    assert [each.call_id for each in found] == [
        result.get("tool_call_id") if number is None else ids[number - 1]
        for result, number in zip(results, answered, strict=True)
    ]
    assert call.parts == ()


def test_messages_without_content_say_nothing() -> None:
    said = [{"role": role, "content": None} for role in ("system", "user", "tool", "assistant")]
    *others, last = read_messages(parse({**ASK, "messages": said}).messages)
    assert [part.text for message in others for part in message.parts] == [""] * 3
    assert last.parts == ()
