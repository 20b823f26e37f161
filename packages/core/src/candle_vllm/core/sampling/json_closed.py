# SPDX-License-Identifier: MIT
"""Close JSON schema objects that have properties and no rule for other keys, as xgrammar and llama.cpp do.

If other keys are allowed, a weak model may invent keys until its token limit.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.sampling.json_cases import CASES, MAPS, SINGLE
from candle_vllm.core.sampling.json_facts import LISTS

_OF_OBJECTS = frozenset({"properties", "patternProperties", "additionalProperties", "required"})
_KEEPS_OPEN = frozenset({"additionalProperties", "patternProperties", "enum", "const"})


def close_objects(root: dict[str, Any]) -> dict[str, Any]:
    """Write `additionalProperties: false` to objects that have `properties` and no keyword for other keys.

    An object that several schemas describe together (`allOf`, or `properties` next to `anyOf` or `$ref`) stays open:
    closing one of the schemas would forbid the properties of the others.

    Args:
        root: a schema in llguidance's keywords, with all definitions that it refers to; changed in place.
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
        parts = [part for name in LISTS for part in schema.get(name, ())]
        parts += [part for name in MAPS for part in schema.get(name, {}).values()]
        parts += [schema[name] for name in SINGLE if name in schema]
        if "$ref" in schema:
            parts.append(_target(root, schema["$ref"]))
        waiting += [(part, shared) for part in parts]
    for schema in found:
        properties = schema.get("properties")
        if together[id(schema)] or properties is None or not _KEEPS_OPEN.isdisjoint(schema):
            continue
        if set(schema.get("required", ())) <= properties.keys() and schema.get("minProperties", 0) <= len(properties):
            schema["additionalProperties"] = False
    return root


def _target(root: dict[str, Any], pointer: str) -> Any:
    """Return the schema to which `#`, `#/$defs/name` or `#/definitions/name` points."""
    _, *steps = pointer.split("/")
    return root.get(steps[0], {}).get(steps[1]) if steps else root
