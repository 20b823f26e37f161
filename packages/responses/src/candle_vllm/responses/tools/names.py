# SPDX-License-Identifier: MIT
"""Names of tools: from a server's label and a tool's own name to what a model may call.

OpenAI allows letters, digits, "_" and "-", at most 64 of them. `server__tool` is used as it is where the two can be
told apart again at its first "__"; otherwise what is not allowed becomes "_", the whole is cut, and ten hex digits of
a SHA-256 of both names stand at the end. A name depends on its own two parts alone, never on what else there is.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable

MAX_NAME = 64  # characters, OpenAI's limit
SEPARATOR = "__"
_DIGITS = 10  # hex digits of the hash
_MAX_SERVER = 20  # characters of a server's label where a name is cut

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FORBIDDEN = re.compile(r"[^a-zA-Z0-9_-]+")
_HASHED = re.compile(rf"_[0-9a-f]{{{_DIGITS}}}\Z")


def is_tool_name(name: str) -> bool:
    """Whether a model may be offered a tool of this name."""
    return _NAME.fullmatch(name) is not None


def tool_name(server: str, tool: str) -> str:
    """The name under which a model calls a server's tool.

    Two different pairs never have the same name, but for the chance of a hash of 40 bits.

    Args:
        server: the label of the server, any text.
        tool: the tool's name there, any text.
    """
    name = f"{server}{SEPARATOR}{tool}"
    plain = _is_plain_server(server) and tool and is_tool_name(name) and not _HASHED.search(name)
    return name if plain else hashed_name(server, tool)


def hashed_name(server: str, tool: str) -> str:
    """The name with the hash: for parts that need it, and for a name that something else has already."""
    data = f"{len(server)}:{server}{tool}".encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(data).hexdigest()[:_DIGITS]
    label = (_clean(server) or "server")[:_MAX_SERVER]
    room = MAX_NAME - len(label) - len(SEPARATOR) - 1 - _DIGITS
    return f"{label}{SEPARATOR}{(_clean(tool) or 'tool')[:room]}_{digest}"


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns is the name; "*" in a pattern stands for any characters, all else for itself."""
    return any(pattern == name or ("*" in pattern and _fits(pattern, name)) for pattern in patterns)


def _fits(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]").replace("?", "[?]"))


def _is_plain_server(server: str) -> bool:
    return bool(server) and SEPARATOR not in server and not server.endswith("_")


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("_", text[: 4 * MAX_NAME]).strip("_")
