# SPDX-License-Identifier: MIT
"""Slips that models make in any format and that have one meaning: each is read the same way wherever it stands."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import pytest

from candle_vllm.openai.formats.layout import Layout, bind
from candle_vllm.openai.formats.parser import OutputParser
from packages.openai.tests.formats.messages import REASONING, Parsed, parse, parser
from packages.openai.tests.formats.messages import TOOLS as FORMATS
from packages.openai.tests.formats.samples import SAMPLES, SHORT, SMALL, TOOLS, Sample

JSON = [sample for sample in SHORT if SMALL in sample.text]  # arguments are an object of JSON
IN_OBJECTS = [sample for sample in JSON if f'": {SMALL}' in sample.text and sample.tools != "apertus"]
with_json = pytest.mark.parametrize("sample", [pytest.param(one, id=one.tools) for one in JSON])
with_objects = pytest.mark.parametrize("sample", [pytest.param(one, id=one.tools) for one in IN_OBJECTS])


def said(sample: Sample, text: str, whole: bool = True, schemas: dict[str, Any] = TOOLS) -> Parsed:
    """What a text says, whole, by characters, and in threes; where it is cut off, its calls are beginnings of these."""

    def read(text: str, whole: bool) -> Parsed:
        pieces = ([text], text, [text[place : place + 3] for place in range(0, len(text), 3)])
        found = {parse(parser(sample.tools, schemas, sample.reasoning), one, whole) for one in pieces}
        assert len(found) == 1, (text, whole, found)
        return found.pop()

    full = read(text, whole)
    for end in range(len(text)):
        part = read(text[:end], False)
        assert len(part.calls) <= len(full.calls), end
        assert all(call[2].startswith(cut[2]) for cut, call in zip(part.calls, full.calls)), (end, part)
    return full


def strictly(text: str) -> Any:
    """The value of a JSON text; raises where it is none."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.one_of_each
@with_objects
@pytest.mark.parametrize("nothing", ['""', '" "', '"{}"', '"null"', "null"])
def test_arguments_that_are_nothing(sample: Sample, nothing: str) -> None:
    parsed = said(sample, sample.text.replace(SMALL, nothing))
    assert (parsed.content, parsed.calls) == (sample.content, (("id0", "f2", "{}", True),))


@pytest.mark.one_of_each
@with_json
@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("-Infinity", "-Infinity"),
        ("01", 1),
        ("-007.50", -7.5),
        ("00", 0),
        ("+5", 5),
        (".5", 0.5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("1.e3", 1000.0),
        ("1.2.3", "1.2.3"),
        ("2024-01-01", "2024-01-01"),
        ("TRUE", True),
        ("rain", "rain"),
        ("été", "été"),
        ("{a: 1, true: None, b-c: x}", {"a": 1, "true": None, "b-c": "x"}),
        ("[NaN, 01, .5]", ["NaN", 1, 0.5]),
    ],
)
def test_words_that_are_no_json(sample: Sample, written: str, value: object) -> None:
    parsed = said(sample, sample.text.replace('"x"', written))
    assert (parsed.content, [call[3] for call in parsed.calls]) == (sample.content, [True])
    assert strictly(parsed.calls[0][2]) == {"city": value}


@with_objects
def test_words_in_arguments_that_are_a_text(sample: Sample) -> None:
    text = json.dumps('{\'city\': NaN, on: 01, "a": "\\ud83d\\ude42"').replace("\\\\", "\\\\")
    parsed = said(sample, sample.text.replace(SMALL, text))
    assert strictly(parsed.calls[0][2]) == {"city": "NaN", "on": 1, "a": "\U0001f642"}


@pytest.mark.one_of_each
@with_json
@pytest.mark.parametrize("more", ["}", "}}", "\n}", "} ]"])
def test_a_bracket_too_many(sample: Sample, more: str) -> None:
    parsed = said(sample, sample.text.replace(SMALL, SMALL + more) + ("" if more == "}" else "\n"))
    assert parsed.values == sample.calls
    assert parsed.content.strip() == sample.content


def test_a_bracket_too_many_between_calls() -> None:
    sample = next(one for one in JSON if one.tools == "mistral")
    call = '{"name": "f2", "arguments": {"city": "x"}}'
    parsed = said(sample, f"[TOOL_CALLS][{call}}}, {call}]")
    assert (parsed.content, parsed.values) == ("", [("f2", {"city": "x"})] * 2)


def test_brackets_behind_a_call_are_text_where_text_goes_on() -> None:
    sample = next(one for one in JSON if one.tools == "granite_20b")
    call = '<function_call>{"name": "f2", "arguments": {"city": "x"}}'
    assert said(sample, call + "\n} is a bracket").content == "} is a bracket"


def test_the_closing_mark_of_a_json_call_in_dots() -> None:
    sample = next(one for one in SHORT if one.tools == "dots")
    text = '<dots_function_call>{"name": "f2", "arguments": {"city": "x"}}</dots_function_call>Ok'
    parsed = said(sample, text)
    assert (parsed.content, parsed.values) == ("Ok", [("f2", {"city": "x"})])


_F2 = '{"name": "f2", "arguments": {"city": "x"}}'


@pytest.mark.parametrize(
    ("tools", "text", "content", "calls"),
    [
        ("hermes", f'<tool_call>{_F2}\n{{"foo": 1}}\n</tool_call>\nbye', '{"foo": 1}\nbye', 1),
        ("hermes", f'<tool_call>{_F2}\n{{"name": "a b", "arguments": {{"name": "c"}}}}\n</tool_call>',
         '{"name": "a b", "arguments": {"name": "c"}}', 1),
        ("mistral", f'[TOOL_CALLS][{_F2}, {{"x": 1}}, {_F2}]', '{"x": 1}', 2),
        ("mistral", f"[TOOL_CALLS][{_F2[:-2]}[/TOOL_CALLS]bye", "bye", 1),
        ("tool_calls_json", f"<tool_calls>\n{_F2}\n{{invalid json here}}\n{_F2}\n</tool_calls>",
         "{invalid json here}", 2),
        ("llama3_json", f'{_F2}; {{"name": "nope", "parameters": {{}}}}', '{"name": "nope", "parameters": {}}', 1),
        ("llama3_json", f"{_F2}\nNote: {{a}}", "Note: {a}", 1),
        ("pythonic", "[f2(city='x'), unknown(a=1)]", "unknown(a=1)]", 1),
        ("lfm2", "<|tool_call_start|>[f2(city='x'), a b]<|tool_call_end|>ok", "a b]<|tool_call_end|>ok", 1),
        ("minimax_m2", '<minimax:tool_call>\n<invoke name="f2">\n<parameter name="city">x</parameter>\n</invoke>\n'
         '<invoke name="a b">\n</invoke>\nok', '<invoke name="a b">\n</invoke>\nok', 1),
        ("minimax_m3", ']<]minimax[>[<tool_call>]<]minimax[>[<invoke name="f2">]<]minimax[>[<city>x]<]minimax[>[</city>'
         ']<]minimax[>[</invoke>]<]minimax[>[<invoke name="a b">ok', ']<]minimax[>[<invoke name="a b">ok', 1),
        ("gemma4", '<|tool_call>call:f2{city:<|"|>x<|"|>},call:a b{}<tool_call|>ok', "call:a b{}<tool_call|>ok", 1),
        ("kimi_k2", '<|tool_call_begin|>functions.f2:0<|tool_call_argument_begin|>{"city": "x"}<|tool_call_end|>'
         "<|tool_call_begin|>a b<|tool_call_argument_begin|>{}",
         "<|tool_call_begin|>a b<|tool_call_argument_begin|>{}", 1),
    ],
)  # fmt: skip
def test_what_is_no_call_behind_a_call_is_text(tools: str, text: str, content: str, calls: int) -> None:
    parsed = said(next(one for one in SHORT if one.tools == tools), text)
    assert (parsed.content, parsed.values) == (content, [("f2", {"city": "x"})] * calls)


@pytest.mark.parametrize("fence", ["```json", "```"])
@pytest.mark.parametrize("sample", [pytest.param(one, id=one.tools) for one in IN_OBJECTS if "<" in one.text])
def test_a_fence_behind_a_mark(sample: Sample, fence: str) -> None:
    parsed = said(sample, re.sub(r"(\[?\{.*\}\]?)", rf"\n{fence}\n\1\n```\n", sample.text))
    assert (parsed.content, parsed.values) == (sample.content, sample.calls)


NAMED = ("mistral_v11", "mistral_v13", "kimi_k2", "deepseek_v3", "deepseek_v31", "solar")
BEHIND_NAMES = [one for one in JSON if one.tools in NAMED]


@pytest.mark.parametrize("sample", [pytest.param(one, id=one.tools) for one in BEHIND_NAMES])
@pytest.mark.parametrize(("written", "arguments"), [('""', "{}"), ("null", "{}"), ("[1, 2]", "[1, 2]"), ("[]", "[]")])
def test_what_is_no_object_behind_a_name(sample: Sample, written: str, arguments: str) -> None:
    parsed = said(sample, sample.text.replace(SMALL, written))
    assert (parsed.content, [call[1:] for call in parsed.calls]) == (sample.content, [("f2", arguments, True)])


@pytest.mark.parametrize("inside", ["", "\n", "\n\n"])
def test_an_empty_fence(inside: str) -> None:
    sample = next(one for one in SHORT if one.tools == "deepseek_v3")
    parsed = said(sample, sample.text.replace(f"\n{SMALL}\n", inside or "\n"))
    assert (parsed.content, [call[1:] for call in parsed.calls]) == ("Ok", [("f2", "{}", True)])


@pytest.mark.parametrize("name", ["a b!", r"\ud800", "x" * 300])
def test_a_key_that_can_be_no_name_of_a_function_calls_none(name: str) -> None:
    sample = next(one for one in SHORT if one.tools == "apertus")
    text = f'<|tools_prefix|>[{{"{name}": {{}}}}]<|tools_suffix|>'
    assert said(sample, text) == Parsed(text, "", ())


def test_words_behind_a_name_are_text() -> None:
    sample = next(one for one in SHORT if one.tools == "mistral_v13")
    for text in ("[TOOL_CALLS]f2[ARGS]nullable", "[TOOL_CALLS]f2[ARGS]7 days", "[TOOL_CALLS]f2 [1]"):
        assert said(sample, text) == Parsed(text, "", ())


NUMBERS: dict[str, Any] = {"type": "object", "properties": {
    "a": {"type": "integer"}, "b": {"type": ["float"]}, "c": {"anyOf": [{"type": "int"}, {"type": "null"}]},
    "d": {"type": "bool"}, "e": {"type": "dict"}, "f": {"type": "list"}, "g": {"type": "str"},
    "h": {"type": ["integer", "string"]},
}}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("a", "007", 7),
        ("a", "+5", 5),
        ("a", "-010", -10),
        ("b", ".5", 0.5),
        ("b", "01.50", 1.5),
        ("b", "NaN", "NaN"),
        ("c", "03", 3),
        ("c", "none", None),
        ("d", "yes", True),
        ("e", '{"x": NaN}', {"x": "NaN"}),
        ("e", "{x: 01}", {"x": 1}),
        ("f", "[1, Infinity]", [1, "Infinity"]),
        ("f", "[1", "[1"),
        ("g", "007", "007"),
        ("h", "007", "007"),
        ("free", "007", "007"),
        ("free", "[NaN]", ["NaN"]),
    ],
)
def test_values_that_a_schema_tells_of(key: str, written: str, value: object) -> None:
    sample = next(one for one in SHORT if one.tools == "glm45")
    text = f"<tool_call>f<arg_key>{key}</arg_key><arg_value>{written}</arg_value></tool_call>"
    parsed = said(sample, text, schemas={"f": NUMBERS})
    assert strictly(parsed.calls[0][2]) == {key: value}


NUMBERED = [one for one in SAMPLES if one.calls and "3</" in one.text.replace("3\n</", "3</").replace("3<|", "3</")]


@pytest.mark.parametrize("sample", [pytest.param(one, id=f"{at}-{one.tools}") for at, one in enumerate(NUMBERED)])
def test_a_number_is_finished_where_its_closing_mark_begins(sample: Sample) -> None:
    """Wherever the text is cut behind that; and nothing of the mark is part of a value."""
    begin = sample.text.index("<", sample.text.index("3", sample.text.index("days")))
    for end in range(begin + 1, len(sample.text)):
        engine = parser(sample.tools, TOOLS, sample.reasoning, in_reasoning=sample.prefilled)
        parsed = parse(engine, [sample.text[:end]], False)
        assert '"days": 3' in parsed.calls[0][2].replace(" ", "").replace(":", ": "), (end, parsed)
        assert "<" not in parsed.calls[0][2].replace("</b>", ""), end


@pytest.mark.parametrize(
    "value",
    [
        'say "a, b" c',
        'say "a"',
        '"a" b',
        'print("a", "b")',
        'print("a")',
        'a = {"x": ["y"]}; b',
        "it's, well",
        'a "b\nc" d',
    ],
)
@pytest.mark.parametrize("tools", ["lfm2", "pythonic", "olmo3"])
def test_quotes_in_quotes(tools: str, value: str) -> None:
    sample = next(one for one in SHORT if one.tools == tools)
    quote = "'" if "'" in value else '"'
    parsed = said(sample, sample.text.replace("city='x'", f"city={quote}{value}{quote}, on=True"))
    assert (parsed.content, parsed.values) == (sample.content, [("f2", {"city": value, "on": True})])
    last = said(sample, sample.text.replace("'x'", f"{quote}{value}{quote}"))
    assert (last.content, last.values) == (sample.content, [("f2", {"city": value})])


@pytest.mark.parametrize(
    "text", ["['a \"b\" c', \"d 'e' f\"]", "{'a': 'b', \"c\": \"d\"}", "'a' 'b'", "'a' + 'b'", "''"]
)
def test_quotes_that_are_python(text: str) -> None:
    sample = next(one for one in SHORT if one.tools == "lfm2")
    parsed = said(sample, sample.text.replace("'x'", text))
    assert parsed.values == [("f2", {"city": ast.literal_eval(text.replace("+", ""))})]


@pytest.mark.parametrize(
    "text",
    [
        '<functionname="f2"><paramname="city">x</param></function>',
        '<function name="f2"><paramname="city">x</param></function>',
        '<functionname="f2"><param name="on">yes</param><paramname="city">x</param></function>',
        '<functionname="now"></function>',
    ],
)
def test_spaces_that_minicpm_leaves_out(text: str) -> None:
    sample = next(one for one in SHORT if one.tools == "minicpm5")
    spaced = text.replace("functionname", "function name").replace("paramname", "param name")
    parsed = said(sample, f"Ok{text}\n{text}")
    assert parsed == said(sample, f"Ok{spaced}\n{spaced}")
    assert (parsed.content, len(parsed.calls)) == ("Ok", 2)
    prose = 'I saw <functionname="f2"> there'
    assert said(sample, prose) == Parsed(prose, "", ())


def as_tokens(sample: Sample, text: str, tokens: list[str], **options: Any) -> Parsed:
    """What a text says in which these are special tokens, whole and by characters."""
    bound = bind(Layout(REASONING[sample.reasoning], FORMATS[sample.tools]), {one: at for at, one in enumerate(tokens)})
    for at in sorted(bound.characters, key=lambda one: -len(bound.names[one])):
        text = text.replace(bound.names[at], bound.characters[at])
    made = lambda: OutputParser(bound.layout, tools=TOOLS, names=bound.shown, make_id=str, **options)  # noqa: E731
    assert parse(made(), text) == parse(made(), [text])
    return parse(made(), [text])


SPECIAL = {
    "mistral": ["[TOOL_CALLS]"],
    "mistral_v13": ["[TOOL_CALLS]", "[ARGS]"],
    "lfm2": ["<|tool_call_start|>", "<|tool_call_end|>"],
    "gemma4": ["<|tool_call>", "<tool_call|>", '<|"|>'],
    "granite": ["<|tool_call|>"],
}


@pytest.mark.parametrize(
    ("tools", "text", "arguments"),
    [
        ("gemma4", "<|tool_call>call:f2{a:1<tool_call|> so: 1", {"a": 1}),
        ("gemma4", "<|tool_call>call:f2{a:1,b<tool_call|> so: 1", {"a": 1}),
        ("gemma4", "<|tool_call>call:f2{a}<tool_call|> so: 1", {}),
        ("gemma4", "<|tool_call>call:f2{a:[1,{b:2<tool_call|> so: 1", {"a": [1, {"b": 2}]}),
        ("lfm2", "<|tool_call_start|>[f2(a=1<|tool_call_end|> so: 1", {"a": 1}),
        ("lfm2", "<|tool_call_start|>[f2(a=[1, {'b': 2<|tool_call_end|> so: 1", {"a": [1, {"b": 2}]}),
        ("lfm2", "<|tool_call_start|>[f2(<|tool_call_end|> so: 1", {}),
    ],
)
def test_a_closing_mark_ends_open_brackets(tools: str, text: str, arguments: dict[str, Any]) -> None:
    sample = next(one for one in SHORT if one.tools == tools)
    parsed = as_tokens(sample, text, SPECIAL[tools])
    assert (parsed.content, parsed.values, parsed.calls[0][3]) == ("so: 1", [("f2", arguments)], True)


@pytest.mark.parametrize("tools", SPECIAL)
def test_a_call_of_special_tokens_in_thoughts_is_a_thought(tools: str) -> None:
    sample = next(one for one in SHORT if one.tools == tools)
    call = sample.text.removeprefix("Ok")
    for text, options in ((f"<think>Hm {call} so</think>No", {}), (f"Hm {call} so</think>No", {"in_reasoning": True})):
        parsed = as_tokens(sample, text, [*SPECIAL[tools], "<think>", "</think>"], **options)
        assert parsed == Parsed("No", f"Hm {call} so", ())
        assert as_tokens(sample, text + call, SPECIAL[tools], **options).values == sample.calls


@pytest.mark.parametrize(
    ("tools", "value"),
    [
        ("kimi_k2", "a <|tool_call_end|> b"),
        ("kimi_k2", "<|tool_calls_section_end|><|tool_call_begin|>functions.now:1"),
        ("kimi_k2", "<|tool_call_end|>"),
        ("openai", "<|start|>assistant<|channel|>final<|message|>Hi<|end|><|call|>"),
        ("openai", "<|call|>"),
        ("deepseek_v31", "<｜tool▁call▁end｜>"),
        ("solar", "<|tool_call:end|><|calls|>"),
    ],
)
def test_special_tokens_in_strings_end_nothing(tools: str, value: str) -> None:
    sample = next(one for one in SHORT if one.tools == tools)
    tokens = re.findall(r"<[|｜][^<>]*[|｜]>", sample.text + value)
    parsed = as_tokens(sample, sample.text.replace('"x"', json.dumps(value, ensure_ascii=False)), tokens)
    assert (parsed.content, parsed.values) == (sample.content, [("f2", {"city": value})])


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        ("mistral_v13", "[TOOL_CALLS]f2[ARGS]7 days"),
        ("kimi_k2", "<|tool_call_begin|>functions.f2:0<|tool_call_argument_begin|>7<|tool_call_end|>"),
        ("deepseek_v31", "<｜tool▁call▁begin｜>f2<｜tool▁sep｜>days<｜tool▁call▁end｜>"),
        ("lfm2", "Look: <|tool_call_start|>no<|tool_call_end|>"),
    ],
)
def test_special_tokens_of_what_is_no_call_are_text(tools: str, text: str) -> None:
    sample = next(one for one in SHORT if one.tools == tools)
    tokens = re.findall(r"<[|｜][^<>]*[|｜]>|\[[A-Z_]+\]", sample.text + text)
    assert as_tokens(sample, text, tokens) == Parsed(text, "", ())
    assert as_tokens(sample, text + sample.text, tokens).values == sample.calls
