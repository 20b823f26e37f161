# SPDX-License-Identifier: MIT
"""`/v1/mailbox`: answers whose request asked to store them; their owner fetches, deletes or pushes them.

Not a step of a request's life: nothing is generated here. A caller sees only its own answers; other ids get a 404.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated

import msgspec
from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from candle_vllm.openai.json_body import parse_body
from candle_vllm.openai.protocol.fields import WireModel, few_entries
from candle_vllm.responses.store.entries import MAX_ID, is_id
from candle_vllm.server.answering import json_answer
from candle_vllm.server.http.body import parse_request, unless_disconnected
from candle_vllm.server.http.routing import caller_of
from candle_vllm.server.mailbox.store import MailboxError, Record, RecordList, Status, invalid, not_found
from candle_vllm.server.openapi.operation import KEPT, routing
from candle_vllm.server.store_access import limit_and_after, query_of, switch_of

if TYPE_CHECKING:
    from candle_vllm.server.mailbox.service import Mailbox

router, route = routing(tag="mailbox", errors=KEPT)

MAX_LIST = 1000
DEFAULT_LIST = 100
MAX_BODY = 64 << 10


class PushRequest(WireModel):
    """The body of `POST /v1/mailbox/{request_id}/webhook`; every field is optional."""

    url: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    bearer_token: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    headers: Annotated[dict[str, str], few_entries(16)] | None = None


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    """The response to a push that was delivered."""

    request_id: str
    delivered: bool = True


@route(
    "GET /v1/mailbox",
    answer=RecordList,
    query={
        "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LIST, "default": DEFAULT_LIST},
        "after": {"type": "string", "maxLength": MAX_ID, "description": "The last request_id of the page before."},
    },
)
async def list_records(request: Request) -> Response:
    """The caller's stored answers, newest first, without their content."""
    mailbox, owner = _mailbox(request)
    limit, after = limit_and_after(query_of(request, "limit", "after"), DEFAULT_LIST, MAX_LIST)
    found = await mailbox.store.page(owner, limit + 1, after)
    if found is None:
        raise invalid("after", f"must be the request_id of one of your records, not {after!r:.80}")
    return json_answer(RecordList(data=found[:limit], has_more=len(found) > limit))


@route(
    "GET /v1/mailbox/{request_id}",
    answer=Record,
    query={"auto_delete": {"enum": ["true", "false"], "default": "false", "description": "Delete it if it has ended."}},
)
async def get_record(request: Request, request_id: str) -> Response:
    """One stored answer.

    `auto_delete=true` deletes it, unless it is still being generated.
    """
    mailbox, owner = _mailbox(request)
    deletes = switch_of(query_of(request, "auto_delete"), "auto_delete")
    found = await mailbox.store.get(owner, request_id) if is_id(request_id) else None
    if found is None:
        raise not_found(request_id)
    if deletes and found.status is not Status.STREAMING and not getattr(request.state, "head", False):
        await mailbox.store.remove(owner, request_id)
    return json_answer(found.record)


@route("DELETE /v1/mailbox/{request_id}", statuses=(204,))
async def delete_record(request: Request, request_id: str) -> Response:
    """Delete a stored answer."""
    mailbox, owner = _mailbox(request)
    query_of(request)
    if not is_id(request_id) or not await mailbox.store.remove(owner, request_id):
        raise not_found(request_id)
    return Response(status_code=204)


@route("POST /v1/mailbox/{request_id}/webhook", body=PushRequest, example={}, answer=Delivered, errors=(*KEPT, 502))
async def push_record(request: Request, request_id: str) -> Response:
    """Push a stored answer to a webhook, once.

    The answer is sent to the URL in the body, or to the operator's webhook. A 502 reports that it was not delivered.
    """
    mailbox, owner = _mailbox(request)
    query_of(request)
    wire = await parse_request(request.scope, request.receive, MAX_BODY, functools.partial(parse_body, PushRequest))
    if not is_id(request_id):
        raise not_found(request_id)
    pushed = mailbox.push(owner, request_id, wire.url, wire.bearer_token, wire.headers or {})
    await unless_disconnected(pushed, request.receive)
    return json_answer(Delivered(request_id=request_id))


def _mailbox(request: Request) -> tuple[Mailbox, str]:
    """Return the server's mailbox, and the caller's owner id in it; MailboxError 404 without a mailbox."""
    mailbox: Mailbox | None = getattr(request.app.state, "mailbox", None)
    if mailbox is None:
        raise MailboxError(404, "This server has no mailbox: its operator turns it on with --mailbox.", "mailbox_off")
    return mailbox, mailbox.owner(caller_of(request.scope).key)
