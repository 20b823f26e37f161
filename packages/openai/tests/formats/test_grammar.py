# SPDX-License-Identifier: MIT
"""Grammars of tool calls: whatever they allow is read back as valid calls of known tools, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jsonschema
import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.formats.grammar import tool_grammar
from candle_vllm.openai.formats.layout import Layout, ReasoningFormat, SpecialText, ToolFormat, bind
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS
from packages.openai.tests.formats.messages import Parsed, parse
from packages.openai.tests.formats.samples import SAMPLES, TOOLS, Sample
from packages.openai.tests.formats.test_custom_grammar import PATCH
from packages.openai.tests.formats.walks import Vocabulary, accepts, allowed, walk
from tests.common_run import few

ROWS = {row.name: row for row in TOOL_FORMATS}
THOUGHTS = {row.name: row for row in REASONING_FORMATS}
THINK = THOUGHTS["think"]


class Tool(NamedTuple):
    name: str
    parameters: dict[str, Any]
    strict: bool = True
    grammar: str | None = None


def _object(
    properties: dict[str, Any], required: list[str] | None = None, defs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
        **({"$defs": defs} if defs else {}),
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "write_text": _object({"text": {"type": "string"}, "title": {"type": "string"}}, ["text"]),
    "choose": _object(
        {
            "unit": {"enum": ["celsius", "fahren'heit", 'a "b"', "x\ny", "</b> <i>"]},
            "level": {"type": "integer", "enum": [1, 2, 30]},
            "kind": {"const": "fixed"},
            "mixed": {"enum": ["auto", 5, None, True]},
        }
    ),
    "count": _object(
        {
            "n": {"type": "integer", "minimum": -3, "maximum": 1200},
            "x": {"type": "number", "exclusiveMinimum": 0},
            "free": {"type": "number"},
            "on": {"type": "boolean"},
            "none": {"type": "null"},
        },
        ["n", "on"],
    ),
    "nest": _object(
        {
            "place": _object({"city": {"type": "string"}, "at": _object({"lat": {"type": "number"}})}, ["city"]),
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
            "grid": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
        },
        ["place", "tags"],
    ),
    "maybe": _object(
        {
            "a": {"type": "string"},
            "b": {"type": "integer"},
            "c": {"type": "boolean"},
            "d": {"type": ["string", "null"]},
            "e": {"anyOf": [{"type": "integer", "minimum": 10}, {"type": "string"}, {"type": "null"}]},
        },
        [],
    ),
    "refer": _object(
        {"who": {"$ref": "#/$defs/person"}, "why": {"$ref": "#/$defs/reason"}},
        defs={
            "person": _object(
                {"name": {"type": "string"}, "boss": {"anyOf": [{"$ref": "#/$defs/boss"}, {"type": "null"}]}}
            ),
            "boss": _object({"name": {"type": "string", "maxLength": 5}}),
            "reason": {"type": "string", "pattern": "^[a-z]{2,8}$"},
        },
    ),
    "limit": _object(
        {
            "short": {"type": "string", "minLength": 2, "maxLength": 6},
            "id": {"type": "string", "format": "uuid"},
            "day": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": "^[A-Z]{3}-\\d+$"},
            "word": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "boolean"}]},
        },
        ["short", "code"],
    ),
    "3d-now": _object({}),  # OpenAI's rule for names allows a digit in front
    "descend": _object(
        {"first": {"$ref": "#/$defs/node"}},
        defs={
            "node": _object(
                {
                    "value": {"type": "string", "maxLength": 4},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                ["value"],
            )
        },
    ),
}
TOOLSET = [Tool(name, schema) for name, schema in SCHEMAS.items()]
WALKS = few([3, 24], 3)  # of each kind


def _literals(form: Any) -> Iterator[str]:
    """Every mark of a row."""
    if isinstance(form, str):
        yield form
    elif isinstance(form, tuple):
        for one in form:
            yield from _literals(one)
    elif dataclasses.is_dataclass(form):
        for field in dataclasses.fields(form):
            if field.name not in ("name", "aliases", "hints", "model_types", "head", "name_head"):
                yield from _literals(getattr(form, field.name))


def special_tokens(form: ToolFormat, reasoning: ReasoningFormat) -> list[str]:
    """What would be special tokens in a vocabulary: marks in angle brackets, and Mistral's."""
    found = re.findall(
        r"<\|?[\w:/▁｜|]+\|?>|\[/?[A-Z_]+\]|<｜[^>]*｜>", "\n".join([*_literals(form), *_literals(reasoning)])
    )
    return sorted({name for name in found if len(name) < 40})


def vocabulary(form: ToolFormat, reasoning: ReasoningFormat, *, bound: bool) -> Vocabulary:
    """Bytes and the marks of a row, which are special tokens where `bound`."""
    return _vocabulary(form.name, reasoning.name, bound)


@functools.cache  # tests share it, and what it has compiled
def _vocabulary(form_name: str, reasoning_name: str, bound: bool) -> Vocabulary:
    form, reasoning = ROWS[form_name], THOUGHTS[reasoning_name]
    literals = [*_literals(form), *_literals(reasoning), '", "', "\n```", '": ', "</think>"]
    special = special_tokens(form, reasoning) if bound else ()
    literals += [text + "</" for text in _literals(form) if text.endswith("[>[")]
    return Vocabulary([text for text in literals if text not in special], special)


def read(
    form: ToolFormat,
    reasoning: ReasoningFormat | None,
    vocab: Vocabulary,
    ids: list[int],
    tools: list[Tool],
    *,
    bound: bool,
    in_reasoning: bool = False,
    whole: bool = True,
) -> Parsed:
    """The message in some tokens."""
    layout, characters = Layout(reasoning, form), None
    if bound:
        found = bind(layout, vocab.special)
        layout, characters = found.layout, found.characters
    schemas = {tool.name: tool.parameters for tool in tools}
    parser = OutputParser(layout, tools=schemas, in_reasoning=in_reasoning)
    return parse(parser, [vocab.text(ids, characters)], whole)


def check(parsed: Parsed, tools: list[Tool], text: str) -> None:
    """Every call is closed, known, and valid."""
    schemas = {tool.name: tool for tool in tools}
    for _, name, arguments, closed in parsed.calls:
        assert closed, text
        assert name in schemas, text
        value = json.loads(arguments)
        assert isinstance(value, dict), text
        if schemas[name].strict:
            jsonschema.Draft202012Validator(schemas[name].parameters).validate(value)


def _reasoning(name: str) -> ReasoningFormat:
    return THOUGHTS.get(name) or THINK


@pytest.mark.one_of_each(12)
@pytest.mark.parametrize("walks", WALKS)
@pytest.mark.parametrize("kind", ["text", "special", "own"])
@pytest.mark.parametrize("name", ROWS)
def test_every_required_text_is_calls(name: str, kind: str, walks: int) -> None:
    form, reasoning = ROWS[name], _reasoning(name)
    bound = kind == "special"
    vocab = vocabulary(form, reasoning, bound=bound)
    marks = special_tokens(form, reasoning) if kind == "own" else ()
    own = {mark: vocab.tokens.index(mark.encode()) for mark in marks if mark.encode() in vocab.tokens}
    rng = random.Random(f"{name}{bound}")
    for parallel, in_reasoning in ((True, False), (False, True)):
        grammar = tool_grammar(
            form, TOOLSET, mode="required", parallel=parallel, reasoning=reasoning, in_reasoning=in_reasoning,
            special=vocab.special if bound else {}, own=own,
        )  # fmt: skip
        assert grammar is not None
        begin = vocab.compiler(grammar)
        for _ in range(walks):
            ids = walk(begin(), vocab, rng)
            text = vocab.text(ids)
            parsed = read(form, reasoning, vocab, ids, TOOLSET, bound=bound, in_reasoning=in_reasoning)
            assert parsed.calls, text
            assert not parsed.content, text
            assert parallel or len(parsed.calls) == 1, text
            check(parsed, TOOLSET, text)
            cut = ids[: rng.randrange(len(ids))]
            part = read(
                form, reasoning, vocab, vocab.whole(cut), TOOLSET, bound=bound, in_reasoning=in_reasoning, whole=False
            )
            assert _begins(part, parsed), (text, vocab.text(vocab.whole(cut)))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("hostname", ["a", "mail.x-y.com"], ["-a", "a..b", "a b", ""]),
        ("ipv6", ["::", "::1", "2001:db8::8a2e:1", "1:2:3:4:5:6:7:8", "1::"], ["1", "1::2::3", "1:2:3:4:5:6:7", "g::"]),
        ("duration", ["P1Y2M3DT4H5M6S", "PT5M", "P3W", "P1D"], ["P", "PT", "P1H", "P1WT1H", "P1Y1D"]),
        (
            "uri",
            ["https://a.com:80/b?c=%20d#e", "mailto:a@b.c", "urn:x:y", "http://a"],
            ["a", "http://", "//a", "a:b#c#d"],
        ),
        ("email", ["a.b@c.com", "x+y@d-e.co.uk"], [".a@b.c", "a..b@c.d", "a@b"]),
    ],
)
def test_formats_of_strings_without_quotes(name: str, right: list[str], wrong: list[str]) -> None:
    vocab = vocabulary(ROWS["glm45"], THINK, bound=False)
    tools = [Tool("f", _object({"x": {"type": "string", "format": name}}))]
    lark = tool_grammar(
        ROWS["glm45"], tools, mode="required", parallel=False, reasoning=None, in_reasoning=False, special={}
    )
    assert lark is not None
    for text in (*right, *wrong):
        ids = vocab.encode(f"<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>")
        assert (accepts(vocab.compiler(lark)(), ids) == (len(ids), True)) == (text in right), text


MAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
ZOD = {  # as zod 4 writes them
    "mail": {"type": "string", "format": "email", "pattern": MAIL},
    "maybe": {"anyOf": [{"type": "string", "format": "email", "pattern": MAIL}, {"type": "null"}]},
    "day": {
        "type": "string",
        "format": "date",
        "pattern": r"^(?:\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])))$",
    },
    "one": {"type": "array", "items": {"type": "integer"}, "maxItems": 1},
    "same": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 1},
    "nothing": {"type": "array", "items": {"type": "string"}, "maxItems": 0},
}


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45", "deepseek_v32", "gemma4", "pythonic", "minimax_m3", "hermes"])
def test_several_patterns_of_a_string_and_lists_of_one_item(name: str) -> None:
    form, vocab, rng = ROWS[name], vocabulary(ROWS[name], THINK, bound=True), random.Random(name)
    for key, schema in ZOD.items():
        tools = [Tool("f", _object({key: schema}))]
        lark = tool_grammar(
            form, tools, mode="required", parallel=False, reasoning=None, in_reasoning=False, special=vocab.special
        )
        assert lark is not None
        for _ in range(3):
            ids = walk(vocab.compiler(lark)(), vocab, rng)
            check(read(form, None, vocab, ids, tools, bound=True), tools, vocab.text(ids))


def test_a_forced_mark_is_the_models_own_token() -> None:
    """Qwen's `<tool_call>` is a token that is text: spelt otherwise, the next prompt would not find it in the cache."""
    vocab = vocabulary(ROWS["hermes"], THINK, bound=False)
    own = {mark: vocab.tokens.index(mark.encode()) for mark in ("<tool_call>", "</tool_call>")}
    cases: list[tuple[Literal["required", "auto"], bool]] = [("required", False), ("auto", True)]
    for mode, spelt in cases:
        lark = tool_grammar(
            ROWS["hermes"], TOOLSET, mode=mode, parallel=False, reasoning=None, in_reasoning=False, special={},
            own=own, always=True,
        )  # fmt: skip
        assert lark is not None
        choices = allowed(vocab.compiler(lark)(), vocab.vocab_size)
        assert own["<tool_call>"] in choices
        assert (ord("<") in choices) is spelt


def test_a_line_may_end_behind_the_last_call() -> None:
    """Qwen2.5-Coder-0.5B ends it before it ends the answer; else it would have to write call after call."""
    vocab = vocabulary(ROWS["hermes"], THINK, bound=False)
    lark = _grammar(TOOLSET)
    assert lark is not None
    call = '<tool_call>\n{"name": "3d-now", "arguments": {}}\n</tool_call>'
    for text in (call, f"{call}\n", f"{call}\n{call}\n"):
        ids = vocab.encode(text)
        assert accepts(vocab.compiler(lark)(), ids) == (len(ids), True)


def test_the_tag_of_an_argument_may_be_a_special_token() -> None:
    """Vocabularies have `<filename>` as a special token, and MiniMax M3 writes an argument's name as such a tag."""
    form, tools = ROWS["minimax_m3"], [Tool("open", _object({"filename": {"type": "string"}}))]
    vocab = Vocabulary((), ["]<]minimax[>[", "<filename>", "</filename>", "</invoke>", "<tool_call>"])
    grammar = tool_grammar(
        form, tools, mode="required", parallel=False, reasoning=None, in_reasoning=False, special=vocab.special
    )
    assert grammar is not None
    begin, rng = vocab.compiler(grammar), random.Random(0)
    for _ in range(3):
        ids = walk(begin(), vocab, rng)
        assert {vocab.special["<filename>"], vocab.special["</invoke>"]} < set(ids)
        text = vocab.text(ids)
        marks = [(len(vocab.text(ids[:place])), token) for place, token in enumerate(ids) if vocab.is_special(token)]
        bound = bind(Layout(None, form), vocab.special)
        parser = OutputParser(bound.layout, tools={tool.name: tool.parameters for tool in tools})
        parsed = parse(parser, [SpecialText(bound).add(text, marks)])
        assert len(parsed.calls) == 1
        assert not parsed.content
        check(parsed, tools, text)


CUSTOM = [  # any text at all, with marks of the formats in it; and one of a few words, with what is spelled otherwise
    ('start: "+" /(.|\\n){0,30}/ ">"', r"\+(?s:.){0,30}>"),
    ('start: line+ "end"i?\nline: ">" WORD? ("\\"" | "\\\\" | "<") LF\nWORD: "a".."c"\n%import common.LF',
     r"(>[abc]?[\"\\<]\n)+((?i:end))?"),
]  # fmt: skip


@pytest.mark.one_of_each(38)
@pytest.mark.parametrize("bound", [False, True], ids=["text", "special"])
@pytest.mark.parametrize("name", ROWS)
def test_the_input_of_a_custom_tool_follows_its_grammar(name: str, bound: bool) -> None:
    form, reasoning = ROWS[name], _reasoning(name)
    vocab = vocabulary(form, reasoning, bound=bound)
    rng = random.Random(f"{name}{bound}")
    for number, (definition, fits) in enumerate(CUSTOM):
        tools = [Tool("run", _object({"input": {"type": "string"}}), strict=False, grammar=definition)]
        grammar = tool_grammar(
            form, tools, mode="required", parallel=bool(number), reasoning=None, in_reasoning=False,
            special=vocab.special if bound else {},
        )  # fmt: skip
        assert grammar is not None
        begin = vocab.compiler(grammar)
        for _ in range(3):
            ids = walk(begin(), vocab, rng, steps=30)
            text = vocab.text(ids)
            parsed = read(form, None, vocab, ids, tools, bound=bound)
            assert parsed.calls, text
            check(parsed, tools, text)
            for call in parsed.calls:
                assert re.fullmatch(fits, json.loads(call[2])["input"]), (text, call)


@pytest.mark.usefixtures("tried_in_a_process")
@pytest.mark.parametrize("name", ["qwen3_coder", "minimax_m2"])
def test_a_patch_fits_into_a_tagged_call(name: str) -> None:
    """The lexer's budget for a step holds for the complement of the marks and a grammar as large as that."""
    form = ROWS[name]
    vocab = vocabulary(form, THINK, bound=False)
    tools = [Tool("run", _object({"input": {"type": "string"}}), strict=False, grammar=PATCH)]
    lark = tool_grammar(
        form, tools, mode="required", parallel=False, reasoning=None, in_reasoning=False, special={}
    )  # fmt: skip
    assert lark is not None
    grammar, rng = vocab.compiler(lark)(), random.Random(0)
    while ord("*") not in (choices := allowed(grammar, vocab.vocab_size)):
        assert grammar.accept(rng.choice([one for one in choices if vocab.tokens[one] != b"\n"] or choices))
    lines = "".join(f"{sign}    if x < 3: return '<b>\\n</b>' </para\n" for sign in "+- ")
    for part in ("*** Begin Patch\n*** ", "Update File: a b.py\n@@ def f(x):\n", lines, "*** End Patch"):
        assert part.encode()[0] in allowed(grammar, vocab.vocab_size)
        assert all(map(grammar.accept, part.encode())), part
    end = "\n</parameter>" if name == "qwen3_coder" else "</parameter>"
    assert all(map(grammar.accept, end.encode()))


def _begins(part: Parsed, whole: Parsed) -> bool:
    """Whether the calls of a cut text are the beginning of those of the whole text."""
    if len(part.calls) > len(whole.calls):
        return False
    for one, other in zip(part.calls, whole.calls, strict=False):
        if one[1] != other[1] or not other[2].startswith(one[2]):
            return False
    return True


@pytest.mark.one_of_each(14)
@pytest.mark.parametrize("walks", WALKS)
@pytest.mark.parametrize("bound", [False, True], ids=["text", "special"])
@pytest.mark.parametrize("name", ROWS)
def test_calls_in_free_text_are_held_to_their_form(name: str, bound: bool, walks: int) -> None:
    form, reasoning = ROWS[name], _reasoning(name)
    vocab = vocabulary(form, reasoning, bound=bound)
    tools = [tool if tool.name != "nest" else tool._replace(strict=False) for tool in TOOLSET]
    rng = random.Random(f"{name}{bound}")
    for parallel in (True, False):
        grammar = tool_grammar(
            form, tools, mode="auto", parallel=parallel, reasoning=reasoning, in_reasoning=False,
            special=vocab.special if bound else {},
        )  # fmt: skip
        assert grammar is not None
        begin = vocab.compiler(grammar)
        for number in range(2 * walks):
            begun = vocab.encode(_beginning(form, number)) if number % 2 else ()
            ids = walk(begin(), vocab, rng, begun=begun)
            text = vocab.text(ids)
            parsed = read(form, reasoning, vocab, ids, tools, bound=bound)
            assert parsed.calls or not begun or form.flow, text
            assert parallel or len(parsed.calls) < 2, text
            check(parsed, tools, text)


def _beginning(form: ToolFormat, number: int) -> str:
    """Free text and what begins a call."""
    if form.flow is not None:
        return ""
    if form.bare is not None and number % 4 == 1:
        return ("<think>Hm.</think>" if number % 8 == 1 else "") + (
            "\n[limit(" if form.bare_starts == "[" else '[{"name": "maybe", "parameters": '
        )
    mark = (*form.opens, *form.names)[0]
    end = {"functools": "[", "Action:": "\n```json\n[", "```json": '\n{"name": "choose", "arguments":'}.get(mark, "")
    return f"Hm, well.\n{mark}{end}"


# Texts that parsers understand and that no model should write where its calls are constrained: (format, part of the
# text, why).
NOT_WRITTEN = (
    ("inkling", '{"args"', "arguments before the name"),
    ("k2_horizon", '<ifm|tool_call>{"name"', "JSON in place of tags"),
    ("k2_horizon", "<ifm|arg_type>", "types beside values"),
    ("hermes", '{"arguments": {}, "name"', "arguments before the name"),
    ("hermes", "\\u00e9", "an escape that is not needed"),
    ("hermes", '"arguments": "{', "arguments as a string"),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}', "no closing tag"),
    ("hermes", "{'name'", "single quotes"),
    ("hermes", "```json", "a fenced block in place of the tag"),
    ("qwen3_coder", "x = '</parameter>'", "the closing tag in a value"),
    ("qwen3_coder", "True\n<parameter=city>", "no closing tag"),
    ("mistral_v13", "[TOOL_CALLS]f2{", "no [ARGS]"),
    ("functionary_v32", "print('>')", "code in place of JSON"),
    ("pythonic", 'f2("x"', "arguments by place"),
    ("lfm2", "a\nb", "a line break in a string"),
    ("llama3_json", "<|python_tag|>", "code or a built-in tool"),
    ("functionary_v31", "<|python_tag|>", "code"),
    ("gigachat3", "<|message_sep|>", "white space behind the last mark, or the mark of the first version"),
    ("minicpm5", "['a', '</b>']", "a list as Python writes it"),
    ("minicpm5", "<![CDATA[</param></function>\n]]]>", "not a string"),
    ("hunyuan_v3", "<tool_sep>", "the marks of another version"),
    ("minimax_m3", 'name="g"', "a tool that is not offered"),
)
# Where calls must come, these begin in another way than the first body does.
NOT_REQUIRED = (("qwen3_coder", "<function="), ("llama3_json", "<function="), ("llama4_json", "<|python_start|>"))


def _written(mode: str) -> Iterator[Any]:
    """Samples that the grammar of a mode has to accept."""
    for number, sample in enumerate(SAMPLES):
        other = any(sample.tools == name and part in sample.text for name, part, _ in NOT_WRITTEN)
        late = any(sample.tools == name and sample.text.startswith(part) for name, part in NOT_REQUIRED)
        if sample.calls and not other and (mode == "auto" or not (sample.content or late)):
            yield pytest.param(mode, sample, id=f"{mode}-{sample.tools}-{number}")


@pytest.mark.parametrize(("mode", "sample"), [*_written("required"), *_written("auto")])
def test_what_models_write_is_accepted(mode: Literal["required", "auto"], sample: Sample) -> None:
    form, reasoning = ROWS[sample.tools], THOUGHTS[sample.reasoning]
    vocab = vocabulary(form, reasoning, bound=False)
    tools = [Tool(name, schema) for name, schema in TOOLS.items()]
    grammar = tool_grammar(
        form, tools, mode=mode, parallel=True, reasoning=reasoning, in_reasoning=sample.prefilled, special={}
    )  # fmt: skip
    assert grammar is not None
    text = sample.text.replace("`</think>`", "'</think >'")  # in thoughts, no mark is written behind a quote
    ids = vocab.encode(text)
    taken, ends = accepts(vocab.compiler(grammar)(), ids)
    assert ends, vocab.text(vocab.whole(ids[:taken]))


@pytest.mark.one_of_each(13)
@pytest.mark.parametrize("name", ROWS)
def test_a_text_is_accepted_however_tokens_cut_it(name: str) -> None:
    """Tokens reach over the edges of marks, as byte-pair encoding makes them."""
    form, rng = ROWS[name], random.Random(name)
    marks = vocabulary(form, THINK, bound=False)
    grammar = _grammar(TOOLSET, name)
    assert grammar is not None
    begin = marks.compiler(grammar)
    texts = [marks.text(walk(begin(), marks, rng)) for _ in range(4)]
    cuts = [sorted({0, len(text), *rng.choices(range(len(text)), k=len(text) // 3)}) for text in texts]
    pieces = [[text[i:j] for i, j in itertools.pairwise(cut)] for text, cut in zip(texts, cuts, strict=True)]
    vocab = Vocabulary(piece for cut in pieces for piece in cut)
    ids = {token: index for index, token in enumerate(vocab.tokens)}
    begin = vocab.compiler(grammar)
    for cut in pieces:
        assert accepts(begin(), [ids[piece.encode()] for piece in cut]) == (len(cut), True)


def _grammar(tools: list[Tool], form: str = "hermes", **options: Any) -> str | None:
    asked = {"mode": "required", "parallel": True, "reasoning": None, "in_reasoning": False, "special": {}} | options
    return tool_grammar(ROWS[form], tools, **asked)


def test_nothing_is_constrained_where_no_tool_is_strict() -> None:
    assert _grammar([TOOLSET[0]._replace(strict=False)], mode="auto") is None


@pytest.mark.one_of_each(29)
@pytest.mark.parametrize("name", [row.name for row in TOOL_FORMATS if row.flow is None])
def test_free_text_may_be_anything_but_special_tokens(name: str) -> None:
    form, reasoning = ROWS[name], _reasoning(name)
    vocab = Vocabulary(["the", " cat"], [*special_tokens(form, reasoning), "<other>"])
    grammar = tool_grammar(
        form, TOOLSET, mode="auto", parallel=True, reasoning=reasoning, in_reasoning=False, special=vocab.special
    )  # fmt: skip
    assert grammar is not None
    begun = vocab.compiler(grammar)()
    assert begun.may_end
    assert begun.accept(ord("a"))
    found = set(allowed(begun, vocab.vocab_size))
    ordinary = {index for index in range(0x80) if index not in vocab.special.values()}
    assert ordinary <= found
    assert set(range(vocab.special["<other>"] + 1, vocab.vocab_size)) <= found
    assert vocab.end in found
    assert vocab.special["<other>"] not in found
    opened = [mark for mark in form.opens if mark in vocab.special]
    assert {vocab.special[mark] for mark in opened} <= found


def test_a_mark_in_quotes_begins_no_call() -> None:
    grammar = _grammar(TOOLSET, mode="auto")
    assert grammar is not None
    vocab = vocabulary(ROWS["hermes"], THINK, bound=False)
    begin = vocab.compiler(grammar)
    for text in ('Write "<tool_call>" here', "Write `<tool_call>` here", "a < b"):
        assert accepts(begin(), vocab.encode(text))[1]
    for text in ("Write <tool_call> here", 'Write "<tool_call> here'):
        assert not accepts(begin(), vocab.encode(text))[1]


def test_only_strict_tools_are_held_to_their_schemas_in_free_text() -> None:
    tools = [TOOLSET[0], TOOLSET[1]._replace(strict=False)]
    grammar = _grammar(tools, mode="auto")
    assert grammar is not None
    vocab = vocabulary(ROWS["hermes"], THINK, bound=False)
    begin = vocab.compiler(grammar)

    def accepted(name: str, arguments: str) -> bool:
        text = f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        return accepts(begin(), vocab.encode(text))[1]

    assert accepted(tools[0].name, '{"text": "x"}')
    assert not accepted(tools[0].name, '{"other": 1}')
    assert accepted(tools[1].name, '{"other": [1, {}]}')
    assert not accepted(tools[1].name, "[]")
    assert not accepted("unknown", "{}")


_LARGE = _object({f"k{number}": {"type": "string", "maxLength": 9} for number in range(200)}, [])


def _often(part: dict[str, Any]) -> dict[str, Any]:
    """Properties that repeat a large one, "#/properties/d"."""
    return {"d": _LARGE, **{f"p{number}": part for number in range(400)}}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma4", _often({"anyOf": [{"$ref": "#/properties/d"}]}), "repeated too often"),
    ("minimax_m3", _often({"anyOf": [{"$ref": "#/properties/d"}]}), "repeated too often"),
    ("qwen3_coder", _often({"type": "array", "items": {"$ref": "#/properties/d"}}), "repeated too often"),
    ("hermes", {"a": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ("hermes", {"a": {"not": {"pattern": "a+"}}}, "not"),
    ("qwen3_coder", {"a": {"minLength": 1, "not": {"const": "x"}, "oneOf": [{}]}}, "not"),
    ("hermes", {"a": {"$ref": "https://example.com/x"}}, "ref"),
    ("hermes", {"a": {"type": "object", "x-guidance": {"lenient": True}}}, "x-guidance"),
    ("qwen3_coder", {"a": {"type": "string", "format": ["x"]}}, "format"),
    ("minimax_m3", {"a": {"format": {"x": 1}}}, "format"),
    ("qwen3_coder", {"a": {"type": "string", "pattern": "a\\b"}}, "pattern"),
    ("qwen3_coder", {"a": {"type": "string", "pattern": "^a|b$"}}, "pattern"),
    ("qwen3_coder", {"a": {"type": "string", "minLength": 3, "maxLength": 2}}, "minLength"),
    ("qwen3_coder", {"a": {"enum": ["x</parameter>"]}}, "enum"),
    ("qwen3_coder", {"a>b": {"type": "string"}}, "a>b"),
    ("qwen3_coder", {"a": {"allOf": [{"minLength": 1}, {"maxLength": 2}]}}, "allOf"),
    ("qwen3_coder", {"a": {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}}, "oneOf"),
    ("qwen3_coder", {"a": {"type": "object", "patternProperties": {"x": {}}}}, "patternProperties"),
    ("pythonic", {"a-b": {"type": "string"}}, "a-b"),
    ("pythonic", {"class": {"type": "string"}}, "class"),
    ("pythonic", {"a": {"type": "array", "prefixItems": [{}]}}, "prefixItems"),
    ("pythonic", {"a": {"type": "object", "minProperties": 1}}, "minProperties"),
    ("gemma4", {"a": {"type": "array", "minItems": 3, "maxItems": 2}}, "minItems"),
    ("qwen3_coder", {"a": {"enum": [1, 2], "const": 1}}, "it is next to enum; keep one of them"),
    ("qwen3_coder", {"a": {"enum": [1, 2], "minimum": 0, "maximum": 2, "multipleOf": 1}}, "'maximum'"),
    ("qwen3_coder", {"a": {"const": 1, "minimum": 0}}, "it is next to enum or const; list only values that fit it"),
]


@pytest.mark.parametrize(
    ("form", "properties", "keyword"), REFUSED, ids=lambda one: one if isinstance(one, str) else ""
)
def test_what_cannot_be_guaranteed_is_refused_by_name(form: str, properties: dict[str, Any], keyword: str) -> None:
    tool = Tool("the_tool", {"type": "object", "properties": properties})
    with pytest.raises(InvalidParameterError) as caught:
        _grammar([tool], form)
    assert "the_tool" in str(caught.value)
    assert keyword in str(caught.value)
    assert caught.value.param == "tools"


@pytest.mark.parametrize("form", ["qwen3_coder", "pythonic", "gemma4", "minimax_m3"])
def test_a_required_argument_without_values_is_refused(form: str) -> None:
    tool = Tool("the_tool", {"type": "object", "properties": {"a": False, "b": {}}, "required": ["b", "a"]})
    with pytest.raises(UnsupportedParameterError, match="'a' is required, and no property of that name is allowed"):
        _grammar([tool], form)
    assert _grammar([tool._replace(parameters=tool.parameters | {"required": ["b"]})], form)


def test_an_integer_may_be_listed_as_a_float() -> None:
    """1.0 is an integer in JSON Schema."""
    schema = _object({"n": {"type": "integer", "enum": [1.0, 2, 2.5]}, "x": {"type": "integer", "const": 3.0}})
    grammar = _grammar([Tool("f", schema)], "pythonic")
    assert grammar is not None
    vocab = vocabulary(ROWS["pythonic"], THINK, bound=False)
    begin = vocab.compiler(grammar)
    for n, expected in (("1", True), ("2", True), ("2.5", False), ("3", False)):
        assert accepts(begin(), vocab.encode(f"[f(n={n}, x=3)]"))[1] is expected, n


_TWICE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {  # each definition has the next one twice
    "alternatives": lambda next_one: {"anyOf": [next_one, next_one]},
    "objects": lambda next_one: _object({"a": next_one, "b": next_one}),
    "objects or null": lambda next_one: _object({name: {"anyOf": [next_one, {"type": "null"}]} for name in "ab"}),
}


@pytest.mark.usefixtures("tried_in_a_process")
@pytest.mark.parametrize("last", [{"type": "string"}, {"type": "string", "enum": [1]}], ids=["text", "nothing"])
@pytest.mark.parametrize("kind", _TWICE)
@pytest.mark.parametrize("form", ["hermes", "qwen3_coder", "glm45", "gemma4", "pythonic", "minimax_m3"])
def test_definitions_that_repeat_others_are_written_in_bounded_time(form: str, kind: str, last: dict[str, Any]) -> None:
    definitions = {f"d{number}": _TWICE[kind]({"$ref": f"#/$defs/d{number + 1}"}) for number in range(30)}
    schema = _object({"a": {"$ref": "#/$defs/d0"}}, defs={**definitions, "d30": last})
    begun = time.process_time()
    with contextlib.suppress(UnsupportedParameterError):
        assert _grammar([Tool("f", schema)], form) is not None
    assert time.process_time() - begun < 2


@pytest.mark.usefixtures("tried_in_a_process")
def test_many_tools_are_compiled_in_bounded_time() -> None:
    tools = [Tool(f"tool_{index}", SCHEMAS["maybe" if index % 2 else "write_text"]) for index in range(1024)]
    vocab = vocabulary(ROWS["hermes"], THINK, bound=False)
    for form in ("hermes", "qwen3_coder", "pythonic", "gemma4"):
        begun = time.process_time()
        grammar = _grammar(tools, form)
        assert grammar is not None
        assert vocab.compiler(grammar)().accept(ord("[" if form == "pythonic" else "<"))
        assert time.process_time() - begun < 20, form  # seconds
