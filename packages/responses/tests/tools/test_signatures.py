# SPDX-License-Identifier: MIT
"""Docstrings in Google's style."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from candle_vllm.responses.tools.python_tool import describe


def documented(text: str | None) -> Callable[..., Any]:
    def function() -> None: ...

    function.__doc__ = text
    return function


@pytest.mark.parametrize(
    ("text", "summary", "parameters"),
    [
        (None, "", {}),
        ("", "", {}),
        ("One.", "One.", {}),
        ("One\n    line.\n\n    More.\n    ", "One line.", {}),
        ("\n    Args:\n        a: b\n    ", "", {"a": "b"}),
        (
            "S.\n\n    Args:\n        a: the first,\n            which: goes on\n        b (int, optional): second\n"
            "        *c: rest\n\n        d: after a gap\n\n    Returns:\n        e: no parameter\n    ",
            "S.",
            {"a": "the first, which: goes on", "b": "second", "c": "rest", "d": "after a gap"},
        ),
        ("S.\n\n    Args:\n        no colon here\n        a:\n            below\n", "S.", {"a": "below"}),
        ("S.\n\n    Example: a: b\n", "S.", {}),
    ],
)
def test_docstrings(text: str | None, summary: str, parameters: dict[str, str]) -> None:
    assert describe(documented(text)) == (summary, parameters)
