# SPDX-License-Identifier: MIT
"""Names of tools: makes a name that a model may call from the label of a server or namespace and the tool's own name.

OpenAI allows letters, digits, "_" and "-", at most 64 of them. `server__tool` is used unchanged if it is such a name,
can be split again at its first "__", and does not end like a hash. Otherwise forbidden characters become "_", the name
is truncated, and ten hex digits of a SHA-256 of both parts are appended. Neither name depends on other tools.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable

MAX_NAME = 64  # characters; OpenAI's limit
SEPARATOR = "__"
_DIGITS = 10  # hex digits of the hash
_MAX_SERVER = 20  # characters of a server's label in a name with a hash

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FORBIDDEN = re.compile(r"[^a-zA-Z0-9_-]+")
_HASHED = re.compile(rf"_[0-9a-f]{{{_DIGITS}}}\Z")


def is_tool_name(name: str) -> bool:
    """Whether a tool of this name may be offered to a model."""
    return _NAME.fullmatch(name) is not None


def tool_name(server: str, tool: str) -> str:
    """Return the name that a model uses for a server's tool; both parts may be any text.

    Two different pairs never have the same name, except by a collision of 40-bit hashes.
    """
    name = f"{server}{SEPARATOR}{tool}"
    splits = bool(server) and SEPARATOR not in server and not server.endswith("_")  # at the first separator
    return name if splits and tool and is_tool_name(name) and not _HASHED.search(name) else hashed_name(server, tool)


def hashed_name(server: str, tool: str) -> str:
    """Return a name with a hash: for parts that cannot be a name unchanged, or if their name is used already."""
    data = f"{len(server)}:{server}{tool}".encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(data).hexdigest()[:_DIGITS]
    label = (_clean(server) or "server")[:_MAX_SERVER]
    room = MAX_NAME - len(label) - len(SEPARATOR) - 1 - _DIGITS
    return f"{label}{SEPARATOR}{(_clean(tool) or 'tool')[:room]}_{digest}"


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether a pattern matches the name; "*" in a pattern matches any text, all other characters match themselves."""
    literal = ((one, one.replace("[", "[[]").replace("?", "[?]")) for one in patterns)
    return any(one == name or ("*" in one and fnmatch.fnmatchcase(name, shell)) for one, shell in literal)


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("_", text[: 4 * MAX_NAME]).strip("_")
