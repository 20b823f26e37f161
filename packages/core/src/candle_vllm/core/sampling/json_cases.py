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
import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from candle_vllm.core.sampling import json_facts
from candle_vllm.core.sampling.json_dialect import Remarks, check_shape, modernise, taker
from candle_vllm.core.sampling.json_facts import LISTS, Facts
from candle_vllm.core.sampling.json_opposites import ASSERTING, OppositeUnknown, opposite
from candle_vllm.core.sampling.json_references import MAX_NESTING, References, Target
from candle_vllm.core.sampling.structured import refused
from candle_vllm.core.sampling.unique_sites import compared

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

    `remarks` collects remarks for the user; for `may_compare` see `Budget`. Raises InvalidParameterError if the schema
    is invalid, or a constraint cannot be guaranteed.
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


# ---- the keywords ----------------------------------------------------------------------------------------------------
# Each function in `WRITERS` gets the schema that has the keyword, may change it, and may return an additional schema.

MAX_CASES = 256  # maximum product of the numbers of alternatives of a schema's keywords
MAX_PLACES = 16  # `contains` is satisfied by elements among the first 16, or fewer, of an array
MAX_OPTIONS = 128  # maximum number of options of oneOf that are compared with each other
MAX_ARRAYS = 2_000  # maximum number of arrays that are enumerated for uniqueItems
IN_PLACE = frozenset({"$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "dependencies"})


class At(NamedTuple):
    """Position of a schema.

    Attributes:
        place: the position in the user's schema, for messages.
        base: the base URI of references.
        depth: depth of nesting.
        asking: the user's keyword that was rewritten to this schema or one around it, and its position; or None.
    """

    place: str
    base: str
    depth: int = 0
    asking: tuple[str, str] | None = None

    def inside(self, step: str) -> At:
        return self._replace(place=f"{self.place}/{step}", depth=self.depth + 1)


class Case(dict[str, Any]):
    """A schema that replaces an option of a keyword; `asking` is the keyword and its position."""

    def __init__(self, schema: Schema, asking: tuple[str, str]) -> None:
        super().__init__(schema)
        self.asking = asking


def _if(cases: Cases, own: Schema, at: At) -> Any:
    if "then" not in own and "else" not in own:
        return None
    other = cases.opposed(own["if"], "if", json_facts.types_of(own), at)
    return {"anyOf": [{"allOf": [own["if"], own.get("then", True)]}, {"allOf": [other, own.get("else", True)]}]}


def _dependent(keyword: str) -> Callable[[Cases, Schema, At], Any]:
    def write(_: Cases, own: Schema, at: At) -> Any:
        found = list[Any]()
        if "object" not in json_facts.types_of(own):
            return None
        for name, needs in own[keyword].items():
            there: Schema = {"required": [name, *needs]} if isinstance(needs, list) else {"allOf": [needs]}
            there.setdefault("required", [name])
            absent = [] if name in own.get("required", ()) else [{"properties": {name: False}}]
            found.append(_only("object", own, [*absent, there]))
        if math.prod(len(one["anyOf"]) for one in found) > MAX_CASES:
            raise refused(
                f"the JSON schema keyword {keyword!r} names {len(found)} properties (at {at.place}): their cases "
                f"multiply, and at most {MAX_CASES} are supported"
            )
        return {"allOf": found} if found else None

    return write


def _contains(cases: Cases, own: Schema, at: At) -> Any:
    """Write one case for each choice of the indices at which elements match."""
    least, most, longest = own.get("minContains", 1), own.get("maxContains"), own.get("maxItems", math.inf)
    if (least == 0 and most is None) or "array" not in json_facts.types_of(own):
        return None
    match = own["contains"]
    other = True if most is None else cases.opposed(match, "contains", json_facts.TYPES, at)
    places = int(min(longest, MAX_PLACES))
    counts = range(least, min(least if most is None else most, places) + 1)
    while sum(math.comb(places, count) for count in counts) > MAX_CASES // 4:
        places -= 1
    if least > places or not counts:
        limit = places if most is None else min(places, most)
        raise refused(f"minContains {least} is not supported (at {at.place}): at most {limit} elements can match")
    if places < longest:
        cases.remarks.add(
            f"matches of the JSON schema's 'contains' are among an array's first {places} elements (at {at.place})"
        )
    found = list[Schema]()
    for count in counts:
        for chosen in itertools.combinations(range(places), count):
            last = chosen[-1] + 1 if chosen else 0
            first = [match if place in chosen else other for place in range(last)]
            found.append({"prefixItems": first, "minItems": last, **({} if most is None else {"items": other})})
    return _only("array", own, found)


def _unique(cases: Cases, own: Schema, at: At) -> Any:
    """Enumerate the arrays of different values if there are few; else compare elements during generation, or refuse."""
    longest = own.get("maxItems", math.inf)
    if own["uniqueItems"] is not True or longest < 2 or "array" not in json_facts.types_of(own):
        return None
    first = [json_facts.Place(one, at.base) for one in own.get("prefixItems", ())]
    others = json_facts.Place(own.get("items", True), at.base)
    if others.schema is False:
        parts = [cases.facts.parts(one) for one in first]
        if all(cases.facts.apart(one, two) for one, two in itertools.combinations(parts, 2)):
            return None
    domains = [cases.facts.domain(one) for one in (*first, others)]
    values = [domain[0] for domain in domains if domain is not None]
    arrays = _different(values, own.get("minItems", 0), longest) if len(values) == len(domains) else None
    if arrays is None and cases.may_compare and (types := compared(cases.facts, own, at.base)):
        cases.compared = True
        if json_facts.FRACTION in types:
            cases.remarks.add(
                f"the numbers of an array with 'uniqueItems' (at {at.place:.120}) have 15 digits at most and no "
                "exponent"
            )
        return None
    if len(values) < len(domains):
        raise refused(
            f"the JSON schema keyword 'uniqueItems' is not supported here (at {at.place}): it can be guaranteed for "
            "elements of few values, as of an enum, and, in an answer that is JSON alone, for texts, integers, booleans"
            ', null, and numbers without bounds, as by "items": {"type": "string"}'
        )
    if arrays is None:
        raise refused(
            f"the JSON schema keyword 'uniqueItems' is not supported here (at {at.place}): there are more than "
            f"{MAX_ARRAYS} arrays of different elements; set maxItems, or use fewer values"
        )
    if all(domain is not None and domain[1] for domain in domains):  # the arrays replace these keywords
        for name in ("items", "prefixItems", "minItems", "maxItems"):
            own.pop(name, None)
    return _only("array", own, [{"enum": arrays}])


def _different(domains: list[list[Any]], least: int, most: float) -> list[list[Any]] | None:
    """Return arrays of different values, whose element n is from domain n or the last one; None if too many."""
    found: list[list[Any]] = []
    longer: list[tuple[list[Any], frozenset[str]]] = [([], frozenset())]
    while longer:
        length = len(longer[0][0])
        found += [said for said, _ in longer] if length >= least else []
        if length >= most:
            break
        named = [(value, json_facts.canonical(value)) for value in domains[min(length, len(domains) - 1)]]
        if len(longer) * len(named) + len(found) > 2 * MAX_ARRAYS:
            return None
        longer = [
            ([*said, value], known | {name}) for said, known in longer for value, name in named if name not in known
        ]
    return found if len(found) <= MAX_ARRAYS else None


def _look_aheads(_: Cases, own: Schema, __: At) -> Any:
    """Rewrite look-aheads after a pattern's first `^`, (?=...) or (?!...), to further patterns of the string."""
    pattern, found = own["pattern"], list[Any]()
    if any(mark.group() == "|" and not depth for mark, depth in brackets(pattern)):
        return None  # the look-aheads belong to the first alternative
    while pattern.startswith(("^(?=", "^(?!")):
        end = next((mark.start() for mark, depth in brackets(pattern) if mark.group() == ")" and not depth), 0)
        ahead, parts = pattern[4:end], [[{"pattern": f"^(?:{pattern[4:end]})"}]]
        if pattern[3] == "!":
            try:
                parts = [opposite({"pattern": f"^{one}"}, frozenset({"string"})) for one in ahead.split("|")]
            except OppositeUnknown:
                return None
        if not ahead or not all(parts):
            return None
        found += [{"pattern": one["pattern"]} for [one] in parts]
        pattern = "^" + pattern[end + 1 :]
    own["pattern"] = pattern
    return {"allOf": found} if found else None


def brackets(pattern: str) -> Iterator[tuple[re.Match[str], int]]:
    """Yield the parentheses, bars and anchors of a pattern outside classes and escapes, with their nesting depth."""
    depth = 0
    for match in _REGEX.finditer(pattern):
        depth -= match.group() == ")"
        if len(match.group()) == 1:
            yield match, depth
        depth += match.group() == "("


_REGEX = re.compile(r"\\.|\[\^?\]?(?:[^\]\\]++|\\.)*+(?:\]|\\?\Z)|[()|^$]", re.DOTALL)


def _names(cases: Cases, own: Schema, at: At) -> Any:
    """Rewrite `propertyNames` to `properties` and `patternProperties`."""
    held = own["propertyNames"]
    if "object" not in json_facts.types_of(own) or held is True or held == {}:
        return None
    if held is False:
        return _only("object", own, [{"maxProperties": 0}])
    if not isinstance(held, dict):
        raise refused(f"a JSON schema must be an object or a boolean (at {at.place}/propertyNames)")
    parts = list[Schema]()
    for one in cases.facts.parts(json_facts.Place(held, at.base)):
        if one.schema is not False:
            part = cases.own(one.schema, at._replace(place=f"{at.place}/propertyNames"))
            parts += [part, *part.get("allOf", [])[len(one.schema.get("allOf", [])) :]]  # a format beside a pattern
    told = [(name, value) for part in parts for name, value in part.items() if name in _OF_NAMES]
    whole = dict(told)
    others = {name for part in parts for name in part} & (ASSERTING - _OF_NAMES - {"$ref", "allOf", "type"})
    if len(told) > len(whole) or own.get("patternProperties") or others & _OF_ALL:
        raise _no_names(at)
    if not parts or not all("string" in json_facts.types_of(part) for part in parts):
        return _only("object", own, [{"maxProperties": 0}])
    named = dict.fromkeys([*own.get("properties", {}), *own.get("required", [])])
    takes = taker(whole)
    wrong = dict.fromkeys((name for name in named if not takes(name)), False)
    own["properties"] = {**own.get("properties", {}), **wrong}
    rest = own.get("additionalProperties", True)
    if rest is False:
        return None
    own["additionalProperties"] = False
    if "enum" in whole or "const" in whole:
        values = (each for each in json_facts.values_of(whole) or () if isinstance(each, str) and takes(each))
        own["properties"] = {**dict.fromkeys(values, rest), **own["properties"]}
    elif rest not in (True, {}) and len(wrong) < len(named):
        raise _no_names(at)  # the pattern also matches named properties, whose schema is a different one
    else:
        own["patternProperties"] = {_one_pattern(whole, at): rest}
    return None


_OF_NAMES = frozenset({"enum", "const", "pattern", "minLength", "maxLength", "format"})
_OF_ALL = frozenset({"anyOf", "oneOf", "not", "if"})


def _one_pattern(schema: Schema, at: At) -> str:
    """Return one pattern that all keys must match."""
    lengths = schema.get("minLength", 0), schema.get("maxLength", "")
    patterns = [schema["pattern"]] if "pattern" in schema else []
    patterns += [f"^(?s:.{{{lengths[0]},{lengths[1]}}})$"] if lengths != (0, "") else []
    if "format" in schema or len(patterns) > 1:
        raise _no_names(at)
    return patterns[0] if patterns else "^(?s:.*)$"


def _no_names(at: At) -> Exception:
    return refused(
        f"the JSON schema keyword 'propertyNames' is not supported here (at {at.place}): it can be guaranteed for an "
        "enum, a pattern or lengths alone, with neither patternProperties nor properties beside additionalProperties"
    )


def _one_of(cases: Cases, own: Schema, at: At) -> Any:
    """Rewrite `oneOf` to an `anyOf` of options that exclude each other; too many options are left to llguidance."""
    options = own["oneOf"]
    beside = cases.facts.parts(
        json_facts.Place({name: value for name, value in own.items() if name != "oneOf"}, at.base)
    )
    parts = [cases.facts.parts(json_facts.Place(one, at.base)) for one in options]
    meeting = _meeting(cases.facts, parts, beside)
    if meeting is None:
        return None
    asking = at.asking or ("oneOf", at.place)
    alone = list[Any]()
    for place, one in enumerate(options):
        others = [
            cases.opposed(options[other], "oneOf", json_facts.types_of(own), at) for other in meeting.get(place, ())
        ]
        alone.append(Case({"allOf": [one, *others]}, asking) if others else one)
    if "anyOf" in own:
        del own["oneOf"]
        return {"anyOf": alone}
    told = [("anyOf", alone) if name == "oneOf" else (name, value) for name, value in own.items()]
    own.clear()
    own.update(told)  # in the same schema, so that the order of properties does not change
    return None


def _meeting(
    facts: json_facts.Facts, options: list[list[json_facts.Place]], beside: list[json_facts.Place]
) -> dict[int, list[int]] | None:
    """Map options to the other options that may accept the same value; None if there are too many."""
    listed = [
        json_facts.values_of(option[0].schema) if option and option[0].schema is not False else None
        for option in options
    ]
    values = [json_facts.canonical(value) for one in listed if one is not None for value in one]
    if all(one is not None for one in listed) and len(set(values)) == len(values):
        return {}
    if len(options) > MAX_OPTIONS:
        return None
    found: dict[int, list[int]] = {}
    for one, two in itertools.combinations(range(len(options)), 2):
        if not facts.apart([*options[one], *beside], options[two]):
            found.setdefault(one, []).append(two)
            found.setdefault(two, []).append(one)
    return found if sum(map(len, found.values())) <= MAX_CASES else None


def _unevaluated(keyword: str, known: str, *beside: str) -> Callable[[Cases, Schema, At], Any]:
    def write(_: Cases, own: Schema, at: At) -> Any:
        if own[keyword] is True or own[keyword] == {}:
            return None
        if found := next((name for name in own if name in IN_PLACE or name in beside), None):
            said = (
                f"the JSON schema keyword {keyword!r} is not supported beside {found!r} (at {at.place}); leave it out"
            )
            raise refused(said)
        own.setdefault(known, own[keyword])
        return None

    return write


def _only(kind: str, own: Schema, cases: list[Any]) -> Schema:
    """Return cases for values of one type; values of other types are accepted."""
    rest = json_facts.type_names(json_facts.types_of(own) - {kind})
    return {"anyOf": [*([{"type": rest}] if rest else []), *({"type": kind, **one} for one in cases)]}


WRITERS: Mapping[str, Callable[[Cases, Schema, At], Any]] = MappingProxyType({
    "unevaluatedProperties": _unevaluated("unevaluatedProperties", "additionalProperties"),
    "unevaluatedItems": _unevaluated("unevaluatedItems", "items", "contains"),
    "pattern": _look_aheads,
    "propertyNames": _names,
    "oneOf": _one_of,
    "not": lambda cases, own, at: cases.opposed(own["not"], "not", json_facts.types_of(own), at),
    "if": _if,
    "dependentRequired": _dependent("dependentRequired"),
    "dependentSchemas": _dependent("dependentSchemas"),
    "dependencies": _dependent("dependencies"),
    "contains": _contains,
    "uniqueItems": _unique,
})  # fmt: skip
