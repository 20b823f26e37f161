# SPDX-License-Identifier: MIT
"""Grammars of calls: arguments as texts between tags (`Tagged`, `Nested`) or as JSON (`JsonCalls`, `NamedJson`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

from candle_vllm.openai.formats.grammars.schemas import TYPES, Branch, FunctionShape, Root, Schema, entries
from candle_vllm.openai.formats.grammars.texts import Guard, edged, json_value, scalar, string_body
from candle_vllm.openai.formats.grammars.writer import SPACE, SPACES, Block, Context, Writer, quoted, sequence
from candle_vllm.openai.formats.json_calls import JsonCalls
from candle_vllm.openai.formats.named_calls import NamedJson
from candle_vllm.openai.formats.nested import Nested
from candle_vllm.openai.formats.output import mistral_id
from candle_vllm.openai.formats.tagged import Tagged
from candle_vllm.openai.formats.values import Kinds, argument_kinds

_FREE_KEY = "/[A-Za-z_][A-Za-z0-9_.\\-]{0,63}/"
_INDEX = "/[1-9][0-9]{0,2}/"


def tagged(body: Tagged, context: Context) -> Block:
    """Return the grammar of calls in which each argument is a text between tags."""
    writer = context.writer
    call = writer.rule(" | ".join(_TaggedCall(body, context, tool).expression() for tool in context.tools))
    end = sequence(SPACE, writer.mark(body.closers[0])) if body.closers else ""
    if not (body.name_open and body.closers and context.many):
        return Block(body.name_open, sequence(call, end))
    again = writer.rule(sequence(SPACE, writer.mark(body.name_open), call))
    return Block(body.name_open, sequence(call, f"{again}*", end))


_Body = TypeVar("_Body", Tagged, Nested)


class _Call(Generic[_Body]):
    def __init__(self, body: _Body, context: Context, tool: FunctionShape) -> None:
        self._body = body
        self._writer: Writer = context.writer
        self._root: Root = context.root(tool)
        self._tool = tool
        self._loose = tool.name in context.loose
        self._rules: dict[tuple[str, int], str] = {}  # of `Nested`: keyed by tag and the id of a part of the schema


class _TaggedCall(_Call[Tagged]):
    def expression(self) -> str:
        """Return the expression of a call, from its name to its end."""
        body, mark = self._body, self._writer.mark
        known, others = entries(self._root, self._root.schema)
        name_end = mark(body.name_end)
        if not body.name_open and body.name_end.isspace():  # GLM 4.7 omits the end of the name
            name_end = f"({name_end})?"
        attribute = sequence('"\\" index=\\""', _INDEX, '"\\""') if body.name_head else ""
        values = []
        for key, schema, required in known:
            value = self._writer.rule(sequence(SPACE, self._entry(key, schema)))
            values.append(value if required else f"{value}?")
        if others is not None:
            free_key = self._writer.other(_FREE_KEY, [key for key, _, _ in known])
            kinds = argument_kinds(self._tool.parameters, "")  # no property has this name
            values.append(self._writer.rule(sequence(SPACE, self._value(free_key, others, kinds))) + "*")
        return sequence(quoted(self._tool.name), attribute, name_end, *values, SPACE, mark(body.call_end))

    def _entry(self, key: str, schema: Schema) -> str:
        marks = (self._body.key_end, self._body.key_open, *(['"'] if self._body.head else []))
        if not key or key != key.strip() or any(mark in key for mark in marks):
            raise self._root.refused(f"properties: {key!r:.60}", "that name cannot be told from the marks around it")
        return self._value(quoted(key), schema, argument_kinds(self._tool.parameters, key))

    def _value(self, key: str, schema: Schema, kinds: Kinds) -> str:
        """Return the rule of a key, its value, and the marks around them."""
        body, found = self._body, self._root.branches(schema)
        free = all(branch.values is None and not branch.schema for branch in found) and len(found) == len(TYPES) - 1
        texts = [branch for branch in found if branch.type == "string"]
        others = [branch for branch in found if branch.type != "string"]
        if not body.head:
            unlike = set[str]() if self._loose or free else {*kinds.types, *(one.type for one in others)}
            others = [] if free else others
            words = {branch.type: word for branch in others if texts and (word := self._word(branch))}
            parts = [self._text(branch, unlike, words.values()) for branch in texts]
            parts += [self._json(branch) for branch in others if branch.type not in words]
            return sequence(self._key(key, ""), self._writer.rule(" | ".join(parts)))
        typed = "?P<type>" in body.head
        alternatives = []
        for branch in [*texts, *others]:
            text = branch.type == "string"
            kind = "number" if branch.type == "integer" else branch.type
            attribute = f' type="{kind}"' if typed else f' string="{"true" if text else "false"}"'
            value = self._text(branch, set()) if text else self._json(branch)
            alternatives.append(sequence(self._key(key, attribute), value))
        return self._writer.rule(" | ".join(alternatives))

    def _key(self, key: str, attribute: str) -> str:
        body, mark = self._body, self._writer.mark
        before = body.head.partition("(?P<key>")[0] if body.head else ""
        attribute = quoted(f'"{attribute}') if body.head else ""
        opened = sequence(SPACE, mark(body.value_open)) if body.value_open else ""
        return sequence(mark(body.key_open + before), key, attribute, mark(body.key_end), opened)

    def _text(self, branch: Branch, unlike: set[str], words: Iterable[str] = ()) -> str:
        """Return the expression of a string, or of a number or word in `words`, and the mark after it.

        If a value may be either, both are one terminal: a lexer cannot decide between two before it reads the mark.
        """
        body, writer = self._body, self._writer
        for value in branch.values or ():
            if body.value_end in value or body.call_end in value:
                raise self._root.refused("enum", f"{value!r:.60} has a mark of the format in it")
        terminal = string_body(writer, self._root, branch, unlike)
        if self._root.grammar is not None:
            return self._custom(terminal)
        if body.newlines and branch.values is not None:
            terminal = self._listed(branch.values)
        elif body.newlines:
            terminal = edged(writer, terminal) if branch.schema else terminal
        outer = [closer for closer in body.closers if closer != body.call_end]
        if branch.values is None and outer and all(map(writer.is_text, (body.call_end, *outer))):
            ends = " | ".join(map(quoted, outer))
            terminal = writer.terminal(f"{terminal} & ~(TEXT {quoted(body.call_end)} /[ \\t\\r\\n]*/ ({ends}) TEXT)")
        if body.text_open and branch.values is None:
            inner = sequence(writer.until(body.text_end, terminal), writer.mark(body.value_end))
            marked = sequence(writer.mark(body.text_open), inner)
            bare = self._or_words(writer.terminal(f"{terminal} & ~({quoted(body.text_open)} TEXT)"), words)
            return writer.rule(f"{marked} | {writer.until(body.value_end, bare)}")
        end = writer.until(body.value_end, self._or_words(terminal, words))
        return writer.rule(f"{end} | {writer.mark(body.value_end)}") if branch.values and "" in branch.values else end

    def _custom(self, terminal: str) -> str:
        """Return a text of a user's grammar, as templates write it, and the mark after it."""
        body, writer = self._body, self._writer
        if body.newlines:
            terminal = writer.terminal(f'"\\n" {terminal} "\\n"')
        if body.text_open:
            inner = sequence(writer.until(body.text_end, terminal), writer.mark(body.value_end))
            return sequence(writer.mark(body.text_open), inner)
        return writer.until(body.value_end, terminal, [body.call_end])

    def _or_words(self, terminal: str, words: Iterable[str]) -> str:
        return self._writer.terminal(" | ".join([terminal, *(f"{SPACE} {word} {SPACE}" for word in words)]))

    def _word(self, branch: Branch) -> str | None:
        """Return the terminal of a number or a word; None for other values.

        Templates with line breaks or CDATA around values write values other than lists and objects as Python does.
        """
        return scalar(self._writer, branch, python=self._body.newlines or bool(self._body.text_open))

    def _listed(self, values: tuple[str, ...]) -> str:
        """Return texts, with the line breaks around them that the parser removes."""
        parts = []
        for value in filter(None, values):
            bare = value.startswith("\n") or value.endswith("\n")
            parts.append(f'"\\n" {quoted(value)} "\\n"' if bare else f'{quoted(value)} | "\\n" {quoted(value)} /\\n?/')
        return self._writer.terminal(" | ".join(parts) or '"\\n"')

    def _json(self, branch: Branch) -> str:
        """Return JSON and the mark after it. Strings in it may not contain the format's marks."""
        body = self._body
        marks = [mark for mark in (body.value_end, body.call_end) if self._writer.is_text(mark)]
        value = self._word(branch) or json_value(self._writer, self._root, branch, Guard(self._root, marks))
        return sequence(SPACE, value, SPACE, self._writer.mark(body.value_end))


_KEY = re.compile(r"[^\s<>/\"'=]{1,128}")
_FREE_KEYS = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"


def nested(body: Nested, context: Context) -> Block:
    """Return the grammar of names with nested tags."""
    writer = context.writer
    lead = f'{body.tag}<{body.call} name="'
    call = writer.rule(" | ".join(_NestedCall(body, context, tool).expression() for tool in context.tools))
    again = writer.rule(sequence(SPACE, writer.mark(lead), call)) + "*" if context.many else ""
    end = sequence(SPACE, writer.mark(body.closers[0])) if body.closers else ""
    return Block(lead, sequence(call, again, end))


class _NestedCall(_Call[Nested]):
    def expression(self) -> str:
        inside = self._entries(self._root.schema)
        return sequence(quoted(self._tool.name + '">'), inside, SPACE, self._close(self._body.call))

    def _close(self, key: str) -> str:
        return self._writer.mark(f"{self._body.tag}</{key}>")

    def _entries(self, schema: Mapping[str, Any]) -> str:
        known, others = entries(self._root, schema)
        parts = []
        for key, part, required in known:
            if not _KEY.fullmatch(key) or (key == self._body.item and not parts):
                raise self._root.refused(f"properties: {key!r:.60}", "that name cannot be a tag here")
            entry = self._writer.rule(sequence(SPACE, self._entry(key, part)))
            parts.append(entry if required else f"{entry}?")
        if others is not None and self._loose:
            parts.append(self._any() + "*")
        elif others not in (None, True):
            raise self._root.refused("additionalProperties", "tags need names; list the properties")
        return sequence(*parts) if parts else ""

    def _any(self) -> str:
        writer, tag = self._writer, self._body.tag
        name = writer.reserve()
        text = writer.until(f"{tag}</", writer.without("TEXT", [f"{tag}<"]))
        inside = writer.rule(f"{text} | {SPACE} {name}+ {SPACE} {writer.mark(tag + '</')}")
        return writer.define(
            name, sequence(writer.mark(f"{tag}<"), _FREE_KEYS, '">"', inside, _FREE_KEYS, '">"', SPACE)
        )

    def _entry(self, key: str, schema: Any) -> str:
        """Return the rule of a tag, its value, and the tag that closes it; the schema may be recursive."""
        target = self._root.resolved(schema)
        known = (key, id(target))
        if known not in self._rules:
            self._rules[known] = self._writer.reserve()
            self._writer.define(self._rules[known], self._element(key, target))
        return self._rules[known]

    def _element(self, key: str, schema: Any) -> str:
        found = self._root.branches(schema)
        kinds = {branch.type for branch in found}
        unlike = set() if kinds == {"string"} else kinds - {"string"}
        free = all(branch.values is None and not branch.schema for branch in found) and len(found) == len(TYPES) - 1
        if free:
            found, unlike = [branch for branch in found if branch.type == "string"], {"object", "array"}
        parts = [self._value(key, branch, unlike) for branch in found]
        return sequence(self._writer.mark(f"{self._body.tag}<{key}>"), self._writer.rule(" | ".join(parts)))

    def _value(self, key: str, branch: Branch, unlike: set[str]) -> str:
        writer = self._writer
        if branch.type == "string":
            if any(self._body.tag + "<" in value for value in branch.values or ()):
                raise self._root.refused("enum", "a value has a mark of the format in it")
            terminal = string_body(writer, self._root, branch, unlike)
            closer = f"{self._body.tag}</{key}>"
            end = writer.until(closer, writer.without(terminal, [self._body.tag + "<"]))
            return writer.rule(f"{end} | {writer.mark(closer)}") if branch.values and "" in branch.values else end
        if branch.values is None and branch.type == "object":
            return sequence(self._entries({"type": "object", **branch.schema}), SPACE, self._close(key))
        if branch.values is None and branch.type == "array":
            return sequence(self._items(branch.schema), SPACE, self._close(key))
        return sequence(json_value(writer, self._root, branch), self._close(key))

    def _items(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems", "")
        items = schema.get("items", True)
        if "prefixItems" in schema or not isinstance(items, (Mapping, bool)) or items is False:
            raise self._root.refused("prefixItems", "write a list with one kind of items")
        if most != "" and most < least:
            raise self._root.refused("minItems", f"{least} is above maxItems {most}")
        one = self._writer.rule(sequence(SPACE, self._entry(self._body.item, items)))
        return f"{one}{{{least},{most}}}" if most != 0 else ""


# ---- arguments as JSON -----------------------------------------------------------------------------------------------


_MISTRAL_ID = "/[A-Za-z0-9]{9}/"
_NUMBER = "/0|[1-9][0-9]{0,2}/"
_FREE_ID = "/[A-Za-z0-9_\\-]{1,40}/"
_FENCE = "```"


def json_calls(body: JsonCalls, context: Context) -> Block:
    """Return the grammar of JSON objects that are calls."""
    one = _object(body, context)
    again = f'({SPACE} "," {SPACE} {one})*' if context.many else ""
    listed = context.writer.rule(sequence(SPACE, one, again, SPACE, '"]"'))
    end = sequence(SPACE, context.writer.mark(body.closers[0])) if body.closers else ""
    if end and context.form.make_id is mistral_id:
        end = f"({end})?"  # newer templates of Mistral omit the closing mark
    if body.listed and body.fenced:
        return Block(f"{_FENCE}json", sequence(SPACE, '"["', listed, end))
    if body.listed and any(closer.startswith("</") for closer in body.closers):  # MiniMax M1 writes calls on lines
        lines = sequence(one, f"({SPACE} {one})*" if context.many else "")
        return Block("", sequence(context.writer.rule(f'"[" {listed} | {lines}'), end))
    if body.listed:
        return Block("[", sequence(listed, end))
    objects = one
    if context.many and body.known_only:
        objects = context.writer.rule(f'{one} | "[" {listed}')
    elif context.many and not body.closers and context.form.bare is not None:
        objects = context.writer.rule(f'{one} (";" {SPACE} {one})*')
    return Block("", sequence(objects, end))


def _object(body: JsonCalls, context: Context) -> str:
    writer, wants_id = context.writer, bool(body.id_key) and not body.keyed
    parts = []
    for tool in context.tools:
        name = quoted(f'"{tool.name}"')
        if body.keyed:
            parts.append(sequence(quoted(f'"{tool.name}":'), SPACE, context.json(tool)))
        else:
            parts.append(sequence(name, '","', SPACE, quoted(f'"{body.arguments_key}":'), SPACE, context.json(tool)))
    call = writer.rule(" | ".join(parts))
    if not body.keyed:
        call = sequence(quoted(f'"{body.name_key}":'), SPACE, call)
    key = quoted(f'"{body.id_key}":')
    first = last = ""
    if wants_id and context.form.make_id is mistral_id:
        last = writer.rule(f'("," {SPACE} {key} {SPACE} "\\"" {_MISTRAL_ID} "\\"")?')
    elif wants_id:  # Cohere's models write the id before the name
        first = writer.rule(f'({key} {SPACE} "\\"" {_NUMBER} "\\"" "," {SPACE})?')
    return writer.rule(sequence('"{"', SPACE, first, call, last, SPACE, '"}"'))


def begun_objects(body: JsonCalls, context: Context) -> tuple[str, str]:
    """Return grammars of calls without an opening mark, and of the beginning of such calls, which may also be text."""
    writer, one = context.writer, _object(body, context)
    calls = []
    for tool in context.tools:
        name = quoted(f'"{tool.name}",')
        begun = writer.rule(f'{SPACES} {name} {SPACES} /"(arguments|parameters)":/', "[lazy]")
        calls.append(sequence(begun, SPACE, context.json(tool), SPACE, '"}"'))
    call = writer.rule(" | ".join(calls))
    again = f'({SPACE} "," {SPACE} {one})*' if context.many else ""
    head = sequence('"{"', SPACES, '/("type":[ ]?"function",[ ]?)?/', quoted('"name":'))
    single = writer.rule(sequence(SPACES, head), "[lazy]")
    listed = writer.rule(sequence(SPACES, '"["', SPACES, head), "[lazy]")
    whole = writer.rule(f'{single} {call} | {listed} {sequence(call, again, SPACE)} "]"')
    return whole, writer.rule(f"{single} | {listed}")


def named_json(body: NamedJson, context: Context) -> Block:
    """Return the grammar of names, each followed by its arguments as JSON."""
    writer, mark = context.writer, context.writer.mark
    lead = body.before_name[0] if body.before_name else ""
    given_id = _FREE_ID if context.form.make_id is not mistral_id else _MISTRAL_ID
    middle = mark(body.name_end + "".join(body.between))
    if body.id_mark:
        middle = writer.rule(sequence(f"({mark(body.id_mark)} {given_id})?", middle))
    fence = sequence(f'"{_FENCE}json"', SPACE) if body.fenced else ""
    end = sequence(sequence(SPACE, f'"{_FENCE}"') if body.fenced else "", *map(mark, body.closers[: body.closed]))

    def call(tool: FunctionShape) -> str:
        head = quoted(f"{tool.name}:") + " " + _NUMBER if body.counted else quoted(tool.name)
        return sequence(head, middle, fence, context.json(tool))

    rest = sequence(writer.rule(" | ".join(map(call, context.tools))), "" if end == '""' else end)
    before = sequence(given_id, mark(body.id_end)) if body.id_end else ""
    return Block("", sequence(before, mark(lead), rest)) if before else Block(lead, rest)
