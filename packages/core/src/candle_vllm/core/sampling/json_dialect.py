# SPDX-License-Identifier: MIT
"""Dialects of JSON schemas: rewrite older drafts, check the shapes of keywords, and report keywords without effect.

A schema is read as draft 2020-12; older spellings (`definitions`, a list as `items`, a boolean `exclusiveMinimum`) keep
their meaning. Unknown keywords and formats that are not enforced are annotations, as in the specification; there are
remarks, up to `MAX_REMARKS`, on such formats, and on keywords that resemble a known one.

The formats `date`, `time` and `date-time` become patterns here, because llguidance's own formats accept the 29th of
February in every year, and a leap second in any minute. A leap second is 23:59:60 UTC, or the same moment in a time
zone whose offset is a multiple of 15 minutes.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from candle_vllm.core.sampling.json_facts import BOUNDS, LISTS, types_of
from candle_vllm.core.sampling.structured import refused, shortened

MAX_COUNT = (1 << 31) - 1  # maximum value of minLength and similar keywords
MAX_UNKNOWN = 8  # maximum number of unknown keywords and formats that are compared with known ones, for misspellings
MAX_REMARKS = 8
MAX_REMARK = 400  # maximum characters of a remark before unprintable ones are escaped
_DRAFTS = ("draft-04", "draft-06", "draft-07", "draft/2019-09", "draft/2020-12", "json-schema.org/schema")
_REFUSED = ("$dynamicRef", "$recursiveRef", "x-guidance")
_SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_MAPS = ("properties", "patternProperties", "dependentSchemas", "dependentRequired", "dependencies")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_COUNTS += ("minContains", "maxContains")
_OTHERS = ("type", "enum", "const", "$ref", "required", "pattern", "format", "multipleOf", "uniqueItems")
_UNEVALUATED = ("unevaluatedItems", "unevaluatedProperties")
KNOWN = frozenset({*_SCHEMAS, *LISTS, *_MAPS, *_COUNTS, *BOUNDS, *_OTHERS, *_UNEVALUATED, *_REFUSED})
_ANNOTATIONS = frozenset(
    {"$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary", "$comment", "$defs"}
    | {"definitions", "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"}
    | {"contentEncoding", "contentMediaType", "contentSchema", "nullable", "discriminator", "xml", "externalDocs"}
)

_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_DECIMALS = r"(?:\.[0-9]{1,9})?"  # without a bound, a model may write digits until its answer is cut


def _leap_seconds() -> Iterator[str]:
    """Yield patterns of the time 23:59:60 UTC, in UTC and in other time zones."""
    yield f"23:59:60{_DECIMALS}[zZ]"
    for sign, way in (("+", 1), ("-", -1)):
        offsets = {(1439 + way * offset) % 1440: offset for offset in range(0, 1440, 15)}  # minute of a day -> offset
        for hour in range(24):
            ends = [
                rf"{time % 60:02}:60{_DECIMALS}[{sign}]{offset // 60:02}:{offset % 60:02}"
                for time, offset in sorted(offsets.items())
                if time // 60 == hour
            ]
            yield f"{hour:02}:(?:{'|'.join(ends)})"


_TIME = rf"(?:{_CLOCK}:[0-5][0-9]{_DECIMALS}(?:[zZ]|[+-]{_CLOCK})|{'|'.join(_leap_seconds())})"
FORMATS: Mapping[str, str] = MappingProxyType(
    {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[tT]{_TIME}$"}
)
"""RFC 3339 formats as patterns."""
_COMPILED = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")  # formats that llguidance compiles
_HELD = (*FORMATS, *_COMPILED)


class Remarks:
    """Remarks for the user on a schema that is accepted, in the order in which they were found."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._compared = 0

    def add(self, text: str) -> None:
        """Add a remark, once, its unprintable characters escaped; remarks beyond `MAX_REMARKS` are dropped."""
        text = "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in text[:MAX_REMARK])
        if text not in self.texts and len(self.texts) < MAX_REMARKS:
            self.texts.append(text)

    def keywords(self, schema: dict[str, Any], place: str) -> None:
        """Add a remark for each unknown keyword that resembles a known one: it may be misspelled."""
        for name in schema:
            if name in KNOWN or name in _ANNOTATIONS or name.startswith("x-"):
                continue
            if close := self._near(name, tuple(sorted(KNOWN))):
                self.add(
                    f"the JSON schema has {name!r:.80} (at {place:.120}), which is unknown and has no effect: did you "
                    f"mean {close!r}?"
                )

    def format(self, name: str, place: str) -> None:
        """Add a remark about a format that is not enforced."""
        meant = f": did you mean {close!r}?" if (close := self._near(name, _HELD)) else ""
        self.add(f"the JSON schema's format {name!r:.80} (at {place:.120}) is not enforced{meant}")

    def _near(self, name: str, known: tuple[str, ...]) -> str | None:
        """Return the most similar known name; None after `MAX_UNKNOWN` calls; each holds the GIL for a millisecond."""
        self._compared += 1
        if self._compared > MAX_UNKNOWN:
            return None
        return next(iter(difflib.get_close_matches(name[:40], known, 1, 0.8)), None)


def modernise(schema: dict[str, Any], place: str, remarks: Remarks) -> None:
    """Rewrite older keywords and RFC 3339 formats of one schema in place; its subschemas are not changed.

    Raises InvalidParameterError for an unknown dialect, an unsupported keyword, or two spellings at once.
    """
    draft = schema.pop("$schema", None)
    if draft is not None and not (isinstance(draft, str) and any(known in draft for known in _DRAFTS)):
        raise refused(f"the JSON schema follows {draft!r:.80}; supported are the drafts 4, 6, 7, 2019-09 and 2020-12")
    for name in _REFUSED:
        if name in schema:
            raise refused(f"the JSON schema keyword {name!r} is not supported (at {place}); leave it out")
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    _lists_of_items(schema, place)
    name = schema.get("format")
    if not isinstance(name, str) or name in _COMPILED:
        return
    del schema["format"]
    if name not in FORMATS:
        remarks.format(name, place)
    elif "pattern" not in schema:
        schema["pattern"] = FORMATS[name]
    elif isinstance(schema.setdefault("allOf", []), list):
        schema["allOf"] = [*schema["allOf"], {"pattern": FORMATS[name]}]


def check_shape(schema: dict[str, Any], place: str) -> None:
    """Refuse invalid values of the keywords of one schema; its subschemas are not checked.

    Raises InvalidParameterError if a value is invalid.
    """
    types_of(schema, place)
    for name in _COUNTS:
        value = schema.get(name)
        if isinstance(value, float) and value.is_integer():
            value = schema[name] = int(value)
        if name in schema and not (type(value) is int and 0 <= value <= MAX_COUNT):
            raise refused(f"{name} must be a whole number of 0 to {MAX_COUNT} (at {place})")
    for name in BOUNDS:
        value = schema.get(name)
        wrong = not isinstance(value, (int, float)) or (isinstance(value, bool) and name in ("minimum", "maximum"))
        if name in schema and wrong:
            raise refused(f"a bound must be a number (at {place}/{name})")
    multiple = schema.get("multipleOf", 1)
    if isinstance(multiple, bool) or not isinstance(multiple, (int, float)) or not 0 < multiple < math.inf:
        raise refused(f"multipleOf must be a number above 0 (at {place})")
    if not isinstance(schema.get("enum", []), list):
        raise refused(f"enum must be a list (at {place})")
    for name in LISTS:
        if not isinstance(schema.get(name, []), list):
            raise refused(f"{name} must be a list of schemas (at {place})")
    for name in _MAPS:
        if not isinstance(schema.get(name, {}), dict):
            raise refused(f"{name} must be an object (at {place})")
    listed = [("required", schema.get("required", []))]
    listed += [("each value of dependentRequired", needs) for needs in schema.get("dependentRequired", {}).values()]
    listed += [("a list in dependencies", e) for e in schema.get("dependencies", {}).values() if isinstance(e, list)]
    for what, names in listed:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise refused(f"{what} must be a list of names (at {place})")
    for name in ("pattern", "format"):
        if not isinstance(schema.get(name, ""), str):
            raise refused(f"{name} must be a text (at {place})")


def taker(schema: dict[str, Any], *, unknown: bool | None = None) -> Callable[[str], bool]:
    """Return a function that checks if a text matches a string schema.

    If llguidance cannot compile the schema, the function returns `unknown`. If that is None, the function returns False
    for a schema that no text matches, and other schemas are refused."""
    from llguidance import LLMatcher, LLTokenizer

    grammar = json.dumps({"grammars": [{"json_schema": {**schema, "type": "string"}}]})
    begun = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    if unknown is None and begun.is_error() and "Unsatisfiable schema" not in begun.get_error():
        raise refused(f"the JSON schema is not supported or wrong: {shortened(begun.get_error())}")

    def takes(text: str) -> bool:
        said = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f").encode(errors="replace")
        matcher = begun.deep_copy()
        return bool(unknown) if matcher.is_error() else matcher.consume_tokens([*said]) and matcher.is_accepting()

    return takes


def _lists_of_items(schema: dict[str, Any], place: str) -> None:
    """Rewrite the old form: `items` lists schemas of the first elements, `additionalItems` is for later elements."""
    others = schema.pop("additionalItems", None)  # has no effect unless `items` is a list
    if isinstance(schema.get("items"), list):
        if "prefixItems" in schema:
            raise refused(f"the JSON schema has prefixItems and a list as items (at {place}); only one can be meant")
        schema["prefixItems"] = schema.pop("items")
        if others is not None:
            schema["items"] = others
