# SPDX-License-Identifier: MIT
"""Chat answers with tool calls and reasoning through the whole adapter: scripted engine, official types."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import openai.types.chat as official
import pytest

from candle_vllm.core.errors import CandleVllmError, ConfigError, EngineDeadError, RequestAbortedError, RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter, SyncOpenAIAdapter, parse_chat_request, to_error, to_json_bytes
from candle_vllm.openai.protocol.custom_tools import CustomTool
from candle_vllm.openai.protocol.fields import MAX_TOOL_CALLS
from candle_vllm.openai.remarks import collect_remarks
from packages.openai.tests.formats.samples import SAMPLES, Sample
from packages.openai.tests.formats.samples import TOOLS as SCHEMAS
from tests.waiting import wait_for

HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
CALL = '<tool_call>\n{"name": "f2", "arguments": {"city": "x"}}\n</tool_call>'


def adapter(script: Any, **options: Any) -> OpenAIAdapter:
    settings = {name: options.pop(name) for name in ("tool_parser", "reasoning_parser") if name in options}
    return OpenAIAdapter(ScriptedEngine(script, **options), **{"tool_parser": "hermes", **settings})


async def whole(made: OpenAIAdapter, **fields: Any) -> official.ChatCompletion:
    answer = await made.chat({"messages": HI, "tools": TOOLS, **fields})
    return official.ChatCompletion.model_validate_json(to_json_bytes(answer))


async def chunks(made: OpenAIAdapter, **fields: Any) -> list[official.ChatCompletionChunk]:
    stream = await made.chat_stream({"messages": HI, "tools": TOOLS, "stream": True, **fields})
    return [official.ChatCompletionChunk.model_validate_json(to_json_bytes(chunk)) async for chunk in stream]


def added_up(stream: list[official.ChatCompletionChunk]) -> tuple[str, str, list[tuple[str, str]], str | None]:
    content, thoughts, calls, reason = "", "", [], None
    for choice in (choice for chunk in stream for choice in chunk.choices):
        content += choice.delta.content or ""
        thoughts += getattr(choice.delta, "reasoning_content", None) or ""
        assert getattr(choice.delta, "reasoning", None) == getattr(choice.delta, "reasoning_content", None)
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(calls)
                assert call.type == "function"
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, thoughts, [tuple(call) for call in calls], reason


def cut(text: str) -> list[str]:
    """Pieces of a text that end in odd places."""
    return [text[start : start + 3] for start in range(0, len(text), 3)]


# The scripted engine's prompts open no thoughts: a sample that begins in them gets its opening mark.
BEGUN = [sample for sample in SAMPLES if not sample.prefilled or sample.reasoning == "think"]


@pytest.mark.one_of_each(74)
@pytest.mark.parametrize("sample", BEGUN, ids=lambda sample: sample.tools)
async def test_every_format_streams_what_it_gives_whole(sample: Sample) -> None:
    text = f"<think>{sample.text}" if sample.prefilled else sample.text
    made = adapter(cut(text), tool_parser=sample.tools, reasoning_parser=sample.reasoning)
    answer, stream = await whole(made), await chunks(made)
    message = answer.choices[0].message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    assert [(name, json.loads(text)) for name, text in calls] == sample.calls
    assert (message.content or "") == sample.content
    thoughts = getattr(message, "reasoning_content", None) or ""
    assert thoughts == sample.thoughts
    reason = "tool_calls" if sample.calls else "stop"
    assert answer.choices[0].finish_reason == reason
    assert added_up(stream) == (sample.content, thoughts, calls, reason)


async def test_special_tokens_are_marks_and_texts_like_them_are_not() -> None:
    special = ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "<pad>")
    text = ['Write "', *"[TOOL_CALLS]", '" first.', "<pad>", '[TOOL_CALLS]f2[ARGS]{"city": "x"}']
    made = adapter(text, tool_parser="mistral_v13", reasoning_parser="mistral", special_tokens=special)
    message = (await whole(made)).choices[0].message
    assert message.content == 'Write "[TOOL_CALLS]" first.'
    assert [call.function.arguments for call in message.tool_calls] == ['{"city": "x"}']
    assert len(message.tool_calls[0].id) == 9
    shown = (await whole(made, skip_special_tokens=False)).choices[0].message
    assert shown.content == 'Write "[TOOL_CALLS]" first.<pad>'


async def test_a_cut_call_is_length_and_is_not_closed() -> None:
    known = CALL[: CALL.index('"x"') + 3]
    answer = await whole(adapter([CALL]), max_tokens=len(known))
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments == '{"city": "x"'
    ended = await whole(adapter([known]))
    assert ended.choices[0].message.tool_calls[0].function.arguments == '{"city": "x"}'


@pytest.mark.one_of_each(74)
@pytest.mark.parametrize("sample", BEGUN, ids=lambda sample: sample.tools)
async def test_a_forced_call_that_is_cut_shows_no_mark(sample: Sample) -> None:
    if sample.content or not sample.calls:
        return
    text = f"<think>{sample.text}" if sample.prefilled else sample.text
    made = adapter([text], tool_parser=sample.tools, reasoning_parser=sample.reasoning)
    for end in range(1, len(text), 23):
        fields = {"tool_choice": "required", "max_tokens": end}
        answer, stream = await whole(made, **fields), await chunks(made, **fields)
        assert not answer.choices[0].message.content, text[:end]
        assert not added_up(stream)[0], text[:end]


async def test_no_tools_no_calls() -> None:
    made = adapter([CALL])
    for fields in ({"tool_choice": "none"}, {"tools": []}):
        message = (await whole(made, **fields)).choices[0].message
        assert (message.content, message.tool_calls) == (CALL, None)


async def test_without_parallel_calls_the_first_counts() -> None:
    made = adapter([CALL, "\n", CALL])
    assert len((await whole(made)).choices[0].message.tool_calls) == 2
    assert len((await whole(made, parallel_tool_calls=False)).choices[0].message.tool_calls) == 1


async def test_an_answer_has_no_more_calls_than_a_message_may_have() -> None:
    """A model that goes round in circles: what it gave can be sent back."""
    made = adapter([CALL] * (MAX_TOOL_CALLS + 2), max_model_len=1 << 16)
    assert len((await whole(made)).choices[0].message.tool_calls) == MAX_TOOL_CALLS


async def test_reasoning_in_answer_and_usage() -> None:
    made = adapter(["<think>", "Hm", ".", "</think>", "\n\n", "Hello"], reasoning_parser="think")
    answer = await whole(made)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].message.reasoning_content == "Hm."
    assert answer.choices[0].message.reasoning == "Hm."  # vLLM's and OpenRouter's name
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("<think>Hm.</think>")
    hidden = await whole(made, include_reasoning=False)
    assert not hasattr(hidden.choices[0].message, "reasoning_content")
    assert hidden.usage.completion_tokens_details.reasoning_tokens == len("<think>Hm.</think>")


async def test_only_thoughts_leave_content_null() -> None:
    answer = await whole(adapter(["<think>Hm"], reasoning_parser="think"))
    assert answer.choices[0].message.content is None
    assert answer.choices[0].message.reasoning_content == "Hm"


async def test_each_choice_has_its_own_calls() -> None:
    scripts = iter([[CALL], ["Hello"]])
    answer = await whole(adapter(lambda _: next(scripts)), n=2)
    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls", "stop"]


async def test_logprobs_cover_every_token_of_a_call() -> None:
    made = adapter(cut(CALL))
    answer, stream = await whole(made, logprobs=True), await chunks(made, logprobs=True)
    tokens = [entry.token for entry in answer.choices[0].logprobs.content]
    assert "".join(tokens).startswith(CALL)
    streamed = [entry.token for chunk in stream for c in chunk.choices if c.logprobs for entry in c.logprobs.content]
    assert streamed == tokens


async def test_required_and_named_calls_bring_a_grammar() -> None:
    engine = ScriptedEngine([CALL])
    made = OpenAIAdapter(engine, tool_parser="hermes")
    for choice in ("auto", "required", {"type": "function", "function": {"name": "f2"}}):
        await made.chat({"messages": HI, "tools": TOOLS, "tool_choice": choice})
    auto, required, named = [request.params.structured_outputs for request in engine.requests]
    assert auto is None
    assert "get_weather" in required.grammar
    assert "get_weather" not in named.grammar


async def test_a_strict_tool_is_held_to_its_schema_in_auto_mode() -> None:
    engine = ScriptedEngine([CALL])
    strict = [{"type": "function", "function": {**TOOLS[1]["function"], "strict": True}}]
    await OpenAIAdapter(engine, tool_parser="hermes").chat({"messages": HI, "tools": strict})
    assert engine.requests[0].params.structured_outputs.grammar


async def test_tools_that_are_shown_but_not_allowed_are_left_out_by_the_grammar() -> None:
    engine = ScriptedEngine([CALL])
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f2"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    await OpenAIAdapter(engine, tool_parser="hermes").chat({"messages": HI, "tools": TOOLS, "tool_choice": choice})
    form = engine.requests[0].params.structured_outputs
    assert "f2" in form.grammar
    assert "get_weather" not in form.grammar


async def test_structured_output_comes_behind_thoughts_and_beside_tools() -> None:
    engine = ScriptedEngine(["{}"])
    made = OpenAIAdapter(engine, tool_parser="hermes", reasoning_parser="think")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    await made.chat({"messages": HI, "response_format": form})
    await made.chat({"messages": HI, "response_format": form, "tools": TOOLS})
    plain, beside = [request.params.structured_outputs for request in engine.requests]
    assert (plain.reasoning_start, plain.reasoning_end, plain.around) == ("<think>", "</think>", None)
    assert "get_weather" in beside.around


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}}},
         "response_format.json_schema.schema"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
            "properties": {"a": {"not": {"type": "integer"}}}}}}]}, "tools"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ],
)  # fmt: skip
async def test_what_cannot_be_guaranteed_is_refused_before_anything_runs(fields: dict[str, Any], param: str) -> None:
    engine = ScriptedEngine()
    made = OpenAIAdapter(engine, tool_parser="hermes", allow_chat_template=False)
    with pytest.raises(RequestError) as caught:
        await made.chat_stream({"messages": HI, "stream": True, **fields})
    error = to_error(caught.value)
    assert error.status == 400
    assert error.body.error.param.startswith(param)
    assert engine.requests == []


def tool(name: str, schema: dict[str, Any], strict: bool = False) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


ODD = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
EVEN = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 7}}}


async def test_a_tool_that_is_not_strict_is_called_even_if_its_schema_cannot_be_guaranteed() -> None:
    engine = ScriptedEngine([CALL])
    made = OpenAIAdapter(engine, tool_parser="hermes")
    await made.chat({"messages": HI, "tools": [tool("odd", ODD), tool("f2", EVEN)], "tool_choice": "required"})
    grammar = engine.requests[0].params.structured_outputs.grammar
    assert "uniqueItems" not in grammar
    assert "maxLength" in grammar  # the other tool is held to its schema all the same


async def test_of_hundreds_of_tools_those_that_cannot_be_guaranteed_are_loose() -> None:
    """Agents with several MCP servers send as many; one odd schema is no reason to free the calls of all others."""
    for odd in ([7], [0, 90, 199], list(range(200))):
        engine = ScriptedEngine([CALL])
        tools = [tool(f"f{i}", ODD if i in odd else {"properties": {f"p{i}": EVEN}}) for i in range(200)]
        made = OpenAIAdapter(engine, tool_parser="hermes")
        await made.chat({"messages": HI, "tools": tools, "tool_choice": "required"})
        assert engine.requests[0].params.structured_outputs.grammar.count("maxLength") == 200 - len(odd)


@pytest.mark.parametrize("form", ["hermes", "qwen3_coder", "mistral"])
async def test_a_call_without_its_schema_is_said(form: str) -> None:
    """Whether the plan or the compiler finds that a schema cannot be guaranteed."""
    for schema in (ODD, {"properties": {"a": {"type": "string", "pattern": "(?!b)"}}}):
        for mode, said in (("required", 1), ("auto", 0)):
            remarks = collect_remarks()
            made = OpenAIAdapter(ScriptedEngine([CALL]), tool_parser=form)
            await made.chat({"messages": HI, "tools": [tool("odd", schema), tool("f2", EVEN)], "tool_choice": mode})
            assert sum("arguments of 'odd' are not constrained by their schema: " in text for text in remarks) == said


@pytest.mark.parametrize("beside", [{}, {"response_format": {"type": "json_object"}}, {"tool_choice": "required"}])
async def test_a_strict_tool_that_cannot_be_guaranteed_is_blamed_by_name(beside: dict[str, Any]) -> None:
    made = adapter([CALL])
    for schema, keyword in ((ODD, "uniqueItems"), ({"properties": {"a": {"not": {"multipleOf": 2}}}}, "multipleOf")):
        with pytest.raises(RequestError, match=f"'odd'.*{keyword}") as caught:
            await made.chat({"messages": HI, "tools": [tool("f2", EVEN), tool("odd", schema, True)], **beside})
        assert caught.value.param == "tools.1.function.parameters"


@pytest.mark.parametrize("stop", ["city", "</tool_call>"])
async def test_a_stop_string_inside_a_call_does_not_cut_it(stop: str) -> None:
    choice = (await whole(adapter(cut(CALL)), stop=[stop])).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls[0].function.arguments) == ("tool_calls", '{"city": "x"}')


async def test_hidden_thoughts_are_not_in_log_probabilities_either() -> None:
    made = adapter(["<think>", "Hm", "</think>", "Hello"], reasoning_parser="think")
    fields = {"include_reasoning": False, "logprobs": True, "return_token_ids": True}
    answer = await whole(made, **fields)
    choice = answer.choices[0]
    assert "".join(entry.token for entry in choice.logprobs.content).startswith("Hello")
    assert len(choice.token_ids) == answer.usage.completion_tokens  # as vLLM, which hides no ids
    assert "Hm" not in str(await chunks(made, **fields))


async def test_reasoning_that_begins_and_ends_in_one_output_is_hidden_as_well() -> None:
    """As with speculation. The tokens of the answer in this output are hidden, too: their number is not known."""
    made = adapter(["<think>Hm</think>Hel", "lo"], reasoning_parser="think")
    answer = await whole(made, include_reasoning=False, logprobs=True)
    assert answer.choices[0].message.content == "Hello"
    assert [entry.token for entry in answer.choices[0].logprobs.content][:2] == ["l", "o"]
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("<think>Hm</think>Hel")


async def test_names_in_errors_are_short() -> None:
    with pytest.raises(RequestError) as caught:
        await adapter([""]).chat({"messages": HI, "x" * 60_000: 1})
    assert len(caught.value.param) < 200
    assert len(str(caught.value)) < 300


def test_closing_aborts_what_is_running() -> None:
    engine = ScriptedEngine(lambda _: "a" * 3000, pause=0.01)  # longer than anything here is held up
    made = SyncOpenAIAdapter(OpenAIAdapter(engine))
    stream = made.chat_stream({"messages": HI})
    next(stream)
    failures: list[Exception] = []

    def ask() -> None:
        try:
            made.chat({"messages": HI})
        except CandleVllmError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: len(engine.requests) == 2)
    made.close()
    asking.join()
    assert repr(made).startswith("<SyncOpenAIAdapter, closed: ")
    assert [type(error) for error in failures] == [RequestAbortedError]
    assert engine.requests[1].request_id in engine.aborted
    stream.close()
    with pytest.raises(EngineDeadError, match="closed"):
        made.chat({"messages": HI})


async def test_required_without_a_format_is_refused() -> None:
    made = adapter(["Hi"], tool_parser="none")
    with pytest.raises(RequestError, match="--tool-parser"):
        await made.chat({"messages": HI, "tools": TOOLS, "tool_choice": "required"})


async def test_a_template_of_the_request() -> None:
    engine = ScriptedEngine()
    await OpenAIAdapter(engine).chat({"messages": HI, "chat_template": "{{ messages[0].content }}!"})
    assert engine.detokenize(engine.requests[0].prompt_token_ids) == "Hi!"
    with pytest.raises(RequestError, match="chat_template cannot be used"):
        await OpenAIAdapter(engine).chat({"messages": HI, "chat_template": "{% if %}"})


def test_formats_are_shown_and_unknown_ones_refused() -> None:
    card = adapter([""], reasoning_parser="qwen3").models().data[0]
    assert (card.tool_parser, card.reasoning_parser) == ("hermes", "think")
    with pytest.raises(ConfigError, match="hermes"):
        adapter([""], tool_parser="hermess")


def test_without_an_event_loop() -> None:
    request = parse_chat_request({"messages": HI, "tools": TOOLS})
    with SyncOpenAIAdapter(adapter([CALL])) as made:
        assert repr(made) == "<SyncOpenAIAdapter: <OpenAIAdapter of scripted>>"
        assert made.chat(request).choices[0].finish_reason == "tool_calls"
        with made.chat_stream({"messages": HI, "stream": True}) as stream:
            assert "".join(c.choices[0].delta.content or "" for c in stream) == CALL
        assert made.complete({"prompt": "a"}).choices[0].text == CALL[:16]
        with pytest.raises(RequestError):
            made.chat({"messages": []})


async def test_tokens_without_text_leave_the_content_of_a_streamed_call_null() -> None:
    made = adapter(cut(CALL))
    assert (await whole(made, logprobs=True)).choices[0].message.content is None
    streamed = await chunks(made, logprobs=True)
    assert {choice.delta.content for chunk in streamed for choice in chunk.choices} == {None}


# ---- custom tools ----------------------------------------------------------------------------------------------------

CUSTOM: list[Any] = [{"type": "custom", "custom": {"name": "c"}}, TOOLS[0]]
CUSTOM_CALL = 'Hm<tool_call>\n{"name": "c", "arguments": {"input": "ls \\"a\\"\\n"}}\n</tool_call>'
INPUT = 'ls "a"\n'


def custom_calls(stream: list[official.ChatCompletionChunk]) -> list[tuple[Any, ...]]:
    """Type, id, name and text of each call, added up."""
    calls: list[list[Any]] = []
    for call in (call for chunk in stream for one in chunk.choices for call in one.delta.tool_calls or ()):
        news = (call.model_dump().get("custom") if call.function is None else call.function.model_dump()) or {}
        if call.id is not None:
            calls.append([call.type, call.id, news["name"], ""])
        calls[call.index][3] += news.get("input") or news.get("arguments") or ""
    return [tuple(call) for call in calls]


def unchecked(chunk: Any) -> official.ChatCompletionChunk:
    """As the official client reads a chunk: its types have no custom call in a delta yet, and it takes what comes."""
    return official.ChatCompletionChunk.construct(**json.loads(to_json_bytes(chunk)))


async def custom_stream(made: OpenAIAdapter, **fields: Any) -> list[Any]:
    stream = await made.chat_stream({"messages": HI, "tools": CUSTOM, "stream": True, **fields})
    return [unchecked(chunk) async for chunk in stream]


@pytest.mark.parametrize("size", [1, 3, len(CUSTOM_CALL)])
async def test_a_call_of_a_custom_tool_has_its_text(size: int) -> None:
    text = CUSTOM_CALL + CALL.replace("f2", TOOLS[0]["function"]["name"])
    made = adapter([text[start : start + size] for start in range(0, len(text), size)])
    (choice,) = (await whole(made, tools=CUSTOM)).choices
    first, second = choice.message.tool_calls or ()
    assert isinstance(first, official.ChatCompletionMessageCustomToolCall)
    assert (first.custom.name, first.custom.input) == ("c", INPUT)
    assert second.type == "function"
    assert choice.finish_reason == "tool_calls"
    streamed = custom_calls(await custom_stream(made))
    assert [(kind, name, said) for kind, _, name, said in streamed] == [
        ("custom", "c", INPUT),
        ("function", second.function.name, second.function.arguments),
    ]
    assert streamed[0][1].startswith("call_")


async def test_tokens_of_a_custom_call_are_all_told() -> None:
    made = adapter(cut(CUSTOM_CALL))
    answer = await made.chat({"messages": HI, "tools": CUSTOM, "return_token_ids": True, "logprobs": True})
    plain = await made.chat({"messages": HI, "return_token_ids": True, "logprobs": True})
    assert answer.choices[0].token_ids == plain.choices[0].token_ids
    stream = await custom_stream(made, return_token_ids=True)
    ids = [token for chunk in stream for one in chunk.choices for token in getattr(one, "token_ids", None) or ()]
    assert tuple(ids) == answer.choices[0].token_ids
    assert custom_calls(stream)[0][3] == INPUT


@pytest.mark.parametrize("fields", [{"return_token_ids": True}, {"logprobs": True}])
async def test_a_token_without_text_does_not_end_the_input_of_a_custom_call(fields: dict[str, Any]) -> None:
    made = adapter(cut('<tool_call>\n{"name": "c", "arguments": {"input": "a \\u00e9 b"}}\n</tool_call>'))
    assert custom_calls(await custom_stream(made, **fields))[0][3] == "a \u00e9 b"
    (call,) = (await made.chat({"messages": HI, "tools": CUSTOM, **fields})).choices[0].message.tool_calls
    assert call.custom.input == "a \u00e9 b"


async def test_several_answers_with_custom_calls_and_one_that_is_cut() -> None:
    made = adapter(cut(CUSTOM_CALL))
    stream = await custom_stream(made, n=2)
    for index in range(2):
        mine = [chunk for chunk in stream if chunk.choices and chunk.choices[0].index == index]
        assert custom_calls(mine)[0][3] == INPUT
    short = await made.chat({"messages": HI, "tools": CUSTOM, "max_tokens": 55})
    (call,) = short.choices[0].message.tool_calls
    assert short.choices[0].finish_reason == "length"
    assert call.custom.input.startswith('{"input": "')  # what there is of it, as the model wrote it


@pytest.mark.parametrize("form", ["hermes", "qwen3_coder", "glm45", "pythonic"])
@pytest.mark.parametrize(
    "definition", [r"^(?P<month>May|June)\s(?P<day>\d{1,2})(?:st|th)?$", "^a|b$", r"a\\$", r"a\$", "^"]
)
async def test_anchors_around_the_expression_of_a_custom_tool(form: str, definition: str) -> None:
    """The documentation of OpenAI's API has them in its example."""
    grammar = {"syntax": "regex", "definition": definition}
    tool = {"type": "custom", "custom": {"name": "c", "format": {"type": "grammar", "grammar": grammar}}}
    made = OpenAIAdapter(ScriptedEngine([CALL]), tool_parser=form)
    await made.chat({"messages": HI, "tools": [tool], "tool_choice": "required"})
    schema = CustomTool.model_validate(tool).shown()["function"]["parameters"]["properties"]["input"]["pattern"]
    for text in ("May 3rd", "May 3", "a", "b", "ab", "a\\", "a$", ""):
        assert bool(re.search(schema, text)) == bool(re.fullmatch(definition, text)), text


async def test_custom_calls_go_back_as_they_came() -> None:
    engine = ScriptedEngine(["Fine"])
    made = OpenAIAdapter(engine, tool_parser="hermes")
    call = {"id": "x", "type": "custom", "custom": {"name": "c", "input": INPUT}}
    history = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "x", "content": "a"}]
    await made.chat({"messages": history, "tools": CUSTOM})
    seen = engine.template_calls[-1]
    (shown,) = seen.messages[1]["tool_calls"]
    assert shown["function"] == {"name": "c", "arguments": {"input": INPUT}}
    assert seen.messages[2]["name"] == "c"
    (tool, _) = seen.options["tools"]
    assert tool["function"]["parameters"]["properties"] == {"input": {"type": "string"}}
