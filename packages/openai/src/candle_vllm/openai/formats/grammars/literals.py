# SPDX-License-Identifier: MIT
"""Grammars of calls in notations that resemble JSON: `Pythonic` and `Gemma`."""

from __future__ import annotations

import dataclasses
import json
import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any

from candle_vllm.openai.formats.gemma import Gemma
from candle_vllm.openai.formats.grammars.schemas import Branch, FunctionShape, Root, entries
from candle_vllm.openai.formats.grammars.texts import json_value, scalar, string_body
from candle_vllm.openai.formats.grammars.writer import SPACE, SPACES, Block, Context, Writer, quoted, sequence
from candle_vllm.openai.formats.pythonic import Pythonic

_BARE_KEY = re.compile(r"[A-Za-z_][\w.\-]*")
_FREE_KEY = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"
_GEMMA_WORDS = {None: '"null"', False: '"false"', True: '"true"'}
_BARE = r"/[^\"'\\\x00-\x1f]*/"
_PLAIN = {'"': r"[^\"\\\x00-\x1f]", "'": r"[^'\\\x00-\x1f]"}
_ESCAPE = r"\\[\"'\\nrt]"
_PYTHON_WORDS = {None: '"None"', False: '"False"', True: '"True"'}


@dataclasses.dataclass(frozen=True)
class Notation:
    """How a tool-call format writes values: functions that return Lark expressions.

    Attributes:
        string: expression of the strings that a branch of a schema allows.
        text: expression of a given string.
        key, free_key: expressions of a given key, and of any key except the given ones.
        words: words for null, false and true.
        unkeyable: whether a key cannot be written.
        ordered: whether entries are sorted by key, case-insensitively, as by Jinja's `dictsort`; otherwise they are in
            the schema's order.
    """

    string: Callable[[Root, Branch], str]
    text: Callable[[str], str]
    key: Callable[[str], str]
    free_key: Callable[[list[str]], str]
    words: Mapping[Any, str]
    unkeyable: Callable[[str], bool]
    ordered: bool = False


class Values:
    """Lark expressions of the values in one tool's arguments, for the tool's schema `root`."""

    def __init__(self, writer: Writer, root: Root, notation: Notation) -> None:
        self._writer = writer
        self._root = root
        self._notation = notation
        self._rules: dict[int, str] = {}  # keyed by the id of a part of the schema; parts live as long as `root`
        self._any = ""

    def value(self, schema: Any) -> str:
        """Return a rule of the values that match a schema, which may be recursive."""
        if schema is True or schema == {}:
            return self._anything()
        target = self._root.resolved(schema)
        if target is schema and "$ref" not in str(schema):  # equal parts share a rule
            return self._writer.rule(self._alternatives(schema))
        if id(target) not in self._rules:
            self._rules[id(target)] = self._writer.reserve()
            self._writer.define(self._rules[id(target)], self._alternatives(target))
        return self._rules[id(target)]

    def _alternatives(self, schema: Any) -> str:
        return " | ".join(map(self._branch, self._root.branches(schema)))

    def items(self, schema: Any, key: Callable[[str], str], free_key: Callable[[list[str]], str]) -> str:
        """Return an expression of an object's entries, separated by commas; additional entries come last."""
        known, others = entries(self._root, schema)
        if self._notation.ordered:
            known = sorted(known, key=lambda entry: entry[0].lower())
        for name, _, _ in known:
            if self._notation.unkeyable(name):
                raise self._root.refused(f"properties: {name!r:.60}", "that name cannot be written in this format")
        first = rest = ""
        if others is not None:
            entry = sequence(free_key([name for name, _, _ in known]), self.value(others))
            rest = self._writer.rule(f'("," {SPACE} {entry})*')
            first = self._writer.rule(f"({entry} {rest})?")
        for name, part, required in reversed(known):
            entry = sequence(key(name), self.value(part))
            begun = self._writer.rule(sequence(entry, rest))
            more = self._writer.rule(sequence('","', SPACE, entry, rest))
            first = begun if required else self._writer.rule(" | ".join([begun, first or '""']))
            rest = more if required else self._writer.rule(" | ".join([more, rest or '""']))
        return first

    def _anything(self) -> str:
        if not self._any:
            self._any = self._writer.reserve()
            free = [Branch(kind, {}) for kind in ("null", "boolean", "number", "array", "object", "string")]
            self._writer.define(self._any, " | ".join(map(self._branch, free)))
        return self._any

    def _branch(self, branch: Branch) -> str:
        if branch.values is not None:
            return self._writer.rule(" | ".join(self._constant(value, 0) for value in branch.values))
        if branch.type == "string":
            return self._notation.string(self._root, branch)
        if branch.type == "array":
            return self._array(branch.schema)
        if branch.type == "object":
            inside = self.items({"type": "object", **branch.schema}, self._notation.key, self._notation.free_key)
            return self._writer.rule(sequence('"{"', inside, '"}"'))
        if branch.type in ("null", "boolean"):
            values = (None,) if branch.type == "null" else (False, True)
            return self._writer.rule(" | ".join(self._notation.words[value] for value in values))
        return scalar(self._writer, branch) or json_value(self._writer, self._root, branch)

    def _array(self, schema: Mapping[str, Any]) -> str:
        if "prefixItems" in schema or isinstance(schema.get("items"), list):
            raise self._root.refused("prefixItems", "write a list with one kind of items")
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most is not None and most < max(least, 1):
            if most < least:
                raise self._root.refused("minItems", f"{least} is above maxItems {most}")
            return '"[]"'
        items = schema.get("items", True)
        if items is False:
            if least:
                raise self._root.refused("items", "no item fits that schema")
            return '"[]"'
        one = self.value(items)
        count = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        inside = sequence(one, f'("," {SPACE} {one}){count}' if most != 1 else "")
        return self._writer.rule(sequence('"["', inside if least else f"({inside})?", '"]"'))

    def _constant(self, value: Any, depth: int) -> str:
        if isinstance(value, str):
            return self._notation.text(value)
        if value is None or isinstance(value, bool):
            return self._notation.words[value]
        if isinstance(value, (int, float)):
            return f'"{value!r}"'
        if depth > 16:
            raise self._root.refused("enum", "a value in it is nested too deeply")
        if isinstance(value, list):
            return sequence('"["', f' "," {SPACE} '.join(self._constant(one, depth + 1) for one in value), '"]"')
        found = sorted(value.items(), key=lambda pair: pair[0].lower()) if self._notation.ordered else value.items()
        pairs = [f"{self._notation.key(key)} {self._constant(one, depth + 1)}" for key, one in found]
        return sequence('"{"', f' "," {SPACE} '.join(pairs), '"}"')


def pythonic(body: Pythonic, context: Context) -> Block:
    """Return the grammar of calls in a list, or on separate lines."""
    writer = context.writer
    call = writer.rule(" | ".join(_call(context, tool) for tool in context.tools))
    separator = f'"," {SPACE}' if body.listed else '"\\n"'
    calls = sequence(call, f"({separator} {call})*" if context.many else "")
    end = sequence(SPACE, writer.mark(body.closers[0])) if body.closers else ""
    if body.listed:
        return Block("[", sequence(calls, '"]"', end))
    return Block("", sequence(calls, end))


def begun_calls(context: Context) -> tuple[str, str]:
    """Return grammars of calls without an opening mark, and of the beginning of such calls, which may also be text."""
    writer = context.writer
    calls = writer.rule(" | ".join(_call(context, tool) for tool in context.tools))
    begun = []
    for tool in context.tools:
        name = writer.rule(quoted(f"{tool.name}("), "[lazy]")
        begun.append(sequence(name, _arguments(context, tool)))
    again = f'("," {SPACE} {calls})*' if context.many else ""
    head = writer.rule(f'{SPACES} "["', "[lazy]")
    return writer.rule(sequence(head, writer.rule(" | ".join(begun)), again, '"]"')), head


def _call(context: Context, tool: FunctionShape) -> str:
    return sequence(quoted(f"{tool.name}("), _arguments(context, tool))


def _arguments(context: Context, tool: FunctionShape) -> str:
    writer, root = context.writer, context.root(tool)
    for key in root.schema.get("properties", {}):
        if not re.fullmatch(r"[A-Za-z_]\w{0,255}", key) or keyword.iskeyword(key):
            raise root.refused(f"properties: {key!r:.60}", "arguments must have names that Python allows")
    values = Values(writer, root, _python_notation(writer))
    inside = values.items(
        root.schema, lambda key: quoted(f"{key}="), lambda known: sequence(writer.other(_FREE_KEY, known), '"="')
    )
    return sequence(inside, '")"')


def _python_notation(writer: Writer) -> Notation:
    def text(value: str) -> str:
        double = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\x7f")
        single = "'" + double[1:-1].replace('\\"', '"').replace("'", "\\'") + "'"
        return writer.terminal(f"{quoted(double)} | {quoted(single)}")

    def free_key(known: list[str]) -> str:
        bare = writer.other(_FREE_KEY, known)
        return sequence(writer.terminal(f'"\'" {bare} "\'" | "\\"" {bare} "\\""'), '":"', SPACE)

    return Notation(
        string=lambda root, branch: _string(writer, root, branch),
        text=text,
        key=lambda key: sequence(text(key), '":"', SPACE),
        free_key=free_key,
        words=_PYTHON_WORDS,
        unkeyable=lambda _: False,
    )


def _string(writer: Writer, root: Root, branch: Branch) -> str:
    """Return an expression of a quoted string, without escapes if the schema has a pattern or format."""
    if root.grammar is not None:
        return writer.spelled(root.grammar)
    if {"pattern", "format"} & branch.schema.keys():
        inner = writer.terminal(f"{string_body(writer, root, branch)} & {_BARE}")
        return writer.terminal(f'"\'" {inner} "\'" | "\\"" {inner} "\\""')
    string_body(writer, root, branch)  # refuses impossible lengths
    least, most = branch.schema.get("minLength", 0), branch.schema.get("maxLength", "")
    count = f"{{{least},{most}}}" if least or most != "" else "*"
    forms = [f"{quoted(quote)} /({plain}|{_ESCAPE}){count}/ {quoted(quote)}" for quote, plain in _PLAIN.items()]
    return writer.terminal(" | ".join(forms))


def gemma(body: Gemma, context: Context) -> Block:
    """Return the grammar of a call: a name and an object."""
    writer = context.writer
    notation = _gemma_notation(writer, body.quote)

    def call(tool: FunctionShape) -> str:
        root = context.root(tool)
        inside = Values(writer, root, notation).items(root.schema, notation.key, notation.free_key)
        return sequence(quoted(tool.name + "{"), inside, '"}"')

    end = writer.mark(body.closers[0]) if body.closers else ""
    return Block(body.prefix, sequence(writer.rule(" | ".join(map(call, context.tools))), end))


def _gemma_notation(writer: Writer, quote: str) -> Notation:
    def string(root: Root, branch: Branch) -> str:
        body = string_body(writer, root, branch)
        return sequence(writer.mark(quote), writer.until(quote, body))

    def text(value: str) -> str:
        return sequence(writer.mark(quote), quoted(value) if value else "", writer.mark(quote))

    return Notation(
        string=string,
        text=text,
        key=lambda key: sequence(quoted(key) if _BARE_KEY.fullmatch(key) else text(key), '":"'),
        free_key=lambda known: sequence(writer.other(_FREE_KEY, known), '":"'),
        words=_GEMMA_WORDS,
        unkeyable=lambda key: quote in key,
        ordered=True,
    )
