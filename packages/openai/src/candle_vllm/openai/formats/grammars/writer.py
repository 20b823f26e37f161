# SPDX-License-Identifier: MIT
"""Writer of grammars in llguidance's dialect of Lark (its docs/syntax.md), and expressions that all grammars share.

The name of a special token in a mark means that token, never its letters; free text has no special tokens. White space
is optional where models usually write it, and its length is limited, so that no model can write it without end.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from candle_vllm.core.sampling.lark import ANY_TEXT, Literals, is_token
from candle_vllm.core.sampling.lark import quoted as lark_string
from candle_vllm.openai.formats.grammars.custom import json_rules, text_terminals
from candle_vllm.openai.formats.grammars.schemas import OBJECT, FunctionShape, Root
from candle_vllm.openai.formats.layout import ToolFormat

SPACE = "WS?"
SPACES = "/[ \\n]{0,4}/"  # as `SPACE`, within a lazy rule
_SPACE = r"/\n{1,3}[ ]{0,4}|[ ]{1,4}/"
_QUOTES = "`\"'"
_UNQUOTED = "/(?s:(.*[^`\"'])?)/"


def quoted(text: str) -> str:
    """Write a text as a Lark string; `%json` is escaped, because core interprets it as the beginning of a schema."""
    return lark_string(text).replace("%json", "\\x25json")


def sequence(*parts: str) -> str:
    """Join expressions that follow each other; "" stands for no expression."""
    return " ".join(filter(None, parts)) or '""'


def common(*marks: str) -> str:
    """Return the common beginning of all marks."""
    same = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*marks, strict=False))
    return "".join(characters[0] for characters in same)


class Writer:
    """Rules and terminals of one grammar.

    Args:
        special: special token -> its id.
        own: ordinary tokens, name -> id; in `mark`, such a name means this token, as in the model's training.
    """

    def __init__(self, special: Mapping[str, int], own: Mapping[str, int] | None = None) -> None:
        self._literals = Literals(special)
        self._marks = Literals({**own, **special}) if own else self._literals
        self._lines: list[str] = [f"WS: {_SPACE}", f"TEXT: {ANY_TEXT}"]
        self._known: dict[str, str] = {}

    def lark(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._lines])

    def rule(self, expression: str, options: str = "") -> str:
        """Return the name of a rule; equal expressions share a rule."""
        key = f"{options}:{expression}"
        if key not in self._known:
            self._known[key] = self.define(self.reserve(), expression, options)
        return self._known[key]

    def reserve(self) -> str:
        """Reserve the name of a recursive rule, for `define`."""
        self._lines.append("")
        return f"r{len(self._lines)}"

    def define(self, name: str, expression: str, options: str = "") -> str:
        """Define a reserved rule, and return its name."""
        self._lines[int(name[1:]) - 1] = f"{name}{options}: {expression}"
        return name

    def terminal(self, expression: str) -> str:
        """Return the name of a terminal; its expression has only strings, regular expressions and terminals."""
        if expression.isidentifier():
            return expression
        key = f"terminal:{expression}"
        if key not in self._known:
            self._known[key] = f"T{len(self._lines)}"
            self._lines.append(f"{self._known[key]}: {expression}")
        return self._known[key]

    def other(self, free: str, known: Sequence[str]) -> str:
        """Return a terminal of the names that match the expression `free` and are not `known`."""
        return self.terminal(f"{free} & ~({' | '.join(map(quoted, known))})" if known else free)

    def json(self, schema: Mapping[str, Any]) -> str:
        """Return a rule of a JSON value that follows a schema; references in the schema are relative to it."""
        return self.rule("%json " + json.dumps(schema, ensure_ascii=False).replace("%json", "\\u0025json"))

    def spelled(self, definition: str) -> str:
        """Return a JSON string, which is also a Python string, whose content follows a user's grammar."""
        return sequence(quoted('"'), self._custom(definition, json_rules), quoted('"'))

    def custom(self, definition: str) -> str:
        """Return a terminal of the texts that follow a user's grammar."""
        return self._custom(definition, text_terminals)

    def _custom(self, definition: str, rules: Callable[[str, str], tuple[str, list[str]]]) -> str:
        key = f"{rules.__name__}:{definition}"
        if key not in self._known:
            self._known[key], lines = rules(definition, f"u{len(self._lines)}")
            self._lines += lines
        return self._known[key]

    def mark(self, text: str) -> str:
        """Write a mark; names of special tokens, and of the model's `own` tokens, become these tokens."""
        return " ".join(self._marks.pieces(text))

    def is_text(self, text: str) -> bool:
        """Whether a mark has no special token, so that a text may contain it."""
        return not any(map(is_token, self._literals.pieces(text)))

    def without(self, body: str, marks: Iterable[str]) -> str:
        """Return a terminal of the texts of terminal `body` that contain none of these marks."""
        held = [mark for mark in dict.fromkeys(marks) if self.is_text(mark)]
        if not held:
            return body
        head = common(*held)  # one short complement costs a lexer much less than several, or than a long one
        ends = " | ".join(quoted(mark[len(head) :]) for mark in held)
        return self.terminal(f"{body} & ~(TEXT {sequence(quoted(head) if head else '', f'({ends})')} TEXT)")

    def until(self, end: str, body: str = "TEXT", others: Sequence[str] = ()) -> str:
        """Return an expression of a text (terminal `body`, without `others`) up to and including the first `end`."""
        first, *rest = self._literals.pieces(end)
        if is_token(first):
            return sequence(self.terminal(self.without(body, others)), first, *rest)
        if not rest:
            # Free text ends at the first mark; a text with a length or pattern could contain a mark.
            plain = body == "TEXT" and not others
            return self.rule(f"{body if plain else self.without(body, [end, *others])} {first}", "[lazy]")
        return sequence(self.terminal(f"{self.without(body, others)} {first}"), *rest)

    def thought(self, end: str) -> str:
        """Return an expression of reasoning and its end mark; an end mark directly after a quote is reasoning."""
        if not self.is_text(end):
            return self.until(end)
        body = self.terminal(f"{_UNQUOTED} & ~(TEXT /[`\"']/ {quoted(end)} TEXT)")
        return self.rule(f"{body} {quoted(end)}", "[lazy]")

    def trigger(self, mark: str, then: str, body: str = "TEXT", lead: str = "") -> str:
        """Return an expression of text up to a mark, and of what must follow the mark; a mark in quotes is text.

        Args:
            mark: the mark that triggers.
            then: the expression after the mark.
            body: the terminal of the text before the mark.
            lead: text that must follow the mark and white space; otherwise the mark does not trigger.
        """
        if not self.is_text(mark):
            return self.rule(sequence(self.until(mark, body), SPACE if lead else "", self.mark(lead), then))
        behind = sequence(quoted(mark), SPACES if lead else "", quoted(lead) if lead else "")
        plain = _UNQUOTED if body == "TEXT" else self.terminal(f"{body} & {_UNQUOTED}")
        found = [f"{self.rule(f'{plain} {behind}', '[lazy]')} {then}"]
        for quote in _QUOTES if not mark.startswith("`") else "":
            within = self.rule(f"{body} {quoted(quote)} {behind}", "[lazy]")
            found += [f"{within} {quoted(quote)}", f"{within} {then}"]
        return self.rule(" | ".join(found))


class Block(NamedTuple):
    """Expression of one or more calls: the mark with which it begins ("" without a mark), and the rest."""

    lead: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Context:
    """Data that the grammars of one request share.

    Attributes:
        writer: receives the rules.
        loose: names of the tools whose arguments are not checked by their schemas: any object is allowed.
        many: whether a message may have more than one call.
    """

    writer: Writer
    form: ToolFormat
    tools: Sequence[FunctionShape]
    loose: Collection[str]
    many: bool

    def root(self, tool: FunctionShape) -> Root:
        """Return the schema that the arguments of a tool must follow."""
        return Root(tool, OBJECT if tool.name in self.loose else tool.parameters, self._grammar(tool))

    def json(self, tool: FunctionShape) -> str:
        """Return an expression of the arguments of a tool as a JSON object."""
        if (grammar := self._grammar(tool)) is not None:
            key = quoted(json.dumps(next(iter(tool.parameters["properties"]))) + ":")
            return self.writer.rule(sequence('"{"', SPACE, key, SPACE, self.writer.spelled(grammar), SPACE, '"}"'))
        root = self.root(tool)
        schema = root.self_contained(root.schema)
        if not schema.get("properties") and not schema.get("required") and schema.get("additionalProperties") is False:
            return '"{}"'
        return self.writer.json(schema)

    def _grammar(self, tool: FunctionShape) -> str | None:
        """Return the user's grammar of the tool's input, unless the tool is loose."""
        return None if tool.name in self.loose else tool.grammar
