# SPDX-License-Identifier: MIT
"""Conversations one or many, pieces without an event loop, and what is said of a wrong message."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import (
    ChatTemplateError,
    EngineDeadError,
    InferenceEngine,
    InvalidParameterError,
    PromptTooLongError,
    RequestAbortedError,
    RequestError,
    SamplingParams,
)
from tests.waiting import wait_for

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def _slowly(_: Any, row: Any) -> Any:
    """A logits processor that keeps an answer from being whole before a test is done with it."""
    time.sleep(0.02)
    return row


LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, logits_processors=[_slowly])
USER = {"role": "user", "content": "hi"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def make(folder: Path, **settings: Any) -> InferenceEngine:
    return InferenceEngine(str(folder), threads=1, **settings)


@pytest.fixture(scope="module")
def engine(toy_model: Path) -> Iterator[InferenceEngine]:
    with make(toy_model, block_size=16) as made:
        yield made


def test_a_list_of_conversations_gives_a_list_of_outputs(
    engine: InferenceEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.chat([[USER]], GREEDY)
    assert capsys.readouterr().err == "", "a bar is for terminals"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    conversations = [[USER], [{"role": "system", "content": "s"}, {"role": "user", "content": "what?"}]]
    prompts = [engine.tokenize(engine.apply_chat_template(each), False) for each in conversations]
    outputs = engine.chat(conversations, [GREEDY, SamplingParams(max_tokens=3, seed=1, ignore_eos=True)])
    assert "prompts: 100%" in capsys.readouterr().err
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert [len(output.token_ids) for output in outputs] == [12, 3]
    assert len(engine.chat([[USER]], GREEDY, use_tqdm=False)) == 1
    assert engine.chat([USER], GREEDY).token_ids == outputs[0].token_ids
    assert "prompts" not in capsys.readouterr().err
    with pytest.raises(InvalidParameterError, match="2 prompts and 1 sampling_params"):
        engine.chat(conversations, [GREEDY])


def test_open_max_tokens_go_to_the_end_of_the_turn_in_lists_and_streams(engine: InferenceEngine) -> None:
    open_end = SamplingParams(temperature=0, ignore_eos=True)
    length = engine.model_info.max_model_len
    (output,) = engine.chat([[USER]], [open_end], use_tqdm=False)
    assert len(output.prompt_token_ids) + len(output.token_ids) == length
    with engine.chat_stream([USER], open_end) as pieces:
        assert tuple(token for piece in pieces for token in piece.token_ids) == output.token_ids


@pytest.mark.parametrize(
    ("messages", "place", "said"),
    [
        ("hi", "messages", 'must be a list of messages, such as [{"role": "user", "content": "Hello"}], not str'),
        (USER, "messages", 'must be a list of messages, such as [{"role": "user", "content": "Hello"}], not dict'),
        ([], "messages", "must hold at least one message"),
        ([USER, "hi"], "messages[1]", "must be an object with role and content, not str"),
        ([{"content": "x"}], "messages[0].role", "is missing"),
        ([{"role": 7, "content": "x"}], "messages[0].role", "must be a text, not int"),
        ([USER, USER, {"role": "user", "content": 5}], "messages[2].content", "must be a list of parts, or a text"),
        ([{"role": "user"}], "messages[0].content", "is missing, and there are no tool_calls"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "must be a text, not None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]", "is of type 'image_url'"),
        ([{"role": "user", "content": [1]}], "messages[0].content[0]", "must be an object with type and text"),
        ([{**CALL, "tool_calls": "f"}], "messages[0].tool_calls", "must be a list of calls, not str"),
        ([{**CALL, "tool_calls": ["f"]}], "messages[0].tool_calls[0]", "must be an object, not str"),
        ([[USER], [USER, {"role": "user"}]], "messages[1][1].content", "is missing"),
        ([[USER], []], "messages[1]", "must hold at least one message"),
        ([[USER], USER], "messages[1]", "must be a list of messages, such as "),
    ],
)
def test_a_wrong_message_is_named_by_its_place(engine: InferenceEngine, messages: Any, place: str, said: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        engine.chat(messages, GREEDY)
    assert str(caught.value).startswith(f"{place}: {said}")
    assert caught.value.param == place


@pytest.mark.parametrize("messages", [[USER, CALL], [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]])
def test_what_templates_take_is_let_by(engine: InferenceEngine, messages: Any) -> None:
    assert engine.apply_chat_template(messages)


def test_one_conversation_where_one_is_taken(engine: InferenceEngine) -> None:
    for call in (engine.apply_chat_template, engine.chat_stream):
        with pytest.raises(InvalidParameterError, match="one conversation, not a list"):
            call([[USER]])  # type: ignore[arg-type, list-item]


def test_pieces_without_a_loop_add_up(engine: InferenceEngine) -> None:
    whole = engine.generate("abc", GREEDY, use_tqdm=False)[0]
    pieces = list(engine.generate_stream("abc", GREEDY))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids
    assert len(pieces) > 1
    assert pieces[-1].finish_reason == whole.finish_reason
    answer = engine.chat([USER], GREEDY)
    with engine.chat_stream([USER], GREEDY) as stream:
        assert "".join(piece.text for piece in stream) == answer.text
        assert list(stream) == []


def test_all_sequences_of_a_request_come(engine: InferenceEngine) -> None:
    params = SamplingParams(n=2, max_tokens=5, seed=3, ignore_eos=True)
    pieces = list(engine.generate_stream("abc", params))
    assert {piece.index for piece in pieces if piece.finished} == {0, 1}


def aborted(engine: InferenceEngine) -> int:
    return engine.stats().finished.get("abort", 0)


@pytest.mark.parametrize("how", ["close", "with", "drop", "break", "never read"])
def test_an_early_end_aborts(engine: InferenceEngine, how: str) -> None:
    before = aborted(engine)
    stream = engine.generate_stream("abc", LONG)
    if how == "close":
        next(stream)
        stream.close()
        stream.close()
        assert list(stream) == []
    elif how == "with":
        with stream:
            next(stream)
    elif how == "break":
        for _ in stream:
            break
    del stream
    gc.collect()
    wait_for(lambda: aborted(engine) > before)
    assert aborted(engine) == before + 1
    assert engine.stats().num_running == 0


def test_a_wrong_request_raises_at_once(engine: InferenceEngine) -> None:
    with pytest.raises(InvalidParameterError, match="token id"):
        engine.generate_stream([1, "x"], GREEDY)  # type: ignore[list-item]


def test_a_closed_engine_ends_the_pieces(toy_model: Path) -> None:
    with make(toy_model) as engine:
        stream = engine.generate_stream("abc", LONG)
        next(stream)
    with pytest.raises((RequestAbortedError, EngineDeadError)):
        list(stream)
    assert list(stream) == []
    with pytest.raises(EngineDeadError):
        engine.generate_stream("abc", LONG)


PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]}
ASKED = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "42"}
WRITES = (
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content + '' }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.values() | join }}){% endfor %}]"
    "{% endfor %}"
)


def test_messages_as_clients_send_them(engine: InferenceEngine) -> None:
    developer = {"role": "developer", "content": "s"}
    answer = {"role": "assistant", "content": "No", "refusal": "never", "annotations": [], "audio": None}
    text = engine.apply_chat_template([developer, PARTS, ASKED, RESULT, answer], chat_template=WRITES)
    assert text == "[system: s][user: a\nb][assistant: f(1)][tool f: 42][assistant: No\nnever]"
    assert engine.chat([PARTS, ASKED, RESULT], GREEDY).token_ids
    null = {**ASKED, "content": None}
    assert engine.apply_chat_template([null, RESULT], chat_template=WRITES) == "[assistant: f(1)][tool f: 42]"
    assert ASKED["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'  # type: ignore[index]


def test_arguments_of_calls_are_as_the_template_wants_them(engine: InferenceEngine) -> None:
    as_text = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}"
        "{% endfor %}{% endfor %}"
    )
    assert engine.apply_chat_template([ASKED, RESULT], chat_template=as_text) == 'f{"x": 1}42'
    broken = {**ASKED, "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": '{"x": '}}]}
    assert engine.apply_chat_template([broken, RESULT], chat_template=as_text) == 'f{"x": 42'


@pytest.mark.parametrize(
    ("message", "place", "said"),
    [
        (
            {"role": "sytem", "content": "x"},
            "messages[1].role",
            "'sytem' is no role (did you mean system?); the roles are",
        ),
        ({"role": "function", "content": "x"}, "messages[1].role", "'function' is no role; the roles are"),
        ({"role": "user", "content": "y", "contnt": "x"}, "messages[1].contnt", "a message has no 'contnt'"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages[1].function_call", "a message has no"),
        ({"role": "user", "content": [{"type": "x", "text": "x"}]}, "messages[1].content[0]", "is of type 'x'"),
        ({"role": "user", "content": [{"type": "text", "text": "", "b": 1}]}, "messages[1].content[0].b", "a part has"),
        ({"role": "user", "content": [{"type": "refusal"}]}, "messages[1].content[0].refusal", "must be a text"),
        ({**CALL, "tool_calls": [{"function": "f"}]}, "messages[1].tool_calls[0].function", "must be an object"),
    ],
)
def test_what_nobody_reads_in_a_message_is_refused(
    engine: InferenceEngine, message: Any, place: str, said: str
) -> None:
    for call in (engine.chat, engine.chat_stream, engine.apply_chat_template):
        with pytest.raises(InvalidParameterError) as caught:
            call([USER, message])  # type: ignore[operator]
        assert str(caught.value).startswith(f"{place}: {said}")
        assert caught.value.param == place


def test_a_template_may_know_more_roles_and_keys(engine: InferenceEngine) -> None:
    source = (
        "{% for m in messages %}{% if m['role'] == 'critic' %}{{ m['stars'] }}{% endif %}{{ m.content }}{% endfor %}"
    )
    critic = {"role": "critic", "content": "x", "stars": 5}
    assert engine.apply_chat_template([critic], chat_template=source) == "5x"
    with pytest.raises(InvalidParameterError, match=r"messages\[0\].role"):
        engine.apply_chat_template([{"role": "stars", "content": "x"}], chat_template=source)


def test_a_template_of_the_call_is_checked_and_read(engine: InferenceEngine) -> None:
    source = "{{ tone }}{{ messages[0].content }}"
    prompt = engine.apply_chat_template([USER], chat_template=source, tone="kindly ")
    assert prompt == "kindly hi"
    whole = engine.generate({"prompt_token_ids": engine.tokenize(prompt, False)}, GREEDY, use_tqdm=False)[0]
    assert engine.chat([USER], GREEDY, chat_template=source, tone="kindly ").token_ids == whole.token_ids
    for wrong, said in (("{{ messages[0", "has an error in line 1"), (5, "must be Jinja source, not int")):
        with pytest.raises(InvalidParameterError, match=said) as caught:
            engine.chat([USER], GREEDY, chat_template=wrong)
        assert caught.value.param == "chat_template"


def test_tools_that_no_template_shows_are_refused(engine: InferenceEngine) -> None:
    with pytest.raises(ChatTemplateError, match="does not read tools") as caught:
        engine.chat([USER], GREEDY, chat_template="{{ messages[0].content }}", tools=[{"type": "function"}])
    assert caught.value.param == "tools"


def test_a_chat_in_an_event_loop(engine: InferenceEngine) -> None:
    whole = engine.chat([USER], GREEDY)

    async def ask() -> None:
        answer = await engine.achat([USER], GREEDY, request_id="mine", priority=1)
        assert (answer.request_id, answer.token_ids, answer.prompt) == ("mine", whole.token_ids, whole.prompt)
        pieces = [piece async for piece in engine.achat_stream([USER], GREEDY)]
        assert "".join(piece.text for piece in pieces) == whole.text
        with pytest.raises(TypeError, match="achat has no argument 'max_tokens': it is a field of SamplingParams"):
            await engine.achat([USER], max_tokens=3)
        with pytest.raises(TypeError, match="in an event loop use `stream` or `achat_stream`"):
            async for _ in engine.chat_stream([USER], GREEDY):  # type: ignore[attr-defined]
                pass

    asyncio.run(ask())


def test_answers_say_what_was_asked(engine: InferenceEngine) -> None:
    other = [{"role": "user", "content": "what?"}]
    outputs = engine.chat([[USER], other], GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == [engine.apply_chat_template(each) for each in ([USER], other)]


@pytest.mark.parametrize(
    ("prompts", "params", "place"),
    [
        (["a", "", "b"], GREEDY, "prompts[1]: the prompt is empty"),
        (["a", "b" * 600], GREEDY, "prompts[1]: the prompt has"),
        (["a", [1, 1 << 30]], GREEDY, "prompts[1]: token id 1073741824 is out of vocabulary"),
        (["a", 5], GREEDY, "prompts[1]: a prompt is a text or a list"),
        (["a", {"prompt": "b", "cache_salt": "x"}], GREEDY, "prompts[1]: a prompt has no 'cache_salt': it is a field"),
        ([USER], GREEDY, "this is a message of a conversation: use chat"),
        (b"abc", GREEDY, "prompts are texts or lists of token ids, not bytes"),
        (["a", b"abc"], GREEDY, "prompts[1]: a prompt is a text or a list"),
        ({"text": "a"}, GREEDY, "a prompt has no 'text'"),
        ({"prompt": 5}, GREEDY, "a prompt that is an object has a text"),
        ("a", {"max_tokens": 5}, "sampling_params must be SamplingParams, not dict: write SamplingParams(max_tokens="),
        ("a", 5, "sampling_params must be SamplingParams, not int"),
        (["a", "b"], [GREEDY, 5], "prompts[1]: sampling_params must be SamplingParams, not int"),
    ],
)
def test_a_wrong_prompt_is_named(engine: InferenceEngine, prompts: Any, params: Any, place: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate(prompts, params, use_tqdm=False)
    assert str(caught.value).startswith(place)


def test_a_wrong_conversation_of_several_is_named(engine: InferenceEngine) -> None:
    long = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(PromptTooLongError, match=r"^messages\[1\]: ") as caught:
        engine.chat([[USER], long], GREEDY, use_tqdm=False)
    assert caught.value.param == "messages[1]"


def test_vllms_prompts_are_taken(engine: InferenceEngine) -> None:
    ids = engine.tokenize("abc")
    given: list[Any] = ["abc", {"prompt": "abc"}, {"prompt_token_ids": ids}, {"prompt": "abc", "prompt_token_ids": ids}]
    given.append({"prompt_token_ids": iter(ids)})
    outputs = engine.generate(given, GREEDY, use_tqdm=False)
    assert len({output.token_ids for output in outputs}) == 1
    assert [output.prompt for output in outputs] == ["abc", "abc", None, "abc", None]
    assert engine.generate({"prompt": "abc"}, GREEDY, use_tqdm=False)[0].token_ids == outputs[0].token_ids
    bare = engine.generate("abc", GREEDY, use_tqdm=False, add_special_tokens=False)[0]
    assert list(bare.prompt_token_ids) == engine.tokenize("abc", add_special_tokens=False)


def test_wrong_kinds_are_our_own_errors(engine: InferenceEngine) -> None:
    given: Any = engine
    with pytest.raises(InvalidParameterError, match="must be a text, not int"):
        given.tokenize(5)
    for wrong in ("abc", [None], 5):
        with pytest.raises(InvalidParameterError, match="a list of token ids"):
            given.detokenize(wrong)
    with pytest.raises(RuntimeError, match="use generate_stream or chat_stream"):
        engine.stream("x")
    with pytest.raises(TypeError, match=r"^score takes pairs, use_tqdm, lora_request: score\(\) takes 2"):
        given.score("a", ["b"])
    with pytest.raises(TypeError, match=r"; the texts are one argument: score\(\[\(\"a\", \"b\"\)\]\)$"):
        given.score("a", "b")


def test_a_character_that_the_end_cuts_off_is_said_alike_in_pieces_and_whole(engine: InferenceEngine) -> None:
    """Of one token each byte, the first of a character alone: U+FFFD, as `detokenize` says it."""
    first = engine.tokenize("\U0001f389", add_special_tokens=False)[0]
    params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=[first], ignore_eos=True)
    whole = engine.generate("a", params)[0]
    pieces = list(engine.generate_stream("a", params))
    assert whole.text == "".join(piece.text for piece in pieces) == engine.detokenize(whole.token_ids) == "\ufffd"
    assert whole.token_ids == (first,)
