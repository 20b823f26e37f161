"""Rules of JSON schemas beyond single keywords: their dialect, patterns that meet, recursion.

- Older spellings are brought to draft 2020-12, and formats that need more than llguidance's own patterns are written
  out: llguidance's times let the 29th of February pass in every year, and a leap second at any minute. Leap seconds are
  left out altogether, as few readers of such texts know them.
- Each pattern that must hold on a text beside others may double the work. The compiler makes one expression of all that
  `allOf`, or a `$ref` beside other keywords, puts on the same text, and no limit of its own ends that work. What meets
  is not followed exactly: of all that lies inside such schemas, patterns count together that are on properties of one
  name, or on elements of arrays, or on keys without a name; the last count with every name, too.
- Recursion that never ends would go on until the context is full.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from candle_vllm.core.sampling.structured import refused

_DRAFTS = ("draft-04", "draft-06", "draft-07", "draft/2019-09", "draft/2020-12")
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]+)?(?:[zZ]|[+-]{_CLOCK})"
FORMATS: Mapping[str, str] = MappingProxyType(
    {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[tT]{_TIME}$"}
)
"""RFC 3339 formats as patterns."""


def modernise(schema: dict[str, Any], place: str) -> None:
    """Rewrites the keywords of one schema, not of those inside it, in place.

    Raises:
        InvalidParameterError: a dialect that is not known, or two spellings at once.
    """
    draft = schema.pop("$schema", None)
    if draft is not None and not (isinstance(draft, str) and any(known in draft for known in _DRAFTS)):
        raise refused(f"the JSON schema follows {draft!r:.80}; known are the drafts 4, 6, 7, 2019-09 and 2020-12")
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    _lists_of_items(schema, place)
    pattern = FORMATS.get(schema["format"]) if isinstance(schema.get("format"), str) else None
    if pattern is not None:
        del schema["format"]
        _also(schema, {"pattern": pattern}, place)


def _lists_of_items(schema: dict[str, Any], place: str) -> None:
    """Before 2020-12, a list as `items` had the first ones, and `additionalItems` the others."""
    others = schema.pop("additionalItems", None)  # without a list as `items`, it says nothing
    if isinstance(schema.get("items"), list):
        if "prefixItems" in schema:
            raise refused(f"the JSON schema has prefixItems and a list as items (at {place}); only one can be meant")
        schema["prefixItems"] = schema.pop("items")
        if others is not None:
            schema["items"] = others


def _also(schema: dict[str, Any], more: dict[str, Any], place: str) -> None:
    """Adds keywords that must hold beside those that are there."""
    if not more.keys() & schema.keys():
        schema.update(more)
        return
    if not isinstance(schema.get("allOf", []), list):
        raise refused(f"allOf must be a list of schemas (at {place})")
    schema["allOf"] = [*schema.get("allOf", []), more]


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
