# SPDX-License-Identifier: MIT
"""Puts a grammar together, in llguidance's dialect of Lark (its docs/syntax.md), and what those of all bodies share.

A special token in a mark is that token, never its letters; free text has no special tokens. White space where a model
writes some by habit is optional and bounded, so that no model can write it for ever.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from candle_vllm.core.sampling.lark import ANY_TEXT, Literals, is_token
from candle_vllm.core.sampling.lark import quoted as lark_string
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.formats.grammars.custom import json_rules, text_terminals
from candle_vllm.openai.formats.grammars.schemas import OBJECT, FunctionShape, Root
from candle_vllm.openai.formats.layout import ToolFormat
from candle_vllm.openai.formats.output import NAME

SPACE = "WS?"
_SPACE = r"/\n{1,3}[ ]{0,4}|[ ]{1,4}/"
_QUOTES = "`\"'"
_UNQUOTED = "/(?s:(.*[^`\"'])?)/"


def quoted(text: str) -> str:
    """A text as a string of Lark; core takes `%json` in one for a schema."""
    return lark_string(text).replace("%json", "\\x25json")


def sequence(*parts: str) -> str:
    """Expressions that follow each other; "" is no expression."""
    return " ".join(filter(None, parts)) or '""'


def common(*marks: str) -> str:
    """How all of them begin."""
    same = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*marks, strict=False))
    return "".join(characters[0] for characters in same)


class Writer:
    """Rules and terminals of one grammar.

    Args:
        special: special token -> its id.
        own: tokens that are text, name -> id; in a mark that is forced the name is this token, as the model learned it.
    """

    def __init__(self, special: Mapping[str, int], own: Mapping[str, int] | None = None) -> None:
        self._literals = Literals(special)
        self._marks = Literals({**own, **special}) if own else self._literals
        self._lines: list[str] = [f"WS: {_SPACE}", f"TEXT: {ANY_TEXT}"]
        self._known: dict[str, str] = {}

    def lark(self, start: str) -> str:
        """The grammar as text."""
        return "\n".join([f"start: {start}", *self._lines])

    def rule(self, expression: str, options: str = "") -> str:
        """A rule's name; the same expression gives the same rule."""
        key = f"{options}:{expression}"
        if key not in self._known:
            self._known[key] = self.define(self.reserve(), expression, options)
        return self._known[key]

    def reserve(self) -> str:
        """A name for a rule that refers to itself; see `define`."""
        self._lines.append("")
        return f"r{len(self._lines)}"

    def define(self, name: str, expression: str, options: str = "") -> str:
        """Gives a reserved name its meaning."""
        self._lines[int(name[1:]) - 1] = f"{name}{options}: {expression}"
        return name

    def terminal(self, expression: str) -> str:
        """A terminal's name; its expression has strings, regexes, and terminals only."""
        if expression.isidentifier():
            return expression
        key = f"terminal:{expression}"
        if key not in self._known:
            self._known[key] = f"T{len(self._lines)}"
            self._lines.append(f"{self._known[key]}: {expression}")
        return self._known[key]

    def json(self, schema: Mapping[str, Any]) -> str:
        """A JSON value; the schema stands for itself, so its references are its own."""
        return self.rule("%json " + json.dumps(schema, ensure_ascii=False).replace("%json", "\\u0025json"))

    def spelled(self, definition: str) -> str:
        """A JSON string, which Python reads alike, whose text follows a user's grammar."""
        return sequence(quoted('"'), self._custom(definition, json_rules), quoted('"'))

    def custom(self, definition: str) -> str:
        """The terminal of the texts that follow a user's grammar."""
        return self._custom(definition, text_terminals)

    def _custom(self, definition: str, rules: Callable[[str, str], tuple[str, list[str]]]) -> str:
        key = f"{rules.__name__}:{definition}"
        if key not in self._known:
            self._known[key], lines = rules(definition, f"u{len(self._lines)}")
            self._lines += lines
        return self._known[key]

    def mark(self, text: str) -> str:
        """A text in which names of special tokens, and of tokens of the model's own, are these tokens."""
        return " ".join(self._marks.pieces(text))

    def is_special(self, text: str) -> bool:
        """Whether a mark begins with a special token."""
        return bool(text) and is_token(self._literals.pieces(text)[0])

    def is_text(self, text: str) -> bool:
        """Whether a mark has no special token, so that a text may hold it."""
        return not any(map(is_token, self._literals.pieces(text)))

    def without(self, body: str, marks: Iterable[str]) -> str:
        """The texts of terminal `body` that hold none of these marks, as a terminal."""
        held = [mark for mark in dict.fromkeys(marks) if self.is_text(mark)]
        if not held:
            return body
        head = common(*held)  # one complement costs a lexer much less than several, or a long one
        ends = " | ".join(quoted(mark[len(head) :]) for mark in held)
        return self.terminal(f"{body} & ~(TEXT {sequence(quoted(head) if head else '', f'({ends})')} TEXT)")

    def until(self, end: str, body: str = "TEXT", others: Sequence[str] = ()) -> str:
        """A text of terminal `body`, and the mark that ends it where it comes first; it holds none of `others`."""
        first, *rest = self._literals.pieces(end)
        if is_token(first):
            return sequence(self.terminal(self.without(body, others)), first, *rest)
        if not rest:
            # Free text ends at the first mark; what must have a length or a form could have one inside.
            plain = body == "TEXT" and not others
            return self.rule(f"{body if plain else self.without(body, [end, *others])} {first}", "[lazy]")
        return sequence(self.terminal(f"{self.without(body, others)} {first}"), *rest)

    def thought(self, end: str) -> str:
        """Thoughts, and the mark that ends them. A mark in quotes does not end them, so no mark follows a quote."""
        if not self.is_text(end):
            return self.until(end)
        body = self.terminal(f"{_UNQUOTED} & ~(TEXT /[`\"']/ {quoted(end)} TEXT)")
        return self.rule(f"{body} {quoted(end)}", "[lazy]")

    def trigger(self, mark: str, then: str, body: str = "TEXT", lead: str = "") -> str:
        """Text up to a mark, and what must follow it; a mark in quotes is text.

        Args:
            mark: what to wait for.
            then: an expression.
            body: the terminal of the text before the mark.
            lead: the text that must follow the mark and white space, or the mark does not count.
        """
        if not self.is_text(mark):
            return self.rule(sequence(self.until(mark, body), SPACE if lead else "", self.mark(lead), then))
        behind = sequence(quoted(mark), "/[ \\n]{0,4}/" if lead else "", quoted(lead) if lead else "")
        plain = _UNQUOTED if body == "TEXT" else self.terminal(f"{body} & {_UNQUOTED}")
        found = [f"{self.rule(f'{plain} {behind}', '[lazy]')} {then}"]
        for quote in _QUOTES if not mark.startswith("`") else "":
            within = self.rule(f"{body} {quoted(quote)} {behind}", "[lazy]")
            found += [f"{within} {quoted(quote)}", f"{within} {then}"]
        return self.rule(" | ".join(found))


class Block(NamedTuple):
    """The expression of one call or more behind an opening mark.

    Attributes:
        lead: the mark that it begins with; "" without a mark.
        rest: an expression of what follows.
    """

    lead: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Context:
    """One request.

    Attributes:
        writer: gets the rules.
        form: the row of the table.
        tools: what may be called.
        loose: names of the tools of which any arguments will do.
        many: whether a message may have more than one call.
    """

    writer: Writer
    form: ToolFormat
    tools: Sequence[FunctionShape]
    loose: Collection[str]
    many: bool

    def root(self, tool: FunctionShape) -> Root:
        """The schema that the arguments of a tool must follow."""
        return Root(tool, OBJECT if tool.name in self.loose else tool.parameters, self._grammar(tool))

    def json(self, tool: FunctionShape) -> str:
        """The arguments of a tool as JSON."""
        if (grammar := self._grammar(tool)) is not None:
            key = quoted(json.dumps(next(iter(tool.parameters["properties"]))) + ":")
            return self.writer.rule(sequence('"{"', SPACE, key, SPACE, self.writer.spelled(grammar), SPACE, '"}"'))
        root = self.root(tool)
        schema = root.self_contained(root.schema)
        if not schema.get("properties") and not schema.get("required") and schema.get("additionalProperties") is False:
            return '"{}"'
        return self.writer.json(schema)

    def _grammar(self, tool: FunctionShape) -> str | None:
        """The user's grammar of its text, where that is to be followed."""
        return None if tool.name in self.loose else tool.grammar

    def check_names(self) -> None:
        """Refuses names that no parser of this format would take for one."""
        for tool in self.tools:
            if NAME.fullmatch(tool.name) is None:
                raise UnsupportedParameterError(
                    f"tools: {tool.name!r} must begin with a letter or '_' in this model's tool format; rename it",
                    "tools",
                )
