# SPDX-License-Identifier: MIT
"""Habits of models, and what other servers' parsers were caught with: each is a case with its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from packages.openai.tests.formats.messages import Parsed, parse, parser
from packages.openai.tests.formats.samples import TOOLS

X = '{"name": "f2", "arguments": {"city": "x"}}'
F2 = ("id0", "f2", '{"city": "x"}', True)


def said(tools: str, text: str, whole: bool = True, reasoning: str | None = "think", **options: Any) -> Parsed:
    """What a text says, whole, by characters, and in threes."""
    readings = {
        parse(parser(tools, TOOLS, reasoning, **options), pieces, whole)
        for pieces in ([text], text, [text[place : place + 3] for place in range(0, len(text), 3)])
    }
    assert len(readings) == 1, readings
    return readings.pop()


def qwen(inside: str) -> str:
    return f"<tool_call>\n<function=f2>\n{inside}</function>\n</tool_call>"


class TestCandleVllm:
    """The cases of candle-vllm's stream tests."""

    def test_arguments_with_code_fences(self) -> None:
        text = '<tool_call>{"name": "python", "arguments": {"code": "```py\\nx\\n```"}}</tool_call>'
        assert said("hermes", text).values == [("python", {"code": "```py\nx\n```"})]

    def test_a_false_closing_mark_in_a_parameter(self) -> None:
        text = qwen("<parameter=city>\na </tool_call> b\n</parameter>\n")
        assert said("qwen3_coder", text).values == [("f2", {"city": "a </tool_call> b"})]

    def test_a_stray_parameter_end_behind_the_function(self) -> None:
        text = "<tool_call><function=f2><parameter=city>x</parameter></function></parameter></tool_call>Ok"
        assert said("qwen3_coder", text) == Parsed("Ok", "", (F2,))

    def test_a_parameter_that_is_not_closed(self) -> None:
        text = "<tool_call><function=f2><parameter=city>x"
        assert said("qwen3_coder", text, whole=False).calls == (("id0", "f2", '{"city": "x', False),)
        assert said("qwen3_coder", text).calls == (F2,)

    def test_an_opening_mark_twice(self) -> None:
        assert said("hermes", f"<tool_call>\n<tool_call>\n{X}\n</tool_call>") == Parsed("", "", (F2,))

    @pytest.mark.parametrize("end", ["", "\n", "</tool_call>", "\n</tool_call>"])
    def test_a_closing_bracket_that_is_missing(self, end: str) -> None:
        parsed = said("hermes", f"<tool_call>\n{X[:-1]}{end}")
        assert parsed == Parsed("", "", (F2,))
        parsed = said("hermes", f"<tool_call>\n{X[:-2]}{end}")
        assert (parsed.values, parsed.calls[0][3]) == ([("f2", {"city": "x"})], True)

    def test_brackets_in_strings_are_not_counted(self) -> None:
        text = '<tool_call>\n{"name": "python", "arguments": {"code": "a } ] { b"}\n</tool_call>'
        assert said("hermes", text).values == [("python", {"code": "a } ] { b"})]

    def test_what_is_no_call_is_text(self) -> None:
        text = "<tool_call>\nnonsense here\n</tool_call> bye"
        assert said("hermes", text) == Parsed(text, "", ())

    def test_a_member_twice_counts_once(self) -> None:
        inside = '<invoke name="f2"><city>x</city><city>y</city><o><a>1</a><a>2</a><b>3</b></o></invoke>'
        text = f"<tool_call>{inside}</tool_call>".replace("<", "]<]minimax[>[<")
        assert said("minimax_m3", text).calls == (("id0", "f2", '{"city": "x", "o": {"a": 1, "b": 3}}', True),)

    def test_a_thought_in_an_argument(self) -> None:
        text = '<tool_call>{"name": "python", "arguments": {"code": "<think>x</think>"}}</tool_call>Done'
        parsed = said("hermes", text)
        assert (parsed.content, parsed.thoughts) == ("Done", "")
        assert parsed.values == [("python", {"code": "<think>x</think>"})]

    def test_thoughts_between_calls_and_twice(self) -> None:
        text = f"<think>a</think>1<tool_call>{X}</tool_call><think>b</think><tool_call>{X}</tool_call><think>c</think>2"
        assert said("hermes", text) == Parsed("1\n2", "abc", (F2, ("id1", *F2[1:])))

    def test_thoughts_that_the_prompt_opened(self) -> None:
        for text in (f"a</think>1<tool_call>{X}</tool_call>", f"<think>a</think>1<tool_call>{X}</tool_call>"):
            assert said("hermes", text, in_reasoning=True) == Parsed("1", "a", (F2,))
        assert said("hermes", "</think>\n\nHi", in_reasoning=True) == Parsed("Hi", "", ())

    def test_a_call_behind_a_code_block(self) -> None:
        block = 'See:\n```py\nx = "<tool_call>"\n```'
        assert said("hermes", f"{block}\n<tool_call>{X}</tool_call>") == Parsed(block, "", (F2,))
        text = f"<tool_call>{X}</tool_call>\n{block}\n<tool_call>{X}</tool_call>"
        assert said("hermes", text) == Parsed(block, "", (F2, ("id1", *F2[1:])))

    def test_minimax_with_two_calls_and_no_end(self) -> None:
        text = (
            '<minimax:tool_call><invoke name="f2"><parameter name="city">x</parameter></invoke>'
            '<invoke name="get_weather"><parameter name="city">y</parameter>'
            '<parameter name="tags">["a"]</parameter></invoke>'
        )
        assert said("minimax_m2", text).values == [("f2", {"city": "x"}), ("get_weather", {"city": "y", "tags": ["a"]})]

    def test_several_pythonic_calls(self) -> None:
        assert said("pythonic", "[f2(city='x'), now()]").values == [("f2", {"city": "x"}), ("now", {})]

    def test_bare_values_of_gemma(self) -> None:
        text = "<|tool_call>call:f2{city:x y,on:TRUE}<tool_call|>"
        assert said("gemma4", text).values == [("f2", {"city": "x y", "on": True})]

    def test_entities_are_what_they_are(self) -> None:
        text = "<tool_call>f2<arg_key>city</arg_key><arg_value>a &lt; b</arg_value></tool_call>"
        assert said("glm45", text).values == [("f2", {"city": "a &lt; b"})]

    def test_arguments_that_are_json_in_a_string(self) -> None:
        text = '<tool_call>{"name": "f2", "arguments": "{\\"city\\": \\"x\\"}"}</tool_call>'
        assert said("hermes", text) == Parsed("", "", (F2,))

    @pytest.mark.parametrize(
        ("text", "types", "value"),
        [
            ("none", ["string", "null"], "none"),
            ("null", ["string", "null"], None),
            ("nil", ["null"], None),
            ("Yes", ["boolean"], True),
            ("no", ["boolean"], False),
            ("12", ["integer"], 12),
            ("12.0", ["integer"], 12),
            ("12", ["string"], "12"),
            ("true", ["string"], "true"),
            ("1.5", ["number", "string"], 1.5),
            ("[1, 'a']", ["array"], [1, "a"]),
            ("{'a': None}", ["object"], {"a": None}),
            ("x", ["integer"], "x"),
        ],
    )
    def test_values_are_what_the_schema_says(self, text: str, types: list[str], value: object) -> None:
        for kind in ({"type": types}, {"anyOf": [{"type": one} for one in types]}):
            schemas = {"f": {"type": "object", "properties": {"a": kind}}}
            whole = f"<tool_call><function=f><parameter=a>{text}</parameter></function></tool_call>"
            parsed = parse(parser("qwen3_coder", schemas), whole)
            assert parsed.values == [("f", {"a": value})]


class TestOtherServers:
    """What issues of vLLM, SGLang and llama.cpp tell of."""

    def test_two_parallel_calls_in_any_pieces(self) -> None:
        text = f"<tool_call>{X}</tool_call><tool_call>{X}</tool_call>"
        assert said("hermes", text).calls == (F2, ("id1", *F2[1:]))
        text = '[TOOL_CALLS] [{"name": "f2", "arguments": {"city": "x"}}, {"name": "now", "arguments": {}}]'
        assert said("mistral", text).calls == (F2, ("id1", "now", "{}", True))

    def test_text_held_back_at_the_end_is_given_away(self) -> None:
        for end in ("<", "<tool", "<tool_call", "<tool_call>", "</thi", "`", "a\n"):
            assert said("hermes", f"Hello {end}") == Parsed(f"Hello {end}", "", ())
            assert said("hermes", f"Hello {end}", whole=False) == Parsed(f"Hello {end}", "", ())

    def test_brackets_and_quotes_in_strings(self) -> None:
        text = '[TOOL_CALLS][{"name": "f2", "arguments": {"city": "\\"}] ["}}]'
        assert said("mistral", text).values == [("f2", {"city": '"}] ['})]

    def test_the_end_of_thoughts_and_a_call_at_once(self) -> None:
        engine = parser("hermes", TOOLS, in_reasoning=True)
        assert parse(engine, ["Hm.", f"</think><tool_call>{X}</tool_call>"]) == Parsed("", "Hm.", (F2,))

    def test_several_tokens_at_once(self) -> None:
        engine = parser("kimi_k2", TOOLS)
        pieces = [
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.f2:0<|tool_call_argument_begin|>{",
            '"city": "x"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_',
            "end|><|tool_calls_section_end|>",
        ]
        assert [call[:3] for call in parse(engine, pieces).calls] == [
            ("functions.f2:0", "f2", '{"city": "x"}'),
            ("functions.now:1", "now", "{}"),
        ]

    def test_arguments_are_escaped_once(self) -> None:
        text = '<tool_call>{"name": "f2", "arguments": {"city": "a\\nb \\"c\\" \\u00e9"}}</tool_call>'
        assert said("hermes", text).calls[0][2] == '{"city": "a\\nb \\"c\\" \\u00e9"}'

    @pytest.mark.parametrize(
        ("tools", "text"),
        [
            ("hermes", '<tool_call>{"name": "now", "arguments": {}}</tool_call>'),
            ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>'),
            ("hermes", '<tool_call>{"name": "now"}</tool_call>'),
            ("qwen3_coder", "<tool_call><function=now></function></tool_call>"),
            ("glm45", "<tool_call>now</tool_call>"),
            ("mistral_v13", "[TOOL_CALLS]now[ARGS]{}"),
            ("pythonic", "[now()]"),
            ("llama3_json", '{"name": "now", "parameters": {}}'),
            ("deepseek_v31", "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
        ],
    )
    def test_a_call_without_arguments(self, tools: str, text: str) -> None:
        assert said(tools, text) == Parsed("", "", (("id0", "now", "{}", True),))

    def test_arguments_come_as_they_are_written(self) -> None:
        engine = parser("qwen3_coder", TOOLS)
        text = "<tool_call><function=f2><parameter=city>a long text</parameter></function></tool_call>"
        pieces = [engine.feed(text[place : place + 4]) for place in range(0, len(text), 4)]
        assert sum(bool(events) for events in pieces) >= 5

    def test_parameters_in_any_order(self) -> None:
        text = qwen("<parameter=on>\ntrue\n</parameter>\n<parameter=city>\nx\n</parameter>\n")
        assert said("qwen3_coder", text).values == [("f2", {"on": True, "city": "x"})]

    def test_a_call_that_was_cut_off_is_not_whole(self) -> None:
        for end in range(len('<tool_call>{"name": "f2", "arguments": {"ci'), len(X) + 9):
            parsed = said("hermes", f"<tool_call>{X}"[:end], whole=False)
            assert not parsed.calls[0][3]
            assert '{"city": "x"}'.startswith(parsed.calls[0][2])

    def test_a_header_follows_a_call_without_its_end(self) -> None:
        call = '<|channel|>commentary to=functions.f2<|message|>{"city": "x"}'
        text = f"{call}<|start|>assistant<|channel|>final<|message|>Ok"
        assert said("openai", text, reasoning="openai") == Parsed("Ok", "", (F2,))

    def test_two_fenced_calls(self) -> None:
        block = f"```json\n{X}\n```"
        assert said("json", f"{block}\n{block}\nOk") == Parsed("Ok", "", (F2, ("id1", *F2[1:])))

    def test_ids_and_names_come_once(self) -> None:
        parsed = said("cohere", '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f2", "parameters": {}}, '
                      '{"tool_call_id": "0", "tool_name": "f2", "parameters": {}}]<|END_ACTION|>')  # fmt: skip
        assert [call[0] for call in parsed.calls] == ["0", "id1"]

    def test_a_text_that_was_cut_within_a_mark(self) -> None:
        """The beginning of a mark is no part of the arguments, even of wrong ones."""
        text = '<tool_call>{"name": "f2", "arguments": {></tool_call>'
        full = said("hermes", text, whole=False).calls[0][2]
        for end in range(text.index("{>"), len(text)):
            for call in said("hermes", text[:end], whole=False).calls:
                assert full.startswith(call[2]), end

    def test_a_long_line_that_is_no_name(self) -> None:
        line = "word " * 80
        assert said("functionary_v32", f"{line}\nOk").content == f"{line}\nOk"

    def test_backslashes_that_escape_nothing(self) -> None:
        text = "[get_weather(city='a\\d', tags=['a\\d', \"\\n\"])]"
        assert said("pythonic", text).values == [("get_weather", {"city": "a\\d", "tags": ["a\\d", "\n"]})]

    @pytest.mark.parametrize("value", ["a\nb", 'a"b', "\\", "\\n", "\U0001f642", "\ud83d"])
    def test_arguments_in_a_string_that_has_escapes(self, value: str) -> None:
        arguments = json.dumps({"city": value})
        text = json.dumps({"name": "f2", "arguments": arguments})
        assert said("hermes", f"<tool_call>{text}</tool_call>").values == [("f2", {"city": value})]

    def test_halves_of_characters_in_arguments_in_a_string(self) -> None:
        text = '{"name": "f2", "arguments": "{\\"city\\": \\"\\ud83d\\ude42\\ud83d-\\ud83d\\ud83d\\"}"}'
        text = text.replace("\\\\", "\\")
        assert said("hermes", f"<tool_call>{text}</tool_call>").values == [
            ("f2", {"city": "\U0001f642\ufffd-\ufffd\ufffd"})
        ]

    @pytest.mark.parametrize(
        ("tools", "text"),
        [
            ("openai", f"<|channel|>{'x y' * 300}<|message|>Hi"),
            ("qwen3_coder", f"<tool_call><function=f2><parameter={'k' * 300}>x</parameter></function></tool_call>Ok"),
            ("glm45", f"<tool_call>f2\n<arg_key>{'k' * 300}</arg_key><arg_value>1</arg_value></tool_call>Ok"),
            ("gemma4", f"<|tool_call>call:f2{{{'k' * 300}:1}}<tool_call|>Ok"),
        ],
    )
    def test_what_is_too_long_for_a_name(self, tools: str, text: str) -> None:
        for whole in (True, False):
            assert all(not call[3] for call in said(tools, text, whole).calls)

    def test_long_texts_in_python(self) -> None:
        value = "a line, with 'quotes' and a \\\n" * 3000
        assert said("pythonic", f"[f2(city={value!r})]").values == [("f2", {"city": value})]

    @pytest.mark.parametrize(
        "mark", ["<tool_call>", "<tool_call> \n", '<tool_call>{"arguments": {"a": "', '<tool_call>{"args": [']
    )
    def test_a_loop_of_marks_is_text(self, mark: str) -> None:
        assert said("hermes", f"Ok {mark * 1000}.") == Parsed(f"Ok {mark * 1000}.", "", ())
