# SPDX-License-Identifier: MIT
"""Thoughts that the prompt opens: every pair of marks that a format has closes them, in answers and before a form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest

from candle_vllm.core.text.tokenizer import ChatConventions
from candle_vllm.openai import parse_chat_request
from candle_vllm.openai.answers import AnswerPlan
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.planning import AnswerPlanner, Planned
from candle_vllm.openai.requests import read_chat
from packages.openai.tests.formats.messages import Parsed, parse
from packages.openai.tests.formats.test_review_grammars import ANSWER, TOOLS, Model

FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
PAIRS = [
    pytest.param(row.name, opening, closing, id=f"{row.name}-{opening}")
    for row in REASONING_FORMATS
    for opening, closing in ((row.open, row.close), *row.others)
]
SPECIAL = re.compile(r"<[|/]?[\w:|]+>|\[/?[A-Z_]+\]")
HEADS = {  # before the text of an answer, and before the part that it is
    "openai": ("<|channel|>final<|message|>", "<|end|><|start|>assistant"),
    "muse": (" to=user<|message|>", "<|eom|><|start|>assistant"),
    "inkling": ("<|content_text|>", "<|end_message|><|message_model|>"),
}
every_pair = pytest.mark.parametrize(("reasoning", "opening", "closing"), PAIRS)
bound_or_not = pytest.mark.parametrize("bound", [False, True], ids=["text", "special"])


def planned(reasoning: str, prompt: str, special: Iterable[str] = (), **fields: Any) -> Planned:
    conventions = ChatConventions(special_tokens={name: index for index, name in enumerate(special)})
    planner = AnswerPlanner(conventions, "none", tool_parser="none", reasoning_parser=reasoning)
    request = parse_chat_request({"messages": [{"role": "user", "content": "Hi"}], **fields})
    return planner.plan(read_chat(request), prompt)


def read(plan: AnswerPlan, text: str) -> Parsed:
    """What an answer says, whole and by characters."""
    bound = plan.bound
    assert bound is not None
    for index, character in sorted(bound.characters.items(), key=lambda one: -len(bound.names[one[0]])):
        text = text.replace(bound.names[index], character)
    whole = parse(OutputParser(bound.layout, in_reasoning=plan.in_reasoning), [text])
    assert parse(OutputParser(bound.layout, in_reasoning=plan.in_reasoning), text) == whole
    return whole


@bound_or_not
@every_pair
def test_the_mark_beside_it_closes_them(reasoning: str, opening: str, closing: str, bound: bool) -> None:
    answers = planned(reasoning, f"Hi.\n{opening}\n", SPECIAL.findall(opening + closing) if bound else ()).answers
    assert read(answers, f"plan{closing}answer") == Parsed("answer", "plan", ())


@pytest.mark.parametrize("offered", [False, True], ids=["alone", "tools"])
@every_pair
def test_a_form_begins_behind_the_mark_beside_it(reasoning: str, opening: str, closing: str, offered: bool) -> None:
    prompt = f"Hi.\n{opening}\n"
    if not offered:
        structured = planned(reasoning, prompt, response_format=FORM).structured
        assert structured is not None
        if structured.around is None:  # core knows how such thoughts end
            assert (structured.reasoning_start, structured.reasoning_end) == (None, closing)
            return
    model = Model(reasoning if reasoning in HEADS else "hermes", reasoning, bound=False, prompt=prompt,
                  tools=TOOLS if offered else [])  # fmt: skip
    head, closed = HEADS.get(reasoning, ("", closing))
    assert model.takes(f"plan{closed}{head}{ANSWER}")
    assert not model.takes(f"{head}{ANSWER}")


def test_of_two_marks_that_are_open_the_last_counts() -> None:
    row = next(row for row in REASONING_FORMATS if row.name == "think")
    assert row.open_mark("<thought>a<think>b", continued=True) == "<think>"
    assert row.open_mark("<think>a</think>b<thought>c", continued=True) == "<thought>"
    harmony = next(row for row in REASONING_FORMATS if row.name == "openai")
    assert harmony.open_mark("<|channel|>analysis<|message|>Hm", continued=True) == harmony.open
    assert harmony.open_mark("<|channel|>analysis<|message|>Hm<|end|><|start|>assistant", continued=True) == ""
