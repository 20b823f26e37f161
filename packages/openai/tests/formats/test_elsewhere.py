# SPDX-License-Identifier: MIT
"""Calls in the way of another model: complete, of a tool that is offered, where an answer begins; otherwise text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from candle_vllm.core.text.tokenizer import ChatConventions
from candle_vllm.openai import parse_chat_request
from candle_vllm.openai.formats.elsewhere import COMMON
from candle_vllm.openai.formats.layout import Layout, bind
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.table import TOOL_FORMATS
from candle_vllm.openai.planning import AnswerPlanner
from candle_vllm.openai.requests import read_chat
from packages.openai.tests.formats.messages import REASONING, Parsed, check_linear, parse, repeated
from packages.openai.tests.formats.messages import TOOLS as FORMATS
from packages.openai.tests.formats.samples import SHORT, TOOLS

X = '{"city": "x"}'
CALL = '{"name": "f2", "arguments": {"city": "x"}}'
QWEN = "<function=f2>\n<parameter=city>\nx\n</parameter>\n</function>"
WAYS = {
    "qwen tags": f"<tool_call>\n{QWEN}\n</tool_call>",
    "qwen tags alone": QWEN,
    "hermes": f"<tool_call>\n{CALL}\n</tool_call>",
    "a list in tags": f"<tool_call>[{CALL}]</tool_call>",
    "mistral": f"[TOOL_CALLS][{CALL}]",
    "mistral's names": f"[TOOL_CALLS]f2[ARGS]{X}",
    "json": CALL,
    "a list": f"[{CALL}]",
    "python": "[f2(city='x')]",
}
TEXTS = [row.name for row in TOOL_FORMATS if row.flow is None]
in_every_way = pytest.mark.parametrize("way", WAYS)
in_every_format = pytest.mark.parametrize("tools", TEXTS)


def made(tools: str, schemas: dict[str, Any] | None = TOOLS, **options: Any) -> OutputParser:
    layout = Layout(REASONING["think"], FORMATS[tools], COMMON)
    return OutputParser(layout, tools=schemas, make_id=lambda index: f"id{index}", **options)


def said(tools: str, text: str, whole: bool = True, **options: Any) -> Parsed:
    """What a text says, whole, by characters and in threes."""
    pieces: list[Iterable[str]] = [[text], text, [text[place : place + 3] for place in range(0, len(text), 3)]]
    found = {parse(made(tools, **options), one, whole) for one in pieces}
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.one_of_each
@in_every_way
@in_every_format
def test_it_is_a_call(tools: str, way: str) -> None:
    for before, thoughts in (("", ""), ("\n", ""), ("<think>Hm.</think>\n\n", "Hm.")):
        parsed = said(tools, f"{before}{WAYS[way]}")
        assert (parsed.content, parsed.thoughts, parsed.values) == ("", thoughts, [("f2", {"city": "x"})])
        assert [call[3] for call in parsed.calls] == [True]


@pytest.mark.one_of_each(31)
@in_every_way
@in_every_format
def test_elsewhere_or_of_no_tool_or_without_its_end_it_is_what_it_was(tools: str, way: str) -> None:
    """As if there were no other models: what is no call then is text as it stands."""
    text = WAYS[way]
    cuts = [text[:end] for end in range(len(text))]
    for other in (f"So {text}", text.replace("f2", "f9")):
        assert said(tools, other) == parse(plain(tools), [other])
    for part in cuts:
        for whole in (False, True):
            parsed = parse(made(tools), [part], whole)
            assert parsed == parse(made(tools), part, whole)
            own = parse(plain(tools), [part], whole)
            assert parsed == own or [call[1:] for call in parsed.calls] == [("f2", X, True)], part


def plain(tools: str) -> OutputParser:
    return OutputParser(Layout(REASONING["think"], FORMATS[tools]), tools=TOOLS, make_id=lambda index: f"id{index}")


def test_what_lacks_its_end_is_text() -> None:
    for text in (f"<tool_call>{CALL[:-1]}", f"<tool_call>{CALL[:-2]}", "[f2(city='x'", f"<tool_call>{QWEN[:-20]}"):
        assert said("gemma4", text) == Parsed(text, "", ())
    for text in (f'{CALL[:-1]} "x" {CALL}', f'{{"function": {CALL}'):
        assert said("gemma4", text) == Parsed(text, "", ())


def test_several_and_then_an_answer() -> None:
    parsed = said("llama3_json", f"{WAYS['qwen tags']}\n{WAYS['hermes']}\nDone.")
    assert (parsed.content, [call[0] for call in parsed.calls]) == ("Done.", ["id0", "id1"])
    text = f"Done.\n{WAYS['qwen tags']}"
    assert said("llama3_json", text) == Parsed(text, "", ())


@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", WAYS)
def test_one_way_behind_another(first: str, second: str) -> None:
    parsed = said("gemma4", f"{WAYS[first]}\n{WAYS[second]}\nDone.")
    assert (parsed.content, parsed.values) == ("Done.", [("f2", {"city": "x"})] * 2)


def test_a_bracket_too_many_changes_nothing() -> None:
    for text in ("[f2(city='x')]", "[f2(city='x')]}}", "[f2(city='x')]\n}"):
        assert said("minimax_m3", text).calls == (("id0", "f2", X, True),)


@pytest.mark.parametrize(
    "text",
    [
        "[f2(city='x')]}",
        "[f2(city='x')]}x",
        "[f2(city='x', \"a\") ]",
        "[f2(city='x\"', ) }\"",
        "[f2([f2(city='x')]`(\"",
    ],
)
def test_what_is_put_back_stays_what_it_was(text: str) -> None:
    parsed = said("gemma4", text)
    assert parsed.calls or parsed.content == text


def test_in_thoughts_it_is_a_thought() -> None:
    text = f"Like {WAYS['qwen tags']} so."
    assert said("llama3_json", f"<think>{text}</think>Ok") == Parsed("Ok", text, ())


@in_every_format
def test_without_tools_or_where_a_grammar_holds_calls_it_is_text(tools: str) -> None:
    way = WAYS["mistral's names"]
    assert parse(made(tools, None), [way]) == Parsed(way, "", ())
    if "[TOOL_CALLS]" not in FORMATS[tools].opens:
        assert parse(made(tools, held=True), [way]) == Parsed(way, "", ())
        assert parse(made(tools, lazy=True), [way]) == Parsed(way, "", ())


@pytest.mark.parametrize("sample", [pytest.param(one, id=one.tools) for one in SHORT if one.tools in TEXTS])
def test_a_formats_own_calls_stream_as_ever(sample: Any) -> None:
    text = sample.text.removeprefix("Ok")
    own, beside = plain(sample.tools), made(sample.tools)
    assert [own.feed(one) for one in text] == [beside.feed(one) for one in text]
    assert own.finish(True) == beside.finish(True)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f2", "arguments": {"a": ',
        '<think></think>{"name": "f2", "arguments": {"a": ',
        "<tool_call><function=f2><parameter=city>",
        "<think></think>[TOOL_CALLS]f2[ARGS]{",
        "[f2(",
    ],
)
def test_time_is_linear(text: str) -> None:
    check_linear(lambda: made("gemma4"), repeated(text))


def test_plans_look_for_it() -> None:
    special = {"[TOOL_CALLS]": 7, "<tool_call>": 8}
    planner = AnswerPlanner(
        ChatConventions(special_tokens=special), "none", tool_parser="llama", reasoning_parser="none"
    )
    tools = [{"type": "function", "function": {"name": "f2", "parameters": TOOLS["f2"]}}]
    request = parse_chat_request({"messages": [{"role": "user", "content": "Hi"}], "tools": tools})
    plan = planner.plan(read_chat(request), "").answers
    assert plan.bound is not None
    text = f"{plan.bound.characters[8]}\n{QWEN}\n</tool_call>"
    engine = OutputParser(plan.bound.layout, tools=plan.tools)
    assert parse(engine, [text]).values == [("f2", {"city": "x"})]
    assert bind(Layout(None, None, COMMON), special).characters == plan.bound.characters
