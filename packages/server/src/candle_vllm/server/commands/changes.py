# SPDX-License-Identifier: MIT
"""Preview of the changes that a tool call would make, for the user who approves it.

Tools that write files take a path and a text, or a text and its replacement, under the names below. For other tools,
the user only sees the arguments.
"""

from __future__ import annotations

import difflib
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

import msgspec

from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition

_PATHS = ("path", "file_path", "filepath", "filename", "file")
_TEXTS = ("content", "contents", "text", "file_text", "new_content")
_OLD = ("old_string", "old_str", "old_text", "oldText", "search")
_NEW = ("new_string", "new_str", "new_text", "newText", "replace")
_MAX_FILE = 1 << 18  # maximum bytes of a file that is compared
_MAX_COMPARED = 1000  # lines of each side; the time for a comparison grows with their product
_MAX_LINES = 200  # maximum number of shown lines
_MAX_WIDTH = 500  # maximum characters of a line


def changes(call: ToolCall, definition: ToolDefinition) -> list[str]:
    """Return the diff lines of a call, "-" before removed and "+" before added lines; empty if they are unknown.

    A file is compared with the file on this machine, which may differ from the tool's. Long output is truncated.
    """
    if definition.read_only:
        return []
    try:
        arguments: Any = msgspec.json.decode(call.arguments)
    except (msgspec.DecodeError, RecursionError):
        return []
    if not isinstance(arguments, dict):
        return []
    lines = list(_lines(cast(dict[str, Any], arguments)))
    more = len(lines) - _MAX_LINES
    shown = [line if len(line) <= _MAX_WIDTH else f"{line[:_MAX_WIDTH]} ... (cut)" for line in lines[:_MAX_LINES]]
    return [*shown, f"... ({more} more lines)"] if more > 0 else shown


def _lines(arguments: Mapping[str, Any]) -> Iterator[str]:
    path = _text(arguments, _PATHS)
    edits: Any = arguments.get("edits")
    for edit in (arguments, *(edits if isinstance(edits, list) else ())):
        old, new = (_text(edit, names) if isinstance(edit, dict) else None for names in (_OLD, _NEW))
        if old is not None and new is not None:
            yield from _difference(old, new, f"in {path}:" if path else "in a text:")
    text = _text(arguments, _TEXTS)
    if path and text is not None and _text(arguments, _OLD) is None:
        before, state = _file(path)
        yield from _difference(before, text, f"{path} ({state}):")


def _difference(old: str, new: str, title: str) -> Iterator[str]:
    before, after = old.splitlines(), new.splitlines()
    yield title
    if max(len(before), len(after)) > _MAX_COMPARED:
        yield f"{len(before)} lines go, {len(after)} come: too many to compare; the new ones are"
        yield from (f"+{line}" for line in after)
    else:
        same = "(nothing changes)" if old == new else "(line ends change, and nothing else)"
        yield from list(difflib.unified_diff(before, after, lineterm="", n=2))[2:] or (same,)


def _file(path: str) -> tuple[str, str]:
    """Return the text of a local file, and a remark about it."""
    try:
        waiting = 0 if sys.platform == "win32" else os.O_NONBLOCK  # opening a pipe would block
        descriptor = os.open(os.path.expanduser(path), os.O_RDONLY | waiting)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return "", "no regular file here"
            data = file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            return "", "too large to compare"
        return data.decode("utf-8"), "beside the file here"
    except (OSError, ValueError):
        return "", "no such text here"


def _text(arguments: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((arguments[name] for name in names if isinstance(arguments.get(name), str)), None)
