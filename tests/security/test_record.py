# SPDX-License-Identifier: MIT
"""docs/security.md is a record: each of its tests exists, and each CVE of the field's record is in one of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "security.md"
HERE = Path(__file__).parent

# What inference servers have been hurt by, by class; the record that this folder answers to.
RECORD = (
    "CVE-2026-48746 CVE-2025-59425 CVE-2025-66448 CVE-2026-22807 CVE-2026-27893 CVE-2025-6242 CVE-2026-24779 "
    "CVE-2026-34753 CVE-2026-33626 CVE-2026-0599 CVE-2026-22778 CVE-2026-5497 CVE-2026-22773 CVE-2026-34755 "
    "CVE-2025-62164 CVE-2025-24357 CVE-2025-29783 CVE-2025-32444 CVE-2025-47277 CVE-2025-30165 CVE-2026-3059 "
    "CVE-2026-3060 CVE-2025-32434 CVE-2026-24747 CVE-2025-9141 CVE-2026-5760 CVE-2024-34359 CVE-2025-61620 "
    "CVE-2025-62426 CVE-2026-34756 CVE-2025-48956 CVE-2025-48942 CVE-2025-48943 CVE-2025-48944 CVE-2025-48887 "
    "CVE-2026-44223 CVE-2026-9540 CVE-2026-21869 CVE-2025-53630 CVE-2026-27940 GHSA-7rxv-5jhh-j6xx CVE-2026-7482 "
    "CVE-2026-42248 CVE-2026-42249 CVE-2025-25183 CVE-2025-46570 CVE-2026-48710 CVE-2026-42561 CVE-2026-40347 "
)


def names_of_tests(path: Path) -> dict[str, str]:
    """Names of the tests in a file, and what each says of itself."""
    tree = ast.parse(path.read_text("utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {node.name: ast.get_docstring(node) or "" for node in functions if node.name.startswith("test_")}


def names_on_the_page() -> set[tuple[str, str]]:
    """Every file or pattern that the page names, and every test of the file that stands before it."""
    named: set[tuple[str, str]] = set()
    path = ""
    for word in re.findall(r"`((?:tests|packages)/[^`\s]+|test_\w+)`", PAGE.read_text("utf-8")):
        if word.startswith("test_"):
            named.add((path, word))
        else:
            path = word
            named.add((path, ""))
    return named


def test_every_test_that_the_page_names_exists() -> None:
    """A path is a file, or a pattern that some files have; a name behind it is a test in that file."""
    named = names_on_the_page()
    assert len(named) > 60
    for path, test in named:
        found = sorted(ROOT.glob(path))
        assert found, path
        assert not test or test in names_of_tests(found[0]), (path, test)


def test_every_test_here_stands_on_the_page() -> None:
    """And the other way: a test of this folder that the page does not name has been forgotten."""
    named = names_on_the_page()
    for path in sorted(HERE.glob("test_*.py")):
        for test in names_of_tests(path):
            assert (f"tests/security/{path.name}", test) in named, test


def test_the_whole_record_is_answered() -> None:
    """Each entry stands in a docstring of a test here, and on the page."""
    docstrings = " ".join(text for path in HERE.glob("test_*.py") for text in names_of_tests(path).values())
    docstrings = re.sub(r"\s+", " ", docstrings)
    docstrings = re.sub(r"CVE-(\d{4})-\d+(?:(?:, -\d+)+)", _written_out, docstrings)
    page = PAGE.read_text("utf-8")
    for entry in RECORD.split():
        assert entry in docstrings, entry
        assert entry in page, entry


def _written_out(match: re.Match[str]) -> str:
    """`CVE-2025-1, -2` as both."""
    first, *others = match[0].split(", ")
    return " ".join([first, *(f"CVE-{match[1]}{other}" for other in others)])
