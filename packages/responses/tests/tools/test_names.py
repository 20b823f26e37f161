# SPDX-License-Identifier: MIT
"""Names are allowed, stable, different for different tools, and have a hash where they cannot be read back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from candle_vllm.responses.tools.names import hashed_name, is_tool_name, matches, tool_name

ALLOWED = re.compile(r"^[a-zA-Z0-9_-]{1,64}\Z")
ANY = st.text(max_size=100)
TRICKY = st.text(alphabet="ab_-0é/", max_size=70)  # separators and their neighbours
PARTS = ANY | TRICKY


@pytest.mark.parametrize(
    ("server", "tool", "name"),
    [
        ("time", "get_current_time", "time__get_current_time"),
        ("time", "a__b", "time__a__b"),
        ("time", "_a", "time___a"),
        ("a", "x" * 61, "a__" + "x" * 61),
    ],
)
def test_what_is_allowed_stays(server: str, tool: str, name: str) -> None:
    assert tool_name(server, tool) == name


def test_what_is_not_is_changed_and_marked() -> None:
    assert re.fullmatch(r"my_server__get_time_[0-9a-f]{10}", tool_name("my server", "get.time"))
    assert re.fullmatch(r"server__tool_[0-9a-f]{10}", tool_name("日本", "語"))
    assert re.fullmatch(r"a__x{50}_[0-9a-f]{10}", tool_name("a", "x" * 100))
    assert tool_name("a__b", "c") != tool_name("a", "b__c") == "a__b__c"
    assert tool_name("a_", "b") != tool_name("a", "_b") == "a___b"


@given(PARTS, PARTS)
def test_every_name_is_allowed_and_stable(server: str, tool: str) -> None:
    for name in (tool_name(server, tool), hashed_name(server, tool)):
        assert ALLOWED.match(name)
        assert is_tool_name(name)
    assert tool_name(server, tool) == tool_name(server, tool)


@given(PARTS, PARTS)
def test_names_are_read_back_or_have_a_hash(server: str, tool: str) -> None:
    hashed = re.compile(r"_[0-9a-f]{10}\Z")
    name = tool_name(server, tool)
    assert hashed.search(name) or name.partition("__") == (server, "__", tool)
    assert hashed.search(hashed_name(server, tool))


@given(st.lists(st.tuples(PARTS, PARTS), unique=True, max_size=20))
def test_different_tools_have_different_names(pairs: list[tuple[str, str]]) -> None:
    assert len({tool_name(*pair) for pair in pairs}) == len(pairs)


@given(PARTS, PARTS)
def test_nobody_can_take_the_name_with_a_hash(server: str, tool: str) -> None:
    taken = hashed_name(server, tool)
    label, _, rest = taken.partition("__")
    assert tool_name(label, rest) != taken


@pytest.mark.parametrize(
    ("patterns", "name", "fits"),
    [
        (["a"], "a", True),
        (["a"], "ab", False),
        (["a*"], "ab", True),
        (["*b"], "ab", True),
        (["*"], "", True),
        ([], "a", False),
        (["A"], "a", False),
        (["a?"], "ab", False),
        (["a?*"], "a?b", True),
        (["[ab]*"], "a", False),
        (["[ab]*"], "[ab]c", True),
        (["x", "*__read*"], "files__read_all", True),
        (["*a" * 30 + "b"], "a" * 1000, False),
    ],
)
def test_patterns(patterns: list[str], name: str, fits: bool) -> None:
    assert matches(patterns, name) is fits
