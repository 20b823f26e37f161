# SPDX-License-Identifier: MIT
"""Grammars of structured answers beside thoughts and calls, and the spellings that templates teach models."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.llguidance_grammar import LlguidanceGrammar
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.tokenizer import ChatConventions
from candle_vllm.openai import parse_chat_request
from candle_vllm.openai.formats.grammar import tool_grammar
from candle_vllm.openai.formats.layout import BoundLayout, Layout, ToolFormat, bind
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS, by_name
from candle_vllm.openai.planning import AnswerPlanner, constrain
from candle_vllm.openai.requests import read_chat
from candle_vllm.openai.task import ToolUse
from packages.openai.tests.formats.messages import Parsed, parse
from packages.openai.tests.formats.test_grammar import Tool, check, vocabulary
from packages.openai.tests.formats.walks import Vocabulary, accepts, walk

ROWS, THOUGHTS = by_name(TOOL_FORMATS), by_name(REASONING_FORMATS)
FORM = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "string", "pattern": "^[^`<]{0,8}$"},
    },  # in code, marks that are text are none, and elsewhere they are
    "required": ["a"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY, "strict": True}}]
TOOL = Tool("get_weather", CITY)
ANSWER = '{"a": 1}'
PAIRS = (
    *(("hermes", "think"), ("qwen3_coder", "think"), ("llama3_json", "think"), ("mistral_v13", "mistral")),
    *(("cohere", "cohere"), ("kimi_k3", "kimi_k3"), ("solar", "solar"), ("gemma4", "gemma4"), ("kimi_k2", "think")),
    *(("openai", "openai"), ("muse", "muse"), ("functionary_v32", "think"), ("pythonic", "think")),
)
ALONE = ("cohere", "kimi_k3", "solar", "openai", "muse", "functionary_v32")


class Model:
    """A model of some formats: its vocabulary, and the plan of a request.

    Args:
        form, reasoning: names of formats.
        bound: marks are special tokens.
        prompt: what the request's prompt ends with.
        fields: of the request.
    """

    def __init__(self, form: str, reasoning: str, *, bound: bool = True, prompt: str = "", **fields: Any) -> None:
        self.vocabulary = vocabulary(ROWS[form], THOUGHTS[reasoning], bound=bound)
        conventions = ChatConventions(special_tokens=self.vocabulary.special if bound else {})
        planner = AnswerPlanner(conventions, "none", tool_parser=form, reasoning_parser=reasoning)
        asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": FORM}}
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "response_format": asked, **fields}
        request = parse_chat_request(body)
        planned = planner.plan(read_chat(request), prompt)
        assert planned.structured is not None
        self.begin = compiled(self.vocabulary, planned.structured)
        self.answers = planned.answers

    def takes(self, text: str) -> bool:
        """Whether a whole answer may be this."""
        return accepts(self.begin(), self.vocabulary.encode(text))[1]

    def read(self, ids: list[int], whole: bool = True, *, cut: bool = False) -> Parsed:
        """The message in some tokens; its text comes character by character where `cut`."""
        plan = self.answers
        assert plan.bound is not None
        engine = OutputParser(
            plan.bound.layout,
            tools=plan.tools,
            in_reasoning=plan.in_reasoning,
            behind_reasoning=plan.behind_reasoning,
            make_id=lambda index: f"id{index}",
        )
        text = self.vocabulary.text(ids, plan.bound.characters)
        return parse(engine, text if cut else [text], whole)


def compiled(vocabulary: Vocabulary, spec: StructuredOutputsParams) -> Callable[[], LlguidanceGrammar]:
    backend = LlguidanceBackend(vocabulary, vocabulary.vocab_size, [vocabulary.end])
    return lambda: backend.compile(spec)


@pytest.mark.one_of_each(13)
@pytest.mark.parametrize("bound", [False, True], ids=["text", "special"])
@pytest.mark.parametrize("offered", [False, True], ids=["alone", "tools"])
@pytest.mark.parametrize(("tools", "reasoning"), PAIRS)
def test_an_answer_with_a_form_is_read_as_that_form_or_as_calls(
    tools: str, reasoning: str, offered: bool, bound: bool
) -> None:
    if not offered and tools not in ALONE:
        pytest.skip("nothing but thoughts stands beside the form: core tests that")
    model = Model(tools, reasoning, bound=bound, tools=TOOLS if offered else [])
    rng = random.Random(f"{tools}{offered}{bound}")
    found = set()
    plain = tools not in ("openai", "muse", "functionary_v32")
    for number in range(16):
        begun = model.vocabulary.encode('{"a"') if plain and number % 4 == 1 else []
        ids = walk(model.begin(), model.vocabulary, rng, begun=begun, steps=40)
        text = model.vocabulary.text(ids)
        parsed = model.read(ids)
        assert parsed == model.read(ids, cut=True), text
        if parsed.calls:
            assert not parsed.content, text
            check(parsed, [TOOL], text)
        else:
            jsonschema.validate(json.loads(parsed.content), FORM)
            assert parsed.content == parsed.content.strip(), text
        found.add((bool(parsed.calls), bool(parsed.thoughts)))
        cut = model.vocabulary.whole(ids[: rng.randrange(len(ids))])
        part = model.read(cut, whole=False)
        assert part == model.read(cut, whole=False, cut=True), text
        assert len(part.calls) <= len(parsed.calls), text
    assert {called for called, _ in found} == ({True, False} if offered else {False}), found


FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "x"}<|call|>'
TAKEN = [
    ("openai", "openai", FINAL + ANSWER, ""),
    ("openai", "openai", FINAL + ANSWER + "<|return|>", ""),
    ("openai", "openai", "<|channel|>final <|constrain|>json<|message|>" + ANSWER, ""),
    ("openai", "openai", ANALYSIS + "<|channel|>final<|constrain|>json<|message|>" + ANSWER, "Hm."),
    ("openai", "openai", ANALYSIS + ANALYSIS + FINAL + ANSWER, "Hm.Hm."),
    ("openai", "openai", CALL, ""),
    ("openai", "openai", ANALYSIS + CALL, "Hm."),
    ("openai", "openai", ANALYSIS + CALL.replace("<|channel|>commentary to=functions.get_weather ",
        " to=functions.get_weather<|channel|>commentary "), "Hm."),
    ("functionary_v32", "think", "all\n" + ANSWER, ""),
    ("functionary_v32", "think", 'get_weather\n{"city": "x"}', ""),
    ("muse", "muse", " to=user<|message|>" + ANSWER + "<|eot|>", ""),
    ("muse", "muse", " to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>" + ANSWER, "Hm."),
    ("cohere", "cohere", ANSWER, ""),
    ("cohere", "cohere", f"<|START_RESPONSE|>{ANSWER}<|END_RESPONSE|>", ""),
    ("cohere", "cohere", f"<|START_THINKING|>Hm.<|END_THINKING|><|START_TEXT|>{ANSWER}<|END_TEXT|>", "Hm."),
    ("cohere", "cohere", '<|START_THINKING|>Hm.<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", '
        '"tool_name": "get_weather", "parameters": {"city": "x"}}\n]<|END_ACTION|>', "Hm."),
    ("kimi_k3", "kimi_k3", f"<|open|>response<|sep|>{ANSWER}<|close|>response<|sep|>", ""),
    ("kimi_k3", "kimi_k3", f"<|open|>think<|sep|>Hm.<|close|>think<|sep|><|open|>response<|sep|>{ANSWER}"
        "<|close|>response<|sep|>", "Hm."),
    ("solar", "solar", f"<|content|>{ANSWER}<|end|>", ""),
    ("solar", "solar", f"<|think|>Hm.<|end|><|begin|>assistant<|content|>{ANSWER}<|end|>", "Hm."),
    ("solar", "solar", "<|think|>Hm.<|end|><|begin|>assistant<|tool_calls|><|tool_call:begin|>a1<|tool_call:name|>"
        'get_weather<|tool_call:args|>{"city": "x"}<|tool_call:end|><|calls|>', "Hm."),
    ("hermes", "think_answer", f"<think>\nHm.\n</think>\n<answer>{ANSWER}</answer>", "Hm."),
    ("hermes", "think", f"<think>\nHm.\n</think>\n\n{ANSWER}", "Hm."),
    ("hermes", "think", '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "x"}}'
        "\n</tool_call>", "Hm."),
]  # fmt: skip


@pytest.mark.one_of_each(24)
@pytest.mark.parametrize("bound", [False, True], ids=["text", "special"])
@pytest.mark.parametrize(("tools", "reasoning", "text", "thoughts"), TAKEN)
def test_the_marks_of_a_format_may_stand_around_a_form(
    tools: str, reasoning: str, text: str, thoughts: str, bound: bool
) -> None:
    model = Model(tools, reasoning, bound=bound, tools=TOOLS)
    assert model.takes(text)
    ids = model.vocabulary.encode(text)
    parsed = model.read(ids)
    assert parsed.thoughts == thoughts
    assert (parsed.values, parsed.content) in (([], ANSWER), ([("get_weather", {"city": "x"})], ""))
    assert parsed == model.read(ids, cut=True)
    for count in range(len(ids)):
        part = model.read(ids[:count], whole=False)
        assert part == model.read(ids[:count], whole=False, cut=True)
        assert all(call[2] in '{"city": "x"}' for call in part.calls)


@pytest.mark.parametrize(
    ("tools", "reasoning", "text"),
    [
        ("openai", "openai", ANSWER),
        ("openai", "openai", ANALYSIS + ANSWER),
        ("openai", "openai", FINAL + "Hello"),
        ("openai", "openai", FINAL + ANSWER + "<|end|><|start|>assistant" + CALL),
        ("openai", "openai", "<|channel|>commentary<|message|>I will.<|end|><|start|>assistant" + FINAL + ANSWER),
        ("openai", "openai", CALL.replace("get_weather", "other")),
        ("functionary_v32", "think", ANSWER),
        ("functionary_v32", "think", "all\nHello"),
        ("muse", "muse", ANSWER),
        ("muse", "muse", " to=self<|message|>" + ANSWER),
        ("cohere", "cohere", "<|START_RESPONSE|>Hello<|END_RESPONSE|>"),
        ("cohere", "cohere", f"<|START_THINKING|>Hm.<|START_ACTION|><|END_THINKING|>{ANSWER}"),
        ("solar", "solar", f"<|content|><|end|>{ANSWER}"),
    ],
)
def test_what_is_neither_the_form_nor_calls_is_not_taken(tools: str, reasoning: str, text: str) -> None:
    assert not Model(tools, reasoning, tools=TOOLS).takes(text)


def test_without_tools_there_are_no_calls_beside_a_form() -> None:
    model = Model("openai", "openai")
    assert model.takes(ANALYSIS + FINAL + ANSWER)
    assert not model.takes(CALL)
    assert not Model("functionary_v32", "think").takes(ANSWER)
    cohere = Model("cohere", "cohere")
    assert cohere.takes(f"<|START_THINKING|>Hm.<|END_THINKING|>\n<|START_RESPONSE|>{ANSWER}<|END_RESPONSE|>")


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_a_request_that_declines_thoughts_is_not_offered_any(name: str) -> None:
    thinks, declines = (Model("hermes", "think", chat_template_kwargs={name: value}) for value in (True, False))
    assert thinks.takes("<think>a</think>" + ANSWER)
    assert not declines.takes("<think>a</think>" + ANSWER)
    assert thinks.takes(ANSWER)
    assert declines.takes(ANSWER)


def test_open_thoughts_are_closed_before_the_form() -> None:
    model = Model("hermes", "think", prompt="<think>\n", tools=TOOLS)
    assert model.takes(f"Hm.\n</think>\n\n{ANSWER}")
    assert not model.takes(ANSWER)
    cohere = Model("cohere", "cohere", prompt="<|START_THINKING|>")
    assert cohere.takes(f"Hm.<|END_THINKING|><|START_TEXT|>{ANSWER}<|END_TEXT|>")
    closed = Model("cohere", "cohere", prompt="<|START_THINKING|><|END_THINKING|>")
    assert closed.takes(f"<|START_TEXT|>{ANSWER}<|END_TEXT|>")
    assert not closed.takes(f"<|START_THINKING|>Hm.<|END_THINKING|>{ANSWER}")


def _constrained(tools: ToolFormat | None, **options: Any) -> StructuredOutputsParams | None:
    given = StructuredOutputsParams(choice=["yes", "no"])
    asked = {"reasoning": None, "in_reasoning": False, "special": {}} | options
    return constrain(given, tools, ToolUse(), **asked)


def test_the_frame_of_a_model_is_used_where_no_tool_is_offered() -> None:
    vocabulary = Vocabulary([])

    def takes(spec: StructuredOutputsParams | None, text: str) -> bool:
        assert spec is not None
        return accepts(compiled(vocabulary, spec)(), vocabulary.encode(text))[1]

    headed = _constrained(ROWS["functionary_v32"])
    assert takes(headed, "all\nyes")
    assert not takes(headed, "yes")
    closed = _constrained(ROWS["cohere"])
    assert takes(closed, "<|START_TEXT|>no<|END_TEXT|>")
    assert takes(closed, "no")
    assert not takes(closed, "\nno")
    assert takes(_constrained(ROWS["hermes"]), "yes")


def test_a_message_that_goes_on_has_no_header() -> None:
    plain = _constrained(ROWS["openai"], continued=True)
    assert plain == StructuredOutputsParams(choice=["yes", "no"])


@pytest.mark.parametrize("row", [*TOOL_FORMATS, *REASONING_FORMATS], ids=lambda row: f"{type(row).__name__}-{row.name}")
def test_marks_around_an_answer_are_left_out_by_the_parser(row: Any) -> None:
    assert {mark for pair in row.answer for mark in pair} <= {*row.strays}


def _accepted(form: str, schema: dict[str, Any], text: str, special: dict[str, int] | None = None) -> bool:
    lark = tool_grammar(
        ROWS[form], [Tool("f", schema)], mode="required", parallel=True, reasoning=None, in_reasoning=False,
        special=special or {},
    )  # fmt: skip
    assert lark is not None
    vocabulary = Vocabulary([])
    return accepts(vocabulary.compiler(lark)(), vocabulary.encode(text))[1]


def _parsed(form: str, schema: dict[str, Any], text: str) -> Any:
    def read(pieces: Any) -> Parsed:
        engine = OutputParser(Layout(None, ROWS[form]), tools={"f": schema}, make_id=lambda index: f"id{index}")
        return parse(engine, pieces)

    assert read([text]) == read(text)
    return read([text]).values


def _required(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


SPELLED = _required(
    on={"type": "boolean"}, none={"type": "null"}, off={"enum": [False]}, either={"type": ["boolean", "string"]}
)
SPELLED_VALUES = {"on": True, "none": None, "off": False, "either": True}
WRITERS = {
    "qwen3_coder": ("<tool_call>\n<function=f>\n{}</function>\n</tool_call>", "<parameter={}>\n{}\n</parameter>\n"),
    "seed_oss": ("<seed:tool_call>\n<function=f>\n{}</function>\n</seed:tool_call>", "<parameter={}>{}</parameter>\n"),
    "minicpm5": ('<function name="f">{}</function>', '<param name="{}">{}</param>'),
    "glm45": ("<tool_call>f\n{}</tool_call>", "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"),
    "minimax_m2": ('<minimax:tool_call>\n<invoke name="f">\n{}</invoke>\n</minimax:tool_call>',
        '<parameter name="{}">{}</parameter>\n'),
}  # fmt: skip


@pytest.mark.parametrize("form", WRITERS)
def test_booleans_and_null_are_written_as_templates_write_them(form: str) -> None:
    call, entry = WRITERS[form]
    for spell, known in ((json.dumps, True), (str, form not in ("glm45", "minimax_m2"))):
        text = call.format("".join(entry.format(key, spell(value)) for key, value in SPELLED_VALUES.items()))
        assert _accepted(form, SPELLED, text) == known
        assert _parsed(form, SPELLED, text) == [("f", SPELLED_VALUES)]
    for wrong in ("TRUE", "yes", "1"):
        assert not _accepted(form, _required(on={"type": "boolean"}), call.format(entry.format("on", wrong)))
    assert not _accepted(form, _required(off={"enum": [False]}), call.format(entry.format("off", "True")))


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"type": ["string", "null"]}, ["x", None]),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "boolean"}]}, ["x", 12, True, "12x", "truer"]),
        ({"type": ["number", "string"]}, [1.5, "1.5.1", -3]),
    ],
    ids=str,
)
def test_a_value_may_be_a_text_or_a_word(form: str, schema: dict[str, Any], values: list[Any]) -> None:
    call, entry = WRITERS[form]
    for value in values:
        text = call.format(entry.format("a", value if isinstance(value, str) else json.dumps(value)))
        assert _accepted(form, _required(a=schema), text)
        assert _parsed(form, _required(a=schema), text) == [("f", {"a": value})]


def test_an_empty_text_of_an_enum_may_be_written_in_a_nested_format() -> None:
    around = (
        ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="f">{}]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>'
    )
    schema = _required(a={"type": "string", "enum": ["", "x"]})
    for value, known in (("x", True), ("", True), ("y", False)):
        text = around.format(f"]<]minimax[>[<a>{value}]<]minimax[>[</a>")
        assert _accepted("minimax_m3", schema, text) == known


def test_an_escaped_backslash_before_a_letter_is_no_boundary() -> None:
    call, entry = WRITERS["qwen3_coder"]
    schema = _required(a={"type": "string", "pattern": r"^C:\\bin$"})
    assert _accepted("qwen3_coder", schema, call.format(entry.format("a", r"C:\bin")))
    assert not _accepted("qwen3_coder", schema, call.format(entry.format("a", "C:bin")))


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
HERMES = '<tool_call>\n{{"name": "f", "arguments": {}}}\n</tool_call>'
A_AND_B = {"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {"type": "integer"}}}]}


@pytest.mark.parametrize(
    ("schema", "good", "invented"),
    [
        (OPEN, {"a": 1}, {"a": 1, "b": 2}),
        ({**OPEN, "additionalProperties": {}}, {"a": 1, "b": 2}, {}),
        ({"type": "object"}, {"b": 2}, None),
        ({"type": "object", "properties": {}}, {}, {"b": 2}),
        ({"properties": {"o": {**OPEN, "enum": [{"a": 1, "b": 2}]}}}, {"o": {"a": 1, "b": 2}}, {"c": 1}),
        ({"type": "object", "properties": {"o": OPEN}}, {"o": {"a": 1}}, {"o": {"a": 1, "b": 2}}),
        (
            {"type": "object", "properties": {"l": {"type": "array", "items": OPEN}}},
            {"l": [{"a": 1}]},
            {"l": [{"a": 1, "b": 2}]},
        ),
        (
            {"type": "object", "properties": {"o": {"$ref": "#/$defs/o"}}, "$defs": {"o": OPEN}},
            {"o": {"a": 1}},
            {"o": {"a": 1, "b": 2}},
        ),
        (
            {"type": "object", "properties": {"o": A_AND_B}, "$defs": {"a": OPEN}},  # either, closed, forbids the other
            {"o": {"a": 1, "b": 2}},
            {"c": 1},
        ),
        ({"type": "object", "properties": {"a": {}}, "required": ["a", "b"]}, {"a": 1, "b": 2}, {"a": 1}),
        ({**OPEN, "properties": {**OPEN["properties"], "enum": OPEN}}, {"a": 1, "enum": {"a": 1}}, {"a": 1, "c": 1}),
    ],
    ids=str,
)
def test_a_call_that_is_held_to_its_schema_invents_no_keys(schema: dict[str, Any], good: Any, invented: Any) -> None:
    assert _accepted("hermes", schema, HERMES.format(json.dumps(good)))
    assert invented is None or not _accepted("hermes", schema, HERMES.format(json.dumps(invented)))
    assert _parsed("hermes", schema, HERMES.format('{"a": 1, "b": 2}')) == [("f", {"a": 1, "b": 2})]  # as ever


def test_values_that_are_json_invent_no_keys() -> None:
    schema = {"type": "object", "properties": {"l": {"type": "array", "items": OPEN}}}
    vocabulary = Vocabulary([], ["<tool_call>", "</tool_call>", "</arg_value>"])  # texts need not avoid such marks
    lark = tool_grammar(
        ROWS["glm45"], [Tool("f", schema)], mode="required", parallel=True, reasoning=None, in_reasoning=False,
        special=vocabulary.special,
    )  # fmt: skip
    assert lark is not None
    call, entry = WRITERS["glm45"]
    for value, known in (([{"a": 1}], True), ([{"a": 1, "b": 2}], False)):
        text = call.format(entry.format("l", json.dumps(value)))
        assert accepts(vocabulary.compiler(lark)(), vocabulary.encode(text))[1] == known


SORTED = _required(
    zone={"type": "integer"},
    Area={"type": "string"},
    at=_required(y={"type": "integer"}, X={"type": "integer"}),
    fixed={"const": {"b": 1, "a": 2}},
)
SORTED_VALUES = {"Area": "x", "at": {"X": 2, "y": 1}, "fixed": {"a": 2, "b": 1}, "zone": 3}


@pytest.mark.parametrize(("form", "text"), [
    ("gemma4", '<|tool_call>call:f{Area:<|"|>x<|"|>,at:{X:2,y:1},fixed:{a:2,b:1},zone:3}<tool_call|>'),
    ("functiongemma", "<start_function_call>call:f{Area:<escape>x<escape>,at:{X:2,y:1},fixed:{a:2,b:1},zone:3}"
        "<end_function_call>"),
])  # fmt: skip
def test_gemma_writes_entries_in_the_order_of_their_keys(form: str, text: str) -> None:
    """As `dictsort` of its template does, which knows no upper and lower case."""
    assert _accepted(form, SORTED, text)
    assert not _accepted(form, SORTED, text.replace("X:2,y:1", "y:1,X:2"))
    assert not _accepted(form, SORTED, text.replace("a:2,b:1", "b:1,a:2"))
    assert _parsed(form, SORTED, text) == [("f", SORTED_VALUES)]


def test_pythonic_calls_keep_the_order_of_the_schema() -> None:
    schema = _required(b={"type": "integer"}, a={"type": "integer"})
    assert _accepted("lfm2", schema, "<|tool_call_start|>[f(b=1, a=2)]<|tool_call_end|>")
    assert not _accepted("lfm2", schema, "<|tool_call_start|>[f(a=2, b=1)]<|tool_call_end|>")


OLD = '<|message_sep|>\n\nfunction call<|role_sep|>\n{"name": "get_weather", "arguments": {"city": "x"}}<|message_sep|>'
NEW = '<|function_call|>{"name": "get_weather", "arguments": {"city": "x"}}<|message_sep|>'


@pytest.mark.parametrize(("special", "taken", "other"), [
    (["<|role_sep|>", "<|message_sep|>"], OLD, NEW),
    (["<|role_sep|>", "<|message_sep|>", "<|function_call|>"], NEW, OLD),
])  # fmt: skip
def test_required_calls_begin_with_a_mark_that_the_vocabulary_has(special: list[str], taken: str, other: str) -> None:
    vocab = Vocabulary([], special)
    form = ROWS["gigachat3"]
    lark = tool_grammar(
        form, [TOOL], mode="required", parallel=True, reasoning=None, in_reasoning=False, special=vocab.special
    )
    assert lark is not None
    begin = vocab.compiler(lark)
    assert accepts(begin(), vocab.encode(taken))[1]
    assert not accepts(begin(), vocab.encode(other))[1]
    bound: BoundLayout = bind(Layout(None, form), vocab.special)
    text = vocab.text(vocab.encode(taken), bound.characters)
    parsed = parse(OutputParser(bound.layout, tools={"get_weather": CITY}), [text])
    assert (parsed.values, parsed.content) == ([("get_weather", {"city": "x"})], "")
