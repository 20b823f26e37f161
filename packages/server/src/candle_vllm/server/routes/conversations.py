# SPDX-License-Identifier: MIT
"""`/v1/conversations`: conversations and their items (steps 1 and 10). A caller sees only its own conversations."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from candle_vllm.responses.api import conversations as api
from candle_vllm.responses.api.stored_items import AnyItem, ItemList
from candle_vllm.server.answering import body_of, deadline_of, in_time, json_answer
from candle_vllm.server.http.body import unless_disconnected
from candle_vllm.server.openapi.operation import KEPT, RESPONSES, routing
from candle_vllm.server.store_access import INCLUDE, ITEM_PAGE, page_request, query_of, store_and_owner

router, route = routing(tag="conversations", naming=RESPONSES, errors=KEPT)


@route(
    "POST /v1/conversations",
    body=api.ConversationCreateRequest,
    example={"items": [{"role": "user", "content": "Hello!"}], "metadata": {"topic": "greetings"}},
    answer=api.Conversation,
)
async def create_conversation(request: Request) -> Response:
    """Create a conversation."""
    conversations, owner = await _conversations(request)
    return json_answer(await conversations.create(owner, await body_of(request, api.ConversationCreateRequest)))


@route("GET /v1/conversations/{conversation_id}", answer=api.Conversation)
async def get_conversation(request: Request, conversation_id: str) -> Response:
    """A conversation without its items."""
    conversations, owner = await _conversations(request)
    return json_answer(await conversations.retrieve(owner, conversation_id))


@route(
    "POST /v1/conversations/{conversation_id}",
    body=api.ConversationUpdateRequest,
    example={"metadata": {"topic": "farewells"}},
    answer=api.Conversation,
)
async def update_conversation(request: Request, conversation_id: str) -> Response:
    """Replace the metadata of a conversation."""
    conversations, owner = await _conversations(request)
    wire = await body_of(request, api.ConversationUpdateRequest)
    return json_answer(await conversations.update(owner, conversation_id, wire))


@route("DELETE /v1/conversations/{conversation_id}", answer=api.ConversationDeleted)
async def delete_conversation(request: Request, conversation_id: str) -> Response:
    """Delete a conversation and its items."""
    conversations, owner = await _conversations(request)
    return json_answer(await conversations.delete(owner, conversation_id))


@route("GET /v1/conversations/{conversation_id}/items", answer=ItemList, query=ITEM_PAGE)
async def list_conversation_items(request: Request, conversation_id: str) -> Response:
    """A page of a conversation's items."""
    wanted = page_request(request)
    conversations, owner = await _conversations(request, "limit", "order", "after", "include")
    return json_answer(await conversations.items(owner, conversation_id, wanted))


@route(
    "POST /v1/conversations/{conversation_id}/items",
    body=api.ItemsCreateRequest,
    example={"items": [{"role": "user", "content": "Hello again!"}]},
    answer=ItemList,
    errors=(*KEPT, 409, 504),
    query=INCLUDE,
)
async def create_conversation_items(request: Request, conversation_id: str) -> Response:
    """Add items at the end of a conversation."""
    conversations, owner = await _conversations(request, "include")
    wire = await body_of(request, api.ItemsCreateRequest)
    adding = conversations.add_items(owner, conversation_id, wire)  # waits for a response in progress
    async with in_time(deadline_of(request), request):
        return json_answer(await unless_disconnected(adding, request.receive))


@route("GET /v1/conversations/{conversation_id}/items/{item_id}", answer=AnyItem, query=INCLUDE)
async def get_conversation_item(request: Request, conversation_id: str, item_id: str) -> Response:
    """One item of a conversation."""
    conversations, owner = await _conversations(request, "include")
    return Response(await conversations.item(owner, conversation_id, item_id), media_type="application/json")


@route("DELETE /v1/conversations/{conversation_id}/items/{item_id}", answer=api.Conversation)
async def delete_conversation_item(request: Request, conversation_id: str, item_id: str) -> Response:
    """Delete an item of a conversation; responds with the conversation."""
    conversations, owner = await _conversations(request)
    return json_answer(await conversations.delete_item(owner, conversation_id, item_id))


async def _conversations(request: Request, *known: str) -> tuple[api.Conversations, str]:
    store, owner = await store_and_owner(request)
    query_of(request, *known)
    return api.Conversations(store), owner
