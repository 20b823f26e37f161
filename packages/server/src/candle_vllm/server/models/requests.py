"""The bodies of `/v1/models/load`, `/unload` and `/select` (step 1 of a request's life)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from candle_vllm.openai.protocol.fields import Name, WireModel, invalid
from candle_vllm.openai.validation import parse_body


class ModelRequest(WireModel):
    """Which model.

    Attributes:
        model, model_id: one of the served names; one field or the other (`model_id` is candle-vllm's).
    """

    model: Name | None = None
    model_id: Name | None = None

    @model_validator(mode="after")
    def _one(self) -> ModelRequest:
        if (self.model is None) == (self.model_id is None):
            raise invalid("model", "is needed: the name of a model (or model_id, not both)")
        return self

    @property
    def name(self) -> str:
        """The model."""
        name = self.model or self.model_id
        assert name is not None
        return name


def parse_model_request(body: bytes | Mapping[str, Any]) -> ModelRequest:
    """Checks a body; raises `RequestError` naming the field."""
    return parse_body(ModelRequest, body)
