# SPDX-License-Identifier: MIT
"""Compaction: replaces a conversation by its user messages and a summary that its model generates.

The summary is an item of type `compaction`, encoded but not encrypted; in a later input, it becomes a part of the
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from candle_vllm.responses.api.call_results import Placed
from candle_vllm.responses.api.messages import encode_thoughts
from candle_vllm.responses.api.stored_items import stored_item
from candle_vllm.responses.protocol.items import MessageItem
from candle_vllm.responses.protocol.request import CompactRequest, ResponsesRequest, parse_responses_request
from candle_vllm.responses.protocol.response import CompactedResponse, MessageOut, OutputText, Response
from candle_vllm.responses.store.entries import new_id, new_item_id

MIN_SUMMARY, MAX_SUMMARY = 128, 2048  # tokens
_SHORTER = 8  # characters of a conversation per token of its summary: about half of its length
_ASKED = (
    "Summarise the conversation up to here for somebody who goes on with it and has not seen it: what was asked, "
    "decided, found and done, the names, numbers, paths and code that still matter, and what is open. Write the "
    "summary and nothing else."
)


def summary_request(request: CompactRequest) -> ResponsesRequest:
    """Return the request for the summary; its last item is the instruction."""
    given: Any = request.model_dump(mode="json", by_alias=True, exclude_none=True).get("input", [])
    items = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
    return parse_responses_request(
        {
            "model": request.model,
            "instructions": request.instructions,
            "previous_response_id": request.previous_response_id,
            "input": [*items, {"type": "message", "role": "user", "content": _ASKED}],
            "store": False,
            "reasoning": {"effort": "none"},
        }
    )


def summary_limit(items: Sequence[Placed]) -> int:
    """Return the maximum number of tokens of these items' summary, which must be shorter than the conversation."""
    size = sum(len(one.item.model_dump_json(exclude_none=True)) for one in items)
    return min(max(size // _SHORTER, MIN_SUMMARY), MAX_SUMMARY)


def compacted(response: Response, items: Sequence[Placed]) -> CompactedResponse:
    """Return the compacted conversation.

    Args:
        response: answer to `summary_request`.
        items: history and input, without the instruction to summarise.
    """
    assert response.usage is not None
    said = (item for item in response.output if isinstance(item, MessageOut))
    summary = "\n".join(part.text for item in said for part in item.content if isinstance(part, OutputText)).strip()
    users = [one for one in items if isinstance(one.item, MessageItem) and one.item.role == "user"]
    item = {"id": new_item_id("compaction"), "type": "compaction", "encrypted_content": encode_thoughts(summary)}
    return CompactedResponse(
        id=new_id("resp"),
        created_at=response.created_at,
        output=(*(stored_item(one.item, one.path) for one in users), item),
        usage=response.usage,
    )
