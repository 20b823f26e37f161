"""Paths of a chat request's fields in the words of the API that it was made for, so that errors blame what was sent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_MESSAGE = re.compile(r"messages\.(\d+)(\..*)?")
_TOOL = re.compile(r"tools\.(\d+)(\..*)?")

Spellings = tuple[tuple[str, str], ...]  # a beginning of our path, and what stands there in the other API


class MessagePath(NamedTuple):
    """A message of a chat request, or something in it.

    Attributes:
        number: of the message, from 0.
        inside: whether the path leads into it.
    """

    number: int
    inside: bool


class FieldPaths(NamedTuple):
    """How another API spells what a chat request has.

    Attributes:
        fields: whole fields and what is below them; the first that fits counts.
        tool_parts: what stands below a tool; the first that fits counts.
    """

    fields: Spellings
    tool_parts: Spellings

    def respelled(self, path: str, tools: Sequence[str]) -> str:
        """The path in the other API's words; `tools` are the paths that each tool of the chat request was made of."""
        match = _TOOL.fullmatch(path)
        if match is not None and int(match[1]) < len(tools):
            below = (match[2] or "").removeprefix(".")
            for prefix, own in self.tool_parts:
                if below.startswith(prefix):
                    below = own + below[len(prefix) :]
                    break
            tool = tools[int(match[1])]
            return f"{tool}.{below}" if below else tool
        for prefix, own in self.fields:
            if path == prefix or path.startswith(f"{prefix}."):
                return own + path[len(prefix) :]
        return path


def message_path(path: str) -> MessagePath | None:
    """The message that a path leads to, or None."""
    match = _MESSAGE.fullmatch(path)
    return None if match is None else MessagePath(int(match[1]), bool(match[2]))
