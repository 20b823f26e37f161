# SPDX-License-Identifier: MIT
"""Rules of JSON schemas beyond single keywords: patterns on a string, recursion, types and references of tool schemas.

- By `allOf`, or a `$ref` next to other keywords, several patterns may apply to one string. The compiler intersects
  them without a limit, and each pattern may double the time, so their number is limited here. The number is estimated:
  patterns inside such a schema are counted together if they belong to the schema itself, one property, array elements,
  or unnamed keys (`additionalProperties`, `patternProperties`), which count for every named property, too.
- A schema that must contain itself would be generated until the context is full.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.json_facts import NAMES
from candle_vllm.core.sampling.json_references import LISTED_PARTS, NAMED_PARTS, SINGLE_PARTS, References, children
from candle_vllm.core.sampling.structured import refused

MAX_MEETING = 8  # maximum number of patterns and formats on one string
MAX_VISITS = 200_000  # maximum number of pairs of a schema and a `Place` that are examined

Schema = dict[str, Any]
Place = tuple[str, str]
"""What patterns apply to: ("property", name), ("element", ""), ("key", "") for unnamed keys, ("schema", position)."""

_MERGED = ("allOf", "anyOf", "oneOf")
_KEY: Place = ("key", "")


def check_meeting(nodes: Sequence[tuple[Schema, str]], targets: Mapping[str, Any], asserting: Collection[str]) -> None:
    """Refuse schemas in which too many different patterns apply to the same string.

    `nodes` are all reachable schemas, checked, with their positions; keywords in `asserting` constrain a value, unlike
    annotations. Raises InvalidParameterError if more than `MAX_MEETING` patterns may meet, or the check is too slow.
    """
    waiting: list[tuple[Any, Place]] = [(each, ("schema", at)) for each, at in nodes if _merges(each, asserting)]
    seen: set[tuple[int, Place]] = set()
    patterns: defaultdict[Place, set[str]] = defaultdict(set)
    while waiting:
        schema, place = waiting.pop()
        if not isinstance(schema, dict) or (id(schema), place) in seen:
            continue
        seen.add((id(schema), place))
        if len(seen) > MAX_VISITS:
            raise refused("the JSON schema has too many allOf and $ref that lead to each other; write some of them out")
        patterns[place].update(f"{name} {schema[name]}" for name in ("pattern", "format") if name in schema)
        waiting += _inside(schema, place, targets)
    for place, own in list(patterns.items()):
        together = own | patterns[_KEY] if place[0] == "property" else own
        if len(together) > MAX_MEETING:
            raise refused(
                f"the JSON schema may put {len(together)} patterns and formats on one text by allOf and $ref (at "
                f"{' '.join(place):.80}); at most {MAX_MEETING} may meet"
            )


def _merges(schema: Schema, asserting: Collection[str]) -> bool:
    """Return whether a schema has parts that apply to the same value."""
    beside = sum(name in asserting for name in schema)
    return len(schema.get("allOf", ())) > 1 or (beside > 1 and ("allOf" in schema or "$ref" in schema))


def _inside(schema: Schema, place: Place, targets: Mapping[str, Any]) -> Iterator[tuple[Any, Place]]:
    """Yield the schemas inside a schema, each with the place that it applies to."""
    if "$ref" in schema:
        yield targets[schema["$ref"]], place
    for name in _MERGED:
        yield from ((part, place) for part in schema.get(name, ()))
    yield from ((part, ("property", name)) for name, part in schema.get("properties", {}).items())
    yield from ((part, _KEY) for part in schema.get("patternProperties", {}).values())
    yield from ((part, ("element", "")) for part in schema.get("prefixItems", ()))
    if "additionalProperties" in schema:
        yield schema["additionalProperties"], _KEY
    if "items" in schema:
        yield schema["items"], ("element", "")


def check_finite(nodes: Sequence[tuple[Schema, str]], targets: Mapping[str, Any]) -> None:
    """Refuse schemas without a finite instance: objects and arrays that must contain themselves, cycles of references.

    `nodes` are all reachable schemas, checked, with their positions; nested schemas are after the schemas around them.
    Raises InvalidParameterError for a schema without a finite instance.
    """
    ends: set[int] = set()
    wanting: dict[int, list[Schema]] = {}  # id of a schema not known to end -> schemas that may end if it does
    queue = deque(schema for schema, _ in reversed(nodes))

    while queue:
        schema = queue.popleft()

        def known(part: Any, asking: Schema = schema) -> bool:
            if isinstance(part, bool) or id(part) in ends:
                return True
            wanting.setdefault(id(part), []).append(asking)
            return False

        if id(schema) not in ends and _ends(schema, known, targets):
            ends.add(id(schema))
            queue.extend(wanting.pop(id(schema), ()))
    endless = next((place for schema, place in nodes if id(schema) not in ends), None)
    if endless is not None:
        raise refused(f"the JSON schema has no finite instance (at {endless}): each of its alternatives is endless")


def _ends(schema: Schema, known: Callable[[Any], bool], targets: Mapping[str, Any]) -> bool:
    """Return whether a schema has a finite instance, if only the schemas for which `known` is true have one."""
    if "$ref" in schema and not known(targets[schema["$ref"]]):
        return False
    if not all(map(known, schema.get("allOf", []))):
        return False
    if any(name in schema and not any(map(known, schema[name])) for name in ("anyOf", "oneOf")):
        return False
    if {"enum", "const"} & schema.keys():
        return True
    if schema.get("type") in ("object", ["object"]):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(known(properties.get(name, others)) for name in schema.get("required", []))
    if schema.get("type") in ("array", ["array"]):
        first, least = schema.get("prefixItems", []), schema.get("minItems", 0)
        needed = [*first[:least], *([schema["items"]] if least > len(first) and "items" in schema else [])]
        return all(map(known, needed))
    return True


TYPE_ALIASES: Mapping[str, str] = MappingProxyType(
    {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "list": "array", "dict": "object"}
)
"""Python's name of a type, as schemas of tools may have it -> JSON's name."""


class Fault(NamedTuple):
    """An error in a schema.

    `path` is the path to its position, joined by dots; `text` says what is wrong there.
    """

    path: str
    text: str


def arguments_fault(root: Schema) -> Fault | None:
    """Return an error in a tool's schema: an unknown type, a `$ref` without a target, too many schemas; or None."""
    try:
        references = References(root)
    except InvalidParameterError as error:
        return Fault("", str(error).removeprefix("structured_outputs: "))
    waiting: list[tuple[Any, str, str]] = [(root, "", "")]
    while waiting:
        schema, path, base = waiting.pop()
        if not isinstance(schema, dict):
            continue
        base = references.base(schema, base)
        named = schema.get("type", "object")
        for one in named if isinstance(named, list) else [named]:
            if not isinstance(one, str) or (one not in NAMES and one not in TYPE_ALIASES):
                text = f"has the unknown JSON type {one!r:.60}; known: {', '.join(NAMES)}"
                return Fault(f"{path}.type".removeprefix("."), text)
        if "$ref" in schema:
            try:
                fault = _leads_nowhere(references, schema["$ref"], base)
            except InvalidParameterError as error:
                fault = str(error).removeprefix("structured_outputs: ")
            if fault:
                return Fault(f"{path}.$ref".removeprefix("."), fault)
        waiting += [(part, f"{path}.{step}".removeprefix("."), base) for step, part in children(schema)]
    return None


def _leads_nowhere(references: References, reference: Any, base: str) -> str | None:
    """Return why a chain of references has no target; None if it has one."""
    seen = set[str]()
    while True:
        target = references.resolve(reference, base, "$ref")
        if target.pointer in seen:
            return f"{reference!r:.80} refers to nothing but itself"
        seen.add(target.pointer)
        if not isinstance(target.schema, dict) or "$ref" not in target.schema:
            return None
        reference, base = target.schema["$ref"], target.base


def in_json_types(schema: Any) -> Any:
    """Return a copy of a tool's schema with JSON's names of types."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    named = schema.get("type")
    if isinstance(named, str):
        found["type"] = TYPE_ALIASES.get(named, named)
    elif isinstance(named, list):
        found["type"] = [TYPE_ALIASES.get(one, one) if isinstance(one, str) else one for one in named]
    for name, value in schema.items():
        if name in NAMED_PARTS and isinstance(value, dict):
            found[name] = {key: in_json_types(part) for key, part in value.items()}
        elif name in LISTED_PARTS and isinstance(value, list):
            found[name] = [in_json_types(part) for part in value]
        elif name in SINGLE_PARTS:
            found[name] = in_json_types(value)
    return found
