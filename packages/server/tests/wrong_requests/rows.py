# SPDX-License-Identifier: MIT
"""Requests with exactly one thing wrong: a right body, and one change of it.

A row says where the body is changed, to what, and which `param` the answer must have. Routes that are added later put
their rows beside these: a module with a list of `Route`, named in `test_every_row.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from candle_vllm.openai.protocol.fields import DRAFT_FIELDS

GONE = object()  # the field is left out
BIG = 1 << 40
LONG = "x" * 257  # longer than a name may be


def deep(levels: int) -> Any:
    """A schema that is nested."""
    value: Any = {"type": "string"}
    for _ in range(levels):
        value = {"type": "object", "properties": {"a": value}}
    return value


@dataclass(frozen=True)
class Row:
    """One wrong request.

    Attributes:
        path: where the right body is changed, as a dotted path; "" is the body itself.
        value: what stands there.
        param: the field that must be named; None is the path.
        status, code: of the answer; code None is any that a client's mistake has.
    """

    path: str
    value: Any
    param: str | None = None
    status: int = 400
    code: str | None = None

    @property
    def blamed(self) -> str:
        """The `param` of the answer."""
        return self.path if self.param is None else self.param

    def __str__(self) -> str:
        shown = "gone" if self.value is GONE else repr(self.value)
        return f"{self.path}={shown if len(shown) < 40 else shown[:37] + '...'}"


@dataclass(frozen=True)
class Route:
    """A route, a right body for it, and what is wrong about others."""

    path: str
    right: Mapping[str, Any]
    rows: Sequence[Row]


def changed(right: Mapping[str, Any], row: Row) -> Any:
    """The right body with one thing wrong."""
    if not row.path:
        return row.value
    body: Any = copy.deepcopy(dict(right))
    steps = [row.path] if row.path in DRAFT_FIELDS else row.path.split(".")  # those have a dot of their own
    *way, last = [int(step) if step.isdigit() else step for step in steps]
    place = body
    for step in way:
        place = place[step]
    if row.value is GONE:
        del place[last]
    elif isinstance(place, list) and last == len(place):
        place.append(row.value)
    else:
        place[last] = row.value
    return body


def numbers(*fields: tuple[str, float, float], whole: bool = True) -> list[Row]:
    """Of each field (name, least, most): beyond both ends, and of other types."""
    rows: list[Row] = []
    for name, least, most in fields:
        step = 1 if whole else 0.001
        kinds = ["1", True, [1], {}, *([0.5] if whole else [])]
        rows += [Row(name, value) for value in (least - step, most + step, *kinds)]
    return rows


def switches(*names: str) -> list[Row]:
    """Of each field: what is neither true nor false."""
    return [Row(name, value) for name in names for value in (1, "true")]


def texts(*names: str) -> list[Row]:
    """Of each field: what is no text."""
    return [Row(name, value) for name in names for value in (1, ["a"])]


def not_served(fields: Mapping[str, Any]) -> list[Row]:
    """Fields that others define, with a value that asks for something."""
    return [Row(name, "x-1", code="unsupported_parameter") for name, field in fields.items() if not field.idle]


MODEL = [
    Row("model", 1),
    Row("model", "", status=404, code="model_not_found"),
    Row("model", LONG),
    Row("model", ["default"]),
    Row("model", "other", status=404, code="model_not_found"),
    Row("modell", "default", code="unknown_parameter"),
]
