"""Values of a schema in notations that are like JSON and are not: Python's and Gemma's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from candle_vllm.openai.formats.grammars.schemas import Branch, Root, entries
from candle_vllm.openai.formats.grammars.texts import json_value, scalar
from candle_vllm.openai.formats.grammars.writer import SPACE, Writer, sequence

_MOST_VALUES = 10_000  # inside one enum


@dataclasses.dataclass(frozen=True)
class Notation:
    """How values are written.

    Attributes:
        string: a string that a branch asks for.
        text: a string that is known.
        key: an entry's key that is known, or any other than those.
        words: of null, false and true.
        unkeyable: whether a key cannot be written.
        ordered: entries stand in the order of their keys, upper and lower case alike, as Jinja's `dictsort` has them;
            otherwise in the schema's.
    """

    string: Callable[[Root, Branch], str]
    text: Callable[[str], str]
    key: Callable[[str], str]
    free_key: Callable[[list[str]], str]
    words: Mapping[Any, str]
    unkeyable: Callable[[str], bool]
    ordered: bool = False


class Values:
    """Expressions of one tool's values.

    Args:
        writer: gets the rules.
        root: the tool's schema.
        notation: how they are written.
    """

    def __init__(self, writer: Writer, root: Root, notation: Notation) -> None:
        self._writer = writer
        self._root = root
        self._notation = notation
        self._rules: dict[int, str] = {}  # by definitions, which live as long as `root`
        self._any = ""

    def value(self, schema: Any) -> str:
        """A rule of what fits a schema; schemas may refer to themselves."""
        if schema is True or schema == {}:
            return self._anything()
        target = self._root.resolved(schema)
        if target is schema:
            return self._writer.rule(self._alternatives(schema))
        if id(target) not in self._rules:
            self._rules[id(target)] = self._writer.reserve()
            self._writer.define(self._rules[id(target)], self._alternatives(target))
        return self._rules[id(target)]

    def _alternatives(self, schema: Any) -> str:
        return " | ".join(map(self._branch, self._root.branches(schema)))

    def items(self, schema: Any, key: Callable[[str], str], free_key: Callable[[list[str]], str]) -> str:
        """The entries of an object, separated by commas; further ones stand behind those that the schema names."""
        known, others = entries(self._root, schema)
        if self._notation.ordered:
            known = sorted(known, key=lambda entry: entry[0].lower())
        for name, _, _ in known:
            if self._notation.unkeyable(name):
                raise self._root.refused(f"properties: {name!r:.60}", "that name cannot be written in it")
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
            return self._object(branch.schema)
        if branch.type in ("null", "boolean"):
            words = [self._notation.words[None]] if branch.type == "null" else [*map(self._word, (False, True))]
            return self._writer.rule(" | ".join(words))
        return scalar(self._writer, branch) or json_value(self._writer, self._root, branch)

    def _word(self, value: bool) -> str:
        return self._notation.words[value]

    def _object(self, schema: Mapping[str, Any]) -> str:
        inside = self.items({"type": "object", **schema}, self._notation.key, self._notation.free_key)
        return self._writer.rule(sequence('"{"', inside, '"}"'))

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
        inside = sequence(one, f'("," {SPACE} {one}){count}')
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
