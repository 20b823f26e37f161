# SPDX-License-Identifier: MIT
"""Reading takes time in proportion to the text: of every format, and of texts that are made to take longer.

Seconds are of the processor, the best of three, and the bar is generous: what is read again from its beginning for each
piece, or from every mark, takes sixteen times as long for four times the text.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from candle_vllm.openai.formats.layout import ToolFormat
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.table import TOOL_FORMATS
from packages.openai.tests.formats.messages import SMALL, check_linear, parse, parser, repeated
from packages.openai.tests.formats.samples import SHORT, TOOLS, Sample

HERMES = '<tool_call>{"name": "f2", "arguments": '


def of(name: str, reasoning: str = "think") -> Callable[[], OutputParser]:
    return lambda: parser(name, TOOLS, reasoning if reasoning else None)


by_format = pytest.mark.parametrize("sample", [pytest.param(one, id=one.tools) for one in SHORT])


def value_at(sample: Sample) -> tuple[str, str]:
    """The text before and behind the only argument."""
    at = sample.text.index("x", sample.text.index("city"))
    return sample.text[:at], sample.text[at + 1 :]


@by_format
def test_a_long_argument(sample: Sample) -> None:
    before, after = value_at(sample)
    words = repeated("a <b `c` {1} ")
    check_linear(of(sample.tools, sample.reasoning), lambda size: before + words(size) + after)
    long = words(SMALL).strip()
    assert parse(of(sample.tools)(), [before + long + after]).values == [("f2", {"city": long})]


@pytest.mark.one_of_each(31)
@by_format
def test_many_calls(sample: Sample) -> None:
    head, ok, call = sample.text.rpartition("Ok") if "Ok" in sample.text else ("", "", sample.text)
    check_linear(of(sample.tools, sample.reasoning), lambda size: head + ok + repeated(call + "\n")(size))
    assert len(parse(of(sample.tools)(), head + ok + (call + "\n") * 50).calls) == 50


@pytest.mark.one_of_each(30)
@by_format
def test_long_content_and_reasoning(sample: Sample) -> None:
    head = sample.text.partition("Ok")[0] if "Ok" in sample.text else ""
    words = repeated("Well, `a` < b <tool_c ```\n")
    check_linear(of(sample.tools), lambda size: head + words(size))
    check_linear(of(sample.tools), lambda size: "<think>" + words(size))


@pytest.mark.one_of_each(33)
@pytest.mark.parametrize("form", [row for row in TOOL_FORMATS if row.flow is None], ids=lambda row: row.name)
@pytest.mark.parametrize("text", ["", "f2", ' {"arguments": {"a": ', ' {"args": [1, \''])
def test_marks_that_begin_no_call(form: ToolFormat, text: str) -> None:
    """Models fall into such loops, and people ask for them."""
    mark = (*form.opens, *form.names)[0]
    check_linear(of(form.name), lambda size: "Ok " + repeated(mark + text)(size))


ODD = {
    "backslashes": ("hermes", HERMES + '{"a": "', "\\\\"),
    "escapes": ("hermes", HERMES + '{"a": "', "\\u00e9\\n"),
    "an encoded string": ("hermes", HERMES + '"{\\"a\\": \\"', "\\\\u00e9\\\\n"),
    "deep brackets": ("hermes", HERMES, '{"a": ['),
    "space behind a comma": ("hermes", HERMES + '{"a": 1,', " "),
    "one long number": ("hermes", HERMES + '{"a": ', "1"),
    "blocks": ("inkling", "", "<|message_model|>f<|content_text|>a "),
    "blocks without a kind": ("inkling", "", "<|message_model|>f2"),
    "calls in blocks that are none": ("inkling", "", '<|content_invoke_tool_json|>{"name": "f'),
    "calls of other models that are none": ("inkling", "<|content_text|>", '<tool_call>{"name": "f2", "arguments": {'),
    "one long word": ("hermes", HERMES + '{"a": ', "ab"),
    "zeros": ("hermes", HERMES + '{"a": 1', "0"),
    "keys without quotes": ("hermes", HERMES + "{", "a: 1, "),
    "brackets too many": ("hermes", HERMES + '{"a": 1}}', "} "),
    "calls with a bracket too many": ("mistral", "[TOOL_CALLS][", '{"name": "f2", "arguments": {}}}, '),
    "null again and again": ("mistral_v13", "", "[TOOL_CALLS]f2[ARGS]null"),
    "quotes in quotes": ("pythonic", '[f2(city="', '"a '),
    "quotes and commas": ("pythonic", '[f2(city="', '", x '),
    "quotes and brackets": ("pythonic", '[f2(city="', '") '),
    "values that are ended twice": ("qwen3_coder", "<tool_call><function=f2><parameter=on>", "</parameter></func"),
    "many keys": ("qwen3_coder", "<tool_call><function=f2>", "<parameter=city>x</parameter>"),
    "ends that are none": ("qwen3_coder", "<tool_call><function=f2><parameter=city>", "</parameter> x"),
    "white space": ("hermes", "Ok", "\n "),
    "a long line": ("hermes", "Ok", "`a"),
    "fences": ("hermes", "Ok", "\n```"),
    "thoughts": ("hermes", "", "<think></think>"),
    "thoughts before calls that are none": ("json", "", '<think></think>{"arguments": {"a": '),
    "headers": ("openai", "", "<|start|>assistant<|channel|>analysis<|message|>"),
    "headers without text": ("openai", "", "<|channel|>"),
    "recipients": ("openai", "", "to=f2<|message|>"),
    "Python's brackets": ("pythonic", "[f2(city=", "["),
    "Python's keys": ("pythonic", "[f2(", "a=1, "),
    "tags in tags": ("minimax_m3", ']<]minimax[>[<tool_call>]<]minimax[>[<invoke name="f2">', "]<]minimax[>[<a>"),
}


@pytest.mark.parametrize(("name", "before", "text"), ODD.values(), ids=ODD)
def test_odd_texts(name: str, before: str, text: str) -> None:
    check_linear(of(name, "openai" if name == "openai" else "think"), lambda size: before + repeated(text)(size))


def test_brackets_that_close_nothing() -> None:
    check_linear(of("hermes"), lambda size: HERMES + '{"a":' * (size // 10) + "]" * (size // 2))
