# SPDX-License-Identifier: MIT
"""`/v1/batches`: files of requests that are answered without a client. A caller sees only its own batches."""

from __future__ import annotations

import functools

from fastapi import APIRouter, Request
from starlette.responses import Response

from candle_vllm.openai.validation import parse_body
from candle_vllm.server.answering import json_answer
from candle_vllm.server.batches.records import Batch, BatchList, BatchRequest
from candle_vllm.server.http.body import parse_request
from candle_vllm.server.openapi.operation import KEPT, Operation, routing
from candle_vllm.server.routes.files import batches_and_owner
from candle_vllm.server.store_access import AFTER, limit_and_after, page_of, query_of

router = APIRouter()
route = routing(router, functools.partial(Operation, tag="batches", errors=KEPT))
DEFAULT_LIST, MAX_LIST = 20, 100
MAX_BODY = 64 << 10


@route(
    "POST /v1/batches",
    body=BatchRequest,
    example={"input_file_id": "file_0", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    answer=Batch,
)
async def create_batch(request: Request) -> Response:
    """Answer the requests of a file."""
    batches, owner = await batches_and_owner(request)
    query_of(request)
    wire = await parse_request(request.scope, request.receive, MAX_BODY, lambda body: parse_body(BatchRequest, body))
    return json_answer(await batches.create(owner, wire))


@route(
    "GET /v1/batches",
    answer=BatchList,
    query={"limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}, **AFTER},
)
async def list_batches(request: Request) -> Response:
    """The caller's batches, newest first."""
    batches, owner = await batches_and_owner(request)
    query = query_of(request, "limit", "after")
    limit, after = limit_and_after(query, DEFAULT_LIST, MAX_LIST)
    return page_of(BatchList, await batches.store.batches(owner, limit + 1, after), limit)


@route("GET /v1/batches/{batch_id}", answer=Batch)
async def get_batch(request: Request, batch_id: str) -> Response:
    """The state of a batch."""
    batches, owner = await batches_and_owner(request)
    query_of(request)
    return json_answer((await batches.store.batch(owner, batch_id)).batch)


@route("POST /v1/batches/{batch_id}/cancel", answer=Batch, errors=(*KEPT, 409))
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """Cancel a batch; its results so far stay."""
    batches, owner = await batches_and_owner(request)
    query_of(request)
    return json_answer(await batches.cancel(owner, batch_id))
