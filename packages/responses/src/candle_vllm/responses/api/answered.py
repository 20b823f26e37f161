"""A response that is to be kept, as its memory gets it and as the store has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from candle_vllm.openai import to_json_bytes
from candle_vllm.responses.protocol.response import Response
from candle_vllm.responses.store.records import StoredResponse


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """A response that is to be kept.

    Attributes:
        owner: whose it is; "" where there are no API keys.
        response: as the client gets it.
        input_items: of the request alone, without its history, each with an id.
    """

    owner: str
    response: Response
    input_items: Sequence[Mapping[str, Any]]


def record_of(answered: Answered) -> StoredResponse:
    """A response as the store has it."""
    made = answered.response
    return StoredResponse(
        id=made.id,
        owner=answered.owner,
        created_at=made.created_at,
        response=to_json_bytes(made),
        input_items=msgspec.json.encode(answered.input_items),
        previous_response_id=made.previous_response_id,
        conversation_id=made.conversation.id if made.conversation is not None else None,
        status=made.status,
        background=bool(made.background),
    )
