# SPDX-License-Identifier: MIT
"""The input of calls: what is passed on can be read at every moment, and is the arguments where they are right."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jiter import from_json

from candle_vllm.openai.anthropic.tool_input import INVALID, ToolInput

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abé\"\\", max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
OBJECTS = st.dictionaries(st.text('ab"\\ é{', max_size=5), VALUES, max_size=5)


def passed(pieces: list[str], *, cut: bool = False) -> str:
    """What is passed on; every beginning of it is read as the official client reads it."""
    call, text = ToolInput(), ""
    for piece in [*pieces, None]:
        text += call.finish(cut=cut) if piece is None else call.feed(piece)
        if text:
            assert isinstance(from_json(text.encode(), partial_mode=True), dict)
    return text


def cut_up(text: str, data: st.DataObject) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]), st.data())
def test_right_arguments_arrive(value: dict[str, Any], plain: bool, indent: int | None, data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=plain, indent=indent)
    assert json.loads(passed(cut_up(text, data))) == value
    assert json.loads(passed(list(text))) == value


@settings(max_examples=300)
@given(OBJECTS, st.lists(st.tuples(st.integers(0, 80), st.sampled_from('{}[]":, \\nx1-.eud8\n\x01\ud800'))), st.data())
def test_broken_arguments_are_marked(value: dict[str, Any], edits: list[tuple[int, str]], data: st.DataObject) -> None:
    characters = list(json.dumps(value))
    for place, character in edits:
        characters[place % len(characters)] = character
    text = "".join(characters)
    for cut in (False, True):
        found = passed(cut_up(text, data), cut=cut)
        assert found == passed([text], cut=cut)
        if not cut and found:
            whole = json.loads(found)
            assert INVALID not in whole or whole[INVALID] == text.encode(errors="replace").decode()


@pytest.mark.parametrize(
    "text",
    ["[1]", '"x"', "12", '{"a": 1 2}', "{a: 1}", '{"a": NaN}', '{"a": 1e999}', '{"a":', '{"a": "x', '{"a" 1}', "{1: 2}",
     '{"a": 18446744073709551616}', '{"a": ["\\ud800"]}', '{"a": ' + "[" * 70 + "]" * 70 + "}"],
)  # fmt: skip
def test_no_object(text: str) -> None:
    assert json.loads(passed(list(text)))[INVALID] == text


def test_nothing_and_cut_texts() -> None:
    assert passed(["", " "]) == ""
    assert passed(['{"a": "long te'], cut=True) == '{"a": "long te'
    assert passed(['{"a": "x", "b": [1, 2'], cut=True) == '{"a": "x"'


@pytest.mark.parametrize(
    ("text", "meant"),
    [('{"a": "\\ud83d\\ude42"}', "\U0001f642"), ('{"a": "x\\ud83d"}', "x\ufffd"), ('{"a": "\\x\n"}', "\\x\n"),
     ('{"a": "\\ude42\\u00e9"}', "\ufffdé")],
)  # fmt: skip
def test_escapes(text: str, meant: str) -> None:
    assert json.loads(passed(list(text))) == {"a": meant}
    assert json.loads(passed([text])) == {"a": meant}


def test_time_grows_with_the_text() -> None:
    edits = [{"old": "x" * 200, "new": 'y"[{' * 50} for _ in range(300)]
    text = json.dumps({"edits": edits, "note": "z" * 50_000})
    call, parts, start = ToolInput(), [], time.process_time()
    for place in range(0, len(text), 4):
        parts.append(call.feed(text[place : place + 4]))
    assert json.loads("".join(parts)) == json.loads(text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("before", "again", "after", "size"),
    [
        ('{"a": ["', "x", '"]}', 4),  # a text inside a value, over many pieces
        ('{"', "x", '": 1}', 4),
        ('{"a"', " ", ": 1}", 4),
        ('{"a": "', "\\n", '"}', 1 << 20),  # one piece with many escapes
    ],
    ids=["an inner text", "a name", "white space", "escapes"],
)
def test_no_part_is_read_again_with_every_piece(before: str, again: str, after: str, size: int) -> None:
    text = before + again * 100_000 + after
    call, parts, start = ToolInput(), [], time.process_time()
    for place in range(0, len(text), size):
        parts.append(call.feed(text[place : place + size]))
    parts.append(call.finish(cut=False))
    assert json.loads("".join(parts)) == json.loads(text)
    assert time.process_time() - start < 2
