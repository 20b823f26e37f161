# SPDX-License-Identifier: MIT
"""Find phrases in docstrings, comments and documentation that a reader who knows the field would not understand.

    python -m tests.language [PATH ...]     print each: file, line, the phrase with its surroundings

Each pattern stands for a sentence without its noun, or for a word of this project where the field has a term. Code in
backticks and blocks of code are left out, and so are the names of arguments.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CHECKED = (
    "packages/core/src",
    "packages/openai/src",
    "packages/server/src",
    "packages/responses/src",
    "docs",
    "README.md",
)

# At most twelve. Write the noun: "None without an adapter" for "None where there is none".
PATTERNS = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "it is none": r"\b(?:is|are|was|were|be|being) (?-i:none)\b(?! of\b)",
        "it has none": r"\b(?:has|have|had|having) (?-i:none)\b(?! of\b)",
        "none is": r"(?-i:\bnone) (?:is|are|was|were|has|have)\b",
        "those of the others": r"\b(?:those|that) of (?:the )?others?\b",
        "of theirs": r"\bof (?:theirs|ours|his)\b",
        "as many as there are": r"\bas many as there are\b",
        "what it was made of": r"\bwhat (?:it|they|he|she) (?:was|were|is|are) made of\b",
        "guess (draft token)": r"\bguess(?:es|ed|ing)?\b",
        "sight, picture (image)": r"\b(?:sights?|pictures?)\b",
        "drawn (sampled)": r"\btokens? (?:is|are|was|were) drawn\b|\bdraws? (?:a|the|its|each) tokens?\b",
        "land (collect results)": r"\b(?:lands?|landed)\b",
        "parcel, courier, crowd, night": r"\b(?:parcels?|couriers?|crowds?|nights?)\b",
    }.items()
}


NAMES = re.compile(r"`[^`]*`|^ *\w+(?:, \w+)*:", re.MULTILINE)
"""Text that is not checked: code, and the names of arguments and attributes."""


class Phrase(NamedTuple):
    """A phrase: its file, the line where its docstring or comment begins, its pattern's name, the words around it."""

    path: Path
    line: int
    pattern: str
    text: str


def phrases(*roots: Path) -> Iterator[Phrase]:
    """Find the phrases in files, and in the Python and Markdown files of folders."""
    for root in roots:
        found = (
            [root] if root.is_file() else sorted(path for path in root.rglob("*.*") if path.suffix in (".py", ".md"))
        )
        for path in found:
            for line, text in _markdown(path) if path.suffix == ".md" else _python(path):
                for name, around in _matches(text):
                    yield Phrase(path, line, name, around)


def _matches(text: str) -> Iterator[tuple[str, str]]:
    """Find the phrases of one text: the pattern's name, and the words around it."""
    flat = " ".join(NAMES.sub("", text).split())
    for name, pattern in PATTERNS.items():
        for match in pattern.finditer(flat):
            yield name, flat[max(0, match.start() - 80) : match.end() + 40]


def _markdown(path: Path) -> Iterator[tuple[int, str]]:
    code = False
    for line, text in enumerate(path.read_text().splitlines(), 1):
        if text.lstrip().startswith("```"):
            code = not code
        elif not code:
            yield line, text


def _python(path: Path) -> Iterator[tuple[int, str]]:
    source = path.read_text()
    nodes: list[ast.AST] = [ast.parse(source)]
    for node in nodes:  # docstrings, of attributes too; `nodes` grows in the loop
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            nodes += inner if isinstance(inner := getattr(node, block, ()), list) else ()
    # Tokenizing takes longest: only files with a phrase behind any "#", in a comment or not.
    rests = (line[at:] for line in source.splitlines() for at, letter in enumerate(line) if letter == "#")
    if any(any(_matches(rest)) for rest in rests):
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


if __name__ == "__main__":
    for phrase in phrases(*(Path(name) for name in sys.argv[1:] or [ROOT / name for name in CHECKED])):
        print(f"{phrase.path}:{phrase.line}: {phrase.pattern}: ...{phrase.text}...")
