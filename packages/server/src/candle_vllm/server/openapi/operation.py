# SPDX-License-Identifier: MIT
"""What the document says of one route. Outside the ten steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from candle_vllm.openai import ErrorEnvelope
from candle_vllm.openai.protocol.fields import WireModel
from candle_vllm.server.openapi.components import Naming

Key = tuple[str, str]  # method and path, as the router has it

BODY_ERRORS = (400, 408, 413, 415)


@dataclass(frozen=True)
class Operation:
    """One route.

    Attributes:
        id: name of the operation in generated clients.
        tag: heading in the pages.
        summary: one line.
        answers: types of a good answer's body, by status; several types mean one of them.
        errors: statuses of refusals, besides 401, 403 and 500.
        body: types of the request; several mean one of them.
        example: a body that works with any model of its kind.
        form: the fields of a body that is a form, by name, each with its schema.
        media: type of a good answer's body; those of JSON have types. Empty where there is no body.
        events: types of an event's data, where the answer can be a stream.
        lines: types of a line, where the answer can be lines of JSON.
        error: type of a refusal's body.
        naming: what these types are called in the document.
        listed: the answer is a list of objects of the types.
        bare: the answer is an array of them.
        one_or_more: the answer is one of them, or an array.
        bare_body: the body is an array of them.
        manages: the route is for operators.
        public: the route needs no key.
        path_parameters: what stands in the path, by name.
        query: the parameters behind the path: a schema by name.
    """

    id: str
    tag: str
    summary: str
    answers: Mapping[int, tuple[type[msgspec.Struct], ...]]
    errors: tuple[int, ...] = ()
    body: tuple[type[WireModel], ...] = ()
    example: Mapping[str, Any] | Sequence[Any] | None = None
    form: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    media: str = "application/json"
    events: tuple[type[msgspec.Struct], ...] = ()
    lines: tuple[type[msgspec.Struct], ...] = ()
    error: type[msgspec.Struct] = ErrorEnvelope
    naming: Naming = field(default_factory=Naming)
    listed: bool = False
    bare: bool = False
    one_or_more: bool = False
    bare_body: bool = False
    manages: bool = False
    public: bool = False
    path_parameters: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
