# SPDX-License-Identifier: MIT
"""Rewrite a user's Lark grammar for a custom tool's input, which is a text between marks or in a JSON string.

In a JSON string, strings and regular expressions are rewritten to match JSON's escapes, where a quote, a backslash and
a line break are two characters each; rules are only renamed. Constructs that cannot be rewritten are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from candle_vllm.core.sampling.lark import quoted
from candle_vllm.openai.errors import UnsupportedParameterError

MAX_DEFINITION = 64 << 10  # characters
_SHORT = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_PLAIN = r'[^"\\\x00-\x1f]'  # characters that JSON does not escape
# terminals of Lark's `common` grammar
_COMMON = {
    "DIGIT": "/[0-9]/", "HEXDIGIT": "/[0-9A-Fa-f]/", "INT": "/[0-9]+/", "SIGNED_INT": "/[+-]?[0-9]+/",
    "DECIMAL": r"/[0-9]+\.[0-9]*|\.[0-9]+/",
    "FLOAT": r"/([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+/",
    "NUMBER": r"/([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?/",
    "SIGNED_NUMBER": r"/[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?/",
    "ESCAPED_STRING": r'/"([^"\\]|\\.)*"/', "LCASE_LETTER": "/[a-z]/", "UCASE_LETTER": "/[A-Z]/",
    "LETTER": "/[A-Za-z]/", "WORD": "/[A-Za-z]+/", "CNAME": "/[A-Za-z_][A-Za-z0-9_]*/",
    "WS_INLINE": r"/[ \t]+/", "WS": r"/[ \t\f\r\n]+/", "CR": r'"\r"', "LF": r'"\n"', "NEWLINE": r"/(\r?\n)+/",
}  # fmt: skip
_TOKENS = re.compile(
    r"""(?P<space>[ \t]+|(?://|\#)[^\n]*)|(?P<line>\r?\n)|(?P<string>"(?:[^"\\\n]++|\\.)*+"i?)"""
    r"""|(?P<regex>/(?:[^/\\\n]++|\\.)++/[a-z]*)|(?P<import>%import[^\n]*)|(?P<name>[!?]{0,2}_*[A-Za-z][\w-]*)"""
    r"""|(?P<mark>\.\.|->|[0-9]+|[():|*+?,\[\]])"""
)
_IMPORT = re.compile(r"%import\s+common\s*(?:\.\s*(\w+)(?:\s*->\s*(\w+))?|\(([\w\s,]+)\))\s*(?:(?://|#).*)?")


def json_rules(definition: str, prefix: str) -> tuple[str, list[str]]:
    """Return a grammar of a text that follows `definition`, escaped in a JSON string: start rule's name, and lines.

    A grammar without recursion becomes one terminal. With several terminals, the longest match would decide where one
    ends, and the backslash of an escaped line break could also belong to the text before it.

    Args:
        definition: the grammar in Lark, with a rule `start`.
        prefix: prefix of the names of its rules, in lower case.

    Raises:
        UnsupportedParameterError: the grammar is too long or has a construct that cannot be rewritten for escaped text.
    """
    kinds = _tokens(definition)
    names = _Names(prefix, single=not _is_recursive(kinds))

    def regex(text: str) -> str:
        pattern, _, flags = text[1:].rpartition("/")
        spelled = _regex(pattern, flags)
        if not names.single and r"|\\[" in spelled:
            raise _refused("it is recursive and has expressions that take quotes, backslashes, tabs or line breaks")
        return spelled

    return _renamed(kinds, names, _string, regex)


def text_terminals(definition: str, prefix: str) -> tuple[str, list[str]]:
    """Return a terminal of a text that follows `definition`: its name, and lines of a grammar (see `json_rules`).

    Formats that write a text between marks search for the mark after it, and only a terminal can exclude this mark from
    the text. Raises UnsupportedParameterError if the grammar is too long or recursive, or has an unsupported construct.
    """
    kinds = _tokens(definition)
    if _is_recursive(kinds):
        raise _refused("it is recursive, and so cannot exclude the mark that ends the text of a call")
    names = _Names(prefix, single=True)
    return _renamed(kinds, names, lambda text: quoted(_decoded(text)) + "i" * text.endswith("i"), str)


_Spell = Callable[[str], str]


def _renamed(kinds: list[tuple[str, str]], names: _Names, string: _Spell, regex: _Spell) -> tuple[str, list[str]]:
    """Rename a grammar's rules, rewrite its strings and expressions; return the name of its start, and its lines."""
    out: list[str] = []
    for number, (kind, text) in enumerate(kinds):
        before = kinds[number - 1][1] if number else ""
        if kind == "string" and number + 2 < len(kinds) and kinds[number + 1][1] == "..":
            last, end = kinds[number + 2]
            out.append(regex(_range(text, end if last == "string" else "")))
        elif kind == "string":
            out.append("" if before == ".." else string(text))
        elif kind == "regex":
            out.append(regex(text))
        elif kind == "import":
            for name, (found, body) in _imported(text):
                out += [f"{names.of(name)}: {(string if found == 'string' else regex)(body)}", "\n"]
        elif kind == "name" and before != "->":
            out.append(names.of(text))
        elif kind in ("line", "mark") and text not in ("..", "->"):
            out.append({"[": "(", "]": ")?"}.get(text, text))
    return names.of("start"), "".join(part if part == "\n" else f"{part} " for part in out).split("\n")


class _Names(NamedTuple):
    """New names of a user's rules, distinct from the other rules' names; `single` makes all of them terminals."""

    prefix: str
    single: bool

    def of(self, name: str) -> str:
        plain = name.lstrip("!?")
        if plain.lstrip("_")[:1].isupper():
            return f"{self.prefix.upper()}T_{plain}"
        return f"{self.prefix.upper()}R_{plain.upper()}" if self.single else f"{self.prefix}{plain}"


def _is_recursive(kinds: list[tuple[str, str]]) -> bool:
    refers: dict[str, set[str]] = {}
    rule = ""
    for number, (kind, text) in enumerate(kinds):
        if kind != "name":
            continue
        name = text.lstrip("!?")
        begins = number == 0 or kinds[number - 1][0] in ("line", "import")
        if begins and number + 1 < len(kinds) and kinds[number + 1][1] == ":":
            rule = name
            refers.setdefault(rule, set())
        elif rule and kinds[number - 1][1] != "->":
            refers[rule].add(name)
    try:
        TopologicalSorter(refers).prepare()
    except CycleError:
        return True
    return False


def _tokens(definition: str) -> list[tuple[str, str]]:
    if len(definition) > MAX_DEFINITION:
        raise _refused(f"it has more than {MAX_DEFINITION} characters")
    position, found = 0, list[tuple[str, str]]()
    while position < len(definition):
        match = _TOKENS.match(definition, position)
        if match is None:
            raise _refused(f"{definition[position : position + 20]!r} is not supported in a tool's grammar")
        position = match.end()
        kind = match.lastgroup or ""
        if kind != "space":
            found.append((kind, "\n" if kind == "line" else match.group()))
    return found


def _imported(text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield imported names, each with the kind and the text of its definition."""
    match = _IMPORT.fullmatch(text.strip())
    if match is None:
        raise _refused(f"of other grammars only common is known: {text[:80]!r}")
    one, alias, several = match.groups()
    for name in [one] if one else re.findall(r"\w+", several):
        if name not in _COMMON:
            raise _refused(f"common has no {name!r:.40} here; it has {', '.join(_COMMON)}")
        [found] = _tokens(_COMMON[name])
        yield alias or name, found


def _range(first: str, last: str) -> str:
    ends = _decoded(first), _decoded(last)
    if any(len(end) != 1 for end in ends):
        raise _refused("a range goes from one character to another")
    first, last = (re.escape(end) if end.isprintable() else f"\\U{ord(end):08x}" for end in ends)
    inside = f"{first}-{last}".replace("/", r"\/")
    return f"/[{inside}]/"


def _decoded(string: str) -> str:
    body = string.removesuffix("i")[1:-1]
    try:
        return json.loads('"' + _ESCAPE.sub(lambda found: f"\\u00{found[1]}" if found[1] else found[0], body) + '"')
    except ValueError:
        raise _refused(f"{string[:40]!r} is no string") from None


def _string(string: str) -> str:
    """Convert a string of Lark to one or several strings of its JSON escapes."""
    text, folds = _decoded(string), string.endswith("i")
    parts = re.findall(r'[^"\\\x00-\x1f]+|["\\\x00-\x1f]', text)
    found = [
        quoted(json.dumps(part, ensure_ascii=False)[1:-1]) + ("i" if folds and re.fullmatch(f"{_PLAIN}+", part) else "")
        for part in parts
    ]
    return " ".join(found) if len(found) == 1 else f"({' '.join(found)})" if found else '""'


_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|(?s:.))")
_ATOM = re.compile(
    r"""(?P<escape>\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|.))|(?P<set>\[\^?\]?(?:[^\]\\]++|\\(?s:.))*+(?:\]|\\?\Z))"""
    r"""|(?P<group>\((?:\?:)?)|(?P<times>\{[0-9]+(?:,[0-9]*)?\}|[)|*+?])|(?P<any>\.)|(?P<char>[\s\S])"""
)


def _regex(pattern: str, flags: str) -> str:
    if set(flags) - set("is"):
        raise _refused(f"a regular expression has the flags {flags!r}; i and s are known")
    if "(?" in pattern.replace("(?:", ""):
        raise _refused("a regular expression has a group that begins with '(?', other than '(?:'")
    out = []
    for match in _ATOM.finditer(pattern):
        kind, text = match.lastgroup, match.group()
        if kind in ("group", "times"):
            out.append(text)
        elif kind == "any":
            out.append(_class(r"[^\n]" if "s" not in flags else r"[\s\S]", flags))
        elif kind == "set":
            if "[" in _ESCAPE.sub("", text[1:]) or re.search(r"&&|--|~~|\\[pPx]\{|\\[pP]", text):
                raise _refused(f"a regular expression has a set within a set, or of properties: {text[:40]!r}")
            out.append(_class(text, flags))
        elif kind == "escape" and text[1] in "pPbBAzZG0123456789":
            raise _refused(f"a regular expression has {text!r}")
        else:
            if kind == "char" and text in "^$":
                raise _refused(f"a regular expression has {text!r}: terminals match whole texts anyhow")
            out.append(_class(f"[{text if kind == 'escape' else re.escape(text)}]", flags))
    return f"/{''.join(out)}/".replace("//", "/(?:)/") if out else '""'


def _class(characters: str, flags: str) -> str:
    """Convert a set of characters to a regular expression of their JSON escapes, without `/`."""
    try:
        holds = re.compile(characters, re.IGNORECASE if "i" in flags else 0)
    except re.error as error:
        raise _refused(f"a regular expression has the set {characters[:40]!r}: {error}") from None
    escaped = "".join(_SHORT[one] for one in _SHORT if holds.fullmatch(one))
    rust = characters.replace("/", r"\/").replace(r"\\/", r"\/")
    plain = f"[{rust}&&{_PLAIN}]"
    if "i" in flags:
        plain = f"(?i:{plain})"
    if not escaped:
        return plain
    return rf"(?:{plain}|\\[{re.escape(escaped)}])"


def _refused(why: str) -> UnsupportedParameterError:
    return UnsupportedParameterError(f"the grammar cannot be guaranteed within a call: {why}", "tools")
