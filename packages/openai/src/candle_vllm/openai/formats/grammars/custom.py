"""A user's Lark grammar for texts that stand in a JSON string: the input of a custom tool.

Strings and regular expressions become those of their JSON spelling, where a quote, a backslash and a line break are two
characters each; rules stay as they are, under other names. What cannot be said of a spelled text is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from candle_vllm.core.sampling.lark import quoted
from candle_vllm.openai.errors import UnsupportedParameterError

MAX_DEFINITION = 64 << 10  # characters
_SHORT = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_PLAIN = r'[^"\\\x00-\x1f]'  # characters that JSON spells as they are
# Lark's own terminals of these names.
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
    r"""(?P<space>[ \t]+|(?://|\#)[^\n]*)|(?P<line>\r?\n)|(?P<string>"(?:\\.|[^"\\\n])*"i?)"""
    r"""|(?P<regex>/(?:\\.|[^/\\\n])+/[a-z]*)|(?P<import>%import[^\n]*)|(?P<name>[!?]{0,2}_*[A-Za-z][\w-]*)"""
    r"""|(?P<mark>\.\.|->|[0-9]+|[():|*+?,\[\]])"""
)
_IMPORT = re.compile(r"%import\s+common\s*(?:\.\s*(\w+)(?:\s*->\s*(\w+))?|\(([\w\s,]+)\))\s*(?:(?://|#).*)?")


def json_rules(definition: str, prefix: str) -> tuple[str, list[str]]:
    """What takes the spelling of a text of `definition` within a JSON string: its name, and lines of a grammar.

    A grammar without recursion becomes one terminal: where a terminal ends is decided by the longest match, and the
    backslash that begins a line break could as well go on with the text before it.

    Args:
        definition: in Lark, with a rule `start`.
        prefix: of the names of its rules, in lower case.

    Raises:
        UnsupportedParameterError: the grammar has what cannot be said of a spelled text.
    """
    if len(definition) > MAX_DEFINITION:
        raise _refused(f"it has more than {MAX_DEFINITION} characters")
    kinds = list(_tokens(definition))
    names = _Names(prefix, single=not _is_recursive(kinds))
    out: list[str] = []
    for number, (kind, text) in enumerate(kinds):
        before = kinds[number - 1][1] if number else ""
        if kind == "string":
            out.append(_range_or_string(kinds, number))
        elif kind == "regex":
            pattern, _, flags = text[1:].rpartition("/")
            spelled = _regex(pattern, flags)
            if not names.single and r"|\\[" in spelled:
                raise _refused("it is recursive and has expressions that take quotes, backslashes or line breaks")
            out.append(spelled)
        elif kind == "import":
            out += _imported(text, names)
        elif kind == "name" and before != "->":
            out.append(names.of(text))
        elif kind in ("line", "mark") and text not in ("..", "->"):
            out.append({"[": "(", "]": ")?"}.get(text, text))
    return names.of("start"), "".join(part if part == "\n" else f"{part} " for part in out).split("\n")


class _Names:
    """Names of a user's rules among those of others; `single`: all of them are terminals."""

    def __init__(self, prefix: str, *, single: bool) -> None:
        self.single = single
        self._prefix = prefix

    def of(self, name: str) -> str:
        plain = name.lstrip("!?")
        if plain.lstrip("_")[:1].isupper():
            return f"{self._prefix.upper()}T_{plain}"
        return f"{self._prefix.upper()}R_{plain.upper()}" if self.single else f"{self._prefix}{plain}"


def _is_recursive(kinds: list[tuple[str, str]]) -> bool:
    """Whether a rule leads to itself."""
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
    left = {name: {other for other in others if other in refers} for name, others in refers.items()}
    while left:
        done = {name for name, others in left.items() if not others}
        if not done:
            return True
        left = {name: others - done for name, others in left.items() if name not in done}
    return False


def _tokens(definition: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(definition):
        match = _TOKENS.match(definition, position)
        if match is None:
            raise _refused(f"{definition[position : position + 20]!r} has no meaning in a text that is spelled as JSON")
        position = match.end()
        kind = match.lastgroup or ""
        if kind != "space":
            yield kind, "\n" if kind == "line" else match.group()


def _imported(text: str, names: _Names) -> Iterator[str]:
    match = _IMPORT.fullmatch(text.strip())
    if match is None:
        raise _refused(f"of other grammars only common is known: {text[:80]!r}")
    one, alias, several = match.groups()
    for name in [one] if one else re.findall(r"\w+", several):
        if name not in _COMMON:
            raise _refused(f"common has no {name!r:.40} here; it has {', '.join(_COMMON)}")
        [(kind, body)] = list(_tokens(_COMMON[name]))
        spelled = _string(body) if kind == "string" else _regex(body[1:-1], "")
        yield f"{names.of(alias or name)}: {spelled}"
        yield "\n"


def _range_or_string(kinds: list[tuple[str, str]], number: int) -> str:
    """A string, or a range of characters at its first one."""
    if number + 2 < len(kinds) and kinds[number + 1][1] == "..":
        first, last = _decoded(kinds[number][1]), _decoded(kinds[number + 2][1])
        if len(first) != 1 or len(last) != 1:
            raise _refused("a range goes from one character to another")
        return f"/{_class(f'[{re.escape(first)}-{re.escape(last)}]', '')}/"
    if number >= 2 and kinds[number - 1][1] == "..":
        return ""
    return _string(kinds[number][1])


def _decoded(string: str) -> str:
    body = string.removesuffix("i")[1:-1]
    try:
        return json.loads('"' + re.sub(r"\\x([0-9A-Fa-f]{2})", r"\\u00\1", body) + '"')
    except ValueError:
        raise _refused(f"{string[:40]!r} is no string") from None


def _string(string: str) -> str:
    """A string of Lark as one, or several, of its spelling."""
    text, folds = _decoded(string), string.endswith("i")
    parts = re.findall(r'[^"\\\x00-\x1f]+|["\\\x00-\x1f]', text)
    found = [
        quoted(json.dumps(part, ensure_ascii=False)[1:-1]) + ("i" if folds and _is_plain(part) else "")
        for part in parts
    ]
    return " ".join(found) if len(found) == 1 else f"({' '.join(found)})" if found else '""'


def _is_plain(text: str) -> bool:
    return re.fullmatch(f"{_PLAIN}+", text) is not None


_ATOM = re.compile(
    r"""(?P<escape>\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|.))|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"""
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
            if re.search(r"(?<!\\)\[", text[1:]) or re.search(r"&&|--|~~|\\[pPx]\{|\\[pP]", text):
                raise _refused(f"a regular expression has a set within a set, or of properties: {text[:40]!r}")
            out.append(_class(text, flags))
        elif kind == "escape" and text[1] in "pPbBAzZG0123456789":
            raise _refused(f"a regular expression has {text!r}")
        else:
            body = "\\^" if text == "^" and kind == "escape" else text
            if kind == "char" and text in "^$":
                raise _refused(f"a regular expression has {text!r}: terminals match whole texts anyhow")
            out.append(_class(f"[{body if kind == 'escape' else re.escape(text)}]", flags))
    return f"/{''.join(out)}/".replace("//", "/(?:)/") if out else '""'


def _class(characters: str, flags: str) -> str:
    """A set of characters, each in its spelling, as a regular expression without `/`."""
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
