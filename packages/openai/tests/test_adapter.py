# SPDX-License-Identifier: MIT
"""Whole answers and streams over a scripted engine, judged by the official client's types."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import threading
import weakref
from functools import partial
from typing import Any

import msgspec
import openai.types as official
import openai.types.chat as official_chat
import pytest

from candle_vllm.core.config import DEMO_NAME
from candle_vllm.core.engine.outputs import PositionLogprobs, TokenLogprob
from candle_vllm.core.errors import (
    ChatTemplateError,
    ConfigError,
    EngineDeadError,
    EngineOverloadedError,
    InvalidParameterError,
    PromptTooLongError,
)
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import (
    GenerationFailedError,
    InvalidBodyError,
    ModelNotServedError,
    OpenAIAdapter,
    SyncOpenAIAdapter,
    UnsupportedParameterError,
    parse_chat_request,
    parse_completion_request,
    preparation,
    to_dict,
    to_json_bytes,
)
from candle_vllm.openai import adapter as adapter_module
from candle_vllm.openai import answers as answers_module
from candle_vllm.openai.logprobs import CompletionLogprobsWriter, prompt_logprobs
from candle_vllm.openai.protocol.fields import MAX_LOGPROBS
from candle_vllm.openai.remarks import collect_remarks
from tests.waiting import PATIENCE, until

HI = [{"role": "user", "content": "hi"}]
GIF = "data:;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACAkQBADs="
SEEN: list[Any] = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": GIF}}]}]


def wire(value: msgspec.Struct) -> dict[str, Any]:
    return json.loads(to_json_bytes(value))


async def chat(engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    answer = await OpenAIAdapter(engine).chat(parse_chat_request({"messages": HI, **fields}))
    body = to_json_bytes(answer)
    official_chat.ChatCompletion.model_validate_json(body, strict=True)
    return json.loads(body)


async def chat_chunks(engine: ScriptedEngine, **fields: Any) -> list[dict[str, Any]]:
    request = parse_chat_request({"messages": HI, "stream": True, **fields})
    bodies = [to_json_bytes(chunk) async for chunk in await OpenAIAdapter(engine).chat_stream(request)]
    for body in bodies:
        official_chat.ChatCompletionChunk.model_validate_json(body, strict=True)
    return [json.loads(body) for body in bodies]


async def complete(engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    answer = await OpenAIAdapter(engine).complete(parse_completion_request({"prompt": "ab", **fields}))
    return wire(answer)


async def completion_chunks(engine: ScriptedEngine, **fields: Any) -> list[dict[str, Any]]:
    request = parse_completion_request({"prompt": "ab", "stream": True, **fields})
    return [wire(chunk) async for chunk in await OpenAIAdapter(engine).complete_stream(request)]


# ---- chat ------------------------------------------------------------------------------------------------------------


async def test_chat_answer() -> None:
    answer = await chat(ScriptedEngine("hello", num_cached_tokens=2), model="default")
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert len(answer["id"]) == len("chatcmpl-") + 32
    assert answer["model"] == "scripted"
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
            "stop_reason": None,
        }
    ]
    prompt = len(ScriptedEngine().tokenize("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False))
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 6,
        "total_tokens": prompt + 6,
        "prompt_tokens_details": {"cached_tokens": 2},
        "prompt_time_costs": 250,
        "completion_time_costs": 750,
    }


async def test_chat_stream_has_openais_shape() -> None:
    chunks = await chat_chunks(ScriptedEngine(["he", "llo"]), stream_options={"include_usage": True})
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "he"},
        {"content": "llo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks} == {
        (chunks[0]["id"], chunks[0]["created"], "scripted")
    }


async def test_chat_stream_without_usage_has_no_usage_key_and_no_empty_chunks() -> None:
    chunks = await chat_chunks(ScriptedEngine("héllo"))
    assert not any("usage" in chunk for chunk in chunks)
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "h", "é", "l", "l", "o", None]


async def test_continuous_usage_counts_up() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await chat_chunks(ScriptedEngine("abc"), stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 3, 4, 4]


async def test_continuous_usage_without_usage_changes_nothing() -> None:
    found = collect_remarks()
    chunks = await chat_chunks(ScriptedEngine("abc"), stream_options={"continuous_usage_stats": True})
    assert not any("usage" in chunk for chunk in chunks)
    assert found == ["stream_options.continuous_usage_stats has no effect without include_usage: true"]


async def test_tools_that_no_prompt_shows_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    said = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    shown = {"plain": said, "reads tools": said + "{{ tools | tojson if tools }}"}
    shown["beside a system message"] = said + "{{ tools | tojson if tools and messages[0].role == 'system' }}"
    for name, template in shown.items():
        caplog.clear()
        adapter = OpenAIAdapter(
            ScriptedEngine('{"name": "f", "arguments": {}}', chat_template=template), tool_parser="json"
        )
        for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}}):
            found = collect_remarks()
            await adapter.chat({"messages": HI, "tools": tools, "tool_choice": choice})
            assert len(found) == (name == "plain"), (name, found)
        assert [record.getMessage() for record in caplog.records] == [f"scripted: {told}" for told in found]
        for fields in ({"tools": tools, "tool_choice": "none"}, {}):
            found = collect_remarks()
            await adapter.chat({"messages": HI, **fields})
            assert not found


async def test_prompts_that_are_too_long_are_cut_where_that_is_asked_for() -> None:
    engine = ScriptedEngine("abc", max_model_len=16)
    adapter = OpenAIAdapter(engine)
    long = list(range(20, 60))
    for given, tokens, side in ((3, long[-3:], None), (-1, long[-15:], "left"), (3, long[:3], "right")):
        fields = {"prompt": long, "max_tokens": 1, "truncate_prompt_tokens": given, "truncation_side": side}
        answer = await adapter.complete(fields)
        assert list(engine.requests[-1].prompt_token_ids) == tokens
        assert answer.usage.prompt_tokens == len(tokens)
    for side, tokens, text in (("left", "ef", "efa"), ("right", "ab", "aba")):
        fields = {"prompt": "abcdef", "max_tokens": 1, "truncate_prompt_tokens": 3, "truncation_side": side}
        assert (await adapter.complete({**fields, "echo": True})).choices[0].text == text
        beginning = engine.tokenizer.encode("")
        assert beginning  # remains, as tokenizers do it
        assert engine.requests[-1].prompt_token_ids == [*beginning, *map(ord, tokens)]
        await adapter.complete({**fields, "add_special_tokens": False})
        assert len(engine.requests[-1].prompt_token_ids) == 3
        assert engine.requests[-1].prompt_token_ids[0] not in beginning
    await chat(engine, max_tokens=1, truncate_prompt_tokens=5)
    assert len(engine.requests[-1].prompt_token_ids) == 5
    assert engine.requests[-1].prompt_token_ids[0] not in beginning  # templates write special tokens, as any text
    with pytest.raises(InvalidParameterError, match="smaller truncation size"):
        await adapter.complete({"prompt": "a", "truncate_prompt_tokens": 16})
    adapter = OpenAIAdapter(ScriptedEngine("abc", sees=True))
    seen: dict[str, Any] = {"messages": SEEN, "truncate_prompt_tokens": -1}
    for asked in (adapter.chat(seen), adapter.embed(seen)):
        with pytest.raises(UnsupportedParameterError, match="truncate_prompt_tokens: a prompt with images"):
            await asked


async def test_tokens_are_named_by_their_ids_where_that_is_asked_for() -> None:
    fields = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    answer = await chat(ScriptedEngine("ab"), **fields)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries][:2] == ["token_id:97", "token_id:98"]
    assert all(each["token"].startswith("token_id:") for entry in entries for each in entry["top_logprobs"])
    fields = {"prompt": "xy", "echo": True, "logprobs": 1, "max_tokens": 1, "return_tokens_as_token_ids": True}
    texts = (await OpenAIAdapter(ScriptedEngine("ab")).complete(fields)).choices[0].logprobs
    assert texts is not None
    assert texts.tokens[-3:] == ("token_id:120", "token_id:121", "token_id:97")
    assert "token_id:97" in (texts.top_logprobs[-1] or {})


def test_the_token_itself_is_the_first_of_its_log_probabilities() -> None:
    tokens = tuple(
        TokenLogprob(number, -number, number, "abc"[number - 1], b"abc"[number - 1 : number]) for number in (1, 2, 3)
    )
    entries = [PositionLogprobs(tokens[2], tokens[:2])]
    (made,) = CompletionLogprobsWriter(2).add(entries).top_logprobs
    (named,) = prompt_logprobs(entries, 1)
    assert (list(made or {}), list(named or {})) == (["c", "a", "b"], ["3", "1"])


async def test_tokens_that_a_request_names_have_log_probabilities() -> None:
    named = {"logprob_token_ids": [5, 97, 7], "return_tokens_as_token_ids": True, "max_tokens": 2}
    content = (await chat(ScriptedEngine("ab"), logprobs=True, top_logprobs=1, **named))["choices"][0]["logprobs"]
    shown = [
        [each["token"].removeprefix("token_id:") for each in entry["top_logprobs"]] for entry in content["content"]
    ]
    assert shown == [["97", "5", "7"], ["98", "5", "97", "7"]]
    texts = (await OpenAIAdapter(ScriptedEngine("ab")).complete({"prompt": "x", "logprobs": 0, **named})).choices[0]
    assert texts.logprobs is not None
    assert [set(each or ()) for each in texts.logprobs.top_logprobs] == [
        {"token_id:97", "token_id:5", "token_id:7"},
        {"token_id:98", "token_id:5", "token_id:97", "token_id:7"},
    ]


async def test_sequences_keep_their_own_text() -> None:
    texts = iter(["abc", "uvwxyz"])
    answer = await chat(ScriptedEngine(lambda _: next(texts)), n=2)
    assert [(c["index"], c["message"]["content"]) for c in answer["choices"]] == [(0, "abc"), (1, "uvwxyz")]
    texts = iter(["abc", "uvwxyz"])
    chunks = await chat_chunks(ScriptedEngine(lambda _: next(texts)), n=2)
    firsts = [c["choices"][0] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert [choice["index"] for choice in firsts] == [0, 1]


async def test_chat_logprobs_stop_and_token_ids() -> None:
    answer = await chat(ScriptedEngine("abcd"), logprobs=True, top_logprobs=2, stop="cd", return_token_ids=True)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == "ab"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "cd")
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["a", "b", "c", "d"]
    assert [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]] == [2] * 4
    assert choice["logprobs"]["content"][0]["bytes"] == [97]
    assert choice["token_ids"] == [97, 98, 99, 100]
    assert answer["prompt_token_ids"][0] == 258


async def test_prompt_logprobs_are_keyed_by_token_id() -> None:
    shown = (await chat(ScriptedEngine("a"), prompt_logprobs=0))["prompt_logprobs"]
    assert shown[0] is None
    assert list(shown[1]) == [str(ord("u"))]
    assert set(shown[1][str(ord("u"))]) == {"logprob", "rank", "decoded_token"}


async def test_length_is_reported() -> None:
    assert (await chat(ScriptedEngine("abc"), max_completion_tokens=2))["choices"][0]["finish_reason"] == "length"


async def test_template_gets_everything() -> None:
    engine = ScriptedEngine()
    history = [*HI, {"role": "assistant", "content": "Sure, "}]
    options = {"documents": [{"text": "d"}], "enable_thinking": False, "continue_final_message": True, "echo": True}
    answer = await chat(engine, messages=history, **options)
    call = engine.template_calls[0]
    assert call.messages == history
    assert call.options == {
        "documents": [{"text": "d"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "enable_thinking": False,
        "thinking": False,
    }
    assert answer["choices"][0]["message"]["content"] == "Sure, Hello!"
    assert engine.requests[0].prompt_token_ids[0] != engine.tokenizer.bos_token_id


async def test_request_id_priority_and_special_tokens_reach_the_engine() -> None:
    engine = ScriptedEngine()
    answer = await chat(engine, request_id="mine", priority=-3, add_special_tokens=True)
    assert answer["id"] == engine.requests[0].request_id == "chatcmpl-mine"
    assert engine.requests[0].priority == -3
    assert engine.requests[0].prompt_token_ids[0] == engine.tokenizer.bos_token_id


# ---- completions -----------------------------------------------------------------------------------------------------


async def test_completion_answer() -> None:
    engine = ScriptedEngine(lambda prompt: prompt.upper())
    answer = await complete(engine, prompt=["ab", "cd"], n=2)
    official.Completion.model_validate(answer, strict=True)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "AB"), (1, "AB"), (2, "CD"), (3, "CD")]
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 12
    assert [request.request_id for request in engine.requests] == [f"{answer['id']}-0", f"{answer['id']}-1"]


@pytest.mark.parametrize("prompt", [[256, 97], [[256, 97]], "a", ["a"]])
async def test_every_form_of_prompt(prompt: object) -> None:
    engine = ScriptedEngine("x")
    assert (await complete(engine, prompt=prompt, echo=True))["choices"][0]["text"].endswith("ax")
    assert list(engine.requests[0].prompt_token_ids) == [256, 97]
    assert engine.requests[0].params.max_tokens == 16


async def test_completion_logprobs_have_the_older_form() -> None:
    answer = await complete(ScriptedEngine(["a", "é".encode()[:1], "é".encode()[1:], "b"]), logprobs=1)
    official.Completion.model_validate(answer, strict=True)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "b", "<|eos|>"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]
    answer = await complete(ScriptedEngine(["a", b"\xe2\x82", b"\xe2", b"\xff", "b"]), logprobs=1)
    assert answer["choices"][0]["text"] == "a\ufffd\ufffd\ufffdb"
    assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1, 2, 3, 4, 5]
    assert all(value < 0 for value in logprobs["token_logprobs"])
    assert [list(entry) for entry in logprobs["top_logprobs"]] == [[token] for token in logprobs["tokens"]]


async def test_echo_with_logprobs_covers_the_prompt() -> None:
    choice = (await complete(ScriptedEngine("x"), echo=True, logprobs=0))["choices"][0]
    assert choice["text"] == "abx"
    assert choice["logprobs"]["tokens"] == ["<|bos|>", "a", "b", "x", "<|eos|>"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("given", range(1, 5))
@pytest.mark.parametrize("ending", [" x", "x", ""])
async def test_an_echo_is_the_text_of_prompt_and_answer_together(given: int, ending: str) -> None:
    """Also where the prompt ends within a character, which the answer goes on with or not."""
    pepper = "\U0001f336".encode()
    prompt = [*"bé".encode(), *pepper[:given]]
    rest = (pepper[given:] if ending == " x" else b"") + ending.encode()
    text = bytes([*prompt, *rest]).decode("utf-8", "replace")
    for fields in ({}, {"n": 2}, {"logprobs": 0}, {"stop": "x"}, {"max_tokens": max(len(rest), 1)}):
        engine = ScriptedEngine([rest])
        whole = await complete(engine, prompt=prompt, echo=True, **fields)
        texts = [one["text"] for one in whole["choices"]]
        assert set(texts) == {text.removesuffix("x") if "stop" in fields else text}
        chunks = await completion_chunks(engine, prompt=prompt, echo=True, **fields)
        for index, one in enumerate(texts):
            assert "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index) == one
        if "logprobs" in fields:
            ids = [*prompt, *rest, engine.tokenizer.eos_token_id]
            begun = [len(engine.detokenize(ids[:count], False, whole=False)) for count in range(len(ids))]
            begun[len(prompt)] += given < 4 and ending != " x"  # a character stands for the one that stays incomplete
            assert whole["choices"][0]["logprobs"]["text_offset"] == begun
    scored = await complete(ScriptedEngine("x"), prompt=prompt, echo=True, max_tokens=0)
    assert scored["choices"][0]["text"] == bytes(prompt).decode("utf-8", "replace")
    plain = await complete(ScriptedEngine([rest]), prompt=prompt)
    assert plain["choices"][0]["text"] == rest.decode("utf-8", "replace")


async def test_scoring_a_prompt_adds_nothing() -> None:
    answer = await complete(ScriptedEngine("x"), echo=True, logprobs=0, max_tokens=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["tokens"] == ["<|bos|>", "a", "b"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_completion_stream() -> None:
    chunks = await completion_chunks(ScriptedEngine("xy"), stream_options={"include_usage": True}, echo=True)
    assert [[c["text"] for c in chunk["choices"]] for chunk in chunks] == [["ab"], ["x"], ["y"], [""], []]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * 4 + [False]
    assert chunks[3]["choices"][0]["finish_reason"] == "stop"


async def test_return_token_ids_of_completions() -> None:
    choice = (await complete(ScriptedEngine("xy"), return_token_ids=True))["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([256, 97, 98], [120, 121, 257])


async def test_labels_of_the_client_are_repeated() -> None:
    """candle-vllm's `conversation_id` and `resource_id`."""
    labels = {"conversation_id": "c-1", "resource_id": "r/2"}
    whole = await chat(ScriptedEngine("xy"), **labels)
    assert labels.items() <= whole.items()
    assert not labels.keys() & (await chat(ScriptedEngine("xy"))).keys()
    adapter = OpenAIAdapter(ScriptedEngine("xy"))
    request = parse_chat_request({"messages": HI, "stream": True, "n": 2, **labels})
    chunks = [wire(chunk) async for chunk in await adapter.chat_stream(request)]
    assert labels.items() <= chunks[0].items()
    assert not any(labels.keys() & chunk.keys() for chunk in chunks[1:])


async def test_a_text_is_a_conversation_of_one_message() -> None:
    engines = [ScriptedEngine("xy") for _ in range(2)]
    for engine, messages in zip(engines, ("Hi there", [{"role": "user", "content": "Hi there"}]), strict=True):
        await OpenAIAdapter(engine).chat(parse_chat_request({"messages": messages}))
    assert engines[0].requests[0].prompt_token_ids == engines[1].requests[0].prompt_token_ids


# ---- models ----------------------------------------------------------------------------------------------------------


async def test_served_names() -> None:
    adapter = OpenAIAdapter(ScriptedEngine(name="org/model"), served_model_names=["small", "alias"])
    models = wire(adapter.models())
    for card in models["data"]:
        official.Model.model_validate(card, strict=True)
    assert [(card["id"], card["root"], card["max_model_len"]) for card in models["data"]] == [
        ("small", "org/model", 4096),
        ("alias", "org/model", 4096),
    ]
    assert models["data"][0]["owned_by"] == "candle-vllm"
    for given, used in ((None, "small"), ("default", "small"), ("alias", "alias")):
        request = parse_chat_request({"messages": HI, "model": given})
        assert (await adapter.chat(request)).model == used
    for other in ("org/model", ""):
        request, remarks = parse_chat_request({"messages": HI, "model": other}), collect_remarks()
        assert (await adapter.chat(request)).model == "small"
        assert remarks == [f"the model {other!r} is not served here: 'small' answers instead"]
        strict = OpenAIAdapter(ScriptedEngine(), served_model_names=["small", "alias"], strict_model_names=True)
        with pytest.raises(ModelNotServedError, match=f"'{other}' is not served here; served models are: small, alias"):
            await strict.chat(request)


async def test_the_demo_model_is_served_as_demo_too() -> None:
    request = parse_chat_request({"messages": HI, "model": "demo"})
    adapter = OpenAIAdapter(ScriptedEngine(name=DEMO_NAME))
    assert (await adapter.chat(request)).model == "demo"
    assert [card["id"] for card in wire(adapter.models())["data"]] == [DEMO_NAME]
    for other in (
        OpenAIAdapter(ScriptedEngine(), strict_model_names=True),
        OpenAIAdapter(ScriptedEngine(name=DEMO_NAME), served_model_names=["x"], strict_model_names=True),
    ):
        with pytest.raises(ModelNotServedError, match="'demo' is not served here"):
            await other.chat(request)


async def test_the_models_own_defaults_are_used_and_checked() -> None:
    engine = ScriptedEngine(default_sampling={"temperature": 0.3})
    await chat(engine)
    assert engine.requests[0].params.temperature == 0.3
    for wrong in ({"temprature": 1}, {"temperature": -1}, {"n": 2}):
        with pytest.raises(ConfigError):
            OpenAIAdapter(ScriptedEngine(default_sampling=wrong))


# ---- failures --------------------------------------------------------------------------------------------------------


async def test_submission_errors_come_before_the_stream() -> None:
    adapter = OpenAIAdapter(ScriptedEngine(max_model_len=64, submit_error=EngineOverloadedError("full")))
    with pytest.raises(EngineOverloadedError):
        await adapter.chat_stream(parse_chat_request({"messages": HI}))
    adapter = OpenAIAdapter(ScriptedEngine(max_model_len=64))
    with pytest.raises(PromptTooLongError):
        await adapter.chat_stream(parse_chat_request({"messages": HI, "max_tokens": 60}))
    with pytest.raises(ChatTemplateError):
        await OpenAIAdapter(ScriptedEngine(has_chat_template=False)).chat(parse_chat_request({"messages": HI}))
    with pytest.raises(InvalidParameterError, match="out of vocabulary: the model's ids are 0 to 259"):
        await adapter.complete(parse_completion_request({"prompt": [260], "echo": True}))
    with pytest.raises(InvalidParameterError, match="prompt: the prompt is empty"):
        await adapter.complete(parse_completion_request({"prompt": "", "add_special_tokens": False}))


@pytest.mark.parametrize(
    ("fields", "param", "spelled"),
    [
        ({}, "prompt", "messages"),
        ({"max_tokens": 9}, "max_tokens", "max_tokens"),
        ({"max_completion_tokens": 9}, "max_tokens", "max_completion_tokens"),
        ({"request_id": "r"}, "request_id", "request_id"),
    ],
)
async def test_errors_of_the_engine_blame_what_the_caller_wrote(
    fields: dict[str, Any], param: str, spelled: str
) -> None:
    adapter = OpenAIAdapter(ScriptedEngine(submit_error=PromptTooLongError("too long", param)))
    with pytest.raises(PromptTooLongError) as caught:
        await adapter.chat_stream(parse_chat_request({"messages": HI, **fields}))
    assert caught.value.param == spelled
    with pytest.raises(PromptTooLongError) as caught:
        await OpenAIAdapter(ScriptedEngine(submit_error=PromptTooLongError("too long", "prompt"))).complete(
            parse_completion_request({"prompt": "a"})
        )
    assert caught.value.param == "prompt"


async def test_priority_can_be_refused() -> None:
    engine = ScriptedEngine()
    adapter = OpenAIAdapter(engine, allow_priority=False)
    for answer in (
        adapter.chat(parse_chat_request({"messages": HI, "priority": -1})),
        adapter.complete(parse_completion_request({"prompt": "a", "priority": -1})),
    ):
        with pytest.raises(UnsupportedParameterError, match="--enable-request-priority") as caught:
            await answer
        assert caught.value.param == "priority"
    for priority in (0, 1):  # who lets others go first takes nothing from them
        await adapter.chat(parse_chat_request({"messages": HI, "priority": priority}))
    assert [request.priority for request in engine.requests] == [0, 1]


async def test_allowed_tokens_are_at_most_the_vocabulary() -> None:
    adapter, vocabulary = OpenAIAdapter(ScriptedEngine("a")), 260
    await adapter.chat(parse_chat_request({"messages": HI, "allowed_token_ids": list(range(vocabulary))}))
    with pytest.raises(InvalidParameterError, match="has 261 entries, but the model's vocabulary has 260") as caught:
        await adapter.chat(parse_chat_request({"messages": HI, "allowed_token_ids": [0] * (vocabulary + 1)}))
    assert caught.value.param == "allowed_token_ids"


async def test_logprobs_of_prompts_are_capped_together() -> None:
    def fields(tokens: int) -> dict[str, Any]:
        return {"prompt": [[97] * (tokens // 2)] * 2, "echo": True, "logprobs": 3, "n": 8, "max_tokens": 0}

    most = MAX_LOGPROBS // 8 // 4
    adapter = OpenAIAdapter(ScriptedEngine("a", max_model_len=1 << 20))
    await (await adapter.complete_stream(parse_completion_request(fields(most)))).aclose()
    with pytest.raises(InvalidParameterError, match=rf"tokens x n x .* at most {MAX_LOGPROBS} are") as caught:
        await adapter.complete(parse_completion_request(fields(most + 2)))
    assert caught.value.param == "logprobs"
    with pytest.raises(InvalidParameterError) as caught:
        await adapter.chat(parse_chat_request({"messages": [{"role": "user", "content": "a" * 20_000}],
                                               "prompt_logprobs": 20}))  # fmt: skip
    assert caught.value.param == "prompt_logprobs"


async def test_logprobs_of_answers_are_capped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without max_tokens an answer ends where it would have too many."""
    monkeypatch.setattr(preparation, "MAX_LOGPROBS", 48)
    adapter = OpenAIAdapter(ScriptedEngine("abcdefghijklmnop"))
    chat = {"messages": HI, "logprobs": True, "top_logprobs": 3, "n": 2}
    completion = {"prompt": ["x", "y"], "logprobs": 3, "n": 2}
    rows: Any = (
        (adapter.chat, parse_chat_request, chat, 6), (adapter.complete, parse_completion_request, completion, 3),
    )  # fmt: skip
    for call, parse, fields, most in rows:
        assert (await call(parse({**fields, "max_tokens": most}))).usage.completion_tokens == 12
        with pytest.raises(InvalidParameterError, match=r"max_tokens x n x .* at most 48 are") as caught:
            await call(parse({**fields, "max_tokens": most + 1}))
        assert caught.value.param == "logprobs"
    open_ended: Any = await adapter.chat(parse_chat_request(chat))
    assert open_ended.usage.completion_tokens == 12
    assert {choice.finish_reason for choice in open_ended.choices} == {"length"}
    await adapter.chat(parse_chat_request({"messages": HI, "n": 2, "max_tokens": 100}))


@pytest.mark.parametrize("call", ["chat", "complete"])
async def test_long_answers_are_joined_beside_the_event_loop(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = list[threading.Thread]()
    name = {"chat": "join_chat", "complete": "join_completion"}[call]
    join = getattr(adapter_module, name)

    def spy(chunks: Any) -> Any:
        joined.append(threading.current_thread())
        return join(chunks)

    monkeypatch.setattr(adapter_module, name, spy)
    monkeypatch.setattr(answers_module, "_MANY_EVENTS", 5)
    fields = {"messages": HI} if call == "chat" else {"prompt": "x"}
    logprobs = {"logprobs": True} if call == "chat" else {"logprobs": 0}
    for text, more in (("a", {}), ("abcdefgh", {}), ("a", logprobs), ("a", {"prompt_logprobs": 0})):
        await getattr(OpenAIAdapter(ScriptedEngine(text)), call)(fields | more)
    assert [thread is threading.main_thread() for thread in joined] == [True, False, False, False]


async def test_one_wrong_prompt_aborts_the_others() -> None:
    engine = ScriptedEngine(max_model_len=30)
    request = parse_completion_request({"prompt": ["a", "b" * 40], "max_tokens": 2, "request_id": "x"})
    with pytest.raises(PromptTooLongError):
        await OpenAIAdapter(engine).complete(request)
    assert engine.aborted == ["cmpl-x-0"]
    assert engine.stats().num_running == 0


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_failures_of_the_engine(prompt: object) -> None:
    for failure, expected in (("boom", GenerationFailedError), (EngineDeadError("dead"), EngineDeadError)):
        engine = ScriptedEngine("abc", fail_after=2, failure=failure)
        with pytest.raises(expected):
            await complete(engine, prompt=prompt)
        stream = await OpenAIAdapter(engine).complete_stream(parse_completion_request({"prompt": prompt}))
        with pytest.raises(expected):
            assert [chunk async for chunk in stream]
        assert engine.stats().num_running == 0


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_closing_a_stream_aborts_begun_or_not(prompt: object) -> None:
    engine = ScriptedEngine("abc")
    adapter = OpenAIAdapter(engine)
    endless = {"prompt": prompt, "ignore_eos": True, "max_tokens": 4000}
    for read in (0, 1):
        stream = await adapter.complete_stream(parse_completion_request(endless))
        for _ in range(read):
            await anext(stream)
        await stream.aclose()
        await stream.aclose()
        assert engine.stats().num_running == 0
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert len(engine.aborted) == len(engine.requests) > 1


async def test_a_failed_whole_answer_leaves_no_cycle() -> None:
    """A cycle would keep the request and its events until the next garbage collection."""
    gc.disable()
    try:
        with pytest.raises(GenerationFailedError) as caught:
            await complete(ScriptedEngine("abc", fail_after=2, failure="boom"), prompt="a")
        error = weakref.ref(caught.value)
        del caught
        assert error() is None
    finally:
        gc.enable()


async def test_cancelling_a_whole_answer_aborts() -> None:
    engine = ScriptedEngine("abc")
    request = parse_chat_request({"messages": HI, "ignore_eos": True, "max_tokens": 4000})
    task = asyncio.create_task(OpenAIAdapter(engine).chat(request))
    await until(lambda: engine.stats().num_running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.aborted == [engine.requests[0].request_id]


# ---- requests that are none ------------------------------------------------------------------------------------------


def test_what_is_no_request_is_said_in_a_sentence() -> None:
    with SyncOpenAIAdapter(OpenAIAdapter(ScriptedEngine())) as adapter:
        for given in ("x", HI, None):
            for call in (adapter.chat, adapter.chat_stream, adapter.complete, adapter.embed):
                with pytest.raises(InvalidBodyError, match=r"one JSON object, as \{'messages'.* is, not "):
                    call(given)
        for call in (adapter.chat, adapter.chat_stream):
            with pytest.raises(TypeError, match=r"'messages': it is a field of the request, as in chat\(\{...\}\)"):
                call(messages=HI)
        with pytest.raises(TypeError, match="'prompt': it is a field of the request"):
            adapter.complete(prompt="x")


def test_a_whole_answer_is_not_asked_for_as_a_stream() -> None:
    with SyncOpenAIAdapter(OpenAIAdapter(ScriptedEngine())) as adapter:
        for call, fields in ((adapter.chat, {"messages": HI}), (adapter.complete, {"prompt": "x"})):
            with pytest.raises(InvalidParameterError, match=rf"call {call.__name__}_stream") as caught:
                call({**fields, "stream": True})
            assert caught.value.param == "stream"
            assert call({**fields, "stream": False}).choices == call(fields).choices


def test_answers_become_dicts() -> None:
    with SyncOpenAIAdapter(OpenAIAdapter(ScriptedEngine("Hello!"))) as adapter:
        answer = adapter.chat({"messages": HI})
        assert json.loads(json.dumps(to_dict(answer))) == wire(answer)
        assert not answer.choices[0].message.tool_calls
        assert "tool_calls" not in to_dict(answer)["choices"][0]["message"]
        assert isinstance(to_dict(adapter.embed({"input": "x"}))["data"][0]["embedding"], list)


def test_the_operators_variables_of_the_template_count_where_a_request_sets_none() -> None:
    engine = ScriptedEngine("x")
    adapter = OpenAIAdapter(engine, default_chat_template_kwargs={"enable_thinking": False, "style": "short"})

    def variables(**fields: Any) -> Any:
        asyncio.run(adapter.chat({"messages": [{"role": "user", "content": "Hi"}], **fields}))
        return {name: engine.template_calls[-1].options.get(name) for name in ("enable_thinking", "style")}

    assert variables() == {"enable_thinking": False, "style": "short"}
    asked = variables(enable_thinking=True, chat_template_kwargs={"style": "long"})
    assert (asked["enable_thinking"], asked["style"]) == (True, "long")
    with pytest.raises(ConfigError, match=r"default_chat_template_kwargs: .*cannot be set here"):
        OpenAIAdapter(engine, default_chat_template_kwargs={"messages": []})


async def test_texts_wait_for_no_images_that_are_decoded() -> None:
    class Slow(ScriptedEngine):
        def look(self, token_ids: Any, images: Any, names: Any = (), **options: Any) -> Any:
            assert free.wait(60)
            return super().look(token_ids, images, names)

    free, adapter = threading.Event(), OpenAIAdapter(Slow("x", sees=True))
    asked = [adapter.chat({"messages": SEEN}) for _ in range(5)]
    counted = [adapter.tokenize({"messages": SEEN}) for _ in range(5)]
    waiting = [asyncio.ensure_future(each) for each in (*asked, *counted)]
    try:
        await asyncio.sleep(0.2)
        answer = await asyncio.wait_for(adapter.chat({"messages": [{"role": "user", "content": "Hi"}]}), PATIENCE)
        assert answer.choices[0].message.content == "x"
        assert not any(each.done() for each in waiting)
    finally:
        free.set()
    await asyncio.gather(*waiting)


class Counting(ScriptedEngine):
    """Counts the characters that it tokenizes; a run of 100 spaces is one token."""

    characters = 0

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.characters += len(text)
        return super().tokenize(text.replace(" " * 100, "_"), add_special_tokens)


@pytest.mark.parametrize("character", ["a", "語"])
async def test_prompts_that_are_too_long_are_not_tokenized_to_their_end(character: str) -> None:
    engine = Counting(max_model_len=512)
    adapter, text = OpenAIAdapter(engine), character * 1_000_000
    message = {"messages": [{"role": "user", "content": text}]}
    for work in (
        partial(adapter.complete, {"prompt": text}),
        partial(adapter.complete, {"prompt": ["a", text]}),
        partial(adapter.chat, message),
        partial(adapter.chat_events, message),
    ):
        engine.characters = 0
        with pytest.raises(
            PromptTooLongError, match="has more than 512 tokens and this model's maximum context length is 512 tokens"
        ) as caught:
            await work()
        assert caught.value.param in ("prompt", "messages")
        assert engine.characters < 20_000
    assert (await adapter.tokenize({"prompt": text})).count == 1 + len(text.encode())  # what is only counted


async def test_long_prompts_of_long_tokens_are_answered() -> None:
    adapter = OpenAIAdapter(Counting("yes", max_model_len=512))
    made = await adapter.complete({"prompt": " " * 40_000, "max_tokens": 5})
    assert made.usage is not None
    assert made.usage.prompt_tokens == 401


async def test_a_template_that_takes_texts_gets_the_placeholder_of_an_image() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    engine = ScriptedEngine("abc", sees=True, chat_template=template)
    adapter = OpenAIAdapter(engine)
    await adapter.chat({"messages": SEEN})
    assert [one["content"] for one in engine.template_calls[-1].messages] == ["<image>"]
    await adapter.try_picture(base64.b64decode(GIF.partition(",")[2]))
    assert engine.template_calls[-1].messages[-1]["content"] == "<image>"
