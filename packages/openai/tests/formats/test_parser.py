# SPDX-License-Identifier: MIT
"""The parser of every format: however a text is cut, one message comes of it; one that was cut off invents nothing."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.openai.formats.layout import Body, Layout, ToolFormat, bind
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS
from packages.openai.tests.formats.messages import Parsed, parse, parser
from packages.openai.tests.formats.samples import SAMPLES, SHORT, SMALL, TOOLS, Sample, chunked, cut, read

PAIRS = 20  # of cuts, for each sample
ENDS = 12  # at which a sample is cut off and read by characters
CHUNKINGS = 40  # of each short text; 100,000 on demand
MANY = 100_000
FORMATS = [row.name for row in TOOL_FORMATS]
by_text = pytest.mark.parametrize(
    "sample", [pytest.param(one, id=f"{place}-{one.tools}") for place, one in enumerate(SAMPLES)]
)


@by_text
def test_a_sample_says_what_it_says(sample: Sample) -> None:
    parsed = read(sample, [sample.text])
    assert (parsed.content, parsed.thoughts, parsed.values) == (sample.content, sample.thoughts, sample.calls)
    assert all(closed for _, _, _, closed in parsed.calls)
    if sample.ids:
        assert tuple(call[0] for call in parsed.calls) == sample.ids


@pytest.mark.parametrize("name", ["3d_render", "-x", "9"])
@by_text
def test_an_offered_tool_may_have_any_name_that_openai_allows(sample: Sample, name: str) -> None:
    def renamed(known: str) -> str:
        return known.replace("get_weather", name)

    tools = {renamed(known): schema for known, schema in TOOLS.items()}
    read_by = parser(sample.tools, tools, sample.reasoning, in_reasoning=sample.prefilled)
    parsed = parse(read_by, [renamed(sample.text)])
    assert parsed.values == [(renamed(known), arguments) for known, arguments in sample.calls]
    assert parsed.content == renamed(sample.content)


@pytest.mark.parametrize("form", ["pythonic", "lfm2", "olmo3", "hermes", "qwen3_coder", "glm45", "kimi_k3", "gemma4"])
@pytest.mark.parametrize("key", ["max-results", "a.b", "$top", "@type", "1st", "class"])
def test_an_argument_may_have_any_name(form: str, key: str) -> None:
    tools = {name: json.loads(json.dumps(schema).replace("city", key)) for name, schema in TOOLS.items()}
    for sample in (one for one in SAMPLES if one.tools == form and one.calls):
        text = sample.text.replace("city", key)
        parsed = parse(parser(form, tools, sample.reasoning, in_reasoning=sample.prefilled), [text])
        calls = [(name, json.loads(json.dumps(given).replace("city", key))) for name, given in sample.calls]
        assert parsed.values == calls, text
    if form == "lfm2":
        text = f"<|tool_call_start|>[f2(on=true, {key}='x'), get_weather(tags=['a'], {key}='it's, on', days=2)]"
        values = [("f2", {"on": True, key: "x"}), ("get_weather", {"tags": ["a"], key: "it's, on", "days": 2})]
        assert parse(parser(form, tools), text).values == values


@pytest.mark.one_of_each(23)
@by_text
def test_no_cut_changes_a_sample(sample: Sample) -> None:
    text = sample.text
    whole = read(sample, [text])
    assert read(sample, text) == whole
    for place in range(len(text) + 1):
        assert read(sample, [text[:place], text[place:]]) == whole, place
    rng = random.Random(len(text))
    for _ in range(PAIRS):
        places = [rng.randrange(len(text) + 1) for _ in range(2)]
        assert read(sample, cut(text, places)) == whole, places


@pytest.mark.every_cut
@by_text
def test_no_pair_of_cuts_changes_a_sample(sample: Sample) -> None:
    text = sample.text
    whole = read(sample, [text])
    for places in itertools.combinations(range(1, len(text)), 2):
        assert read(sample, cut(text, places)) == whole, places


@pytest.mark.one_of_each(31)
@by_text
def test_a_sample_that_is_cut_off_invents_nothing(sample: Sample) -> None:
    whole = read(sample, [sample.text])
    for end in range(len(sample.text)):
        part = read(sample, [sample.text[:end]], whole=False)
        assert len(part.calls) <= len(whole.calls), end
        assert not part.calls or whole.content.startswith(part.content), (end, part.content)
        for (_, name, arguments, _), (_, full_name, full_arguments, _) in zip(part.calls, whole.calls):
            assert name == full_name, end
            assert full_arguments.startswith(arguments), (end, arguments)
        for _, _, arguments, closed in part.calls:
            assert not closed or isinstance(json.loads(arguments), dict), end
    for end in random.Random(len(sample.text)).sample(range(len(sample.text)), min(len(sample.text), ENDS)):
        same_however_it_comes(sample, sample.text[:end])


@pytest.mark.every_cut
@by_text
def test_no_cut_changes_a_sample_that_is_cut_off(sample: Sample) -> None:
    for end in range(len(sample.text)):
        same_however_it_comes(sample, sample.text[:end])


def same_however_it_comes(sample: Sample, text: str) -> None:
    for whole in (False, True):
        assert read(sample, text, whole) == read(sample, [text], whole), (len(text), whole)


def test_every_format_has_a_sample() -> None:
    assert {sample.tools for sample in SAMPLES if sample.calls} == set(FORMATS)
    assert sorted(sample.tools for sample in SHORT) == sorted(FORMATS)
    assert {sample.reasoning for sample in SAMPLES} == {row.name for row in REASONING_FORMATS}


@pytest.mark.parametrize("sample", [pytest.param(one, id=one.tools) for one in SHORT])
def test_no_random_chunking_changes_a_message(sample: Sample) -> None:
    assert chunked(sample, CHUNKINGS) == ""


@pytest.mark.every_cut
@pytest.mark.timeout(1200)  # two minutes where two cores have nothing else to do
def test_no_random_chunking_of_very_many_changes_a_message() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert [*filter(None, pool.starmap(chunked, [(one, MANY) for one in SHORT], chunksize=1))] == []


def marks(form: ToolFormat) -> list[str]:
    """The marks of a format, and those that stand in its calls."""
    return [*form.opens, *form.names, *form.strays, *itertools.chain(*map(_texts, form.bodies))]


def _texts(body: Body) -> Iterator[str]:
    for value in vars(body).values():
        for text in value if isinstance(value, tuple) else [value]:
            if isinstance(text, str) and text:
                yield text


# Marks that are words like others, or none at all: only tools that are offered are called.
OFFERED = ("json", "llama3_json", "pythonic", "functionary_v32", "minicpm5", "phi4_mini_json", "command_r_plus")
NOISE = ["a", "f2", "now", "city", " ", "\n", '"', "'", "`", "```", "{", "}", "[", "]", ":", ",", "=", "(", ")", "1"]
NOISE += ["\\", "\\u12", "<", "</", "é", "<think>", "</think>", '{"name": "f2", "arguments": {', '"city": "x"', "true"]


@pytest.mark.one_of_each(10)
@pytest.mark.parametrize("form", TOOL_FORMATS, ids=FORMATS)
def test_any_text_is_read_in_one_way(form: ToolFormat) -> None:
    """Whether marks are special tokens or not, the model done or cut off; and of less text comes a part of it."""
    reasoning = next((row for row in REASONING_FORMATS if row.name == form.name), REASONING_FORMATS[0])
    plain = Layout(reasoning, form)
    special = [mark for mark in (*form.opens, *form.strays, *reasoning.pairs) if mark.startswith(("<|", "<｜"))]
    bound = bind(plain, {mark: index for index, mark in enumerate(special)})
    characters = {special[index]: character for index, character in bound.characters.items()}
    pieces = st.lists(st.sampled_from([*marks(form), reasoning.open, reasoning.close, *NOISE]), max_size=25)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(pieces, st.booleans(), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
    def check(parts: list[str], whole: bool, prefilled: bool, as_tokens: bool, rng: random.Random) -> None:
        if as_tokens:
            parts = [characters.get(part, part) for part in parts]
        layout = bound.layout if as_tokens else plain
        text = "".join(parts)

        def said(pieces: Iterable[str], whole: bool = whole) -> Parsed:
            return parse(OutputParser(layout, tools=TOOLS, in_reasoning=prefilled, make_id=str), pieces, whole)

        expected = said([text])
        assert said(parts) == expected
        assert said(text) == expected
        assert said(cut(text, [rng.randrange(len(text) + 1) for _ in range(3)])) == expected
        assert all(arguments for _, _, arguments, closed in expected.calls if closed)
        full, less = said([text], False), said([text[: rng.randrange(len(text) + 1)]], False)
        assert len(less.calls) <= len(full.calls)
        for part, call in zip(less.calls, full.calls):
            assert (part[1], part[2]) == (call[1], call[2][: len(part[2])])

    check()


@pytest.mark.parametrize("form", TOOL_FORMATS, ids=FORMATS)
def test_no_text_is_lost_outside_of_marks(form: ToolFormat) -> None:
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.text("ab \n*-.é(){}\"':,1", max_size=40))
    def check(text: str) -> None:
        words = f"Well {text} so"  # a message that no call without a mark begins
        before = "all\n" if form.name == "functionary_v32" else ""
        assert parse(parser(form.name, TOOLS), before + words).content == words
        assert parse(parser(None, None, None), words).content == words

    check()


@pytest.mark.parametrize("form", [row for row in TOOL_FORMATS if row.flow is None], ids=lambda row: row.name)
def test_marks_in_code_and_quotes_are_text(form: ToolFormat) -> None:
    call = next(one for one in SHORT if one.tools == form.name).text.removeprefix("Ok")
    text = f"Write `{(*form.opens, *form.names)[0]}` so:\n~~~\n{call}\n~~~\nand not else."
    assert parse(parser(form.name, TOOLS), text) == Parsed(text, "", ())


@pytest.mark.parametrize("form", [row for row in TOOL_FORMATS if row.flow is None], ids=lambda row: row.name)
def test_calls_in_thoughts_are_thoughts(form: ToolFormat) -> None:
    call = next(one for one in SHORT if one.tools == form.name).text.removeprefix("Ok")
    thoughts = f"Should I?\n{call}\nNo."
    text = f"<think>{thoughts}</think>No."
    if form.ends_thoughts:
        parsed = parse(parser(form.name, TOOLS), text)
        assert (parsed.thoughts, parsed.values, parsed.content) == ("Should I?", [("f2", {"city": "x"})], "No.\nNo.")
    engine = parser(form.name, {"other": {}} if form.ends_thoughts else TOOLS)
    assert parse(engine, text) == Parsed("No.", thoughts, ())


@pytest.mark.parametrize("sample", [pytest.param(one, id=one.tools) for one in SHORT])
def test_a_tool_that_is_not_offered(sample: Sample) -> None:
    """It is called where a mark says that it is; a text that only looks like a call is text."""
    engine = parser(sample.tools, {"other": {"type": "object", "properties": {}}}, sample.reasoning)
    parsed = parse(engine, sample.text)
    form = next(row for row in TOOL_FORMATS if row.name == sample.tools)
    if sample.tools in OFFERED:
        assert parsed.calls == ()
        assert "f2" in parsed.content
    else:
        assert form.opens or form.names or form.flow
        assert [call[1] for call in parsed.calls] == ["f2"]


@pytest.mark.parametrize("sample", [pytest.param(one, id=one.tools) for one in SHORT])
def test_without_tools_calls_are_text(sample: Sample) -> None:
    """The headers of a message that comes in parts are no text."""
    text = {
        "openai": f"Ok\n{SMALL}",
        "muse": "Ok\n" + sample.text[sample.text.find("<atem") :].removesuffix("<|eot|>"),
        "inkling": f'Ok\n{{"name": "f2", "args": {SMALL}}}',
        "functionary_v32": f"Ok>>>f2\n{SMALL}",
    }
    parsed = parse(parser(sample.tools, None, None), sample.text)
    assert parsed == Parsed(text.get(sample.tools, sample.text), "", ())


def test_more_calls_than_are_wanted_are_left_out() -> None:
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    engine = parser("hermes", TOOLS, most_calls=1)
    assert parse(engine, f"a{call}\n{call}{call}b") == Parsed("a\nb", "", (("id0", "now", "{}", True),))
    assert engine.num_calls == 3


@pytest.mark.parametrize("size", [1 << 10, 1 << 17])
def test_long_texts_take_linear_time(size: int) -> None:
    """A text that was read again from its beginning for each piece would not be done with in the time of a test."""
    words = "word <tool " * (size // 11)
    code = json.dumps({"code": "x<" * (size // 2)})
    text = f'<think>{words}</think>{words}<tool_call>{{"name": "python", "arguments": {code}}}</tool_call>'
    engine = parser("hermes", TOOLS)
    parsed = parse(engine, cut(text, range(3, len(text), 3)))
    assert len(parsed.content) + len(parsed.thoughts) == 2 * len(words.strip())
    assert parsed.values == [("python", json.loads(code))]


@pytest.mark.parametrize("reasoning", [row.name for row in REASONING_FORMATS])
def test_any_two_formats_go_together(reasoning: str) -> None:
    """People may ask for any two, so no mark of one may begin as one of the other does."""
    for sample in SHORT:
        form = next(row for row in TOOL_FORMATS if row.name == sample.tools)
        parsed = parse(parser(sample.tools, TOOLS, reasoning), [sample.text])
        if reasoning not in ("openai", "muse", "inkling") or form.flow is not None:
            assert (parsed.content, parsed.values) == (sample.content, sample.calls), sample.tools
