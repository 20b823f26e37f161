"""A response that is to be kept, as its memory gets it and as the store has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from candle_vllm.openai import to_json_bytes
from candle_vllm.responses.protocol.response import Response
from candle_vllm.responses.store.entries import RESPONSE, Entry


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


def entry_of(answered: Answered) -> Entry:
    """A response as the store has it."""
    made = answered.response
    conversation = made.conversation.id if made.conversation is not None else None
    return Entry(
        kind=RESPONSE,
        owner=answered.owner,
        id=made.id,
        created=made.created_at * 1000,
        status=made.status,
        follows=made.previous_response_id,
        about={"background": bool(made.background), "conversation": conversation},
        body=to_json_bytes(made),
        given=msgspec.json.encode(answered.input_items),
    )
