# SPDX-License-Identifier: MIT
"""Check JSON schemas before they are compiled: refuse constraints that cannot be guaranteed, or are too costly.

A schema is first rewritten in llguidance's keywords (`json_cases`). Then this module finds numbers that would be
rounded, objects in which a key could appear twice, as "a" and as "\\u0061", and schemas that would take unbounded time
or memory or overflow the stack. All limits were measured: a schema at one of them compiles in at most a second.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from candle_vllm.core.sampling.json_cases import CASES, MAPS, SINGLE, in_known_keywords
from candle_vllm.core.sampling.json_dialect import Remarks
from candle_vllm.core.sampling.json_facts import BOUNDS, FRACTION, LISTS, types_of
from candle_vllm.core.sampling.json_references import MAX_NESTING
from candle_vllm.core.sampling.json_rules import check_finite, check_meeting
from candle_vllm.core.sampling.structured import Schema, parsed_json, refused

MAX_SUBSCHEMAS = 10_000
MAX_LEVELS = 600  # sum of the depths of the schema and its definitions: the compiler may recurse through all of them
MAX_PROPERTIES = 4_000
MAX_OPTIONAL = 480  # optional properties of an object; each takes four of llguidance's 2,000 Earley items per position
MAX_COUNTED_OPTIONAL = 64  # optional properties of an object with minProperties or maxProperties
MAX_PATTERNS = 1_000
MAX_PATTERN_PROPERTIES = 64
MAX_VALUES = 50_000  # maximum number of values of all enums, and of values inside objects and arrays of enum and const
MAX_COMPOUND_VALUES = 2_000  # maximum number of objects and arrays that are values of enum or const
MAX_MULTIPLE = 50_000  # maximum of multipleOf as an integer, without its decimal point: 0.25 counts as 25
MAX_MULTIPLES = 200_000  # maximum sum of these integers in all schemas of a grammar
NEXT_TO_ZERO = 1e-17  # replaces an exclusive bound of 0; smaller numbers have too many digits to be compiled
EXACT = 1 << 53  # above it, not every integer is a float
MAX_INTEGER = (1 << 63) - 1

_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
SUPPORTED = frozenset(
    {*SINGLE, *LISTS, *MAPS, *_COUNTS, *BOUNDS, "type", "enum", "const", "$ref", "required", "pattern", "format"}
    | {"multipleOf"}
)
_ESCAPED = "\b\t\n\f\r"
_OF_OBJECTS = frozenset({"properties", "patternProperties", "additionalProperties", "required"})
_KEEPS_OPEN = frozenset({"additionalProperties", "patternProperties", "enum", "const"})


class Budget:
    """Budget of all schemas in one grammar, such as a request's tools: twice the limits of one, `MAX_MULTIPLES` once.

    Attributes:
        counts: counts of subschemas, properties and so on, by name.
        multiples: sum of all multipleOf as integers, see `MAX_MULTIPLE`.
        may_compare: whether `uniqueItems` may be enforced by comparing elements during generation (`unique_items`).
        compared: whether a schema needs this comparison, because its grammar alone allows equal elements.
        open_objects: whether objects may have keys that their schemas do not mention; see `close_objects`.
    """

    def __init__(self, may_compare: bool = False, open_objects: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self.multiples = 0
        self.may_compare = may_compare
        self.compared = False
        self.open_objects = open_objects


class Compilable(NamedTuple):
    """A schema that can be compiled.

    Attributes:
        schema: the schema in llguidance's keywords.
        any_escape: whether strings may have `\\u` escapes (a string with a pattern: of control characters only).
        remarks: remarks for the user.
        compared: see `Budget`.
    """

    schema: dict[str, Any]
    any_escape: bool
    remarks: list[str]
    compared: bool


def compilable_schema(schema: Any, budget: Budget | None = None) -> Compilable:
    """Check a schema and rewrite it for compilation.

    `schema` is the result of `json.loads`; `budget` is for all schemas in the grammar, None for a single schema. Raises
    InvalidParameterError if the schema is invalid, not supported, too large, or has no finite instance.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise refused("the JSON schema must be an object or true")
    remarks = Remarks()
    budget = budget or Budget()
    known, compared = in_known_keywords(schema, remarks, may_compare=budget.may_compare)
    if not budget.open_objects:
        close_objects(known)
    check = _Check(known, budget, remarks, compared)
    check.run()
    return Compilable(known, check.any_escape(), remarks.texts, compared)


def schema_remarks(schema: Schema) -> list[str]:
    """Return the remarks on an accepted schema; raises the errors of `compilable_schema`."""
    return compilable_schema(parsed_json("json", schema), Budget(may_compare=True)).remarks


class _Check:
    """Checks the root schema, and each definition that is reachable from it once."""

    def __init__(self, root: dict[str, Any], budget: Budget, remarks: Remarks, compared: bool) -> None:
        self.root = root
        self.compared = compared
        self.budget = budget
        self.remarks = remarks
        self.counts: Counter[str] = Counter()
        self.targets: dict[str, Any] = {"#": root}  # JSON pointer -> schema
        self.waiting: list[tuple[str, Any]] = []
        self.multiples: list[Fraction] = []  # values of multipleOf in this schema
        self.nodes: list[tuple[dict[str, Any], str]] = []
        self.control: tuple[str, str] | None = None  # a control character in an enum or const, and its position

    def run(self) -> None:
        levels = self.subschema(self.root, "#", 0)
        while self.waiting:
            place, target = self.waiting.pop()
            levels += self.subschema(target, place, 0) + 1
            if levels > MAX_LEVELS:
                raise refused(
                    f"the JSON schema and the definitions it refers to are nested {levels} deep, added up; at most "
                    f"{MAX_LEVELS} are allowed"
                )
        self.check_multiples()
        self.close_open_ends()
        check_finite(self.nodes, self.targets)
        check_meeting(self.nodes, self.targets, SUPPORTED)
        if self.control and not self.any_escape():
            raise refused(
                f"a value of enum or const has the control character U+{ord(self.control[0]):04X} (at "
                f"{self.control[1]}) beside objects whose keys could be spelt with such characters in two ways: "
                "close them by additionalProperties false"
            )

    def any_escape(self) -> bool:
        """Whether strings may have `\\u` escapes. With them, an object that allows other keys could repeat a named key
        in a different spelling, and an array of unique elements could repeat an element.
        """
        if self.compared:
            return False
        named = [node for node, _ in self.nodes if {"properties", "required"} & node.keys()]
        patterns = any("patternProperties" in node for node, _ in self.nodes)
        return not any(patterns or node.get("additionalProperties", True) is not False for node in named)

    def subschema(self, schema: Any, place: str, depth: int) -> int:
        """Check a schema and its subschemas; return the depth of nesting."""
        if isinstance(schema, bool):
            return 1
        if depth > MAX_NESTING:
            raise refused(f"the JSON schema is nested more than {MAX_NESTING} deep (at {place[:80]}...)")
        self.count("subschemas", MAX_SUBSCHEMAS)
        self.nodes.append((schema, place))
        self.numbers(schema, place)
        self.values(schema, place)
        self.objects(schema, place)
        if "$ref" in schema:
            self.reference(schema["$ref"])
        return 1 + max((self.subschema(part, at, depth + 1) for part, at in _parts(schema, place)), default=0)

    def count(self, what: str, most: int, number: int = 1) -> None:
        self.counts[what] += number
        self.budget.counts[what] += number
        if self.counts[what] > most:
            raise refused(f"the JSON schema has more than {most} {what}")
        if self.budget.counts[what] > 2 * most:
            raise refused(f"the JSON schemas have more than {2 * most} {what} together")

    def numbers(self, schema: dict[str, Any], place: str) -> None:
        for name in BOUNDS:
            value = schema.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) > EXACT:
                self.large_bound(schema, name, f"{place}/{name}")
        if "multipleOf" in schema:
            self.multiples.append(Fraction(str(schema["multipleOf"])))
        if "pattern" in schema or "format" in schema:
            self.count("patterns and formats", MAX_PATTERNS)

    def close_open_ends(self) -> None:
        """Replace an exclusive bound that is an integer by the next allowed float, where llguidance may include it.

        It may if any schema's other bound is a fraction of this unit: `{"exclusiveMinimum": 1, "maximum": 1.5}`.
        """
        ends = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
        for sign, (plain, opened), other in ((1, *ends), (-1, *reversed(ends))):
            units = {math.floor(sign * bound) for node, _ in self.nodes for bound in _fractions(node, *other)}
            for node, place in self.nodes:
                value = node.get(opened)
                if isinstance(value, bool) or not isinstance(value, (int, float)) or sign * value not in units:
                    continue
                if sign * value < 0:  # handled from the other end, which is not open
                    continue
                held = sign * (math.nextafter(sign * value, math.inf) if value else NEXT_TO_ZERO)
                del node[opened]
                node[plain] = sign * max(sign * held, sign * node.get(plain, held))
                if not value:
                    self.remarks.add(f"the JSON schema's bound 0 (at {place:.120}/{opened}) is enforced as {held}")

    def large_bound(self, schema: dict[str, Any], name: str, place: str) -> None:
        """Narrow a bound that llguidance would round: it converts bounds to floats, then to their shortest decimals.

        A maximum above zero and a minimum below zero are moved towards zero; other inexact bounds are refused.
        """
        value, sign = schema.pop(name), 1 if name.endswith("aximum") else -1
        whole = types_of(schema) & {"integer", FRACTION} == {"integer"}
        if abs(value) == math.inf or (
            sign * value < 0 and (abs(value) > 10**17 or Decimal(repr(float(value))) != value)
        ):
            raise refused(f"the JSON schema has a number that is too large (at {place}); at most 2^53 is supported")
        if sign * value < 0:
            schema[name] = value
            return
        held = int(value)
        if whole and name.startswith("exclusive"):
            name, held = ("maximum" if sign > 0 else "minimum"), held - sign
            held = sign * min(sign * held, sign * schema.get(name, held))
        if not (whole and held == MAX_INTEGER):
            bound = float(min(abs(held), MAX_INTEGER - 1023 if whole else 10**18))
            while (int(bound) if whole else Decimal(repr(bound))) > abs(held):
                bound = math.nextafter(bound, 0)
            held = sign * int(bound if whole else Decimal(repr(bound)))
        schema[name] = held
        if held != value and not whole:
            self.remarks.add(f"the JSON schema's bound {value!s:.40} (at {place:.120}) is enforced as {held}")

    def values(self, schema: dict[str, Any], place: str) -> None:
        listed = schema.get("enum", [])
        self.count("enum values", MAX_VALUES, len(listed))
        for value in [*listed, *([schema["const"]] if "const" in schema else [])]:
            if isinstance(value, (dict, list)):
                self.count("objects and arrays as values of enum and const", MAX_COMPOUND_VALUES)
            self.value(value, place, 0)

    def value(self, value: Any, place: str, depth: int) -> None:
        if depth > MAX_NESTING:
            raise refused(f"a value of enum or const is nested more than {MAX_NESTING} deep (at {place})")
        if isinstance(value, str):
            wrong = next((c for c in value if (c < " " and c not in _ESCAPED) or c == "\x7f"), None)
            if wrong is not None:
                self.control = wrong, place
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(value, place)
        elif isinstance(value, (dict, list)):
            self.count("values inside enum and const", MAX_VALUES, len(value))
            for inner in value.values() if isinstance(value, dict) else value:
                self.value(inner, place, depth + 1)

    def objects(self, schema: dict[str, Any], place: str) -> None:
        required = schema.get("required", [])
        properties = schema.get("properties", {})
        self.count("properties", MAX_PROPERTIES, len({*properties, *required}))
        self.count("patternProperties", MAX_PATTERN_PROPERTIES, len(schema.get("patternProperties", {})))
        optional = len(set(properties) - set(required))
        if optional > MAX_OPTIONAL:
            raise refused(
                f"the JSON schema has an object with {optional} optional properties (at {place}); at most "
                f"{MAX_OPTIONAL} are supported: name some in required, or group them in objects of their own"
            )
        least = schema.get("minProperties", 0)
        if least > 1 + len(set(required)):
            raise refused(
                f"minProperties {least} with {len(set(required))} required properties is not supported (at {place}): a "
                "key could occur twice; name the properties in required"
            )
        if (least or "maxProperties" in schema) and optional > MAX_COUNTED_OPTIONAL:
            raise refused(
                f"minProperties and maxProperties are not supported with more than {MAX_COUNTED_OPTIONAL} optional "
                f"properties (at {place})"
            )

    def reference(self, pointer: str) -> None:
        """Record a `$ref`, whose target is in the root's definitions."""
        if pointer not in self.targets:
            section, name = pointer.split("/")[1:]
            self.targets[pointer] = self.root[section][name]
            self.waiting.append((pointer, self.targets[pointer]))

    def check_multiples(self) -> None:
        """Limit `multipleOf`, whose remainders llguidance enumerates, and the common multiple, for use in `allOf`."""
        together = Fraction(1)
        for place, value in enumerate(self.multiples):
            multiple = math.lcm(together.numerator, value.numerator)
            together = Fraction(multiple, math.gcd(together.denominator, value.denominator)) if place else value
            self.budget.multiples += _digits(value)
            if max(_digits(value), _digits(together)) > MAX_MULTIPLE or self.budget.multiples > MAX_MULTIPLES:
                raise refused(
                    f"multipleOf is supported up to {MAX_MULTIPLE}, for the least common multiple too, and up to "
                    f"{MAX_MULTIPLES} added up, decimal points left out"
                )


def _parts(schema: dict[str, Any], place: str) -> Iterator[tuple[Any, str]]:
    """Yield the subschemas of a schema, each with its position."""
    for name in SINGLE:
        if name in schema:
            yield schema[name], f"{place}/{name}"
    for name in LISTS:
        yield from ((part, f"{place}/{name}/{index}") for index, part in enumerate(schema.get(name, ())))
    for name in MAPS:
        yield from ((part, f"{place}/{name}/{key}") for key, part in schema.get(name, {}).items())


def _check_number(value: float, place: str) -> None:
    """Refuse a number that llguidance would change, because it converts it to a float and back to a decimal."""
    if abs(value) <= EXACT or (abs(value) <= 10**22 and Decimal(repr(float(value))) == value):
        return
    if isinstance(value, int) and abs(value) <= 1 << 62 and int(float(value)) == value:
        return
    raise refused(f"the JSON schema has a number that is too large (at {place}); at most 2^53 is supported")


def _fractions(schema: dict[str, Any], *names: str) -> Iterator[float]:
    """Yield the bounds of these names that are not integers."""
    for name in names:
        value = schema.get(name)
        if isinstance(value, float) and not value.is_integer():
            yield value


def _digits(value: Fraction) -> int:
    """Return a decimal number without its point: 25 for 0.25."""
    while value.denominator > 1:
        value *= 10
    return value.numerator


def close_objects(root: dict[str, Any]) -> None:
    """Write `additionalProperties: false` to objects that have `properties` and no keyword for other keys.

    xgrammar and llama.cpp do this too: a weak model may otherwise invent keys until its token limit. An object that
    several schemas describe together (`allOf`, or `properties` next to `anyOf` or `$ref`) stays open, because closing
    one would forbid the properties of the others; so does an object with `enum` or `const`, or that needs other keys.

    `root`, which is changed in place, is in llguidance's keywords and has all definitions that it refers to.
    """
    together: dict[int, bool] = {}  # by id: whether other schemas describe the same value
    found: list[dict[str, Any]] = []
    waiting: list[tuple[Any, bool]] = [(root, False)]
    while waiting:
        schema, shared = waiting.pop()
        if not isinstance(schema, dict):
            continue
        lists = [schema[name] for name in ("allOf", "anyOf", "oneOf") if name in schema]
        beside = len(lists) + ("$ref" in schema) + (not _OF_OBJECTS.isdisjoint(schema)) > 1
        shared = shared or beside or CASES in schema or len(schema.get("allOf", ())) > 1
        known = together.get(id(schema))
        if known is None:
            found.append(schema)
        elif known or not shared:
            continue
        together[id(schema)] = shared
        parts = [part for part, _ in _parts(schema, "")]
        if "$ref" in schema:
            parts.append(_target(root, schema["$ref"]))
        waiting += [(part, shared) for part in parts]
    for schema in found:
        properties = schema.get("properties")
        if together[id(schema)] or properties is None or not _KEEPS_OPEN.isdisjoint(schema):
            continue
        if set(schema.get("required", ())) <= properties.keys() and schema.get("minProperties", 0) <= len(properties):
            schema["additionalProperties"] = False


def _target(root: dict[str, Any], pointer: str) -> Any:
    """Return the schema to which `#`, `#/$defs/name` or `#/definitions/name` points."""
    _, *steps = pointer.split("/")
    return root.get(steps[0], {}).get(steps[1]) if steps else root
