# SPDX-License-Identifier: MIT
"""Docstrings, comments and documentation say the noun, and the field's term (`tests/language.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.language import CHECKED, PATTERNS, ROOT, phrases

ALLOWED: set[tuple[str, str]] = set()
"""Files and patterns that they may use."""


def test_there_are_at_most_twelve_patterns() -> None:
    assert len(PATTERNS) <= 12


def test_no_sentence_leaves_out_its_noun() -> None:
    found = {
        (phrase.path.relative_to(ROOT).as_posix(), phrase.pattern): phrase
        for phrase in phrases(*(ROOT / name for name in CHECKED))
    }
    wrong = [
        f"{path}:{one.line}: {one.pattern}: {one.text}"
        for (path, _), one in found.items()
        if (path, one.pattern) not in ALLOWED
    ]
    assert not wrong, "\n".join(wrong)
    assert set(found) >= ALLOWED, "an exception that is no longer needed goes"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ('"""None where there is none."""', "it is none"),
        ("x = 1  # those of the others", "those of the others"),
        ('def f():\n    """Several\n    guesses."""', "guess (draft token)"),
        ('"""Text.\n\n    guess: a number.\n"""', ""),
        ('"""The `guess` of None is none of these; default is None."""', ""),
    ],
)
def test_phrases_are_found_in_docstrings_and_comments(tmp_path: Path, text: str, pattern: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(text)
    assert [one.pattern for one in phrases(path)] == [pattern] * bool(pattern)


def test_code_in_documentation_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("It has none.\n```\nIt has none.\n```\n`it has none`\n")
    assert [one.line for one in phrases(path)] == [1]
