# SPDX-License-Identifier: MIT
"""What reviewers of the parser found: calls in thoughts, names of tags in prose, other formats' habits, lost text."""

from __future__ import annotations

from typing import Any

import pytest

from candle_vllm.openai.formats.events import CallArguments, CallStart, Event
from candle_vllm.openai.formats.layout import Layout, bind
from candle_vllm.openai.formats.output import CallSink
from candle_vllm.openai.formats.parser import OutputParser
from packages.openai.tests.formats.messages import REASONING, TOOLS, Parsed, parse, parser

SCHEMAS: dict[str, dict[str, Any]] = {
    "f2": {"type": "object", "properties": {"city": {"type": "string"}, "on": {"type": "boolean"}}},
    "now": {"type": "object", "properties": {}},
    "write": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "content": {"type": "string"},
            "days": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
    },
}
X = '{"city": "x"}'
F2 = ("id0", "f2", X, True)
JSON_CALL = '{"name": "f2", "arguments": ' + X + "}"
NAMED = "<function=f2>\n<parameter=city>\nx\n</parameter>\n</function>"


def said(tools: str, text: str, whole: bool = True, **options: Any) -> Parsed:
    """What a text says, however it comes; of one that is cut off anywhere come beginnings of its calls."""
    made = lambda: parser(tools, SCHEMAS, **options)  # noqa: E731
    parsed = parse(made(), [text], whole)
    assert parse(made(), text, whole) == parsed
    for end in range(len(text)):
        part = parse(made(), [text[:end]], False)
        assert parse(made(), text[:end], False) == part, end
        assert len(part.calls) <= len(parsed.calls), end
        for (_, name, arguments, closed), (_, full_name, full_arguments, _) in zip(part.calls, parsed.calls):
            assert name == full_name, end
            assert full_arguments.startswith(arguments), (end, arguments)
            assert not closed or arguments == full_arguments, end
    return parsed


CALLS = {
    "hermes": f"<tool_call>\n{JSON_CALL}\n</tool_call>",
    "qwen3_coder": f"<tool_call>\n{NAMED}\n</tool_call>",
    "glm45": "<tool_call>f2\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f2:0<|tool_call_argument_begin|>"
    f"{X}<|tool_call_end|><|tool_calls_section_end|>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f2<｜tool▁sep｜>{X}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f2">'
    '<｜DSML｜parameter name="city" string="true">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "deepseek_v4": '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f2">'
    '<｜DSML｜parameter name="city" string="true">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="f2">\n<parameter name="city">x</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
}
in_thoughts = pytest.mark.parametrize("tools", CALLS)


class TestCallsInThoughts:
    """Models begin calls without closing their thoughts, and think about calls that they do not make."""

    @in_thoughts
    def test_a_call_ends_thoughts_that_are_open(self, tools: str) -> None:
        for text, options in (
            (f"I look.\n{CALLS[tools]}", {"in_reasoning": True}),
            (f"<think>I look.\n{CALLS[tools]}", {}),
        ):
            parsed = said(tools, text, **options)
            assert (parsed.content, parsed.thoughts, parsed.values) == ("", "I look.", [("f2", {"city": "x"})])

    @in_thoughts
    def test_a_call_of_no_tool_is_a_thought(self, tools: str) -> None:
        text = f"Like\n{CALLS[tools].replace('f2', 'f3')}\nso."
        assert said(tools, f"{text}</think>Ok", in_reasoning=True) == Parsed("Ok", text, ())

    @in_thoughts
    def test_a_mark_in_thoughts_is_a_thought(self, tools: str) -> None:
        mark = CALLS[tools].partition(">")[0] + ">"
        for text in (
            f"A {mark} is {mark}{mark} here.\n{mark}",
            f"```\n{CALLS[tools]}\n```\nor `{CALLS[tools].replace(chr(10), chr(32))}`",
        ):
            assert said(tools, f"{text}</think>Ok", in_reasoning=True) == Parsed("Ok", text.strip(), ())

    def test_in_a_line_hermes_is_only_thought_of(self) -> None:
        text = f"I could write {CALLS['hermes']} here"
        assert said("hermes", f"{text}</think>Ok", in_reasoning=True) == Parsed("Ok", text, ())

    def test_a_name_without_its_mark(self) -> None:
        parsed = said("qwen3_coder", f"I look.\n{NAMED}", in_reasoning=True)
        assert parsed == Parsed("", "I look.", (F2,))
        text = "A <function=f2> here"
        assert said("qwen3_coder", f"{text}</think>Ok", in_reasoning=True) == Parsed("Ok", text, ())

    def test_the_end_of_thoughts_that_comes_late(self) -> None:
        call = CALLS["qwen3_coder"]
        assert said("qwen3_coder", f"Hm.\n{call}\n</think>\nOk", in_reasoning=True) == Parsed("Ok", "Hm.", (F2,))

    def test_an_open_fence_does_not_hide_the_end(self) -> None:
        text = "So:\n```\nx = 1"
        assert said("qwen3_coder", f"{text}</think>Ok", in_reasoning=True) == Parsed("Ok", text, ())

    def test_special_tokens_end_thoughts_whatever_they_call(self) -> None:
        marks = [
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ]
        bound = bind(
            Layout(REASONING["think"], TOOLS["deepseek_v31"]), {mark: place for place, mark in enumerate(marks)}
        )
        text = f"Hm{CALLS['deepseek_v31'].replace('f2', 'f3')}"
        for place, mark in enumerate(marks):
            text = text.replace(mark, bound.characters[place])
        for pieces in ([text], text):
            parsed = parse(OutputParser(bound.layout, tools=SCHEMAS, in_reasoning=True), pieces)
            assert (parsed.content, parsed.thoughts, parsed.values) == ("", "Hm", [("f3", {"city": "x"})])

    @pytest.mark.parametrize("tools", ["lfm2", "mistral", "seed_oss"])
    def test_other_formats_call_behind_their_thoughts(self, tools: str) -> None:
        text = {"lfm2": "<|tool_call_start|>[now()]<|tool_call_end|>", "mistral": "[TOOL_CALLS]now{}"}
        thoughts = text.get(tools, f"<seed:tool_call>{NAMED}</seed:tool_call>")
        assert said(tools, f"{thoughts}</think>Ok", in_reasoning=True) == Parsed("Ok", thoughts, ())

    def test_a_loop_of_marks(self) -> None:
        for mark in ("<tool_call>\n", "<tool_call>\n<function=f", "\n<function=now> "):
            text = (mark * 2000).strip()
            assert parse(parser("qwen3_coder", SCHEMAS, in_reasoning=True), [text]) == Parsed("", text, ())


class TestObjectsInTags:
    """A body of JSON where tags should be."""

    @pytest.mark.parametrize(
        ("tools", "text"),
        [
            ("qwen3_coder", f"<tool_call>\n<function=f2>\n{X}\n</function>\n</tool_call>"),
            ("qwen3_coder", f"<tool_call><function=f2>{X}</tool_call>"),
            ("qwen3_coder", f"<function=f2>{X}</function>"),
            ("seed_oss", f"<seed:tool_call><function=f2>{X}</function></seed:tool_call>"),
            ("minimax_m2", f'<minimax:tool_call><invoke name="f2">{X}</invoke></minimax:tool_call>'),
            (
                "deepseek_v32",
                f'<｜DSML｜function_calls><｜DSML｜invoke name="f2">{X}</｜DSML｜invoke></｜DSML｜function_calls>',
            ),
            ("glm45", f"<tool_call>f2\n{X}\n</tool_call>"),
            ("glm45", f"<tool_call>f2{X}</tool_call>"),
            ("hunyuan_v3", f"<tool_call>f2<tool_sep>\n{X}\n</tool_call>"),
            ("minicpm5", f'<function name="f2">{X}</function>'),
        ],
    )
    def test_they_are_the_arguments(self, tools: str, text: str) -> None:
        assert said(tools, f"{text}Ok") == Parsed("Ok", "", (F2,))

    def test_brackets_that_are_missing(self) -> None:
        text = '<tool_call><function=f2>{"city": "x"</function></tool_call>'
        assert said("qwen3_coder", text) == Parsed("", "", (F2,))

    def test_a_value_may_begin_like_one(self) -> None:
        text = "<tool_call><function=f2><parameter=city>{a}</parameter></function></tool_call>"
        assert said("qwen3_coder", text).values == [("f2", {"city": "{a}"})]


class TestNamesInProse:
    @pytest.mark.parametrize(
        ("tools", "text"),
        [
            ("qwen3_coder", "I saw <function=now> in the log"),
            ("qwen3_coder", "I saw <function=now>"),
            ("qwen3_coder", "std::function<function=f2> x"),
            ("qwen3_coder", "<function=foo> is odd"),
            ("qwen3_coder", "<function=foo></function>"),
            ("minicpm5", 'I saw <function name="now"> x'),
        ],
    )
    def test_they_are_text(self, tools: str, text: str) -> None:
        assert said(tools, text) == Parsed(text, "", ())

    def test_calls_without_the_mark_before_them(self) -> None:
        assert said("qwen3_coder", f"Ok\n{NAMED}\n</tool_call>") == Parsed("Ok", "", (F2,))
        assert said("qwen3_coder", f"{NAMED}\n<function=foo> is odd") == Parsed("<function=foo> is odd", "", (F2,))
        twice = said("qwen3_coder", f"{NAMED}\n<function=now>\n</function>")
        assert twice.values == [("f2", {"city": "x"}), ("now", {})]
        assert said("minicpm5", '<function name="now"></function>').values == [("now", {})]


class TestParts:
    """Content goes on behind thoughts and calls."""

    @pytest.mark.parametrize(
        ("before", "behind", "between"),
        [("\n\n", "\n\n", "\n\n"), ("\n\n", "", "\n\n"), ("", " ", "\n"), ("", "", "\n"), ("\n", "\n\n", "\n")],
    )
    def test_white_space_between_them_stays(self, before: str, behind: str, between: str) -> None:
        call = f"<tool_call>{JSON_CALL}</tool_call>"
        assert said("hermes", f"A{before}{call}{behind}B") == Parsed(f"A{between}B", "", (F2,))
        if "\n" in before:
            assert said("hermes", f"A{before}<think>hm</think>{behind}B") == Parsed(f"A{between}B", "hm", ())

    def test_at_either_end_it_does_not(self) -> None:
        assert said("hermes", "<think>hm</think>\n\nA") == Parsed("A", "hm", ())
        assert said("hermes", f"A\n\n<tool_call>{JSON_CALL}</tool_call>\n\n") == Parsed("A", "", (F2,))
        assert said("hermes", "A \n") == Parsed("A \n", "", ())

    def test_messages_of_channels(self) -> None:
        text = "<|channel|>commentary<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B<|return|>"
        assert said("openai", text, reasoning="openai") == Parsed("A\nB", "", ())


class TestTagsOfThoughts:
    @pytest.mark.parametrize(
        "text",
        [
            "The tag <think> begins reasoning. And </think> ends.",
            "<b><think></b>",
            "Use </think> so.",
            "(<think>)",
            "A\n- <think> is a tag\n",
        ],
    )
    def test_in_prose_they_are_text(self, text: str) -> None:
        assert said("hermes", text) == Parsed(text, "", ())

    def test_at_the_beginning_of_a_line_or_behind_a_part_they_are_none(self) -> None:
        assert said("hermes", "A\n  <think>hm</think>B") == Parsed("A\n  B", "hm", ())
        text = f"A<tool_call>{JSON_CALL}</tool_call><think>hm</think>"
        assert said("hermes", text) == Parsed("A", "hm", (F2,))

    def test_an_end_without_a_beginning(self) -> None:
        assert said("hermes", "</think>\n\nA") == Parsed("A", "", ())
        assert said("hermes", "<think>a</think>\n</think>\nB") == Parsed("B", "a", ())

    def test_special_tokens_are_marks_everywhere(self) -> None:
        bound = bind(Layout(REASONING["think"], TOOLS["hermes"]), {"<think>": 1, "</think>": 2})
        characters = {bound.names[token]: character for token, character in bound.characters.items()}
        text = "A <think>hm</think> b</think>".replace("</think>", characters["</think>"])
        engine = OutputParser(bound.layout, tools=SCHEMAS)
        assert parse(engine, [text.replace("<think>", characters["<think>"])]) == Parsed("A b", "hm", ())


class TestSpecialTokensInArguments:
    """They are what they read like."""

    @pytest.mark.parametrize(
        ("tools", "token", "text", "value"),
        [
            (
                "mistral",
                "[TOOL_CALLS]",
                '[TOOL_CALLS][{"name": "f2", "arguments": {"city": "a ||"}}]',
                "a [TOOL_CALLS]",
            ),
            ("mistral_v13", "[ARGS]", '[TOOL_CALLS]f2[ARGS]{"city": "||b"}', "[ARGS]b"),
            (
                "hermes",
                "<tool_call>",
                '<tool_call>{"name": "f2", "arguments": {"city": "||"}}</tool_call>',
                "<tool_call>",
            ),
            ("qwen3_coder", "<tool_call>", NAMED.replace("x", "||"), "<tool_call>"),
            ("gemma4", "<|tool_call>", '<|tool_call>call:f2{city:<|"|>||<|"|>}<tool_call|>', "<|tool_call>"),
        ],
    )
    def test_in_strings(self, tools: str, token: str, text: str, value: str) -> None:
        bound = bind(Layout(None, TOOLS[tools]), {token: 7})
        written = text.replace(token, "||").replace("||", bound.characters[7])
        for pieces in ([written], written):
            engine = OutputParser(bound.layout, tools=SCHEMAS, names=bound.shown)
            assert parse(engine, pieces).values == [("f2", {"city": value})]

    def test_quotes_in_their_names_are_escaped(self) -> None:
        events: list[Event] = []
        sink = CallSink(events.append, SCHEMAS, str, names={"\ud800": '<|"|>'})
        sink.begin("f2")
        sink.arguments('{"city": "\ud800"}')
        sink.end()
        assert CallArguments(0, '{"city": "<|\\"|>"}') in events

    def test_beside_values_they_are_left_out(self) -> None:
        bound = bind(Layout(None, TOOLS["qwen3_coder"]), {"<tool_call>": 7})
        text = f"<function=write><parameter=days>3{bound.characters[7]}</parameter></function>"
        assert parse(OutputParser(bound.layout, tools=SCHEMAS, names=bound.shown), [text]).values == [
            ("write", {"days": 3})
        ]


class TestQwen:
    def test_doubled_brackets(self) -> None:
        for text in ("{" + JSON_CALL + "}", "{ " + JSON_CALL + "\n}", JSON_CALL.replace(X, "{" + X + "}")):
            assert said("hermes", f"<tool_call>\n{text}\n</tool_call>Ok") == Parsed("Ok", "", (F2,))
        assert said("hermes", f"<tool_call>{{{JSON_CALL}</tool_call>Ok") == Parsed("Ok", "", (F2,))

    def test_a_call_with_only_its_end_marked(self) -> None:
        assert said("hermes", f"{JSON_CALL}\n</tool_call>") == Parsed("", "", (F2,))

    def test_functions_in_functions(self) -> None:
        text = "<tool_call>" + '{"function": ' * 3000
        assert parse(parser("hermes", SCHEMAS), [text]) == Parsed(text, "", ())

    def test_a_key_at_the_beginning_of_a_line_ends_a_value(self) -> None:
        text = "<tool_call><function=write>\n<parameter=path>\na\n<parameter=content>\nb\n</parameter></function>"
        assert said("qwen3_coder", text).values == [("write", {"path": "a", "content": "b"})]

    @pytest.mark.parametrize(
        "value", ["a <parameter=content> b", "a\n<parameter=path> b", "a\n<parameter=other>", "\n<parameter="]
    )
    def test_others_are_part_of_it(self, value: str) -> None:
        text = f"<tool_call><function=write>\n<parameter=path>\n{value}\n</parameter>\n</function></tool_call>"
        assert said("qwen3_coder", text).values == [("write", {"path": value})]

    @pytest.mark.parametrize("end", ["</tool_call>", "</function></tool_call>", "</function>\n</tool_call>"])
    def test_ends_of_a_call_end_a_number(self, end: str) -> None:
        text = f"<tool_call><function=write>\n<parameter=days>\n3\n{end}Ok"
        parsed = said("qwen3_coder", text)
        assert (parsed.content, parsed.values) == ("Ok", [("write", {"days": 3})])

    def test_lists_end_at_a_key_too(self) -> None:
        text = '<tool_call><function=write><parameter=tags>\n["a"]\n<parameter=days>\n3\n</parameter></function>'
        assert said("qwen3_coder", text).values == [("write", {"tags": ["a"], "days": 3})]

    @pytest.mark.parametrize(
        ("value", "read"),
        [
            ("\na\n", "a"),
            ("a\n", "a\n"),
            ("a\nb\n", "a\nb\n"),
            ("a", "a"),
            ("\na", "a"),
            ("\n\na\n\n", "\na\n"),
            ("\n\n", ""),
            ("\n", ""),
        ],
    )
    @pytest.mark.parametrize("tools", ["qwen3_coder", "seed_oss"])
    def test_line_breaks_in_pairs(self, tools: str, value: str, read: str) -> None:
        call = f"<function=f2><parameter=city>{value}</parameter></function>"
        text = f"<tool_call>{call}</tool_call>".replace(
            "tool_call", "seed:tool_call" if tools == "seed_oss" else "tool_call"
        )
        assert said(tools, text).values == [("f2", {"city": read})]

    def test_a_line_break_before_the_next_key(self) -> None:
        text = "<tool_call><function=write>\n<parameter=path>a\n<parameter=content>b\n</parameter></function>"
        assert said("qwen3_coder", text).values == [("write", {"path": "a", "content": "b\n"})]


class TestGlm:
    def test_a_value_without_its_opening_mark(self) -> None:
        text = "<tool_call>f2\n<arg_key>city</arg_key>\nx</arg_value>\n</tool_call>Ok"
        assert said("glm45", text) == Parsed("Ok", "", (F2,))

    def test_a_key_without_a_value(self) -> None:
        for inside in ("", "x", "<arg_key>city</arg_key><arg_value>x</arg_value>"):
            parsed = said("glm45", f"<tool_call>f2\n<arg_key>on</arg_key>{inside}</tool_call>Ok")
            assert (parsed.content, parsed.values) == ("Ok", [("f2", {"city": "x"} if ">" in inside else {})])


@pytest.mark.parametrize("cut", range(1, 13))
def test_a_closing_mark_that_was_cut_is_no_content(cut: int) -> None:
    call = '<tool_call>{"name": "f2", "arguments": {"city": "x"}}'
    text = call + "</tool_call>"[: cut - 1]
    parsed = parse(parser("hermes", SCHEMAS), text, whole=False)
    assert (parsed.content, [name for _, name, _, _ in parsed.calls]) == ("", ["f2"])
    thoughts = parse(parser("hermes", SCHEMAS), "<think>hm" + "</think>"[: min(cut - 1, 8)], whole=False)
    assert (thoughts.content, thoughts.thoughts) == ("", "hm")


@pytest.mark.parametrize(("most", "warnings"), [(2, 1), (1, 0)])
def test_calls_that_are_left_out_are_logged_once(most: int, warnings: int, caplog: pytest.LogCaptureFixture) -> None:
    """A request for one call at a time asked for it itself."""
    events: list[Any] = []
    sink = CallSink(events.append, SCHEMAS, str, most)
    for _ in range(5):
        sink.begin(next(iter(SCHEMAS)))
        sink.arguments("{}")
        sink.end()
    assert sum(isinstance(event, CallStart) for event in events) == most
    assert len([one for one in caplog.records if "tool calls" in one.message]) == warnings
