# SPDX-License-Identifier: MIT
"""Find the arrays whose elements must differ (`uniqueItems`) in instances of a JSON schema, for `unique_items`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from candle_vllm.core.sampling.json_facts import BOUNDS, FRACTION, TYPES, Facts, Place, type_of, types_of, values_of
from candle_vllm.core.sampling.json_references import References

_PLAIN = frozenset({"string", "integer", FRACTION, "boolean", "null"})
_NARROWING = frozenset({*BOUNDS, "multipleOf", "enum", "const"})
_MAX_DEPTH = 8


def compared(facts: Facts, schema: dict[str, Any], base: str) -> frozenset[str]:
    """Return the element types of a schema's arrays if they can be compared during generation; else no type.

    Fractions can be compared if every fraction is allowed, because each can then be restricted to one spelling.
    """
    if {"prefixItems", "contains"} & schema.keys() or isinstance(schema.get("items"), list):
        return frozenset()
    types, narrow = _types_at(facts, Place(schema.get("items", True), base), {})
    return types if types <= _PLAIN and not (narrow and FRACTION in types) else frozenset()


def _types_at(facts: Facts, place: Place, known: dict[int, Any], depth: int = 0) -> tuple[frozenset[str], bool]:
    """Return the types of values at a place, including alternatives, and whether some fractions are not allowed."""
    if (key := id(place.schema)) in known:  # otherwise references in a circle would take exponential time
        return known[key]
    found, narrow = known[key] = TYPES, False
    for schema, base in facts.parts(place):
        if schema is False:
            known[key] = frozenset(), False
            return known[key]
        found &= types_of(schema)
        narrow |= FRACTION in types_of(schema) and not _NARROWING.isdisjoint(schema)
        if (values := values_of(schema)) is not None:
            found &= frozenset(map(type_of, values))
        for name in ("anyOf", "oneOf"):
            narrow |= name in schema and depth >= _MAX_DEPTH
            if isinstance(schema.get(name), list) and depth < _MAX_DEPTH:
                options = [_types_at(facts, Place(one, base), known, depth + 1) for one in schema[name]]
                found &= frozenset[str]().union(*(types for types, _ in options))
                narrow |= any(one for _, one in options)
    known[key] = found, narrow
    return found, narrow


class Site:
    """The schemas that may apply to one value in an instance.

    `differing` are the types of an array's elements that must differ. `inside` has the sites inside this one, made when
    needed, by index or key; None stands for the keys that no `properties` has.
    """

    def __init__(self, places: Sequence[Place], differing: frozenset[str]) -> None:
        self.places = places
        self.differing = differing
        self.inside: dict[str | int | None, Site] = {}


class Sites:
    """The sites of a schema's instances; `root` is the schema of the request, which must have been checked."""

    def __init__(self, root: Any) -> None:
        self._references = References(root if isinstance(root, dict) else {})
        self._facts = Facts(self._references, lambda _: lambda _: True)
        self.root = self._site([Place(root, "")])

    def member(self, site: Site, key: str) -> Site:
        """Return the site of the value of a key."""
        known = key if any(key in schema.get("properties", ()) for schema, _ in site.places) else None
        if known not in site.inside:
            places = [Place(one, base) for schema, base in site.places for one in _of_key(schema, key)]
            site.inside[known] = self._site(places)
        return site.inside[known]

    def element(self, site: Site, index: int) -> Site:
        """Return the site of an element of an array."""
        first = max((len(_first(schema)) for schema, _ in site.places), default=0)
        index = min(index, first)
        if index not in site.inside:
            places = [Place(one, base) for schema, base in site.places for one in _of_index(schema, index)]
            site.inside[index] = self._site(places)
        return site.inside[index]

    def _site(self, waiting: list[Place]) -> Site:
        found: dict[tuple[int, str], Place] = {}
        while waiting:
            schema, base = waiting.pop()
            if not isinstance(schema, dict):
                continue
            base = self._references.base(schema, base)
            if (id(schema), base) in found:
                continue
            found[id(schema), base] = Place(schema, base)
            if "$ref" in schema:
                target = self._references.resolve(schema["$ref"], base, "#")
                waiting.append(Place(target.schema, target.base))
            for name in ("allOf", "anyOf", "oneOf"):
                waiting += [Place(one, base) for one in schema.get(name, ())]
            for name in ("dependentSchemas", "dependencies"):
                waiting += [Place(one, base) for one in schema.get(name, {}).values()]
            waiting += [Place(schema[name], base) for name in ("then", "else") if name in schema]
        places = list(found.values())
        kinds = [compared(self._facts, one, base) for one, base in places if one.get("uniqueItems") is True]
        return Site(places, frozenset[str]().union(*kinds))


def _first(schema: dict[str, Any]) -> list[Any]:
    items = schema.get("items")
    return items if isinstance(items, list) else schema.get("prefixItems", [])


def _of_index(schema: dict[str, Any], index: int) -> Iterator[Any]:
    first = _first(schema)
    if index < len(first):
        yield first[index]
    else:
        others = ("additionalItems" if isinstance(schema.get("items"), list) else "items", "unevaluatedItems")
        yield from (schema[name] for name in others if name in schema)
    if "contains" in schema:
        yield schema["contains"]


def _of_key(schema: dict[str, Any], key: str) -> Iterator[Any]:
    properties = schema.get("properties", {})
    if key in properties:
        yield properties[key]
    else:
        yield from (schema[name] for name in ("additionalProperties", "unevaluatedProperties") if name in schema)
    yield from schema.get("patternProperties", {}).values()
