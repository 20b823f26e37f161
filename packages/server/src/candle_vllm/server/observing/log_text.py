"""Texts that came from outside, as they may stand in a log: one line each, nothing that a terminal would obey."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

_PLAIN = re.compile(r"[A-Za-z0-9._:/+-]{1,256}")
_DELETE = "\x7f"


def escaped(text: str) -> str:
    """A text without control, format and separator characters, each written as Python would."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if character == "\\" or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else character
        for character in text
    )


def key_values(fields: Mapping[str, Any]) -> str:
    """`name=value name="a value"`; values that are None are left out."""
    return " ".join(f"{name}={_value(value)}" for name, value in fields.items() if value is not None)


def json_line(fields: Mapping[str, Any]) -> str:
    """One JSON object in ASCII, without values that are None."""
    known = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(known, ensure_ascii=True, allow_nan=False).replace(_DELETE, "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, (int, float)):
        return str(value)
    text = str(value)
    return text if _PLAIN.fullmatch(text) else '"' + escaped(text).replace('"', '\\"') + '"'
