"""Older spellings of JSON Schema brought to draft 2020-12, and formats that need more than llguidance's own patterns.

The time formats are written out here: llguidance's let the 29th of February pass in every year, and a leap second at
any minute. Leap seconds are left out altogether, as few readers of such texts know them.
"""

from __future__ import annotations

from collections.abc import Mapping
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
