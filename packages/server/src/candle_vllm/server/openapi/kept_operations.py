# SPDX-License-Identifier: MIT
"""The table of routes of kept responses, of conversations, and of files and batches. Outside the ten steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from candle_vllm.responses.api.conversations import (
    Conversation,
    ConversationCreateRequest,
    ConversationDeleted,
    ConversationUpdateRequest,
    ItemsCreateRequest,
)
from candle_vllm.responses.api.stored_items import DEFAULT_LIMIT, MAX_LIMIT, AnyItem, ItemList
from candle_vllm.responses.protocol.events import ResponseEvent
from candle_vllm.responses.protocol.request import INCLUDABLE
from candle_vllm.responses.protocol.response import Response, ResponseDeleted
from candle_vllm.responses.store.entries import MAX_ID
from candle_vllm.server.batches.records import (
    BATCH_OUTPUT,
    LEAST_LIFE,
    LONGEST_LIFE,
    UPLOADED,
    Batch,
    BatchList,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
)
from candle_vllm.server.openapi.components import Naming
from candle_vllm.server.openapi.operation import BODY_ERRORS, Key, Operation

RESPONSES = Naming("Responses", "Out")
_KEPT = (400, 404, 503)
_RESPONSE = {"response_id": "The id of a response."}
_CONVERSATION = {"conversation_id": "The id of a conversation."}
_ITEM = {"item_id": "The id of an item."}
_INCLUDE: Mapping[str, Any] = {
    "include": {
        "enum": [*INCLUDABLE],
        "description": "Without effect: items are as they were asked for when they were made. It may be repeated.",
    }
}
_ITEM_PAGE: Mapping[str, Any] = {
    **_INCLUDE,
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
    "order": {"enum": ["asc", "desc"], "default": "desc", "description": "Oldest or newest first."},
    "after": {"type": "string", "maxLength": MAX_ID, "description": "The last id of the page before."},
}
_FILE = {"file_id": "The id of a file."}
_BATCH = {"batch_id": "The id of a batch."}
_AFTER: Mapping[str, Any] = {
    "after": {"type": "string", "maxLength": MAX_ID, "description": "The last id of the page before."}
}

KEPT_OPERATIONS: Mapping[Key, Operation] = {
    ("GET", "/v1/responses/{response_id}"): Operation(
        id="get_response",
        tag="responses",
        summary="A response, or the events of one that runs in the background",
        naming=RESPONSES,
        answers={200: (Response,)},
        errors=_KEPT,
        events=get_args(ResponseEvent),
        path_parameters=_RESPONSE,
        query={
            **_INCLUDE,
            "stream": {"enum": ["true", "false"], "default": "false", "description": "Send the events."},
            "starting_after": {
                "type": "integer",
                "minimum": 0,
                "maximum": 999999999,
                "description": "With stream=true: the number of the last event that is known already.",
            },
            "include_obfuscation": {"enum": ["false"], "default": "false"},
        },
    ),
    ("DELETE", "/v1/responses/{response_id}"): Operation(
        id="delete_response",
        tag="responses",
        summary="Delete a response; one that is running is ended",
        naming=RESPONSES,
        answers={200: (ResponseDeleted,)},
        errors=_KEPT,
        path_parameters=_RESPONSE,
    ),
    ("POST", "/v1/responses/{response_id}/cancel"): Operation(
        id="cancel_response",
        tag="responses",
        summary="End a response that runs in the background",
        naming=RESPONSES,
        answers={200: (Response,)},
        errors=_KEPT,
        path_parameters=_RESPONSE,
    ),
    ("GET", "/v1/responses/{response_id}/input_items"): Operation(
        id="list_input_items",
        tag="responses",
        summary="What the request of a response gave",
        naming=RESPONSES,
        answers={200: (ItemList,)},
        errors=_KEPT,
        path_parameters=_RESPONSE,
        query=_ITEM_PAGE,
    ),
    ("POST", "/v1/conversations"): Operation(
        id="create_conversation",
        tag="conversations",
        summary="A new conversation",
        body=(ConversationCreateRequest,),
        example={"items": [{"role": "user", "content": "Hello!"}], "metadata": {"topic": "greetings"}},
        naming=RESPONSES,
        answers={200: (Conversation,)},
        errors=(*_KEPT, *BODY_ERRORS),
    ),
    ("GET", "/v1/conversations/{conversation_id}"): Operation(
        id="get_conversation",
        tag="conversations",
        summary="A conversation without its items",
        naming=RESPONSES,
        answers={200: (Conversation,)},
        errors=_KEPT,
        path_parameters=_CONVERSATION,
    ),
    ("POST", "/v1/conversations/{conversation_id}"): Operation(
        id="update_conversation",
        tag="conversations",
        summary="Give a conversation other metadata",
        body=(ConversationUpdateRequest,),
        example={"metadata": {"topic": "farewells"}},
        naming=RESPONSES,
        answers={200: (Conversation,)},
        errors=(*_KEPT, *BODY_ERRORS),
        path_parameters=_CONVERSATION,
    ),
    ("DELETE", "/v1/conversations/{conversation_id}"): Operation(
        id="delete_conversation",
        tag="conversations",
        summary="Delete a conversation and its items",
        naming=RESPONSES,
        answers={200: (ConversationDeleted,)},
        errors=_KEPT,
        path_parameters=_CONVERSATION,
    ),
    ("GET", "/v1/conversations/{conversation_id}/items"): Operation(
        id="list_conversation_items",
        tag="conversations",
        summary="Some of its items",
        naming=RESPONSES,
        answers={200: (ItemList,)},
        errors=_KEPT,
        path_parameters=_CONVERSATION,
        query=_ITEM_PAGE,
    ),
    ("POST", "/v1/conversations/{conversation_id}/items"): Operation(
        id="create_conversation_items",
        tag="conversations",
        summary="Add items at its end",
        body=(ItemsCreateRequest,),
        example={"items": [{"role": "user", "content": "Hello again!"}]},
        naming=RESPONSES,
        answers={200: (ItemList,)},
        errors=(*_KEPT, *BODY_ERRORS, 409, 504),
        path_parameters=_CONVERSATION,
        query=_INCLUDE,
    ),
    ("GET", "/v1/conversations/{conversation_id}/items/{item_id}"): Operation(
        id="get_conversation_item",
        tag="conversations",
        summary="One item",
        naming=RESPONSES,
        answers={200: (AnyItem,)},
        errors=_KEPT,
        path_parameters=_CONVERSATION | _ITEM,
        query=_INCLUDE,
    ),
    ("DELETE", "/v1/conversations/{conversation_id}/items/{item_id}"): Operation(
        id="delete_conversation_item",
        tag="conversations",
        summary="Delete one item; answers with the conversation",
        naming=RESPONSES,
        answers={200: (Conversation,)},
        errors=_KEPT,
        path_parameters=_CONVERSATION | _ITEM,
    ),
    ("POST", "/v1/files"): Operation(
        id="upload_file",
        tag="batches",
        summary="Keep a file: requests of a batch, or an image",
        form={
            "file": {
                "type": "string",
                "format": "binary",
                "description": "Lines of JSON, or an image.",
            },
            "purpose": {"enum": [*UPLOADED]},
            "expires_after[anchor]": {"enum": ["created_at"], "default": "created_at"},
            "expires_after[seconds]": {
                "type": "integer",
                "minimum": LEAST_LIFE,
                "maximum": LONGEST_LIFE,
                "default": LONGEST_LIFE,
            },
        },
        answers={200: (FileObject,)},
        errors=(*_KEPT, *BODY_ERRORS),
    ),
    ("GET", "/v1/files"): Operation(
        id="list_files",
        tag="batches",
        summary="Your files, newest first",
        answers={200: (FileList,)},
        errors=_KEPT,
        query={
            "limit": {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 10_000},
            "order": {"enum": ["desc"], "default": "desc"},
            "purpose": {"enum": [*UPLOADED, BATCH_OUTPUT]},
            **_AFTER,
        },
    ),
    ("GET", "/v1/files/{file_id}"): Operation(
        id="get_file",
        tag="batches",
        summary="What is known of a file",
        answers={200: (FileObject,)},
        errors=_KEPT,
        path_parameters=_FILE,
    ),
    ("GET", "/v1/files/{file_id}/content"): Operation(
        id="get_file_content",
        tag="batches",
        summary="What is in a file",
        media="application/octet-stream",
        answers={200: ()},
        errors=_KEPT,
        path_parameters=_FILE,
    ),
    ("DELETE", "/v1/files/{file_id}"): Operation(
        id="delete_file",
        tag="batches",
        summary="Delete a file",
        answers={200: (FileDeleted,)},
        errors=_KEPT,
        path_parameters=_FILE,
    ),
    ("POST", "/v1/batches"): Operation(
        id="create_batch",
        tag="batches",
        summary="Answer the requests of a file",
        body=(BatchRequest,),
        example={"input_file_id": "file_0", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
        answers={200: (Batch,)},
        errors=(*_KEPT, *BODY_ERRORS),
    ),
    ("GET", "/v1/batches"): Operation(
        id="list_batches",
        tag="batches",
        summary="Your batches, newest first",
        answers={200: (BatchList,)},
        errors=_KEPT,
        query={"limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}, **_AFTER},
    ),
    ("GET", "/v1/batches/{batch_id}"): Operation(
        id="get_batch",
        tag="batches",
        summary="How far a batch is",
        answers={200: (Batch,)},
        errors=_KEPT,
        path_parameters=_BATCH,
    ),
    ("POST", "/v1/batches/{batch_id}/cancel"): Operation(
        id="cancel_batch",
        tag="batches",
        summary="End a batch; what it has made stays",
        answers={200: (Batch,)},
        errors=(*_KEPT, 409),
        path_parameters=_BATCH,
    ),
}
