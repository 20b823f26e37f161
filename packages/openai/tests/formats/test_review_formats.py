# SPDX-License-Identifier: MIT
"""Ways of writing of single formats: what models of each write beside the form that their templates teach them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from candle_vllm.core.text.tokenizer import ChatConventions
from candle_vllm.openai import parse_chat_request
from candle_vllm.openai.formats.choice import choose_layout
from candle_vllm.openai.formats.layout import Layout, bind
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS, by_name
from candle_vllm.openai.planning import AnswerPlanner
from candle_vllm.openai.requests import read_chat
from packages.openai.tests.formats.messages import Parsed, parse, parser
from packages.openai.tests.formats.samples import TOOLS

X = '{"city": "x"}'
CALL = '{"name": "f2", "arguments": {"city": "x"}}'
F2 = [("f2", {"city": "x"})]
NOTE = {"type": "object", "properties": {"note": {"type": "string"}}}
OFFERED = {**TOOLS, "write": NOTE}


def said(tools: str, text: str, reasoning: str | None = "think", **options: Any) -> Parsed:
    """What a text says; the same by characters, and its beginnings say a part of it."""

    def read(text: str, *, whole: bool = True) -> Parsed:
        found = parse(parser(tools, OFFERED, reasoning, **options), [text], whole)
        assert parse(parser(tools, OFFERED, reasoning, **options), text, whole) == found, text
        return found

    full = read(text, whole=False)
    for end in range(len(text)):
        part = read(text[:end], whole=False)
        assert len(part.calls) <= len(full.calls), text[:end]
        for cut, call in zip(part.calls, full.calls):
            assert cut[1] == call[1]
            assert call[2].startswith(cut[2]), text[:end]
    return read(text)


def check(tools: str, text: str, calls: list[tuple[str, Any]], content: str = "", reasoning: str = "think") -> None:
    parsed = said(tools, text, reasoning)
    assert (parsed.content, parsed.values) == (content, calls)
    assert all(closed for _, _, _, closed in parsed.calls)


class TestFunctionary:
    """Version 3.2 writes `>>>` before each part, and content before it without a line break."""

    @pytest.mark.parametrize(
        "content",
        [
            ">>> 1 + 1\n2",
            "Python prompt:\n>>> print(1)\n1\n>>> f2\n{}",
            "Python prompt:\n>>> now\n<function now>\n>>> x",
            "x >>>now\nfoo",
            "x >>>f2\nfoo",
            "x >>>unknown\n{}",
            '```\n>>>f2\n{"city": 1}\n```',
            "Use `>>>f2\n{}` so",
            "a >>>",
            "a >>>f2",
            "a >>>f2\n",
            "a >>>f2 {}",
        ],
    )
    def test_marks_that_are_text(self, content: str) -> None:
        check("functionary_v32", f"all\n{content}", [], content)

    @pytest.mark.parametrize(
        ("content", "kept"),
        [("Hi.", "Hi."), ("Hi.\n", "Hi."), ("<b>Hi</b>", "<b>Hi</b>"), ("```py\nx\n```", "```py\nx\n```"), ("", "")],
    )
    def test_marks_that_are_none(self, content: str, kept: str) -> None:
        check("functionary_v32", f"all\n{content}>>>f2\n{X}", F2, kept)

    def test_parts_in_a_row(self) -> None:
        text = f"f2\n{X}\n>>>now\n>>>python\nprint(1)\n>>> x\n>>>now\n{{}}>>>write\nHi\n>>>all\nDone."
        calls = [*F2, ("now", {}), ("python", {"code": "print(1)\n>>> x\n"}), ("now", {}), ("write", {"note": "Hi\n"})]
        check("functionary_v32", text, calls, "Done.")

    @pytest.mark.parametrize(("text", "arguments"), [("now", "{}"), ("now\n", "{}"), ("f2\nfoo", "foo")])
    def test_no_object(self, text: str, arguments: str) -> None:
        name = text.partition("\n")[0]
        assert said("functionary_v32", text).calls == (("id0", name, arguments, True),)

    def test_content_without_a_header(self) -> None:
        check("functionary_v32", "Hello.\nYou.", [], "Hello.\nYou.")
        check("functionary_v32", f"Hello.\n>>>f2\n{X}", F2, "Hello.")

    @pytest.mark.parametrize("fields", [{}, {"tool_choice": "none"}])
    def test_answers_without_tools(self, fields: dict[str, Any]) -> None:
        tools = {"tools": [{"type": "function", "function": {"name": "f2"}}]} if fields else {}
        planned = plan("functionary_v32", **tools, **fields)
        assert read(planned, "all\nHello >>>f2\n{}") == Parsed("Hello >>>f2\n{}", "", ())

    def test_the_beginning_of_a_mark_in_a_cut_text_is_not_shown(self) -> None:
        for end in range(3, len("all\nOk>>>f2\n")):
            parsed = parse(parser("functionary_v32", TOOLS), ["all\nOk>>>f2\n"[: end + 1]], whole=False)
            assert "Ok".startswith(parsed.content.rstrip(">")), end


def plan(tool_parser: str, reasoning_parser: str = "none", **fields: Any) -> OutputParser:
    planner = AnswerPlanner(ChatConventions(), "none", tool_parser=tool_parser, reasoning_parser=reasoning_parser)
    request = parse_chat_request({"messages": [{"role": "user", "content": "Hi"}], **fields})
    answers = planner.plan(read_chat(request), "").answers
    assert answers.bound is not None
    return OutputParser(answers.bound.layout, tools=answers.tools)


def read(engine: OutputParser, text: str) -> Parsed:
    return parse(engine, text)


class TestHarmony:
    """A header that lacks its end is text; a call needs no object."""

    @pytest.mark.parametrize(
        ("text", "content"),
        [
            ("<|channel|>final Hello there", "Hello there"),
            ("<|channel|>final Hello there<|end|><|start|>assistant<|channel|>final<|message|>B", "Hello there\nB"),
            ("<|channel|>finally", "finally"),
            ("<|channel|>final <|constrain|>json", ""),
            ("<|start|>assistant Hello", "Hello"),
            ("<|start|>Hello there", "Hello there"),
            ("to=be or not", "to=be or not"),
            ("to=be or not\n\nto be", "to=be or not\n\nto be"),
            ("<|channel|>commentary to=functions.f2", ""),
            ("<|channel|>final " + "word " * 200, "word " * 200),
            ("<|message|>Hi", "Hi"),
            ("<|channel|>final to=user<|message|>Hi", "Hi"),
            ("<|channel|>commentary to=all<|message|>Hi", "Hi"),
        ],
    )
    def test_content(self, text: str, content: str) -> None:
        check("openai", text, [], content, "openai")

    def test_thoughts_without_the_mark_before_them(self) -> None:
        assert said("openai", "<|channel|>analysis We need", "openai") == Parsed("", "We need", ())

    @pytest.mark.parametrize(
        ("name", "body", "arguments"),
        [
            ("now", "", "{}"),
            ("now", " \n", "{}"),
            ("f2", "foo", "foo"),
            ("f2", "[1, 2]", "[1, 2]"),
            ("python", "print(1)", '{"code": "print(1)"}'),
            ("ipython", "x = '\"'", '{"code": "x = \'\\"\'"}'),
            ("write", "a\nb", '{"note": "a\\nb"}'),
            ("f2", X, X),
        ],
    )
    @pytest.mark.parametrize("end", ["<|call|>", ""])
    def test_bodies(self, name: str, body: str, arguments: str, end: str) -> None:
        text = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{body}{end}"
        assert said("openai", text, "openai").calls == (("id0", name, arguments, True),)

    def test_a_recipient_right_before_a_special_token(self) -> None:
        special = {name: index for index, name in enumerate(("<|channel|>", "<|constrain|>", "<|message|>"))}
        bound = bind(Layout(by_name(REASONING_FORMATS)["openai"], by_name(TOOL_FORMATS)["openai"]), special)
        text = f"<|channel|>commentary to=functions.f2<|constrain|>json<|message|>{X}"
        for name, index in special.items():
            text = text.replace(name, bound.characters[index])
        assert parse(OutputParser(bound.layout, tools=TOOLS), text).values == F2

    def test_without_tools_the_frame_is_no_text(self) -> None:
        assert read(plan("openai"), "<|channel|>final<|message|>Hi<|return|>") == Parsed("Hi", "", ())


class TestWords:
    """Marks that are words like others."""

    @pytest.mark.parametrize(
        "text",
        [
            "Call to Action: [] next",
            "Action: []",
            "Action: none needed.\nI am done.",
            'Action: {"name": "Bob"}',
            'Action: [{"tool_name": "unknown", "parameters": {}}]',
            'An Action: [{"tool_name": "f2", "parameters": {}}]',
        ],
    )
    def test_actions_that_are_none(self, text: str) -> None:
        check("command_r_plus", text, [], text)

    @pytest.mark.parametrize("space", ["", " ", "\n"])
    @pytest.mark.parametrize("before", ["", "I will.\n", "I will.\n\n  "])
    def test_actions(self, before: str, space: str) -> None:
        text = f'{before}Action:{space}```json\n[\n    {{"tool_name": "f2", "parameters": {X}}}\n]\n```'
        check("command_r_plus", text, F2, before.strip())

    @pytest.mark.parametrize("name", ["directly-answer", "directly_answer"])
    def test_the_tool_for_no_tool(self, name: str) -> None:
        text = f'Action: ```json\n[\n    {{"tool_name": "{name}", "parameters": {{}}}}\n]\n```'
        check("command_r_plus", f"Ok.\n{text}", [], "Ok.")
        engine = parser("command_r_plus", {name: {}})
        assert parse(engine, text).values == [(name, {})]
        both = f'Action:\n[{{"tool_name": "{name}", "parameters": {{}}}}, {{"tool_name": "f2", "parameters": {X}}}]'
        check("command_r_plus", both, F2)

    @pytest.mark.parametrize(
        "text",
        [
            "functools [] is nothing",
            'functools {"name": "Bob"}',
            "functools[0]",
            "import functools\nfunctools.reduce()",
        ],
    )
    def test_functools(self, text: str) -> None:
        check("phi4_mini_json", text, [], text)
        check("phi4_mini_json", f"Ok functools[{CALL}]", F2, "Ok")


class TestValues:
    """Quotes of JSON around values that are no strings."""

    @pytest.mark.parametrize(
        ("kind", "text", "value"),
        [
            ("integer", '"3"', 3),
            ("integer", '"x"', "x"),
            ("integer", '"', '"'),
            ("number", '"1.5"', 1.5),
            ("boolean", '"true"', True),
            ("null", '"null"', None),
            ("object", '"{\\"a\\": 1}"', {"a": 1}),
            ("array", '"[1]"', [1]),
            ("string", '"3"', '"3"'),
            (["string", "null"], '"3"', '"3"'),
            (None, '"01"', "01"),
            (None, '"a" and "b"', '"a" and "b"'),
        ],
    )
    def test_quoted_values(self, kind: Any, text: str, value: object) -> None:
        schemas = {"f": {"type": "object", "properties": {"a": {"type": kind} if kind else {}}}}
        call = f"<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
        assert parse(parser("glm45", schemas), call).values == [("f", {"a": value})]

    def test_deepseek_says_that_it_is_json(self) -> None:
        for key, text, value in (("city", '"01"', "01"), ("on", '"true"', True), ("on", "true", True)):
            check("deepseek_v32", dsml(key, text), [("f2", {key: value})])

    def test_sums_in_python(self) -> None:
        for text, value in (
            ('"a" + "b"', "ab"),
            ("'a' +\n \"b's\"", "ab's"),
            ("'say 'hi' so'", "say 'hi' so"),
            ("'a\nb'", "a\nb"),
        ):
            check("lfm2", f"<|tool_call_start|>[f2(city={text})]<|tool_call_end|>", [("f2", {"city": value})])


def dsml(key: str, value: str, *, text: str = "false", section: bool = True) -> str:
    call = (
        f'<｜DSML｜invoke name="f2">\n<｜DSML｜parameter name="{key}" string="{text}">{value}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
    )
    return ("<｜DSML｜function_calls>\n" if section else "") + call + "</｜DSML｜function_calls>"


class TestCheapForms:
    """Calls in the marks of another form, and marks that are missing."""

    @pytest.mark.parametrize(
        ("tools", "text"),
        [
            ("granite", f"<tool_call>[{CALL}]"),
            ("granite", f"<tool_call> [{CALL}]"),
            ("glm45", f"<tool_call>{CALL}</tool_call>"),
            ("lfm2", f"<|tool_call_start|>[{CALL}]<|tool_call_end|>"),
            ("lfm2", f"<|tool_call_start|>{CALL}<|tool_call_end|>"),
            (
                "kimi_k2",
                "<|tool_call_section_begin|><|tool_call_begin|>functions.f2:0<|tool_call_argument_begin|>"
                f"{X}<|tool_call_end|><|tool_call_section_end|>",
            ),
            ("deepseek_v32", dsml("city", "x", text="true", section=False)),
            ("deepseek_v32", dsml("arguments", X)),
            ("deepseek_v32", dsml("input", '{"city": "x"}')),
            ("qwen3_coder", f"<tool_call><function=f2><parameter=arguments>{X}</parameter></function></tool_call>"),
            ("gemma4", '<|tool_call>:call:f2{city:<|"|>x<|"|>}<tool_call|>'),
            ("gemma4", 'call:f2{city:<|"|>x<|"|>}<tool_call|>'),
            ("gemma4", '<|channel>thought\nHm.<channel|>call:f2{city:<|"|>x<|"|>}'),
        ],
    )
    def test_calls(self, tools: str, text: str) -> None:
        check(tools, text, F2, reasoning=tools if tools == "gemma4" else "think")

    @pytest.mark.parametrize(
        ("tools", "text"),
        [
            ("gemma4", "call:me{maybe}"),
            ("gemma4", 'So call:f2{city:<|"|>x<|"|>}'),
            ("deepseek_v32", '<｜DSML｜invoke name="unknown">\n</｜DSML｜invoke>'),
        ],
    )
    def test_texts(self, tools: str, text: str) -> None:
        check(tools, text, [], text, "gemma4" if tools == "gemma4" else "think")

    @pytest.mark.parametrize(
        ("tools", "text"),
        [
            ("qwen3_coder", "<function=f2><parameter=city>x</parameter></function>"),
            ("minicpm5", '<function name="f2"><param name="city">x</param></function>'),
            ("deepseek_v32", dsml("city", "x", text="true", section=False)),
            ("command_r_plus", f'So, Action:```json\n[{{"tool_name": "f2", "parameters": {X}}}]\n```'),
        ],
    )
    def test_what_a_grammar_has_taken_for_a_call_is_one(self, tools: str, text: str) -> None:
        assert said(tools, text, lazy=True).values == F2

    @pytest.mark.parametrize("value", ['{"zip": 1}', '{"city": "x", "zip": 1}', "[1]", "x"])
    def test_an_argument_that_wraps_nothing(self, value: str) -> None:
        found = json.loads(value) if value != "x" else value
        check("deepseek_v32", dsml("arguments", value), [("f2", {"arguments": found})])


class TestThoughts:
    """Marks around thoughts and answers."""

    @pytest.mark.parametrize("word", ["Here is", "Here's"])
    def test_granite(self, word: str) -> None:
        text = f"{word} my thought process:\nHm.\n\n{word} my response:\n\nOk."
        assert said("granite", text, "granite") == Parsed("Ok.", "Hm.", ())

    @pytest.mark.parametrize(("reasoning", "tag"), [("hunyuan_a13b", "answer"), ("ernie45", "response")])
    def test_answers_between_tags(self, reasoning: str, tag: str) -> None:
        text = f"<think>\nHm.\n</think>\n<{tag}>\nOk.</{tag}>"
        assert said("hermes", text, reasoning) == Parsed("Ok.", "Hm.", ())
        assert said("hermes", text, "think") == Parsed(f"<{tag}>\nOk.</{tag}>", "Hm.", ())

    @pytest.mark.parametrize(
        ("template", "kind", "reasoning"),
        [
            ("{{ '<think></think>, then <response></response>' }}", "granite", "think_response"),
            ("{{ '<think></think>, then <response>, </response>' }}", "minimax_m2", "think"),
            ("{{ '<think></think>' }}", "hunyuan_v1_moe", "think_answer"),
            ("{{ 'Here is my thought process: Here is my response:' }}", "granite", "granite"),
            ("", "ernie4_5_moe", "think_response"),
        ],
    )
    def test_which_row_is_chosen(self, template: str, kind: str, reasoning: str) -> None:
        found = choose_layout(template=template, model_type=kind).reasoning
        assert found is not None
        assert found.name == reasoning

    def test_an_answer_that_begins_within_thoughts(self) -> None:
        names = ("<|open|>", "<|close|>", "<|sep|>")
        bound = bind(
            Layout(by_name(REASONING_FORMATS)["kimi_k3"], by_name(TOOL_FORMATS)["kimi_k3"]),
            {one: i for i, one in enumerate(names)},
        )
        text = "Hm.<|open|>response<|sep|>Ok.<|close|>response<|sep|>"
        for index, name in enumerate(names):
            text = text.replace(name, bound.characters[index])
        for pieces in ([text], text):
            engine = OutputParser(bound.layout, tools=TOOLS, in_reasoning=True)
            assert parse(engine, pieces) == Parsed("Ok.", "Hm.", ())


@pytest.mark.parametrize(
    ("tools", "head", "part"),
    [
        ("functionary_v32", "all\n", ">"),
        ("functionary_v32", "all\n", ">>>f2\n"),
        ("functionary_v32", "all\n", "`>>>f2\n{"),
        ("functionary_v32", "python\n", ">>>f2\n x"),
        ("openai", "", "to=f2 "),
        ("openai", "", "<|channel|>final a <|end|>"),
        ("command_r_plus", "", 'Action: [{"tool_name": "directly-answer"}'),
        ("lfm2", "<|tool_call_start|>[f2(city=", '"a" + '),
        ("deepseek_v32", "<｜DSML｜function_calls>" + dsml("arguments", "")[:80], "{"),
    ],
)
def test_time_is_linear(tools: str, head: str, part: str) -> None:
    def seconds(size: int) -> float:
        text = head + part * (size // len(part))
        engine = parser(tools, OFFERED, "openai" if tools == "openai" else "think")
        start = time.process_time()
        parse(engine, [text[at : at + 4] for at in range(0, len(text), 4)])
        return time.process_time() - start

    assert any(seconds(1 << 15) < 7 * seconds(1 << 13) for _ in range(3))
