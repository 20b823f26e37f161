"""What a function's docstring in Google's style says of the function and of its parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

_SECTION = re.compile(r"[A-Z][A-Za-z ]{0,30}:\s*$")
_PARAMETER = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")


def describe(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The docstring's first paragraph on one line, and the descriptions of its "Args:" by parameter."""
    lines = (inspect.getdoc(function) or "").splitlines()
    first: list[str] = []
    for line in lines:
        if not line.strip() or _SECTION.match(line):
            break
        first.append(line.strip())
    return " ".join(first), _parameters(lines)


def _parameters(lines: list[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    inside = False
    current: list[str] | None = None
    indent: int | None = None
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if depth == 0 and line.strip():
            inside = line.strip() in ("Args:", "Arguments:", "Parameters:")
            current, indent = None, None
        elif inside and line.strip():
            indent = depth if indent is None else indent
            parameter = _PARAMETER.match(line.strip()) if depth <= indent else None
            if parameter is not None:
                current = found[parameter[1]] = [parameter[2]]
            elif current is not None:
                current.append(line.strip())
    return {name: " ".join(part for part in parts if part) for name, parts in found.items()}
