# SPDX-License-Identifier: MIT
"""The OpenAPI document: every route is in it, and what it says is what the server takes and gives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai.types as official
import openai.types.chat as official_chat
import pytest
from fastapi import APIRouter
from fastapi.routing import iter_route_contexts
from openai.types.completion_create_params import CompletionCreateParamsStreaming
from openai.types.embedding_create_params import EmbeddingCreateParams
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from candle_vllm.openai import ChatCompletion, ChatCompletionRequest
from candle_vllm.server import Settings, create_app
from candle_vllm.server.app import OPERATIONS, ROUTERS
from candle_vllm.server.openapi.document import ApiDocument
from candle_vllm.server.openapi.operation import Access, Naming, operations_of, routing
from packages.server.tests.server_fakes import PacedEngine

FOR_PEOPLE = {"/openapi.json", "/docs", "/docs/{name}"}  # the document itself, and the pages that show it
DOCUMENT = ApiDocument(ROUTERS, keys=True, management_keys=False).value
SCHEMAS = DOCUMENT["components"]["schemas"]
USAGE = {"include_usage": True}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(inner)


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            yield method, path, operation


def check(schema: dict[str, Any], value: Any) -> None:
    """The value is as the schema says."""
    whole = {**schema, "components": {"schemas": SCHEMAS}}
    errors = [str(error) for error in jsonschema_rs.Draft202012Validator(whole).iter_errors(value)]
    assert not errors, errors[0]


def check_answer(name: str, value: Any) -> None:
    """The answer is as its schema says, and has nothing that the schema does not know."""
    closed = json.loads(json.dumps({"schemas": SCHEMAS}))
    for schema in closed["schemas"].values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    whole = {"$ref": f"#/components/schemas/{name}", "components": closed}
    errors = [str(error) for error in jsonschema_rs.Draft202012Validator(whole).iter_errors(value)]
    assert not errors, errors[0]


def test_every_route_has_an_entry_and_every_entry_a_route() -> None:
    app = create_app(PacedEngine())
    contexts = list(iter_route_contexts(app.routes))
    sockets = {context.path for context in contexts if not context.methods}
    assert sockets == {"/v1/responses", "/{path:path}"}  # a WebSocket, and the refusal of every other
    found = {(method, context.path) for context in contexts for method in context.methods or ()}
    assert len(found) > 15
    told = {key for key in found if key[1] not in FOR_PEOPLE}
    assert told == set(OPERATIONS), "a route stands outside of the modules of app.py, or says nothing of itself"
    assert {path for _, path in found} >= FOR_PEOPLE


def test_the_page_of_routes_has_all_of_them() -> None:
    text = (Path(__file__).parents[3] / "docs" / "routes.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| `(GET|POST|DELETE|PUT|PATCH|HEAD) ", line)]
    wanted = [
        f"| `{method} {re.sub(':path', '', path)}` | {operation.summary} |"
        for (method, path), operation in OPERATIONS.items()
    ]
    assert sorted(rows) == sorted(wanted)


def test_a_route_without_a_description_is_left_out() -> None:
    router = APIRouter()
    router.add_api_route("/new", lambda: None, methods=["GET", "POST"])
    assert operations_of([router]) == {}


def test_a_route_is_described_where_it_stands() -> None:
    router, route = routing()

    @route("POST /v1/word /word", tag="tokens", manages=True)
    async def count_words() -> None:
        """How many words there are.

        More of it.
        """

    found = operations_of([router])
    assert {key: each.id for key, each in found.items()} == {
        ("POST", "/v1/word"): "count_words", ("POST", "/word"): "count_words_word",
    }  # fmt: skip
    assert {each.summary for each in found.values()} == {"How many words there are"}
    access = Access(found)
    assert access.managed == {"/v1/word", "/word"}


def test_it_is_openapi() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    assert [str(error) for error in OPENAPI_31_VALIDATOR.iter_errors(DOCUMENT)] == []
    for name in SCHEMAS:
        jsonschema_rs.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}})


def test_references_and_names() -> None:
    targets = {node["$ref"] for node in walk(DOCUMENT) if "$ref" in node}
    for target in targets:
        _, _, kind, name = target.split("/")
        assert name in DOCUMENT["components"][kind], target
    used = {target.rsplit("/", 1)[1] for target in targets}
    assert set(SCHEMAS) <= used, "schemas that nothing refers to"
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(ids) == len(set(ids)) == len(OPERATIONS)
    for _, path, operation in operations():
        named = {each["name"] for each in operation["parameters"] if each["in"] == "path"}
        assert named == set(re.findall(r"{(\w+)}", path))


def test_descriptions_are_plain_and_everywhere() -> None:
    for _, path, operation in operations():
        assert operation["summary"], path
        for response in operation["responses"].values():
            assert response["description"]
    assert "a list of either" in SCHEMAS["CompletionRequest"]["description"]
    assert "at position" not in SCHEMAS["Embedding"]["description"]
    assert SCHEMAS["EmbeddingRequest"]["properties"]["dimensions"]["description"].startswith("length of the vectors")
    assert "Attributes:" not in json.dumps(DOCUMENT)


def test_what_is_not_served_is_said_with_the_values_that_may_stand() -> None:
    field = SCHEMAS["ChatCompletionRequest"]["properties"]["watermarking"]
    assert field == {
        "enum": [None, False],
        "deprecated": True,
        "description": "Not served: watermarks are not implemented.",
    }


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("ChatCompletionRequest", official_chat.completion_create_params.CompletionCreateParamsStreaming),
        ("CompletionRequest", CompletionCreateParamsStreaming),
        ("EmbeddingRequest", EmbeddingCreateParams),
    ],
)
def test_the_official_clients_fields_are_there(name: str, params: Any) -> None:
    assert len(params.__annotations__) > 4
    assert not {*params.__annotations__} - {*SCHEMAS[name]["properties"]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ChatCompletion", official_chat.ChatCompletion),
        ("ChatCompletionChunk", official_chat.ChatCompletionChunk),
        ("Completion", official.Completion),
        ("CompletionChoice", official.CompletionChoice),
        ("EmbeddingList", official.CreateEmbeddingResponse),
        ("Embedding", official.Embedding),
        ("LoadedCard", official.Model),
        ("UnloadedCard", official.Model),
    ],
)
def test_answers_have_what_the_official_types_require(name: str, kind: Any) -> None:
    required = {field for field, info in kind.model_fields.items() if info.is_required()}
    assert required <= {*SCHEMAS[name]["properties"]}
    assert required - {"finish_reason", "usage"} <= {*SCHEMAS[name]["required"]}


@pytest.mark.parametrize("name", ["Classified", "Pooled", "Score"])
def test_entries_of_lists_have_all_their_fields(name: str) -> None:
    assert SCHEMAS[name]["required"] == [*SCHEMAS[name]["properties"]]


def test_requests_are_taken_apart_as_the_schemas_say() -> None:
    chat = {"$ref": "#/components/schemas/ChatCompletionRequest"}
    check(chat, CHAT)
    check(chat, {**CHAT, "temperature": 0.5, "stop": ["a"], "tools": None, "response_format": {"type": "text"}})
    for wrong in ({}, {**CHAT, "temprature": 1}, {**CHAT, "n": 0}, {**CHAT, "functions": [1]}, {"messages": []}):
        with pytest.raises(AssertionError):
            check(chat, wrong)


def kept(client: Any) -> dict[str, str]:
    """A response, a conversation and an item of it, a file and a batch, as they stand in paths."""
    response = client.post("/v1/responses", json={"input": "Hi"}).json()
    example = OPERATIONS["POST", "/v1/conversations"].example
    conversation = client.post("/v1/conversations", json=example).json()
    item = client.get(f"/v1/conversations/{conversation['id']}/items").json()["data"][0]
    file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", b"{}")}).json()
    begun = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = client.post("/v1/batches", json=begun).json()
    made = {
        "response_id": response,
        "conversation_id": conversation,
        "item_id": item,
        "file_id": file,
        "batch_id": batch,
    }
    return {"model_id": "scripted", **{name: each["id"] for name, each in made.items()}}


def filled(path: str, names: dict[str, str]) -> str:
    """A path of the table with something that is there."""
    return re.sub(r"{(\w+)(?::\w+)?}", lambda match: names[match[1]], path)


LEAVE = ("/v1/models/add", "/v1/models/remove", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Routes that need the operator's leave."""


def test_each_example_works(start: Callable[..., Any]) -> None:
    engine = PacedEngine(tasks=("generate", "embed", "score", "classify"))
    with start(engine, management_key=(), enable_lora=True, lora_modules=("tone=/srv/tone",)).http() as client:
        names = kept(client)
        for (method, path), operation in OPERATIONS.items():
            changes = operation.tag == "ollama" and operation.manages  # which needs the operator's leave
            if not operation.body or path == "/v1/models/unload" or operation.tag in ("mailbox", "mcp") or changes:
                continue
            if path in LEAVE:
                continue
            described = DOCUMENT["paths"][path][method.lower()]
            check(described["requestBody"]["content"]["application/json"]["schema"], operation.example)
            there = {"input_file_id": names["file_id"]} if path == "/v1/batches" else {}
            example: Any = operation.example or {}
            given = example if operation.bare_body else {**example, **there}
            answer = client.post(filled(path, names), json=given)
            assert answer.status_code == 200, (path, answer.text)
            check(described["responses"]["200"]["content"]["application/json"]["schema"], answer.json())


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
ANSWERS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2}, "ChatCompletion"),
    ("/v1/chat/completions", {**CHAT, "return_token_ids": True}, "ChatCompletion"),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL]}, "ChatCompletion"),
    ("/v1/chat/completions", {**CHAT, "prompt_logprobs": 1}, "ChatCompletion"),
    ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 2, "echo": True, "return_token_ids": True}, "Completion"),
    ("/v1/completions", {"prompt": "a", "stop": "!", "prompt_logprobs": 0}, "Completion"),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}, "EmbeddingList"),
    ("/v1/score", {"text_1": "a", "text_2": "b"}, "ScoreList"),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "return_documents": False}, "Ranking"),
    ("/tokenize", {**CHAT, "return_token_strs": True}, "Tokenized"),
    ("/detokenize", {"tokens": [1]}, "Detokenized"),
    ("/v1/models/load", {"model": "default"}, "SlotStatus"),
    ("/v1/models/select", {"model": "default"}, "Selected"),
    ("/v1/chat/completions", {**CHAT, "model": "other"}, "ErrorEnvelope"),
    ("/v1/messages", {**CHAT, "model": "default", "max_tokens": 9}, "AnthropicMessageOut"),
    ("/v1/messages", {**CHAT, "model": "other", "max_tokens": 9}, "AnthropicErrorBodyOut"),
    ("/v1/messages/count_tokens", {**CHAT, "model": "default"}, "AnthropicTokenCountOut"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "name"), ANSWERS)
def test_answers_are_as_described(start: Callable[..., Any], path: str, body: dict[str, Any], name: str) -> None:
    script = CALL if "tools" in body else "Hello!"
    engine = PacedEngine(script, chat_template="{{ tools }}<tool_call>" if "tools" in body else None)
    with start(engine, strict_model_names=True).http() as client:
        check_answer(name, client.post(path, json=body).json())


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/chat/completions", CHAT | {"logprobs": True, "stream_options": USAGE}, "ChatCompletionChunk"),
        ("/v1/chat/completions", {**CHAT, "return_token_ids": True}, "ChatCompletionChunk"),
        ("/v1/completions", {"prompt": "a", "logprobs": 1, "stream_options": USAGE}, "Completion"),
    ],
)  # fmt: skip
def test_events_are_as_described(start: Callable[..., Any], path: str, body: dict[str, Any], name: str) -> None:
    with start().http() as client:
        text = client.post(path, json={**body, "stream": True}).text
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    assert len(events) > 5
    for event in events:
        check_answer(name, json.loads(event))


def test_gets_are_as_described(start: Callable[..., Any]) -> None:
    running = start()
    with running.http() as client:
        names = kept(client)
        for method, path, operation in operations():
            if method != "get" or {"mailbox", "mcp"} & {*operation["tags"]}:
                continue
            answer = client.get(filled(path, names))
            assert answer.status_code == 200, path
            [media] = [kind for kind in operation["responses"]["200"]["content"] if kind != "text/event-stream"]
            assert answer.headers["content-type"].startswith(media)
            if media != "application/json":
                continue
            check(operation["responses"]["200"]["content"]["application/json"]["schema"], answer.json())
            assert re.fullmatch(
                DOCUMENT["components"]["headers"]["RequestId"]["schema"]["pattern"], answer.headers["x-request-id"]
            )


def test_keys_are_described_as_they_are() -> None:
    def secured(**settings: Any) -> dict[str, bool]:
        document = create_app(PacedEngine(), Settings(**settings)).openapi()
        assert ("securitySchemes" in document["components"]) == bool(settings)
        return {
            path: bool(operation["security"]) == ("401" in operation["responses"]) and bool(operation["security"])
            for path, item in document["paths"].items() for operation in item.values()
        }  # fmt: skip

    assert not any(secured().values())
    guarded = secured(api_key=("k",))
    assert [path for path, needs in guarded.items() if not needs] == ["/v1/health", "/health", "/ready", "/ping"]
    managed = secured(management_key=("k",))
    assert {path for path, needs in managed.items() if needs} == {
        "/v1/models/status", "/v1/models/load", "/v1/models/unload", "/v1/models/select", "/metrics", "/v1/usage",
        "/v1/models/inventory", "/v1/models/reload", "/v1/models/add", "/v1/models/remove",
        "/server_info", "/reset_prefix_cache", "/sleep", "/wake_up", "/is_sleeping",
        "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/lora-adapters",
        "/api/pull", "/api/copy", "/api/delete",
        "/v1/queues", "/v1/queues/{model_id}",
    }  # fmt: skip


def test_a_refused_method_is_told_all_others(start: Callable[..., Any]) -> None:
    with start().http() as client:
        for path, allowed in (
            ("/v1/mailbox/x", "DELETE, GET"), ("/v1/models/load", "POST"), ("/v1/models/x", "GET"), ("/", "GET")
        ):  # fmt: skip
            answer = client.patch(path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed), path


def test_it_is_made_once() -> None:
    app = create_app(PacedEngine())
    assert app.openapi() is app.openapi()
    assert app.state.document.encoded is app.state.document.encoded


def test_a_request_and_an_answer_of_one_name_are_noticed() -> None:
    kind = type("ChatCompletionRequest", (ChatCompletion,), {}, frozen=True)
    with pytest.raises(AssertionError, match="is a request and an answer"):
        Naming().components([ChatCompletionRequest], [kind])


def test_a_conversation_may_be_one_text() -> None:
    schema = ChatCompletionRequest.model_json_schema()["properties"]["messages"]
    text, listed = schema["anyOf"]
    assert text == {"type": "string", "minLength": 1}
    assert listed["type"] == "array"
    assert listed["minItems"] == 1
