# SPDX-License-Identifier: MIT
"""Resolve the `$ref`s of JSON schemas: JSON pointers, anchors and ids of the same document.

Nothing is fetched: a reference to another document is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin

from candle_vllm.core.sampling.structured import refused

MAX_INDEXED = 50_000  # maximum number of schemas of one document, unreferenced ones included
MAX_NESTING = 100  # maximum depth of subschemas, and of values in `enum` and `const`
SINGLE_PARTS = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains")
SINGLE_PARTS += ("propertyNames", "unevaluatedItems", "unevaluatedProperties", "contentSchema")
LISTED_PARTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
NAMED_PARTS = ("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions")


class Target(NamedTuple):
    """Target of a reference.

    Attributes:
        pointer: its JSON pointer, as in `#/$defs/a`; for an anchor, and inside a schema with an id, the URI.
        schema: the target, which is not checked yet and may be no schema.
        base: the base URI of the references in it.
    """

    pointer: str
    schema: Any
    base: str


class References:
    """The possible targets of references in one document.

    Raises InvalidParameterError if the document has too many schemas, or is nested too deeply.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._ids = ("$id", "id") if "draft-04" in str(root.get("$schema")) else ("$id",)
        self._resources: dict[str, Any] = {"": root}
        self._anchors: dict[str, tuple[Any, str]] = {}
        self._bases: dict[int, str] = {}
        waiting: list[tuple[Any, str, int]] = [(root, "", 0)]
        while waiting:
            schema, base, depth = waiting.pop()
            if not isinstance(schema, dict):
                continue
            if depth > MAX_NESTING:
                raise refused(f"the JSON schema is nested more than {MAX_NESTING} deep")
            base = self._enter(schema, base)
            if len(self._bases) > MAX_INDEXED:
                raise refused(f"the JSON schema has more than {MAX_INDEXED} schemas in it")
            waiting += [(part, base, depth + 1) for _, part in children(schema)]

    def base(self, schema: dict[str, Any], outer: str) -> str:
        """Return the base URI of references in a schema."""
        return self._bases.get(id(schema), outer)

    def resolve(self, reference: Any, base: str, place: str) -> Target:
        """Return the target of a `$ref` at `place`.

        Raises:
            InvalidParameterError: `reference` is not a text, or its target does not exist or is in another document.
        """
        if not isinstance(reference, str):
            raise _elsewhere(reference, place)
        document, _, fragment = reference.partition("#")
        uri = _joined(base, document) if document else base
        if uri not in self._resources:
            raise _elsewhere(reference, place)
        resource = self._resources[uri]
        if fragment and not fragment.startswith("/"):
            found = self._anchors.get(f"{uri}#{unquote(fragment)}")
            if found is None:
                raise refused(f"$ref {reference!r:.80} points to nothing in the schema (at {place})")
            return Target(f"{uri}#{fragment}", *found)
        schema = _walked(resource, fragment, reference)
        inner = self._bases.get(id(schema), uri) if isinstance(schema, dict) else uri
        return Target(f"#{fragment}" if resource is self._root else f"{uri}#{fragment}", schema, inner)

    def _enter(self, schema: dict[str, Any], base: str) -> str:
        """Register the ids and anchors of a schema; return the base URI of its references."""
        for own in map(schema.get, self._ids):
            if not isinstance(own, str):
                continue
            document, _, fragment = own.partition("#")
            base = _joined(base, document) if document else base
            if document:
                self._resources.setdefault(base, schema)
            if fragment:  # an anchor in the older drafts
                self._anchors.setdefault(f"{base}#{fragment}", (schema, base))
        self._bases[id(schema)] = base
        for name in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(name), str):
                self._anchors.setdefault(f"{base}#{schema[name]}", (schema, base))
        return base


def children(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the possible subschemas of a schema, each with the path to it, joined by dots."""
    for name in SINGLE_PARTS:
        if isinstance(schema.get(name), dict):
            yield name, schema[name]
    for name in LISTED_PARTS:
        if isinstance(schema.get(name), list):
            yield from ((f"{name}.{place}", part) for place, part in enumerate(schema[name]))
    for name in NAMED_PARTS:
        if isinstance(schema.get(name), dict):
            yield from ((f"{name}.{key}", part) for key, part in schema[name].items())


def _joined(base: str, document: str) -> str:
    try:
        return urljoin(base, document)
    except ValueError:  # not a URI
        return document


def _walked(root: Any, pointer: str, reference: str) -> Any:
    """Return the value to which a JSON pointer (RFC 6901, in a URI fragment) points."""
    found = root
    for part in pointer.split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and len(name) < 7 and int(name) < len(found):
            found = found[int(name)]
        else:
            raise refused(f"$ref {reference!r:.80} points to nothing in the schema")
    return found


def _elsewhere(reference: Any, place: str) -> Exception:
    return refused(
        f"$ref {reference!r:.80} is not supported (at {place}): refer to a place of the same schema, as in #/$defs/name"
    )
