# SPDX-License-Identifier: MIT
"""Rewrite JSON schemas to the keywords that llguidance supports; other keywords become alternatives (cases).

`if`, `dependentRequired` and similar keywords become an `anyOf` of their cases; `contains` has a case for each choice
of the indices at which elements match. `oneOf` becomes an `anyOf` whose schemas exclude each other, if necessary by the
opposites of the other schemas (`json_opposites`). The cases are in an `allOf` after the schema's own keywords, so that
the order of the properties does not change. If the cases accept fewer values than the keyword, there is a remark for
the user; a keyword that cannot be rewritten is refused by its name.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from candle_vllm.core.sampling.json_dialect import Remarks, check_shape, modernise, taker
from candle_vllm.core.sampling.json_facts import LISTS, Facts
from candle_vllm.core.sampling.json_keywords import MAX_CASES, WRITERS, At, Case
from candle_vllm.core.sampling.json_opposites import ASSERTING, OppositeUnknown, opposite
from candle_vllm.core.sampling.json_references import MAX_NESTING, References, Target
from candle_vllm.core.sampling.structured import refused

Schema = dict[str, Any]

MAX_WRITTEN = 12_000  # maximum number of schemas in the result, with all cases
CASES = "x-cases"
"""Key of a schema with cases in its `allOf`, and of a `Case`; its value is a keyword. The compiler ignores it."""
SINGLE = ("items", "additionalProperties")
MAPS = ("properties", "patternProperties")
_LEFT_OUT = frozenset({"$id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary", "$defs", "definitions"})
_LEFT_OUT |= {"then", "else", "minContains", "maxContains"}  # the functions of `if` and `contains` read these
_APPLIED = frozenset({"const", "enum", "allOf", "anyOf", "oneOf", "$ref"})
_SIMPLE = re.compile(r"#/(?:\$defs|definitions)/[\w.-]{1,64}", re.ASCII)


class _Written(str):
    """A `$ref` to a definition that this module has written."""

    __slots__ = ()


def in_known_keywords(root: Schema, remarks: Remarks, *, may_compare: bool = False) -> tuple[Schema, bool]:
    """Return the schema in llguidance's keywords, and whether array elements must be compared during generation.

    Args:
        remarks: collects remarks for the user.
        may_compare: see `Budget`.

    Raises:
        InvalidParameterError: the schema is invalid, or a constraint cannot be guaranteed.
    """
    cases = Cases(root, remarks, may_compare)
    return cases.run(), cases.compared


class Cases:
    """The rewriting of one schema; `compared` is whether array elements must be compared during generation."""

    def __init__(self, root: Schema, remarks: Remarks, may_compare: bool) -> None:
        self.root = root
        self.remarks = remarks
        self.may_compare = may_compare
        self.compared = False
        self.references = References(root)
        self.facts = Facts(self.references, lambda pattern: taker({"pattern": pattern}, unknown=True))
        self.names: dict[str, _Written] = {"#": _Written("#")}  # pointer, or "not " + pointer -> reference
        self.waiting: list[tuple[_Written, Any, At]] = []
        self.written = 0

    def run(self) -> Schema:
        found = self.schema(self.root, At("#", ""))
        assert isinstance(found, dict)
        defined: dict[str, Schema] = {}
        while self.waiting:
            name, schema, at = self.waiting.pop()
            section, key = name.split("/")[1:]
            defined.setdefault(section, {})[key] = self.schema(schema, at)
        return found | defined

    def schema(self, schema: Any, at: At) -> Schema | bool:
        """Rewrite a schema and its subschemas in known keywords."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise refused(f"a JSON schema must be an object or a boolean (at {at.place})")
        if at.depth > MAX_NESTING:
            raise refused(f"the JSON schema is nested more than {MAX_NESTING} deep (at {at.place[:80]}...)")
        self.written += 1
        if self.written > MAX_WRITTEN:
            raise refused(f"the JSON schema has more than {MAX_WRITTEN} subschemas, those of all its cases included")
        at = at._replace(base=self.references.base(schema, at.base))
        if isinstance(schema, Case):
            at = at._replace(asking=at.asking or schema.asking)
        own = self.own(schema, at)
        more, cases = list[Any](), 1
        for keyword, write in WRITERS.items():
            if keyword in own and (one := write(self, own, at)) is not None:
                more.append((keyword, one))
                cases *= len(one["anyOf"]) if isinstance(one, dict) and "anyOf" in one else 1
        if cases > MAX_CASES:
            raise refused(
                f"the JSON schema keywords {', '.join(keyword for keyword, _ in more)} make {cases} cases together (at "
                f"{at.place}); at most {MAX_CASES} are supported"
            )
        kept = ("oneOf", "pattern")  # their functions change the keyword itself
        known = self.known({name: value for name, value in own.items() if name not in WRITERS or name in kept}, at)
        parts = [
            self.schema(one, at._replace(depth=at.depth + 1, asking=at.asking or (keyword, at.place)))
            for keyword, one in more
        ]
        found: Schema = dict(known)
        if parts:
            found = {"allOf": [known, *parts]} if "allOf" in known else {**known, "allOf": parts}
        if isinstance(schema, Case) or more:
            found[CASES] = schema.asking[0] if isinstance(schema, Case) else more[0][0]
        return found

    def own(self, schema: Schema, at: At) -> Schema:
        """Return a mutable copy of a checked schema, in the current dialect."""
        found = dict(schema)
        modernise(found, at.place, self.remarks)
        check_shape(found, at.place)
        self.remarks.keywords(found, at.place)
        return found

    def known(self, schema: Schema, at: At) -> Schema:
        """Keep the keywords that llguidance supports, in their order."""
        found: Schema = {}
        for name, value in schema.items():
            if name == "$ref":
                found[name] = self.reference(value, at)
            elif name in SINGLE:
                found[name] = self.schema(value, at.inside(name))
            elif name in LISTS:
                found[name] = [self.schema(one, at.inside(f"{name}/{place}")) for place, one in enumerate(value)]
            elif name in MAPS:
                found[name] = {key: self.schema(one, at.inside(f"{name}/{key}")) for key, one in value.items()}
            elif name not in _LEFT_OUT:
                found[name] = value
        return _together(found)

    def reference(self, value: Any, at: At) -> str:
        if isinstance(value, _Written):
            return value
        return self.definition(self.references.resolve(value, at.base, at.place))

    def definition(self, target: Target, opposed: tuple[str, str] | None = None) -> _Written:
        """Return a reference to the target of a `$ref`; with `opposed` (`At.asking`), to the target's opposite."""
        key = target.pointer if opposed is None else f"not {target.pointer}"
        if key not in self.names:
            taken = {"$defs": self.root.get("$defs"), "definitions": self.root.get("definitions")}
            name = key
            if not _SIMPLE.fullmatch(name):
                free = (f"case{number}" for number in itertools.count(len(self.names)))
                name = "#/$defs/" + next(one for one in free if one not in (taken["$defs"] or ()))
            schema = target.schema if opposed is None else {"not": target.schema}
            self.names[key] = _Written(name)
            self.waiting.append((self.names[key], schema, At(target.pointer, target.base, 0, opposed)))
        return self.names[key]

    def opposed(self, schema: Any, keyword: str, types: frozenset[str], at: At) -> Schema | bool:
        """Return the opposite of a schema (see `json_opposites`), in keywords that must still be rewritten."""
        asking = at.asking or (keyword, at.place)
        if isinstance(schema, bool):
            return not schema
        if not isinstance(schema, dict):
            raise refused(f"a JSON schema must be an object or a boolean (at {at.place}/{keyword})")
        base = self.references.base(schema, at.base)
        own = self.own(schema, at._replace(place=f"{at.place}/{keyword}"))
        if own.keys() & ASSERTING == {"$ref"}:
            return {"$ref": self.definition(self.references.resolve(own["$ref"], base, at.place), asking)}
        try:
            found = opposite(own, types)
        except OppositeUnknown as error:
            raise refused(
                f"the JSON schema keyword {asking[0]!r} is not supported here (at {asking[1]}): values that "
                f"{error.args[0]!r} excludes cannot be expressed as a grammar"
            ) from None
        return {"anyOf": found} if found else False


def _together(schema: Schema) -> Schema:
    """Keep the keywords of properties together in one schema: next to `_APPLIED`, llguidance would separate them."""
    if "patternProperties" not in schema or not schema.keys() & _APPLIED:
        return schema
    names = [name for name in schema if name in ("properties", "patternProperties", "additionalProperties")]
    first = list(schema).index(names[0])
    rest = [(name, value) for name, value in schema.items() if name not in names]
    parts = [dict(rest[:first]), {name: schema[name] for name in names}, dict(rest[first:])]
    return {"allOf": [part for part in parts if part]}
