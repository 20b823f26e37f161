# SPDX-License-Identifier: MIT
"""Stop strings are looked for in answers: what is read as thoughts, as calls, or as marks has none, in any format."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from typing import Any

import pytest
from msgspec.structs import replace

from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.text.detokenizer import StopScanner
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.formats.layout import THOUGHTS
from candle_vllm.openai.planning import stop_marks
from packages.openai.tests.formats.messages import REASONING, parse, parser
from packages.openai.tests.formats.messages import TOOLS as FORMATS
from packages.openai.tests.formats.samples import SAMPLES, TOOLS, Sample, cut
from tests.common_run import few

# Where the marks alone do not tell: a mark in quotes in thoughts, a call in another way to write it, closing marks in
# the text of an argument.
UNTOLD = ("`</think>`", "```json\n{\"name\": \"get_weather\", \"arguments\"", '"code": "</tool_call>',
          "<![CDATA[</param></function>")  # fmt: skip
# Texts in which the mark of a call begins none: behind it no stop string is looked for.
NO_CALLS = ("`<tool_call>`", '{"a": 1}', "to=f2<|message|>What?", '```json\n{"name": "Ann"}')


def samples(but: tuple[str, ...]) -> list[Any]:
    marks = ("<tool_call>", "<|python_tag|>", '```json\n{"name": "now"}\n```\nso.')
    found = [(place, one) for place, one in enumerate(SAMPLES) if not any(text in one.text for text in but)]
    return [pytest.param(one, id=f"{place}-{one.tools}") for place, one in found if one.text not in marks]


def scanned(sample: Sample, stop: str, pieces: Iterable[str]) -> tuple[str, str | None]:
    """The text up to the stop string, and that where it was found."""
    reasoning = REASONING[sample.reasoning]
    marks = stop_marks(reasoning, FORMATS[sample.tools], list(TOOLS), ())
    first = reasoning.open if sample.prefilled else ""
    scanner = StopScanner([stop], marks=replace(marks, first=first if first in ("", *marks.states) else THOUGHTS))
    return "".join(map(scanner.feed, pieces)) + scanner.flush(), scanner.found


def parts_of(text: str, size: int) -> list[str]:
    """The texts of some size in another; those with white space at an end may stand before a call."""
    found = {text[at : at + size] for at in range(len(text) - size + 1)}
    return sorted(one for one in found if one == one.strip())


@pytest.mark.one_of_each(73)
@pytest.mark.parametrize("size", few([1, 2, 3, 7], 1))
@pytest.mark.parametrize("sample", samples(UNTOLD))
def test_stops_beside_the_answer_are_not_found(sample: Sample, size: int) -> None:
    for stop in parts_of(sample.text, size):
        if stop not in sample.content:
            assert scanned(sample, stop, [sample.text]) == (sample.text, None), stop


@pytest.mark.parametrize("size", few([1, 2, 3, 7], 2))
@pytest.mark.parametrize("sample", samples(UNTOLD + NO_CALLS))
def test_stops_in_the_answer_are_found_however_it_is_cut(sample: Sample, size: int) -> None:
    rng = random.Random(sample.text)
    for stop in parts_of(sample.content, size):
        if stop not in sample.text:
            continue  # it reaches over a call
        shown, found = scanned(sample, stop, [sample.text])
        assert found == stop
        places = [rng.randrange(len(sample.text) + 1) for _ in range(3)]
        for pieces in (sample.text, cut(sample.text, places)):
            assert scanned(sample, stop, pieces) == (shown, found)
        parsed = parse(
            parser(sample.tools, TOOLS, sample.reasoning, in_reasoning=sample.prefilled), [shown], whole=False
        )
        before = sample.content[: sample.content.index(stop)]
        assert parsed.content.strip() == before.strip(), stop


def test_a_mention_of_thoughts_does_not_hide_stop_strings() -> None:
    scanner = StopScanner(["END"], marks=stop_marks(REASONING["think"], FORMATS["hermes"], list(TOOLS), ()))
    text = "<think>END</think>\n<thought>END</thought>Wrap it in `<think>` tags. "
    assert ("".join(map(scanner.feed, text + "END and more")) + scanner.flush(), scanner.found) == (text, "END")


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_begin_thoughts_anywhere(special: bool) -> None:
    made = ScriptedEngine("Yes.", special_tokens=("<think>", "</think>") if special else ())
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Why?"}], "stop": ["END"]}
    asyncio.run(OpenAIAdapter(made, reasoning_parser="qwen3").chat(body))
    marks = made.requests[-1].params.stop_marks
    assert marks is not None
    assert ("<think>" in marks.states[""], "<think>" in marks.fresh) == (special, not special)
    assert "<thought>" in marks.fresh
