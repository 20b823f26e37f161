# SPDX-License-Identifier: MIT
"""A budget of thoughts: what is counted, what is forced, and what undoes it."""

from __future__ import annotations

from typing import Any

import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.state import SamplingState
from candle_vllm.core.sampling.thoughts import ThoughtBudget, ThoughtCount, ThoughtLimit

THINK = {"<think>": "</think>"}
WORDS = {"Hm, ": "So: "}  # marks of several tokens
TEXT = {"<t>": "</t>", "\n<u>": "</u>"}


def count(vocabulary: Any, **budget: Any) -> ThoughtCount:
    names = {name: vocabulary.first_special + i for i, name in enumerate(vocabulary.special)}
    return ThoughtCount(
        ThoughtLimit(
            ThoughtBudget(**budget),
            lambda text, special: vocabulary.encode(text, parse_special=special),
            vocabulary.token_bytes,
            names,
        )
    )


def say(vocabulary: Any, thoughts: ThoughtCount, text: str) -> str:
    """Says a text token by token, and what is forced in its place; the text that came of it."""
    said: list[int] = []
    for token in vocabulary.encode(text):
        while (forced := thoughts.next_token) is not None:
            said.append(forced)
            thoughts.add(forced)
        said.append(token)
        thoughts.add(token)
    return vocabulary.text(said)


@pytest.mark.parametrize(
    ("budget", "text", "came"),
    [
        ({"tokens": 3, "marks": THINK}, "<think>abcdef", "<think>abc</think>def"),
        ({"tokens": 3, "marks": THINK}, "<think>abc</think>def", "<think>abc</think></think>def"),
        ({"tokens": 4, "marks": THINK}, "<think>abc</think>def", "<think>abc</think>def"),
        ({"tokens": 3, "marks": THINK}, "no thoughts at all", "no thoughts at all"),
        ({"tokens": 3, "marks": THINK, "opened": "<think>"}, "abcdef", "abc</think>def"),
        ({"tokens": 0, "marks": THINK, "opened": "<think>"}, "abc", "</think>abc"),
        ({"tokens": 0, "marks": THINK, "message": "Enough."}, "<think>abc", "<think></think>abc"),
        ({"tokens": 2, "marks": THINK, "message": "Enough."}, "<think>abc", "<think>abEnough.</think>c"),
        # All thoughts of a text share a budget.
        (
            {"tokens": 3, "marks": THINK},
            "<think>ab</think>xyz<think>cde",
            "<think>ab</think>xyz<think>c</think>de",
        ),
        # What else ends thoughts.
        ({"tokens": 3, "marks": THINK, "ends": ["<|call|>"]}, "<think>ab<|call|>xyz", "<think>ab<|call|>xyz"),
        # Marks of plain text, which stand in the middle of tokens or take many; a begun one is not begun again.
        ({"tokens": 5, "marks": WORDS}, "Hm, ab world", "Hm, ab world"),
        ({"tokens": 2, "marks": WORDS}, "Hm, abcd", "Hm, abSo: cd"),
        ({"tokens": 4, "marks": WORDS}, "Hm, abSocial", "Hm, abSo: cial"),
        ({"tokens": 7, "marks": WORDS}, "Hm, abSo: then on", "Hm, abSo: then on"),
        ({"tokens": 2, "marks": WORDS | THINK}, "<think>abc", "<think>ab</think>c"),
        # Text that mentions a mark: an opening one behind other text, a closing one in quotes.
        ({"tokens": 0, "marks": TEXT}, 're.sub(r"<t>.*', 're.sub(r"<t>.*'),
        ({"tokens": 0, "marks": TEXT}, "Use\n<t>ab and\n<u>ab.", "Use\n<t>ab and\n<u>ab."),
        ({"tokens": 4, "marks": TEXT}, "<t>a</t>x" + 9 * " " + "<t>bcdef", "<t>a</t>x" + 9 * " " + "<t>bcdef"),
        ({"tokens": 0, "marks": TEXT | THINK}, "Use <t>ab<think>c", "Use <t>ab<think></think>c"),
        ({"tokens": 2, "marks": TEXT}, 9 * " " + "<t>abc", 9 * " " + "<t>ab</t>c"),
        ({"tokens": 2, "marks": TEXT}, "\n<u>abc", "\n<u>ab</u>c"),
        ({"tokens": 4, "marks": TEXT, "opened": "<t>"}, "a</t>\n\n<t>bcde", "a</t>\n\n<t>bcd</t>e"),
        ({"tokens": 10, "marks": TEXT}, "<t>a `</t>` bbbb", "<t>a `</t>` bb</t>bb"),
        ({"tokens": 7, "marks": TEXT}, '<t>abc"</t>def', '<t>abc"</t>def'),
        ({"tokens": 7, "marks": TEXT}, '<t>abc"</t>"de', '<t>abc"</t>"</t>de'),
    ],
)
def test_thoughts_end_where_the_budget_is_spent(vocabulary: Any, budget: dict[str, Any], text: str, came: str) -> None:
    assert say(vocabulary, count(vocabulary, **budget), text) == came


def test_the_text_of_a_special_token_is_no_mark(vocabulary: Any) -> None:
    thoughts = count(vocabulary, tokens=2, marks=THINK)
    for token in vocabulary.encode("<think>abc", parse_special=False):
        thoughts.add(token)
        assert thoughts.next_token is None
    assert not thoughts.inside


def test_a_mark_takes_no_part_in_the_count(vocabulary: Any) -> None:
    for marks, text, spent in ((WORDS, "Hm, abcSo: ", 3), (TEXT, "<t>a</t>", 1), (TEXT, '<t>ab"</t>c', 3)):
        thoughts = count(vocabulary, tokens=9, marks=marks)
        say(vocabulary, thoughts, text)
        assert (thoughts.spent, thoughts.inside) == (spent, False)


def test_tokens_that_are_taken_back_were_not_thought(vocabulary: Any) -> None:
    params = SamplingParams(thoughts=ThoughtBudget(tokens=3, marks=THINK))
    state = SamplingState(
        params, [1], vocab_size=300, eos_token_ids=[], thoughts=count(vocabulary, tokens=3, marks=THINK)
    )
    for token in vocabulary.encode("<think>abc"):
        state.append(token)
    end = vocabulary.encode("</think>")[0]
    assert state.forced == end
    assert state.mask_bits() is not None
    state.rollback(2)
    assert state.forced is None
    assert state.mask_bits() is None
    assert not state.masks_tokens
    for token in vocabulary.encode("xy"):
        state.append(token)
    assert state.forced == end


def test_what_the_request_does_not_allow_is_not_forced(vocabulary: Any) -> None:
    def state(*allowed: int) -> SamplingState:
        thoughts = count(vocabulary, tokens=0, marks=THINK, opened="<think>")
        return SamplingState(
            SamplingParams(allowed_token_ids=allowed), [1], vocab_size=300, eos_token_ids=[], thoughts=thoughts
        )

    end = vocabulary.encode("</think>")[0]
    assert state(1, 2).forced is None
    assert state(1, 2, end).forced == end


def test_a_form_that_goes_on_in_another_way_is_not_held_up(vocabulary: Any) -> None:
    thoughts = count(vocabulary, tokens=1, marks={"<think>": "</think>ab"}, opened="<think>")
    for token in vocabulary.encode("x</think>"):
        thoughts.add(token)
    assert thoughts.next_token == ord("a")
    thoughts.add(ord("z"))
    assert thoughts.next_token is None
    assert not thoughts.inside


@pytest.mark.parametrize(
    "budget",
    [
        {"tokens": -1, "marks": THINK},
        {"tokens": True, "marks": THINK},
        {"tokens": 1, "marks": {}},
        {"tokens": 1, "marks": {"": "</think>"}},
        {"tokens": 1, "marks": THINK, "opened": "<thought>"},
        {"tokens": 1, "marks": THINK, "ends": "</think>"},
        {"tokens": 1, "marks": THINK, "message": "x" * 5000},
    ],
)
def test_what_is_no_budget_is_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError, match="thoughts: "):
        ThoughtBudget(**budget)
