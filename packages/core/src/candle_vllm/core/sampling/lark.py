# SPDX-License-Identifier: MIT
"""Parts of grammars in llguidance's dialect of Lark: quoted texts, special tokens, and a user's own grammar.

A user's grammar is checked before it is compiled: options that would be ignored, or that break the engine's guarantees,
are refused by name, JSON schemas in it are checked like others, and its size is limited.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from candle_vllm.core.sampling.gbnf import gbnf_to_lark
from candle_vllm.core.sampling.json_schema import Budget, compilable_schema
from candle_vllm.core.sampling.structured import StructuredOutputsParams, parsed_json, refused

logger = logging.getLogger(__name__)

MAX_DEPTH = 2_000  # maximum depth of rules and brackets inside each other
MAX_WORDS = 100_000  # maximum number of names, strings, regular expressions and special tokens in a grammar
MAX_SEQUENCE = 5_000  # maximum number of these one after the other, in one alternative of a rule or bracket
MAX_MEETING = 16  # maximum number of `&` in a terminal and the terminals that it uses; each may double the time


class LarkShape:
    """Size and nesting of a grammar, collected from its tokens in order, to limit the compiler's work."""

    def __init__(self) -> None:
        self._refers: dict[str, set[str]] = {"": set()}
        self._nested: dict[str, int] = {"": 0}
        self._meeting: Counter[str] = Counter()
        self._rule = ""
        self._lengths = [0]  # lengths of the open sequences
        self._words = 0

    def rule(self, name: str) -> None:
        """Begin a rule."""
        self._rule = name
        self._refers.setdefault(name, set())
        self._nested.setdefault(name, 0)
        self._lengths = [0]

    def word(self, name: str | None = None) -> None:
        """Add an element of a sequence: a rule or terminal called `name`, or else a string or regular expression."""
        if name is not None:
            self._refers[self._rule].add(name)
        self._words += 1
        self._lengths[-1] += 1
        if self._words > MAX_WORDS or self._lengths[-1] > MAX_SEQUENCE:
            raise refused(f"the grammar has more than {MAX_WORDS} names and strings, or {MAX_SEQUENCE} in one sequence")

    def bracket(self, mark: str) -> None:
        """Handle a bracket, the bar between alternatives, or the `&` between intersected expressions."""
        if mark == "&":
            self._meeting[self._rule] += 1
        elif mark == "|":
            self._lengths[-1] = 0
        elif mark in "([{":
            self._nested[self._rule] = max(self._nested[self._rule], len(self._lengths))
            if len(self._lengths) > MAX_DEPTH:
                raise refused(f"the grammar has more than {MAX_DEPTH} brackets inside each other")
            self._lengths.append(0)
        elif len(self._lengths) > 1:
            self._lengths.pop()

    def check(self) -> None:
        """Refuse a grammar that is nested too deeply, or intersects too many expressions."""
        depth: dict[str, int] = {}
        meeting: dict[str, int] = {}
        group: dict[str, int] = {}
        for number, names in enumerate(self._circles()):
            group |= dict.fromkeys(names, number)
            beyond = {other for name in names for other in self._known(name) if group.get(other) != number}
            own = sum(1 + self._nested[name] for name in names)
            reached = own + max((depth[other] for other in beyond), default=0)
            depth |= dict.fromkeys(names, reached)
            if reached > MAX_DEPTH:
                raise refused(
                    f"the grammar's rules lead {reached} deep from one to the next, brackets included; at most "
                    f"{MAX_DEPTH} are allowed"
                )
            is_terminal = names[0].lstrip("_")[:1].isupper()
            inside = beyond if is_terminal else set()  # terminals of a rule are not intersected
            together = sum(self._meeting[name] for name in names) + sum(meeting[other] for other in inside)
            meeting |= dict.fromkeys(names, together)
            if together > MAX_MEETING:
                raise refused(
                    f"the grammar has a terminal with {together} '&', those of the terminals inside it included (at "
                    f"{names[0]:.80}); at most {MAX_MEETING} are allowed"
                )

    def _known(self, name: str) -> list[str]:
        return [other for other in self._refers[name] if other in self._refers]

    def _circles(self) -> Iterator[list[str]]:
        """Yield strongly connected sets of rules, each after the sets that it refers to (Tarjan, without recursion)."""
        found: dict[str, int] = {}
        lowest: dict[str, int] = {}
        waiting: list[str] = []
        places: dict[str, int] = {}  # in `waiting`
        done: set[str] = set()
        for start in self._refers:
            if start in found:
                continue
            path = [(start, iter(self._known(start)))]
            found[start] = lowest[start] = len(found)
            places[start] = len(waiting)
            waiting.append(start)
            while path:
                name, others = path[-1]
                for other in others:
                    if other not in found:
                        found[other] = lowest[other] = len(found)
                        places[other] = len(waiting)
                        waiting.append(other)
                        path.append((other, iter(self._known(other))))
                        break
                    if other not in done:
                        lowest[name] = min(lowest[name], found[other])
                else:
                    path.pop()
                    if path:
                        lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[name])
                    if lowest[name] == found[name]:
                        circle = waiting[places[name] :]
                        del waiting[places[name] :]
                        done.update(circle)
                        yield circle


DEFAULT_WHITESPACE = r"[ ]{1,2}|\n(?:[ ]{0,40}|\t{0,10})"
ANY_TEXT = "/(?s:.*)/"
_ESCAPES = 'nrbtf\\"'  # without \u, with which a key could be spelled in two ways
_TOKENS = re.compile(  # the relevant tokens of llguidance; no pattern backtracks over the same characters
    r"""(?P<string>"(?:[^"\\\n]++|\\.)*+"i?)|(?P<comment>(?://|\#)[^\n]*+)|(?P<regex>/(?:[^/\\]++|\\.)++/[a-z]*+)"""
    r"""|(?P<broken>["/])|(?P<token><[^<>\s]++>)|(?P<json>%json\b\s*+)"""
    r"""|(?P<option>\b(?:temperature|max_tokens|stop)\s*+=)|^[ \t]*+[?!]?(?P<rule>\w[\w-]*+)(?=[^\n"/:]*+:)"""
    r"""|(?P<mark>[(\[{}\])|&])|(?P<name>\w[\w-]*+)""",
    re.MULTILINE,
)
_IS_LARK = re.compile(
    r"^[^\S\n]*+(?:%llguidance\b|[!?]?start\s*+:(?!:))", re.MULTILINE
)  # llguidance's own pattern for this takes quadratic time

Grammar = dict[str, Any]
"""An element of llguidance's list of grammars: `name`, and `lark_grammar` or `json_schema`."""


def quoted(text: str) -> str:
    """Quote a text as a string of Lark."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7f")


class Literals:
    """Converts texts in which the names of special tokens mean these tokens; `special` has their ids by name."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        names = sorted(filter(None, special), key=len, reverse=True)
        self._names = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def pieces(self, text: str) -> list[str]:
        """Return the text as a sequence of Lark expressions: strings, and tokens as `<[id]>`."""
        parts = self._names.split(text) if self._names is not None else [text]
        return [f"<[{self._special[part]}]>" if part in self._special else quoted(part) for part in parts if part]

    def expression(self, text: str) -> str:
        """Return the text as one Lark expression."""
        return " ".join(self.pieces(text)) or '""'


def is_token(piece: str) -> bool:
    """Return whether an expression of `Literals.pieces` is a token."""
    return piece.startswith("<[")


def json_grammar(name: str, schema: Any, spec: StructuredOutputsParams, budget: Budget) -> Grammar:
    """Return the grammar of a JSON schema, which `compilable_schema` rewrites or refuses.

    Of `spec` only the options for whitespace are used; `budget` is for all schemas in the request's grammars.
    """
    return {"name": name, "json_schema": _compilable(schema, spec, budget)}


def user_grammar(name: str, text: str, spec: StructuredOutputsParams, budget: Budget) -> Grammar:
    """Return a user's grammar, in Lark or GBNF, after checks; the syntax of Lark is checked by the compiler.

    Raises InvalidParameterError if the grammar is not GBNF, is too large, or has an unsupported option or JSON schema.
    """
    if _IS_LARK.search(text) is None:
        text = gbnf_to_lark(text)
    return {"name": name, "lark_grammar": _checked_lark(text, spec, budget)}


def _compilable(schema: Any, spec: StructuredOutputsParams, budget: Budget) -> dict[str, Any]:
    checked = compilable_schema(schema, budget)
    budget.compared |= checked.compared
    for remark in checked.remarks:
        logger.debug("%s", remark)
    options: dict[str, Any] = {
        "json_allowed_escapes": _ESCAPES + ("u" if checked.any_escape else ""),
        "json_allow_general_unicode_escapes": checked.any_escape,
    }
    if spec.disable_any_whitespace:
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = spec.whitespace_pattern or DEFAULT_WHITESPACE
    return {"x-guidance": options} | checked.schema


def _checked_lark(text: str, spec: StructuredOutputsParams, budget: Budget) -> str:
    kept, begin, position, inline, shape = [], 0, 0, 0, LarkShape()
    while match := _TOKENS.search(text, position):
        position, kind, found = match.end(), match.lastgroup, match.group(match.lastgroup or 0)
        if kind == "broken":
            what = "a string" if found == '"' else "an expression"
            raise refused(f"the grammar has {what} without an end: {text[match.start() : position + 40]!r}")
        if kind == "option":
            raise refused(f"the grammar has the option {found.rstrip('= ')!r}, which is not supported; leave it out")
        if kind == "rule":
            shape.rule(found)
        elif kind == "mark":
            shape.bracket(found)
        elif kind == "json":
            schema, end = _inline_schema(text, position)
            kept += text[begin:position], " ", json.dumps(_compilable(schema, spec, budget))
            begin = position = end
            inline += 1
        elif kind != "comment":
            shape.word(found if kind == "name" else None)
    if text.count("%json") != inline:
        raise refused("the grammar has %json where no schema can be, in a text or a comment; spell it in another way")
    shape.check()
    return "".join([*kept, text[begin:]])


def _inline_schema(text: str, position: int) -> tuple[Any, int]:
    """Return the JSON schema after `%json` and whitespace, and the position of its end."""
    try:
        _, end = json.JSONDecoder().raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise refused(f"the grammar has no JSON schema behind %json: {error}") from None
    return parsed_json("%json", text[position:end]), end
