# SPDX-License-Identifier: MIT
"""Wire types as JSON schemas: requests from pydantic models, answers from msgspec structs.

Outside a request's life: made once, for the OpenAPI document. The schemas describe what the types check field by field;
rules between several fields are stated only in the error messages of the routes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import UNSET
from pydantic.json_schema import models_json_schema

from candle_vllm.openai.protocol.fields import WireModel

_REF = "#/components/schemas/"
_ENTRY = re.compile(r"^    ([\w, ]+): (.+(?:\n {8}.+)*)", re.MULTILINE)

Schema = dict[str, Any]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Naming:
    """Names of one API's types in the document.

    Attributes:
        prefix: prefix of every type's name, if another API has classes with the same names.
        out: suffix of the names of answers, if requests have classes with the same names.
    """

    prefix: str = ""
    out: str = ""

    def name(self, kind: type) -> str:
        """Return the name of a wire type."""
        return self.prefix + kind.__name__ + (self.out if issubclass(kind, msgspec.Struct) else "")

    def ref(self, kind: type) -> Schema:
        """Return a reference to the schema of a wire type."""
        return {"$ref": _REF + self.name(kind)}

    def one_of(self, kinds: Sequence[type]) -> Schema:
        """Return the schema of a value of one of these types."""
        return self.ref(kinds[0]) if len(kinds) == 1 else {"anyOf": [self.ref(kind) for kind in kinds]}

    def components(
        self, requests: Sequence[type[WireModel]], answers: Sequence[type[msgspec.Struct]]
    ) -> dict[str, Schema]:
        """Return the schemas of these types and of all types in their fields, by name."""
        made = self._requests(requests) if requests else {}
        structs = {kind.__name__: kind for kind in _reached(answers, msgspec.Struct)}
        template = f"{_REF}{self.prefix}{{name}}{self.out}"
        _, found = msgspec.json.schema_components([*structs.values()], ref_template=template)
        for short, schema in found.items():
            name = self.prefix + short + self.out
            assert name not in made, f"{name} is a request and an answer"
            made[name] = _answer_schema(structs[short], schema) if short in structs else schema  # else an enumeration
        return made

    def _requests(self, requests: Sequence[type[WireModel]]) -> dict[str, Schema]:
        template = f"{_REF}{self.prefix}{{model}}"
        _, given = models_json_schema([(kind, "validation") for kind in requests], ref_template=template)
        kinds = {kind.__name__: kind for kind in _reached(requests, WireModel)}
        return {
            self.name(kinds[short]): _request_schema(kinds[short], schema) for short, schema in given["$defs"].items()
        }


def _request_schema(kind: type[WireModel], schema: Schema) -> Schema:
    """Add to a schema the fields that are not supported or have no effect, with the values accepted for them."""
    properties = schema.setdefault("properties", {})
    for each in properties.values():
        each.pop("title", None)
        if each.get("default", "") is None:  # null means absent
            del each["default"]
    for field, refusal in sorted(kind.refused_fields.items()):
        allowed = {} if refusal.idle else {"enum": [None, *refusal.neutral]}
        what = "No effect" if refusal.idle else "Not served"
        properties[field] = {**allowed, "deprecated": True, "description": f"{what}: {refusal.reason}."}
    return _described(schema, kind.__doc__)


def _answer_schema(kind: type[msgspec.Struct], schema: Schema) -> Schema:
    """Adapt a schema to answers: fields with a default are always present, unless the default is UNSET."""
    if not kind.__struct_config__.omit_defaults:
        always = [field.encode_name for field in msgspec.structs.fields(kind) if field.default is not UNSET]
        schema["required"] = [*dict.fromkeys([*schema.get("required", ()), *always])]
    for each in schema.get("properties", {}).values():
        each.pop("default", None)
    return _described(schema, kind.__doc__)


def _reached(kinds: Sequence[Any], base: type[_T]) -> Iterator[type[_T]]:
    """Yield the subclasses of `base` among these types and the types of their fields."""
    waiting, seen = list(kinds), list[Any]()
    while waiting:
        kind = waiting.pop()
        if any(kind is each for each in seen):
            continue
        seen.append(kind)
        waiting += [each for each in get_args(kind) if each is not Ellipsis]
        if isinstance(kind, type) and issubclass(kind, base):
            yield kind
            waiting += _field_types(kind)


def _field_types(kind: Any) -> list[Any]:
    if issubclass(kind, WireModel):
        return [field.annotation for field in kind.model_fields.values()]
    return list(get_type_hints(kind).values())


def _described(schema: Schema, text: str | None) -> Schema:
    """Add the descriptions of the type and of each field from the docstring."""
    whole, _, attributes = (text or "").partition("Attributes:\n")
    paragraphs = [" ".join(part.split()) for part in whole.split("\n\n")]
    schema["description"] = "\n\n".join(filter(None, paragraphs)).replace("`", "")
    properties = schema.get("properties", {})
    for names, said in _entries(attributes):
        for name in names.split(", "):
            if name in properties:
                properties[name].setdefault("description", " ".join(said.split()).replace("`", ""))
    return schema


def _entries(attributes: str) -> Iterator[tuple[str, str]]:
    """Yield the entries of a docstring's section, whatever its indentation."""
    lines = attributes.split("\n")
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=4)
    text = "\n".join(" " * 4 + line[indent:] for line in lines)
    for match in _ENTRY.finditer(text):
        yield match[1], match[2]


def as_list(items: Schema) -> Schema:
    """Return the schema of OpenAI's list of objects; `items` is the schema of an object."""
    return {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": items}},
    }
