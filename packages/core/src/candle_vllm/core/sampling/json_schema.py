"""JSON schemas before they are compiled: what cannot be guaranteed is refused by name, and what would explode, too.

llguidance answers most of what it does not know with an error. The rest is decided here: keywords that it passes over,
numbers that it rounds, keys that it would let appear twice, and schemas whose compilation takes time or memory without
bound or overflows the stack. Every number is a measured one: each limit alone costs a second at most.

A schema is read as draft 2020-12; what older drafts spell differently (`definitions`, a list as `items`, a boolean
`exclusiveMinimum`) means what it meant there. Keywords that no draft knows are annotations, as the specification says,
unless they look like a misspelt one.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from candle_vllm.core.sampling.json_rules import check_finite, check_meeting, modernise
from candle_vllm.core.sampling.structured import refused

MAX_SUBSCHEMAS = 10_000
MAX_LEVELS = 600  # nesting of the schema and of all definitions that it refers to, added up: the compiler recurses
MAX_NESTING = 100
MAX_PROPERTIES = 4_000
MAX_OPTIONAL = 480  # optional properties of an object: each is four items of a parser that has 2,000 for one place
MAX_COUNTED_OPTIONAL = 64  # optional properties of an object with minProperties or maxProperties
MAX_PATTERNS = 1_000
MAX_PATTERN_PROPERTIES = 64
MAX_VALUES = 50_000  # of all enums
MAX_COMPOUND_VALUES = 2_000  # of these, objects and arrays
MAX_COUNT = (1 << 31) - 1  # of minLength and the like
MAX_MULTIPLE = 50_000  # of multipleOf, its decimal point left out
MAX_MULTIPLES = 200_000  # the same, summed up
MAX_UNKNOWN = 1_000  # keywords that no draft knows
MAX_LOOKED_UP = 8  # of them, those that are compared with the known ones, in search of what was meant
MAX_INTEGER = 1 << 53  # beyond it, neighbours are the same float

_ONE = ("items", "additionalProperties")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
SUPPORTED = frozenset(
    {*_ONE, *_LISTS, *_MAPS, *_COUNTS, *_BOUNDS, "type", "enum", "const", "$ref", "required", "pattern", "format"}
    | {"multipleOf"}
)
UNSUPPORTED = frozenset(
    {"not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"}
    | {"dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"}
    | {"$dynamicRef", "$recursiveRef", "x-guidance", "extends", "disallow", "divisibleBy"}
)
_ANNOTATIONS = frozenset(
    {"$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary", "$comment", "$defs"}
    | {"definitions", "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"}
    | {"contentEncoding", "contentMediaType", "contentSchema", "nullable"}
)
_ESCAPED = "\b\t\n\f\r"


class Budget:
    """What all schemas of one form may have together: twice what one may.

    Attributes:
        counts: of what, and how many.
        multiples: every multipleOf without its decimal point, added up.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.multiples = 0


def checked_schema(schema: Any, budget: Budget | None = None) -> dict[str, Any]:
    """A schema as it may be compiled.

    Args:
        schema: as `json.loads` gives it; its dicts may be changed.
        budget: of all schemas of one form; None where this is the only one.

    Returns:
        The same, without what says nothing to the compiler.

    Raises:
        InvalidParameterError: the schema is wrong, not supported, too large, or has no finite instance.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise refused("the JSON schema must be an object or true")
    _Check(schema, budget or Budget()).run()
    return schema


class _Check:
    """One walk over what can be reached from the root, in the order of the text, each definition once."""

    def __init__(self, root: dict[str, Any], budget: Budget) -> None:
        self.root = root
        self.budget = budget
        self.counts: Counter[str] = Counter()
        self.targets: dict[str, Any] = {"#": root}  # JSON pointer -> schema
        self.waiting: list[tuple[str, Any]] = []
        self.multiples: list[Fraction] = []  # of this schema
        self.nodes: list[tuple[dict[str, Any], str]] = []
        self.base = root.get("$id") if isinstance(root.get("$id"), str) else None

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
        check_finite(self.nodes, self.targets)
        check_meeting(self.nodes, self.targets, SUPPORTED)

    def subschema(self, schema: Any, place: str, depth: int) -> int:
        """Checks a schema and those inside it; how deep they are nested."""
        if isinstance(schema, bool):
            return 1
        if not isinstance(schema, dict):
            raise refused(f"a JSON schema must be an object or a boolean (at {place})")
        if depth > MAX_NESTING:
            raise refused(f"the JSON schema is nested more than {MAX_NESTING} deep (at {place[:80]}...)")
        self.count("subschemas", MAX_SUBSCHEMAS)
        self.nodes.append((schema, place))
        self.keywords(schema, place)
        self.numbers(schema, place)
        self.values(schema, place)
        self.objects(schema, place)
        if "$ref" in schema:
            self.reference(schema, place)
        return 1 + max((self.subschema(part, at, depth + 1) for part, at in _parts(schema, place)), default=0)

    def count(self, what: str, most: int, number: int = 1) -> None:
        self.counts[what] += number
        self.budget.counts[what] += number
        if self.counts[what] > most:
            raise refused(f"the JSON schema has more than {most} {what}")
        if self.budget.counts[what] > 2 * most:
            raise refused(f"the JSON schemas have more than {2 * most} {what} together")

    def keywords(self, schema: dict[str, Any], place: str) -> None:
        modernise(schema, place)
        if schema is not self.root and isinstance(schema.get("$id"), str):
            raise refused(f"the JSON schema has an $id inside it (at {place}); only the root may have one")
        for name in schema:
            if name in UNSUPPORTED:
                raise refused(f"the JSON schema keyword {name!r} is not supported (at {place}); leave it out")
            if name not in SUPPORTED and name not in _ANNOTATIONS and not name.startswith("x-"):
                self.count("keywords that are none", MAX_UNKNOWN)
                if self.counts["keywords that are none"] <= MAX_LOOKED_UP:
                    _check_spelling(name, place)

    def numbers(self, schema: dict[str, Any], place: str) -> None:
        for name in _COUNTS:
            value = schema.get(name)
            if isinstance(value, float) and value.is_integer():
                value = schema[name] = int(value)
            if value is not None and not (type(value) is int and 0 <= value <= MAX_COUNT):
                raise refused(f"{name} must be a whole number of 0 to {MAX_COUNT} (at {place})")
        for name in _BOUNDS:
            if not isinstance(schema.get(name), bool):
                _exact(schema.get(name), f"{place}/{name}")
        multiple = schema.get("multipleOf")
        if multiple is not None:
            if isinstance(multiple, bool) or not isinstance(multiple, (int, float)) or not 0 < multiple < math.inf:
                raise refused(f"multipleOf must be a number above 0 (at {place})")
            self.multiples.append(Fraction(str(multiple)))
        if "pattern" in schema or "format" in schema:
            self.count("patterns and formats", MAX_PATTERNS)

    def values(self, schema: dict[str, Any], place: str) -> None:
        listed = schema.get("enum", [])
        if not isinstance(listed, list):
            raise refused(f"enum must be a list (at {place})")
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
                raise refused(f"a value of enum or const has the control character U+{ord(wrong):04X} (at {place})")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            _exact(value, place)
        elif isinstance(value, (dict, list)):
            self.count("values inside enum and const", MAX_VALUES, len(value))
            for inner in value.values() if isinstance(value, dict) else value:
                self.value(inner, place, depth + 1)

    def objects(self, schema: dict[str, Any], place: str) -> None:
        for name in _MAPS:
            if not isinstance(schema.get(name, {}), dict):
                raise refused(f"{name} must be an object (at {place})")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise refused(f"required must be a list of names (at {place})")
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
                "key could be said twice; name the properties in required"
            )
        if (least or "maxProperties" in schema) and optional > MAX_COUNTED_OPTIONAL:
            raise refused(
                f"minProperties and maxProperties are not supported with more than {MAX_COUNTED_OPTIONAL} optional "
                f"properties (at {place})"
            )

    def reference(self, schema: dict[str, Any], place: str) -> None:
        """Notes where a `$ref` points, and spells it as a pointer into this document."""
        pointer = schema["$ref"]
        if isinstance(pointer, str) and self.base and pointer.startswith(self.base.rstrip("#")):
            pointer = "#" + pointer.removeprefix(self.base.rstrip("#")).removeprefix("#")
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise refused(
                f"$ref {schema['$ref']!r:.80} is not supported (at {place}): refer to a place of the same schema, as "
                "in #/$defs/name"
            )
        schema["$ref"] = pointer
        if pointer not in self.targets:
            self.targets[pointer] = target = _resolved(self.root, pointer)
            self.waiting.append((pointer, target))

    def check_multiples(self) -> None:
        """llguidance counts remainders, and those of the common multiple where two meet (`allOf`)."""
        together = Fraction(1)
        for place, value in enumerate(self.multiples):
            together = _common_multiple(together, value) if place else value
            self.budget.multiples += _digits(value)
            if max(_digits(value), _digits(together)) > MAX_MULTIPLE or self.budget.multiples > MAX_MULTIPLES:
                raise refused(
                    f"multipleOf is supported up to {MAX_MULTIPLE}, for the least common multiple too, and up to "
                    f"{MAX_MULTIPLES} added up, decimal points left out"
                )


def _check_spelling(name: str, place: str) -> None:
    """Refuses a keyword that looks like a misspelt one."""
    close = difflib.get_close_matches(name[:40], (*SUPPORTED, *UNSUPPORTED), 1, 0.8)
    if close:
        raise refused(f"the JSON schema has {name!r:.80} (at {place}): is {close[0]!r} meant?")


def _parts(schema: dict[str, Any], place: str) -> Iterator[tuple[Any, str]]:
    """The schemas inside a schema, and where they are."""
    for name in _ONE:
        if name in schema:
            yield schema[name], f"{place}/{name}"
    for name in _LISTS:
        listed = schema.get(name, [])
        if not isinstance(listed, list):
            raise refused(f"{name} must be a list of schemas (at {place})")
        yield from ((part, f"{place}/{name}/{index}") for index, part in enumerate(listed))
    for name in _MAPS:
        yield from ((part, f"{place}/{name}/{key}") for key, part in schema.get(name, {}).items())


def _resolved(root: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901, in a URI fragment) points to."""
    found = root
    for part in pointer.split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and len(name) < 7 and int(name) < len(found):
            found = found[int(name)]
        else:
            raise refused(f"$ref {pointer!r:.80} points to nothing in the schema")
    return found


def _exact(value: Any, place: str) -> None:
    """Numbers become floats on the way."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refused(f"a bound must be a number (at {place})")
    if (isinstance(value, int) and abs(value) > MAX_INTEGER) or not math.isfinite(value):
        raise refused(f"the JSON schema has a number that is too large (at {place}); at most 2^53 is supported")


def _digits(value: Fraction) -> int:
    """A decimal number without its point."""
    while value.denominator > 1:
        value *= 10
    return value.numerator


def _common_multiple(one: Fraction, two: Fraction) -> Fraction:
    return Fraction(math.lcm(one.numerator, two.numerator), math.gcd(one.denominator, two.denominator))
