# SPDX-License-Identifier: MIT
"""What a request said is let go of when it has been answered, whatever the answer: without Python's cycle collector."""

from __future__ import annotations

import gc
import http.client
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine

SIZE = 100_000  # characters
ASK = "who are you?"
FORM = {"type": "object", "properties": {"a": {"type": "string", "pattern": "((("}}}  # which is refused


def _tool(text: str) -> dict[str, Any]:
    return {"name": "f", "description": text, "parameters": {"type": "object"}}


def _said(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _requests(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """A path and a body by names; each body holds a long text."""
    picture = "data:image/png;base64," + "A" * 1000
    chat, messages, responses = "/v1/chat/completions", "/v1/messages", "/v1/responses"
    form = {**FORM, "description": text}
    seen = [{"type": "text", "text": text[:8000]}, {"type": "image_url", "image_url": {"url": picture}}]
    shown = [{"type": "input_text", "text": text[:8000]}, {"type": "input_image", "image_url": picture}]
    named = {"model": "scripted"}
    return {
        "chat": (chat, {"messages": _said(text)}),
        "chat_streamed": (chat, {"messages": _said(text), "stream": True}),
        "chat_grammar": (
            chat,
            {
                "messages": _said(ASK),
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": form}},
            },
        ),
        "chat_image": (chat, {"messages": _said(seen), "metadata": {}, "documents": [{"text": text}]}),
        "messages": (messages, {**named, "max_tokens": 5, "messages": _said(text)}),
        "messages_streamed": (messages, {**named, "max_tokens": 5, "messages": _said(text), "stream": True}),
        "completions": ("/v1/completions", {"prompt": text}),
        "responses": (responses, {"input": text}),
        "responses_instructions": (responses, {"input": ASK, "instructions": text}),
        "responses_streamed": (responses, {"input": text, "stream": True}),
        "responses_shortened": (responses, {"input": text, "truncation": "auto"}),
        "responses_background": (responses, {"input": text, "background": True}),
        "responses_grammar": (
            responses,
            {"input": ASK, "text": {"format": {"type": "json_schema", "name": "a", "schema": form}}},
        ),
        "responses_image": (
            responses,
            {"input": [{"type": "message", **_said(shown)[0]}], "tools": [{"type": "function", **_tool(text)}]},
        ),
        "compact": ("/v1/responses/compact", {**named, "input": text}),
        "ollama_chat": ("/api/chat", {**named, "messages": _said(text)}),
        "ollama_generate": ("/api/generate", {**named, "prompt": text}),
        "ollama_raw": ("/api/generate", {**named, "prompt": text, "raw": True}),
        "ollama_image": ("/api/generate", {**named, "prompt": ASK, "system": text, "images": ["AAAA"]}),
        "ollama_grammar": ("/api/chat", {**named, "messages": _said(ASK), "format": form}),
        "embeddings": ("/v1/embeddings", {"input": text}),
    }


def _post(server: Running, path: str, body: dict[str, Any]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def _held(server: Running, names: list[str]) -> set[str]:
    """Which of the requests' texts are in cycles that only the collector would find."""
    found = set[str]()
    gc.collect()
    gc.freeze()  # what there is need not be gone through again
    gc.disable()
    try:
        for name in names:
            path, body = _requests(f"body of {name}: " + "abc " * (SIZE // 4))[name]
            status = _post(server, path, body)
            assert status == (200 if name == "responses_background" else 400), name
            del body
        assert _post(server, "/v1/completions", {"prompt": "end"}) in (200, 500)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        for each in gc.garbage:
            for text in gc.get_referents(each):
                if isinstance(text, (str, bytes, bytearray)) and len(text) > SIZE // 2:
                    data = text.encode() if isinstance(text, str) else bytes(text)
                    found |= {match.decode() for match in re.findall(rb"body of (\w+):", data)} or {"?"}
        return found
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("sees", [False, True])
def test_refused_bodies_are_in_no_cycle(start: Callable[..., Running], sees: bool) -> None:
    """None stays until the collector runs, for each API, kind of refusal and way to answer."""
    server = start(PacedEngine("Good day!", sees=sees))
    names = [name for name in _requests("") if not sees or name.endswith("_image")]
    assert _held(server, names) == set()
