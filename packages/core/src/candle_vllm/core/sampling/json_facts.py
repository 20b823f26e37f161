# SPDX-License-Identifier: MIT
"""Facts about JSON schemas that need no compiling: types, values, and which schemas exclude each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

from candle_vllm.core.sampling.json_references import References
from candle_vllm.core.sampling.structured import refused

FRACTION = "fraction"
TYPES = frozenset({"null", "boolean", "integer", FRACTION, "string", "array", "object"})
"""Types of values. They exclude each other: a `number` of JSON Schema is an `integer` or a `FRACTION` here."""
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")  # keywords with a list of schemas
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
NAMES = ("null", "boolean", "integer", "number", "string", "array", "object")
MAX_LOOKS = 100_000  # maximum number of schemas in all comparisons; after it, no two schemas are known to be apart
MAX_VALUES = 16  # maximum difference between the bounds of integers that are enumerated
_MAX_DEPTH = 8


class Place(NamedTuple):
    """A schema, and the base URI of its references."""

    schema: Any
    base: str


def types_of(schema: dict[str, Any], place: str = "#") -> frozenset[str]:
    """Return the types that the keyword `type` allows.

    Raises InvalidParameterError if it names a type that JSON does not have.
    """
    named = schema.get("type", NAMES)
    listed = [named] if isinstance(named, str) else named
    wrong = [one for one in listed if one not in NAMES] if isinstance(listed, (list, tuple)) else [named]
    if wrong:
        raise refused(f"the JSON type {wrong[0]!r:.80} is unknown (at {place}); known: {', '.join(NAMES)}")
    return frozenset(kind for one in listed for kind in (("integer", FRACTION) if one == "number" else (one,)))


def type_names(types: Iterable[str]) -> list[str] | None:
    """Return the value of `type` that allows these types; None for fractions without integers."""
    found = set(types)
    if FRACTION in found:
        if "integer" not in found:
            return None
        found -= {FRACTION, "integer"}
        found.add("number")
    return [name for name in NAMES if name in found]


def type_of(value: Any) -> str:
    """Return the type of a JSON value; `FRACTION` for a number that is not an integer."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else FRACTION
    kinds = {type(None): "null", bool: "boolean", int: "integer", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def canonical(value: Any) -> str:
    """Return a text that is equal for values that are equal in JSON Schema: 1 and 1.0, keys in any order."""

    def plain(one: Any) -> Any:
        if isinstance(one, float) and one.is_integer():
            return int(one)
        if isinstance(one, list):
            return [plain(each) for each in one]
        return {key: plain(each) for key, each in one.items()} if isinstance(one, dict) else one

    return json.dumps(plain(value), sort_keys=True)


def values_of(schema: dict[str, Any]) -> list[Any] | None:
    """Return the values that `enum`, `const` and `type` allow; None without `enum` and `const`."""
    if "const" not in schema and not isinstance(schema.get("enum"), list):
        return None
    listed: list[Any] = [schema["const"]] if "const" in schema else schema["enum"]
    if "const" in schema and isinstance(schema.get("enum"), list):
        both = set(map(canonical, schema["enum"]))
        listed = [value for value in listed if canonical(value) in both]
    types = types_of(schema)
    return [value for value in listed if type_of(value) in types]


class Span(NamedTuple):
    """The range of numbers of a schema; an open end is excluded."""

    low: float = -math.inf
    low_open: bool = False
    high: float = math.inf
    high_open: bool = False

    def misses(self, other: Span) -> bool:
        """Return whether no number is in both; two spans of which one is empty may count as overlapping."""
        return self._ends_before(other) or other._ends_before(self)

    def _ends_before(self, other: Span) -> bool:
        return self.high < other.low or (self.high == other.low and (self.high_open or other.low_open))


def span_of(schema: dict[str, Any]) -> Span:
    """Return the range that the bounds allow, also in the spelling of draft 4."""

    def end(plain: str, exclusive: str, sign: int, none: float) -> tuple[float, bool]:
        bound, opened = schema.get(plain), schema.get(exclusive)
        ends = [(bound, opened is True)] if _is_number(bound) else []
        ends += [(opened, True)] if _is_number(opened) else []
        return max(ends, key=lambda one: (sign * one[0], one[1]), default=(none, False))

    low = end("minimum", "exclusiveMinimum", 1, -math.inf)
    return Span(*low, *end("maximum", "exclusiveMaximum", -1, math.inf))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Facts:
    """Facts about the schemas of one document. An answer is False or None if the fact is uncertain or costs too much.

    `taker` returns, for a pattern, a function that checks whether the pattern may be found in a text.
    """

    def __init__(self, references: References, taker: Callable[[str], Callable[[str], bool]]) -> None:
        self._references = references
        self._taker = taker
        self._takers: dict[str, Callable[[str], bool]] = {}
        self._looks = 0

    def parts(self, place: Place) -> list[Place]:
        """Return the schema and the schemas that `$ref` and `allOf` add to it, each once and without `true`; if one of
        them is `false`, only that."""
        found: dict[int, Place] = {}  # by id of the schema
        waiting = [place]
        while waiting:
            schema, base = waiting.pop()
            if schema is False:
                return [Place(schema, base)]
            if not isinstance(schema, dict) or id(schema) in found:
                continue
            base = self._references.base(schema, base)
            found[id(schema)] = Place(schema, base)
            if isinstance(schema.get("allOf"), list):
                waiting += [Place(part, base) for part in reversed(schema["allOf"])]
            if "$ref" in schema:
                target = self._references.resolve(schema["$ref"], base, "#")
                waiting.append(Place(target.schema, target.base))
        return [*found.values()]

    def domain(self, place: Place) -> tuple[list[Any], bool] | None:
        """Return a list of all valid values, and whether each value in it is certainly valid; None for no such list."""
        parts = self.parts(place)
        for schema, _ in parts:
            if schema is False:
                return [], True
            alone = len(parts) == 1 and not set(schema) - {"type", "enum", "const", "title", "description"}
            values = values_of(schema)
            if values is not None:
                return [json.loads(text) for text in dict.fromkeys(map(canonical, values))], alone
            types = types_of(schema)
            span = span_of(schema)
            finite = math.inf not in (abs(span.low), abs(span.high))
            if types == {"integer"} and finite and span.high <= span.low + MAX_VALUES:
                low, high = math.ceil(span.low), math.floor(span.high)
                inside = [n for n in range(low, high + 1) if not span.misses(Span(n, False, n, False))]
                return inside, False
            if types <= {"null", "boolean"}:
                booleans = [True, False] if "boolean" in types else []
                return [*booleans, *([None] if "null" in types else [])], alone
        return None

    def apart(self, one: Sequence[Place], other: Sequence[Place], depth: int = 0) -> bool:
        """Return whether certainly no value matches both lists of schemas, that is all schemas in them; see `parts`."""
        self._looks += len(one) + len(other)
        if self._looks > MAX_LOOKS or depth > _MAX_DEPTH:
            return False
        if any(part.schema is False for part in (*one, *other)):
            return True
        both = [part.schema for part in (*one, *other)]
        types = frozenset.intersection(TYPES, *map(types_of, both))
        listed = [values for values in map(values_of, both) if values is not None]
        if listed:
            common = set[str].intersection(*({canonical(value) for value in values} for values in listed))
            left = [value for value in listed[0] if canonical(value) in common and type_of(value) in types]
            return not any(self._may_be(value, both) for value in left)
        if any(self._branches_apart(mine, theirs, depth) for mine, theirs in ((one, other), (other, one))):
            return True
        return all(self._type_apart(kind, one, other, depth) for kind in types)

    def _may_be(self, value: Any, schemas: Sequence[dict[str, Any]]) -> bool:
        """Return whether a value may match all of these schemas; only keywords that are fast to check are used."""
        if isinstance(value, str):
            patterns = [schema["pattern"] for schema in schemas if isinstance(schema.get("pattern"), str)]
            self._takers |= {pattern: self._taker(pattern) for pattern in patterns if pattern not in self._takers}
            return all(_fits(len(value), schema, "Length") for schema in schemas) and all(
                self._takers[pattern](value) for pattern in patterns
            )
        if _is_number(value):
            return not any(span_of(schema).misses(Span(value, False, value, False)) for schema in schemas)
        return True

    def _branches_apart(self, mine: Sequence[Place], theirs: Sequence[Place], depth: int) -> bool:
        for schema, base in mine:
            for name in ("anyOf", "oneOf"):
                options = schema.get(name)
                if isinstance(options, list) and all(
                    self.apart(self.parts(Place(option, base)), theirs, depth + 1) for option in options
                ):
                    return True
        return False

    def _type_apart(self, kind: str, one: Sequence[Place], other: Sequence[Place], depth: int) -> bool:
        mine, theirs = [part.schema for part in one], [part.schema for part in other]
        if kind in ("integer", FRACTION):
            return any(span_of(a).misses(span_of(b)) for a in mine for b in theirs)
        if kind == "string":
            return _lengths_apart([*mine, *theirs], "Length")
        if kind == "array":
            return _lengths_apart([*mine, *theirs], "Items")
        if kind != "object":
            return False
        listed = [schema.get("required") for schema in (*mine, *theirs)]
        required = [name for names in listed if isinstance(names, list) for name in names]
        return any(
            self.apart(a, b, depth + 1)
            for name in dict.fromkeys(name for name in required if isinstance(name, str))
            for a in self._entries(one, name)
            for b in self._entries(other, name)
        )

    def _entries(self, parts: Sequence[Place], name: str) -> Iterator[list[Place]]:
        """Yield, for each part that constrains a property, the `parts` of the property's schema."""
        for schema, base in parts if self._looks <= MAX_LOOKS else ():
            properties = schema.get("properties", {})
            if isinstance(properties, dict) and name in properties:
                yield self.parts(Place(properties[name], base))
            elif "additionalProperties" in schema and not schema.get("patternProperties"):
                yield self.parts(Place(schema["additionalProperties"], base))


def _fits(count: int, schema: dict[str, Any], what: str) -> bool:
    least, most = schema.get(f"min{what}", 0), schema.get(f"max{what}", math.inf)
    return not (_is_number(least) and count < least) and not (_is_number(most) and count > most)


def _lengths_apart(schemas: Sequence[dict[str, Any]], what: str) -> bool:
    least = max((schema[f"min{what}"] for schema in schemas if _is_number(schema.get(f"min{what}"))), default=0)
    return not all(_fits(least, schema, what) for schema in schemas)
