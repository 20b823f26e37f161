"""JSON with comments and trailing commas, as editors write it, to strict JSON at the same places."""

from __future__ import annotations

import re

_STRING = r'"(?:[^"\\]|\\.)*+(?:"|\Z)'
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"{_STRING}|,(?=\s*[}}\]])", re.DOTALL)
_NO_NEWLINE = re.compile(r"[^\n]")


def strip_comments(text: str) -> str:
    """The text with blanks where `//` and `/* */` comments and commas before a closing bracket were.

    Strings stay as they are, and so do lines and columns, for the messages of a JSON parser. What is wrong otherwise
    is left for that parser to find; a comment that never ends takes the rest of the text.
    """
    return _TRAILING_COMMA.sub(_blank, _COMMENT.sub(_blank, text))


def _blank(match: re.Match[str]) -> str:
    found = match.group()
    return found if found.startswith('"') else _NO_NEWLINE.sub(" ", found)
