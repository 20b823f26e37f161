"""A body's bytes, or an object, as a checked request of its kind (step 2 of a request's life)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.validation import to_request_error

_Request = TypeVar("_Request", bound=BaseModel)


def parse_body(kind: type[_Request], body: bytes | Mapping[str, Any]) -> _Request:
    """The request; raises `RequestError` with the field at fault."""
    value = decode_json(body) if isinstance(body, bytes) else dict(body)
    if not isinstance(value, dict):
        raise InvalidBodyError("The body must be one JSON object.")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise to_request_error(error) from None
