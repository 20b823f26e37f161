"""Grammars of calls whose arguments are tags in tags: `Nested`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from candle_vllm.openai.formats.grammars.context import Block, Context
from candle_vllm.openai.formats.grammars.schemas import TYPES, Branch, Root, Tool, entries
from candle_vllm.openai.formats.grammars.texts import json_value, string_body
from candle_vllm.openai.formats.grammars.writer import SPACE, Writer, quoted, sequence
from candle_vllm.openai.formats.nested import Nested

_KEY = re.compile(r"[^\s<>/\"'=]{1,128}")
_MOST_DEPTH = 32
_FREE_KEYS = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"


def nested(body: Nested, context: Context) -> Block:
    """Names, each with tags behind it."""
    context.check_names()
    writer = context.writer
    lead = f'{body.tag}<{body.call} name="'
    call = writer.rule(" | ".join(_Call(body, context, tool).expression() for tool in context.tools))
    again = writer.rule(sequence(SPACE, writer.mark(lead), call)) + "*" if context.many else ""
    end = sequence(SPACE, writer.mark(body.closers[0])) if body.closers else ""
    return Block(lead, sequence(call, again, end))


class _Call:
    """One tool."""

    def __init__(self, body: Nested, context: Context, tool: Tool) -> None:
        self._body = body
        self._writer: Writer = context.writer
        self._root: Root = context.root(tool)
        self._tool = tool
        self._loose = tool.name in context.loose

    def expression(self) -> str:
        """A call, from its name to its end."""
        inside = self._entries(self._root.schema, 0)
        return sequence(quoted(self._tool.name + '">'), inside, SPACE, self._close(self._body.call))

    def _close(self, key: str) -> str:
        return self._writer.mark(f"{self._body.tag}</{key}>")

    def _entries(self, schema: Mapping[str, Any], depth: int) -> str:
        known, others = entries(self._root, schema)
        if depth > _MOST_DEPTH:
            raise self._root.refused("$ref", f"values may be nested at most {_MOST_DEPTH} deep")
        parts = []
        for key, part, required in known:
            if not _KEY.fullmatch(key) or (key == self._body.item and not parts):
                raise self._root.refused(f"properties: {key!r:.60}", "that name cannot be a tag here")
            entry = self._writer.rule(sequence(SPACE, self._entry(key, part, depth)))
            parts.append(entry if required else f"{entry}?")
        if others is not None and self._loose:
            parts.append(self._any() + "*")
        elif others not in (None, True):
            raise self._root.refused("additionalProperties", "tags need names; list the properties")
        return sequence(*parts) if parts else ""

    def _any(self) -> str:
        """Tags of any names, in each other."""
        writer, tag = self._writer, self._body.tag
        name = writer.reserve()
        text = writer.until(f"{tag}</", writer.without("TEXT", [f"{tag}<"]))
        inside = writer.rule(f"{text} | {SPACE} {name}+ {SPACE} {writer.mark(tag + '</')}")
        return writer.define(
            name, sequence(writer.mark(f"{tag}<"), _FREE_KEYS, '">"', inside, _FREE_KEYS, '">"', SPACE)
        )

    def _entry(self, key: str, schema: Any, depth: int) -> str:
        """A tag, its value, and the tag that closes it."""
        found = self._root.branches(schema)
        kinds = {branch.type for branch in found}
        unlike = set() if kinds == {"string"} else kinds - {"string"}
        free = all(branch.values is None and not branch.schema for branch in found) and len(found) == len(TYPES) - 1
        if free:
            found, unlike = [branch for branch in found if branch.type == "string"], {"object", "array"}
        parts = [self._value(key, branch, unlike, depth) for branch in found]
        return sequence(self._writer.mark(f"{self._body.tag}<{key}>"), self._writer.rule(" | ".join(parts)))

    def _value(self, key: str, branch: Branch, unlike: set[str], depth: int) -> str:
        writer = self._writer
        if branch.type == "string":
            if any(self._body.tag + "<" in value for value in branch.values or ()):
                raise self._root.refused("enum", "a value has a mark of the format in it")
            terminal = string_body(writer, self._root, branch, unlike)
            return writer.until(f"{self._body.tag}</{key}>", writer.without(terminal, [self._body.tag + "<"]))
        if branch.values is None and branch.type == "object":
            inside = self._entries({"type": "object", **branch.schema}, depth + 1)
            return sequence(inside, SPACE, self._close(key))
        if branch.values is None and branch.type == "array":
            return sequence(self._items(branch.schema, depth), SPACE, self._close(key))
        return sequence(json_value(writer, self._root, branch), self._close(key))

    def _items(self, schema: Mapping[str, Any], depth: int) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems", "")
        items = schema.get("items", True)
        if "prefixItems" in schema or not isinstance(items, (Mapping, bool)) or items is False:
            raise self._root.refused("prefixItems", "write a list with one kind of items")
        if most != "" and most < least:
            raise self._root.refused("minItems", f"{least} is above maxItems {most}")
        if depth > _MOST_DEPTH:
            raise self._root.refused("$ref", f"values may be nested at most {_MOST_DEPTH} deep")
        one = self._writer.rule(sequence(SPACE, self._entry(self._body.item, items, depth + 1)))
        return f"{one}{{{least},{most}}}"
