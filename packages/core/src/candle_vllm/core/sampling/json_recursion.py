"""Whether a JSON schema has a finite instance: recursion that never ends would go on until the context is full."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from candle_vllm.core.sampling.structured import refused

Schema = dict[str, Any]


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
