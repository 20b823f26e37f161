# SPDX-License-Identifier: MIT
"""Only strict JSON gets in, and every fault is a RequestError that says where."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.openai import json_body
from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import MAX_CONTAINERS, MAX_DEPTH, MAX_ELEMENTS, decode_json, to_json_bytes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=100)
@given(JSON)
def test_every_json_value_gets_through(value: object) -> None:
    assert decode_json(json.dumps(value).encode()) == value
    assert decode_json(json.dumps(value, ensure_ascii=False).encode()) == value


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from('a\\"\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029é\u2027\U00010085')))
def test_an_answer_is_one_line_for_every_reader(text: str) -> None:
    data = to_json_bytes(msgspec.defstruct("Answer", [(name, str) for name in "ab"])(text, "b"))
    assert data.decode().splitlines() == [data.decode()]
    assert json.loads(data) == {"a": text, "b": "b"}


@settings(deadline=None, max_examples=200)
@given(st.binary() | st.text(alphabet='{}[]",:\\u0d8c1e-tn ').map(str.encode))
def test_any_bytes_give_a_value_or_a_request_error(body: bytes) -> None:
    with contextlib.suppress(InvalidBodyError):
        decode_json(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"a": 1,}', "line 1, column [89]"),  # Python 3.13 names the comma
        (b'{\n"a" 1}', "line 2, column 5"),
        (b"", "line 1, column 1"),
        (b'{"a": "\xff"}', "byte 7"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' appears twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uDC00": 1}', "surrogate"),
        (b"9" * 5000, "digits"),
        (b'{"a": "\n"}', "control character"),
        (b"[1] 2", "Extra data"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_faults_are_named(body: bytes, message: str) -> None:
    with pytest.raises(InvalidBodyError, match=message):
        decode_json(body)


def test_surrogate_pairs_are_characters() -> None:
    assert decode_json(b'"\\ud83d\\ude00"') == "😀"


def test_depth_is_capped_exactly() -> None:
    assert decode_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    with pytest.raises(InvalidBodyError, match=f"at most {MAX_DEPTH}"):
        decode_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_the_number_of_values_is_capped_and_text_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = [1] * MAX_ELEMENTS
    assert len(decode_json(json.dumps(ones))) == MAX_ELEMENTS  # a bracket and a comma less than values
    with pytest.raises(InvalidBodyError, match=f"more than {MAX_ELEMENTS} values"):
        decode_json(json.dumps([*ones, 1]))
    with pytest.raises(InvalidBodyError, match=f"more than {MAX_CONTAINERS} arrays and objects"):
        decode_json("[" + "[]," * MAX_CONTAINERS + "[]]")
    with pytest.raises(InvalidBodyError, match=f"more than {json_body.MAX_NAMES} names"):
        decode_json("{" + ",".join(f'"{number}":1' for number in range(json_body.MAX_NAMES + 1)) + "}")
    prose = {"prompt": 'a, "b" [c] {d}: \\' * 300_000}
    assert decode_json(json.dumps(prose)) == prose


@settings(deadline=None, max_examples=100)
@given(JSON)
def test_only_what_stands_outside_of_strings_is_counted(value: object) -> None:
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text := json.dumps(value))
    for characters, pattern, _, _ in json_body._LIMITS:
        assert len([*json_body._outside(pattern, text)]) == sum(map(bare.count, characters))


class Measured:
    """A pattern, and how many characters each of its matches had."""

    def __init__(self, pattern: re.Pattern[str], lengths: list[int]) -> None:
        self._pattern, self._lengths = pattern, lengths

    def finditer(self, *arguments: Any) -> Iterator[Any]:
        return map(self._seen, self._pattern.finditer(*arguments))

    def match(self, *arguments: Any) -> Any:
        return self._seen(self._pattern.match(*arguments))

    def _seen(self, match: Any) -> Any:
        self._lengths.append(len(match.group()))
        return match


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("inner", ["a", "\\[", "aaa[:,", "9"], ids=repr)
@pytest.mark.parametrize("more", [0, 1])
def test_long_texts_are_looked_through_in_pieces(monkeypatch: pytest.MonkeyPatch, inner: str, more: int) -> None:
    """`re` lets other threads run between two matches alone."""
    most = json_body._RUN * json_body._STEPS
    long = inner * (3 * most // len(inner) + more)
    for text in (f'[0,"{long}",{{"": "{long}"}}', f'["{long}', f'"{long}\\', f"{long if inner == '9' else ''}[:"):
        bare = re.sub(r'"(?:[^"\\]|\\.)*("|\\?$)', "", text)
        for characters, pattern, _, _ in json_body._LIMITS:
            lengths = list[int]()
            measured: Any = Measured(pattern, lengths)
            with monkeypatch.context() as patched:
                patched.setattr(json_body, "_REST", Measured(json_body._REST, lengths))
                found = [match[1] for match in json_body._outside(measured, text)]
            assert found == [each for each in bare if each in characters]
            assert max(lengths) <= 2 * most + 2  # before a string, and of it
            assert sum(lengths) == len(text)


@pytest.mark.parametrize("body", ['"' + "," * 2_000_000, "," * 1_000_001 + " " * 1_000_000, '"' + "\\," * 1_000_001])
def test_counting_is_linear_in_broken_bodies(body: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidBodyError):
        decode_json(body)
    assert time.process_time() - began < 10  # 0.1 s; hours where each place looks through the rest


def test_duplicate_search_is_linear() -> None:
    body = "{" + ",".join(f'"{number}":1' for number in range(90_000)) + ',"0":2}'
    with pytest.raises(InvalidBodyError, match="'0' appears twice"):
        decode_json(body)
