"""Rules of JSON schemas beyond single keywords: patterns that meet, recursion.

- Each pattern that must hold on a text beside others may double the work. The compiler makes one expression of all that
  `allOf`, or a `$ref` beside other keywords, puts on the same text, and no limit of its own ends that work. What meets
  is not followed exactly: of all that lies inside such schemas, patterns count together that are on properties of one
  name, or on elements of arrays, or on keys without a name; the last count with every name, too.
- Recursion that never ends would go on until the context is full.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from candle_vllm.core.sampling.structured import refused

MAX_MEETING = 8  # 12 take 0.4 s, 15 take half a minute
MAX_VISITS = 200_000  # of schemas, at each place that they are on

Schema = dict[str, Any]
Place = tuple[str, str]
"""What kind of place, and its name: ("property", "age"), ("element", ""), ("key", ""), ("schema", where)."""

_MERGED = ("allOf", "anyOf", "oneOf")
_KEY: Place = ("key", "")


def check_meeting(nodes: Sequence[tuple[Schema, str]], targets: Mapping[str, Any], asserting: Collection[str]) -> None:
    """Refuses schemas in which too many different patterns meet.

    Args:
        nodes: every schema that can be reached, checked, and where it is.
        targets: what each `$ref` points to.
        asserting: keywords that are more than annotations.

    Raises:
        InvalidParameterError: more than `MAX_MEETING` may meet, or the schema is too entangled to tell.
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
    """Whether a schema has parts that must hold together."""
    beside = sum(name in asserting for name in schema)
    return len(schema.get("allOf", ())) > 1 or (beside > 1 and ("allOf" in schema or "$ref" in schema))


def _inside(schema: Schema, place: Place, targets: Mapping[str, Any]) -> Iterator[tuple[Any, Place]]:
    """The schemas inside a schema, and the places that they are on."""
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
    """Refuses objects that must hold themselves, and references that go round.

    Args:
        nodes: every schema that can be reached, checked, and where it is; what is inside of others comes behind them.
        targets: what each `$ref` points to.

    Raises:
        InvalidParameterError: one of them has no finite instance.
    """
    ends: set[int] = set()
    wanting: dict[int, list[Schema]] = {}  # schema -> those that asked for it too early
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
        raise refused(f"the JSON schema has no finite instance (at {endless}): it refers to itself wherever it goes")


def _ends(schema: Schema, known: Callable[[Any], bool], targets: Mapping[str, Any]) -> bool:
    """Whether a schema has a finite instance, as far as is known of those that it needs."""
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
