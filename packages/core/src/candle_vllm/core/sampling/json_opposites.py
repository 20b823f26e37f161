# SPDX-License-Identifier: MIT
"""The opposite of a JSON schema: schemas that accept exactly the values that the schema rejects.

A value is rejected if it violates at least one keyword, so each keyword becomes schemas of the values that violate it.
Only one level is rewritten: subschemas appear as `{"not": ...}`. `OppositeUnknown` is raised if a grammar cannot write
the opposite: of most patterns, of the type integer among numbers, of `additionalProperties` beside named keys.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from candle_vllm.core.sampling.json_facts import BOUNDS, TYPES, span_of, type_names, type_of, types_of

MAX_PATTERN = 1 << 16  # approximate maximum of the characters of a pattern that excludes texts
MAX_ELEMENTS = 64  # maximum length of an array value, or of `prefixItems`, whose opposite is written for each element
MAX_CONTAINED = 64  # maximum characters of a text that `lacking` excludes, because its pattern is nested as deeply
_LITERAL = re.compile(r"(\^(?:\.\*)?|)((?:[\w /@:,;=!#%&~'\"<>-]|\\[.\-/^$*+?()\[\]{}|\\])*)(\$?)", re.ASCII)
_PLAIN = re.compile(r"[0-9A-Za-z_]")

Schema = dict[str, Any]


class OppositeUnknown(Exception):
    """A keyword, the exception's argument, has no opposite that a grammar can express."""


def opposite(schema: Schema, types: frozenset[str] = TYPES) -> list[Any]:
    """Return schemas whose union accepts the values that `schema` rejects.

    `schema` has the keywords of draft 2020-12, nested schemas may have older drafts; the value is known to have one of
    `types`, see `json_facts`. Raises OppositeUnknown if no such schemas are known.
    """
    own = types_of(schema)
    found: list[Any] = []
    names = type_names(types - own)
    if names is None:
        raise OppositeUnknown("type")
    if names:
        found.append({"type": names})
    for keyword, value in schema.items():
        if keyword in _UNKNOWN and not (keyword == "uniqueItems" and value is False):
            raise OppositeUnknown(keyword)
        breaks = _BREAKS.get(keyword)
        if breaks is not None:
            kind = _KINDS.get(keyword)
            if kind is None:
                found += breaks(value, schema)
            elif kind & types & own:
                name = type_names(kind | ({"integer"} if "fraction" in kind else set()))
                found += [{"type": name, **one} for one in breaks(value, schema)]
    for keyword in ("enum", "const"):
        if keyword in schema:
            values = schema[keyword] if keyword == "enum" else [schema[keyword]]
            found += [one for kind in sorted(types & own) for one in _other_values(kind, values)]
    return found


def without(texts: Iterable[str], *, beginnings: bool = False) -> str:
    """Return a pattern of all texts except these; with `beginnings`, of all texts that do not begin with one of them.

    Raises OppositeUnknown if the pattern would be too long.
    """
    ends = set(texts)
    if sum(len(text) ** 2 for text in ends) > 16 * MAX_PATTERN:  # a common beginning is written once for each text
        raise OppositeUnknown("enum")
    following: dict[str, set[str]] = {"": set()}
    for text in ends:
        for place, character in enumerate(text):
            following.setdefault(text[:place], set()).add(character)
        following.setdefault(text, set())
    found, size = list[str](), 0
    for beginning, characters in following.items():
        if beginnings and any(beginning[:end] in ends for end in range(len(beginning) + 1)):
            continue
        said = "".join(map(_escaped, beginning))
        if characters:
            found.append(f"{said}[^{''.join(map(_escaped, sorted(characters)))}](?s:.*)")
        else:
            found.append(f"{said}(?s:.+)")
        if beginning not in ends:
            found.append(said)
        size += len(found[-1]) + len(said) + 16
        if size > MAX_PATTERN:
            raise OppositeUnknown("enum")
    return f"^(?:{'|'.join(found)})$"


def lacking(text: str, *, line: bool = False) -> str:
    """Return a pattern of all texts that do not contain `text`; with `line`, only the first line must not contain it.

    Raises OppositeUnknown if `text` is too long.
    """
    if len(text) > MAX_CONTAINED:
        raise OppositeUnknown("pattern")
    # An automaton whose state is the number of characters of `text` that were read: for each state, next state -> way.
    ways: list[dict[int, list[str]]] = []
    for read, following in enumerate(text):
        ends = [text[:read] + one for one in sorted(set(text))]
        after = {end[-1]: next(n for n in range(read + 1, -1, -1) if end.endswith(text[:n])) for end in ends}
        others = "".join(_escaped(one) for one in [*filter(after.get, after), *("\n" if line else "")])
        ways.append({0: [f"[^{others}]"]})
        for one in filter(after.get, after):
            if one != following or read + 1 < len(text):
                ways[-1].setdefault(after[one], []).append(_escaped(one))
    rest = ""
    for read in range(len(text) - 1, 0, -1):  # eliminate the states except 0
        again = "|".join(ways[read].pop(read, ()))
        step = "".join(ways[read - 1].pop(read)) + (f"(?:{again})*" if again else "")
        for fewer, way in ways[read].items():
            ways[read - 1].setdefault(fewer, []).append(f"{step}(?:{'|'.join(way)})")
        rest = f"(?:{step}{rest})?"
    return f"^(?:{'|'.join(ways[0][0])})*{rest}" + (r"(?:\n(?s:.*))?$" if line else "$")


def _escaped(character: str) -> str:
    return character if _PLAIN.fullmatch(character) else f"\\x{{{ord(character):x}}}"


def _not_pattern(value: Any, _: Schema) -> list[Schema]:
    """Return the opposite of a pattern for a literal text, or for texts that begin with it or contain it."""
    match = _LITERAL.fullmatch(value) if isinstance(value, str) else None
    if match is None or (match[1] != "^" and match[3]):
        raise OppositeUnknown("pattern")
    text = re.sub(r"\\(.)", r"\1", match[2])
    if not text and not match[3]:
        return []  # the pattern accepts everything
    if match[1] != "^":
        return [{"pattern": lacking(text, line=bool(match[1]))}]
    return [{"pattern": without([text], beginnings=not match[3])}]


def _other_values(kind: str, values: Sequence[Any]) -> list[Any]:
    """Return schemas of the values of one type that differ from these values."""
    listed = [value for value in values if type_of(value) == kind]
    if kind == "fraction":
        return []  # handled together with integers
    if kind == "integer":
        return _between([value for value in values if type_of(value) in ("integer", "fraction")])
    if kind == "null":
        return [] if listed else [{"type": "null"}]
    if kind == "boolean":
        left = [value for value in (True, False) if value not in listed]
        return [{"enum": left}] if left else []
    if not listed:
        return [{"type": kind}]
    if kind == "string":
        return [{"type": "string", "pattern": without(listed)}]
    other = _other_array if kind == "array" else _other_object
    return [{"allOf": [{"anyOf": [{"type": kind, **one} for one in other(value)]} for value in listed]}]


def _between(numbers: Sequence[float]) -> list[Schema]:
    ends = sorted(set(numbers))
    if not ends:
        return [{"type": "number"}]
    inner = [{"exclusiveMinimum": low, "exclusiveMaximum": high} for low, high in itertools.pairwise(ends)]
    outer = [{"exclusiveMaximum": ends[0]}, *inner, {"exclusiveMinimum": ends[-1]}]
    return [{"type": "number", **one} for one in outer]


def _other_array(value: list[Any]) -> Iterator[Schema]:
    if len(value) > MAX_ELEMENTS:
        raise OppositeUnknown("const")
    if value:
        yield {"maxItems": len(value) - 1}
    yield {"minItems": len(value) + 1}
    for place, one in enumerate(value):
        yield {"prefixItems": [*[True] * place, {"not": {"const": one}}], "minItems": place + 1}


def _other_object(value: dict[str, Any]) -> Iterator[Schema]:
    yield {"properties": dict.fromkeys(value, True), "required": [*value], "minProperties": len(value) + 1}
    for name, one in value.items():
        yield {"properties": {name: False}}
        yield {"properties": {name: {"not": {"const": one}}}, "required": [name]}


def _less(keyword: str) -> Callable[[Any, Schema], list[Schema]]:
    """Return the function for a minimum count; `keyword` is the maximum that violates it."""
    return lambda value, _: [{keyword: int(value) - 1}] if value >= 1 else []


def _more(keyword: str) -> Callable[[Any, Schema], list[Schema]]:
    return lambda value, _: [{keyword: int(value) + 1}]


def _not_bounds(keyword: str) -> Callable[[Any, Schema], list[Schema]]:
    """Return the function for a bound. Of two bounds at one end, only the inclusive one's function returns schemas."""
    plain = "minimum" if keyword.endswith("inimum") else "maximum"

    def breaks(value: Any, schema: Schema) -> list[Schema]:
        if isinstance(value, bool) or (keyword != plain and plain in schema):
            return []
        span = span_of(schema)
        if plain == "minimum":
            return [{"maximum" if span.low_open else "exclusiveMaximum": span.low}]
        return [{"minimum" if span.high_open else "exclusiveMinimum": span.high}]

    return breaks


def _not_items(value: Any, schema: Schema) -> list[Schema]:
    first = len(schema.get("prefixItems", ()))
    if value is True or value == {}:
        return []
    if value is not False:
        raise OppositeUnknown("items")
    return [{"minItems": first + 1}]


def _not_prefix(value: Any, _: Schema) -> list[Schema]:
    if len(value) > MAX_ELEMENTS:
        raise OppositeUnknown("prefixItems")
    return [{"prefixItems": [*[True] * i, {"not": one}], "minItems": i + 1} for i, one in enumerate(value)]


def _not_contains(value: Any, schema: Schema) -> list[Schema]:
    if schema.get("minContains", 1) != 1 or "maxContains" in schema:
        raise OppositeUnknown("contains")
    return [{"items": {"not": value}}]


def _not_properties(value: Any, _: Schema) -> list[Schema]:
    told = {name: one for name, one in value.items() if one is not True and one != {}}
    return [{"properties": {name: {"not": one}}, "required": [name]} for name, one in told.items()]


def _not_others(value: Any, schema: Schema) -> list[Schema]:
    if value is True or value == {}:
        return []
    if value is not False or schema.get("properties") or schema.get("patternProperties"):
        raise OppositeUnknown("additionalProperties")
    return [{"minProperties": 1}]


def _not_dependent(value: Any, _: Schema) -> list[Schema]:
    found = list[Schema]()
    for name, needs in value.items():
        if isinstance(needs, list):
            found += [{"required": [name], "properties": {one: False}} for one in needs]
        else:
            found.append({"required": [name], "allOf": [{"not": needs}]})
    return found


def _not_one(value: Any, _: Schema) -> list[Any]:
    pairs = [{"allOf": [a, b]} for a, b in itertools.combinations(value, 2)]
    return [{"allOf": [{"not": one} for one in value]}, *pairs]


def _not_if(value: Any, schema: Schema) -> list[Any]:
    found = [{"allOf": [value, {"not": schema["then"]}]}] if "then" in schema else []
    if "else" in schema:
        found.append({"allOf": [{"not": value}, {"not": schema["else"]}]})
    return found


_BREAKS: Mapping[str, Callable[[Any, Schema], list[Any]]] = MappingProxyType({
    "minLength": _less("maxLength"),
    "maxLength": _more("minLength"),
    "pattern": _not_pattern,
    "minItems": _less("maxItems"),
    "maxItems": _more("minItems"),
    "items": _not_items,
    "prefixItems": _not_prefix,
    "contains": _not_contains,
    "minProperties": _less("maxProperties"),
    "maxProperties": _more("minProperties"),
    "properties": _not_properties,
    "additionalProperties": _not_others,
    "required": lambda value, _: [{"properties": {name: False}} for name in value],
    "dependentRequired": _not_dependent,
    "dependentSchemas": _not_dependent,
    "dependencies": _not_dependent,
    **{name: _not_bounds(name) for name in BOUNDS},
    "allOf": lambda value, _: [{"not": one} for one in value],
    "anyOf": lambda value, _: [{"allOf": [{"not": one} for one in value]}],
    "oneOf": _not_one,
    "not": lambda value, _: [value],
    "if": _not_if,
    "$ref": lambda value, _: [{"not": {"$ref": value}}],
})  # fmt: skip
_UNKNOWN = frozenset(
    {"format", "multipleOf", "uniqueItems", "patternProperties", "propertyNames"}
    | {"unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"}
)
_OF_STRINGS = ("minLength", "maxLength", "pattern")
_OF_ARRAYS = ("minItems", "maxItems", "items", "prefixItems", "contains")
_OF_OBJECTS = ("minProperties", "maxProperties", "properties", "additionalProperties", "required")
_OF_OBJECTS += ("dependentRequired", "dependentSchemas", "dependencies")
_KINDS: Mapping[str, frozenset[str]] = MappingProxyType({
    **{name: frozenset({"string"}) for name in _OF_STRINGS},
    **{name: frozenset({"array"}) for name in _OF_ARRAYS},
    **{name: frozenset({"integer", "fraction"}) for name in BOUNDS},
    **{name: frozenset({"object"}) for name in _OF_OBJECTS},
})  # fmt: skip
ASSERTING = frozenset({*_BREAKS, *_UNKNOWN, "type", "enum", "const"})
"""Keywords that constrain a value; `then`, `else`, `minContains` and `maxContains` only change what others mean."""
