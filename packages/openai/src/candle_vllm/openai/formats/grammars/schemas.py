# SPDX-License-Identifier: MIT
"""JSON schemas of tools' arguments, decomposed for tool-call formats whose arguments are not JSON (XML, Pythonic).

A constraint that a format cannot express is refused; the error names the tool and the keyword.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.json_cases import CASES
from candle_vllm.core.sampling.json_schema import SUPPORTED, compilable_schema
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.formats.values import JSON_NAMES

Schema = Mapping[str, Any]
TYPES = ("null", "boolean", "integer", "number", "array", "object", "string")
OBJECT: Schema = {"type": "object"}
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
OWN = {  # type -> keywords that constrain only its values
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": _NUMBERS,
    "number": _NUMBERS,
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
}
_MOST_STEPS = 64  # nested references and alternatives
_MOST_BRANCHES = 256
_MOST_WORK = 2_000  # budget of expanded parts of a schema; the budget has two more for each character of the schema
_PART = 32  # an expanded part costs one, and one more for each of this many characters


class FunctionShape(Protocol):
    """What grammars use of a tool: `grammar` is a user's Lark grammar of the text that a custom tool gets, or None."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> dict[str, Any]: ...

    @property
    def strict(self) -> bool: ...

    @property
    def grammar(self) -> str | None: ...


class Branch(NamedTuple):
    """One type that a value may have.

    Attributes:
        schema: further constraints; only keywords of this type.
        values: the allowed values; None if `schema` alone describes them.
    """

    type: str
    schema: Schema
    values: tuple[Any, ...] | None = None


class Root:
    """The schema of one tool's arguments.

    Args:
        schema: schema of the tool's arguments; references in it are relative to the whole schema.
        grammar: a user's Lark grammar that every string in the arguments must follow.

    Raises:
        InvalidParameterError: the schema is invalid, or constrained decoding does not support it.
    """

    def __init__(self, tool: FunctionShape, schema: Schema, grammar: str | None = None) -> None:
        self.tool = tool
        self.grammar = grammar
        try:
            self.schema: dict[str, Any] = compilable_schema(copy.deepcopy(dict(schema))).schema
        except InvalidParameterError as error:
            message = str(error).removeprefix("structured_outputs: ")
            raise InvalidParameterError(f"tools: the parameters of {tool.name!r}: {message}", "tools") from None
        self._work_left = _MOST_WORK + 2 * len(str(self.schema))

    def refused(self, keyword: str, why: str) -> UnsupportedParameterError:
        """Return the error for a keyword that the model's tool-call format cannot express."""
        return UnsupportedParameterError(
            f"tools: the parameters of {self.tool.name!r} have {keyword!r}, which cannot be guaranteed in this model's "
            f"tool format: {why}",
            "tools",
        )

    def resolved(self, schema: Any) -> Any:
        """Follow references; refuse other keywords beside a reference."""
        for _ in range(_MOST_STEPS):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                return schema
            if len(_asserted(schema)) > 1:
                raise self.refused("$ref", "other keywords are next to it; put them into the definition")
            schema = self._target(schema["$ref"])
        raise self.refused("$ref", "references refer to references without an end")

    def _spend(self, characters: int, keyword: str = "$ref") -> None:
        """Count an expanded part of the schema: a few references may repeat a definition a million times."""
        self._work_left -= 1 + characters // _PART
        if self._work_left < 0:
            raise self.refused(keyword, "the definitions are repeated too often by references; use fewer of them")

    def self_contained(self, schema: Schema) -> dict[str, Any]:
        """Return a part of the schema, with the definitions to which it refers."""
        names: dict[str, str] = {}
        definitions: dict[str, Any] = {}

        def moved(part: Any) -> Any:
            if isinstance(part, list):
                return [moved(one) for one in part]
            if not isinstance(part, Mapping):
                return part
            found: dict[str, Any] = {}
            for key in [each for each in part if each in SUPPORTED]:
                value = part[key]
                if key == "$ref":
                    found[key] = reference(value)
                elif key in ("properties", "patternProperties"):
                    found[key] = {name: moved(one) for name, one in value.items()}
                else:
                    found[key] = value if key in ("enum", "const") else moved(value)
            return found

        def reference(pointer: str) -> str:
            if pointer not in names:
                names[pointer] = f"d{len(names)}"
                definitions[names[pointer]] = moved(self._target(pointer))
            return f"#/$defs/{names[pointer]}"

        whole = moved(schema)
        self._spend(2 * len(str([whole, definitions])))
        return {**whole, "$defs": definitions} if definitions else whole

    def branches(self, schema: Any) -> list[Branch]:
        """Return the possible types of a value; an empty schema allows every type."""
        found = list(self._branches(schema, 0))
        if len(found) > _MOST_BRANCHES:
            raise self.refused("anyOf", f"there are {len(found)} alternatives; at most {_MOST_BRANCHES} are supported")
        return found

    def _branches(self, schema: Any, depth: int) -> Iterator[Branch]:
        schema = self.resolved(schema)
        if schema is True:
            schema = {}
        if schema is False:
            raise self.refused("false", "no value fits that schema")
        asserted = _asserted(schema)
        several = next((name for name in ("allOf", "oneOf", "anyOf") if name in asserted), None)
        if depth > _MOST_STEPS:
            raise self.refused(several or "$ref", "alternatives are nested too deeply")
        self._spend(len(str(schema)), several or "$ref")
        if several:
            yield from self._alternatives(schema, several, depth)
        elif "enum" in asserted or "const" in asserted:
            yield from self._values(schema, asserted)
        else:
            kinds = schema.get("type", TYPES)
            for kind in [kinds] if isinstance(kinds, str) else kinds:
                own = {name: schema[name] for name in OWN.get(kind, ()) if name in schema}
                if not (kind == "integer" and "number" in kinds and not isinstance(kinds, str)):
                    yield Branch(kind, own)

    def _alternatives(self, schema: Schema, name: str, depth: int) -> Iterator[Branch]:
        options, rest = schema[name], {key: value for key, value in schema.items() if key != name}
        if name == "allOf" and all(isinstance(one, Mapping) and set(one) == {"pattern"} for one in options):
            several = [*patterns(rest), *(one["pattern"] for one in options)]
            yield from self._branches({**rest, "pattern": several}, depth + 1)
            return
        if name == "allOf" and len(options) != 1:
            raise self.refused(schema.get(CASES, "allOf"), "write its parts as one schema")
        seen: set[str] = set()
        for option in options:
            option = self.resolved(option)
            if not isinstance(option, Mapping):
                option = {} if option else {"enum": []}
            clash = (_asserted(rest) & _asserted(option)) - {"type"}
            if clash or ("type" in rest and option.get("type", rest["type"]) != rest["type"]):
                clashing = sorted(clash or {"type"})[0]
                raise self.refused(name, f"{clashing!r} is in one of its schemas and next to it; keep one")
            found = list(self._branches({**rest, **option}, depth + 1))
            kinds = {"number" if branch.type == "integer" else branch.type for branch in found}
            if name == "oneOf" and kinds & seen and not all(branch.values is not None for branch in found):
                raise self.refused("oneOf", "two of its schemas may fit one value; use anyOf")
            seen |= kinds
            yield from found

    def _values(self, schema: Schema, asserted: set[str]) -> Iterator[Branch]:
        if others := asserted - {"enum", "const", "type"}:
            raise self.refused(min(others), "it is next to enum or const; list only values that fit it")
        if {"enum", "const"} <= asserted:
            raise self.refused("const", "it is next to enum; keep one of them")
        values = [schema["const"]] if "const" in asserted else schema["enum"]
        kinds = schema.get("type", TYPES)
        groups: dict[str, list[Any]] = {}
        for value in values:
            kind, listed = JSON_NAMES[type(value)], value
            if kind == "number" and "number" not in kinds and value.is_integer():  # 1.0 is an integer too
                kind, listed = "integer", int(value)
            if kind in kinds or (kind == "integer" and "number" in kinds):
                groups.setdefault(kind, []).append(listed)
        for kind, found in groups.items():
            yield Branch(kind, {}, tuple(found))

    def _target(self, pointer: str) -> Any:
        found: Any = self.schema
        for step in pointer.removeprefix("#").split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            found = found[int(name)] if isinstance(found, list) else found[name]  # `compilable_schema` has validated it
        return found


def patterns(schema: Schema) -> list[str]:
    """Return the patterns of a string; `Root.branches` joins several in a list."""
    found = schema.get("pattern", [])
    return [found] if isinstance(found, str) else found


def entries(root: Root, schema: Schema) -> tuple[Sequence[tuple[str, Any, bool]], Any | None]:
    """Return an object's properties, and the schema of additional properties (None if the model may not write any).

    Properties are (key, schema, whether it is required), in the schema's order. This is for tool-call formats in which
    the model writes properties one by one.

    The model may write additional properties if the schema describes them, or has no `properties`. A schema with
    `properties` but without `additionalProperties` allows additional properties too, but the model may not write any.
    """
    schema = root.resolved(schema)
    for keyword in ("patternProperties", "minProperties", "maxProperties", *sorted(_asserted(schema) - _OBJECT)):
        if keyword in schema and schema[keyword] not in ({}, 0 if keyword == "minProperties" else None):
            raise root.refused(schema.get(CASES, keyword), "it constrains several arguments together; leave it out")
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    others = schema.get("additionalProperties", None if "properties" in schema else True)
    known = [(key, part, key in required) for key, part in properties.items()]
    if forbidden := [key for key in required if properties.get(key, others) is False]:
        raise root.refused("required", f"{forbidden[0]!r} is required, and no property of that name is allowed")
    missing = [key for key in dict.fromkeys(required) if key not in properties]
    known += [(key, True if others is None else others, True) for key in missing]
    return [entry for entry in known if entry[1] is not False], None if others is False else others


_OBJECT = {"type", *OWN["object"]}


def _asserted(schema: Schema) -> set[str]:
    return {*SUPPORTED} & schema.keys()
