# SPDX-License-Identifier: MIT
"""Every finish reason in every API, in the metrics and in the request log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from msgspec import UNSET
from msgspec.structs import replace

from candle_vllm.core.engine.outputs import CompletionOutput, FinishReason
from candle_vllm.core.shown import FIELDS
from candle_vllm.core.vllm.outputs import _completion
from candle_vllm.responses.conversation.events import ConversationFinished
from candle_vllm.responses.conversation.options import ConversationResult, ConversationUsage
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.server.mcp.chat_execution import ExecutionState
from packages.server.tests.observing.conftest import Samples
from packages.server.tests.server_fakes import PacedEngine

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
TOOL = {"name": "f", "parameters": {"type": "object"}}
TOOLS = {"tools": [{"type": "function", "function": TOOL}]}
HI = {"messages": [{"role": "user", "content": "Hi"}]}
ANSWERED = [reason for reason in FinishReason if reason.complete]
APIS: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "/v1/chat/completions": ({**HI, **TOOLS}, lambda body: body["choices"][0]["finish_reason"], "value"),
    "/v1/completions": ({"prompt": "Hi"}, lambda body: body["choices"][0]["finish_reason"], "value"),
    "/v1/messages": (
        {**HI, "max_tokens": 64, "tools": [{"name": "f", "input_schema": {"type": "object"}}]},
        lambda body: body["stop_reason"], "anthropic",
    ),
    "/v1/responses": (
        {"input": "Hi", "tools": [{"type": "function", **TOOL}]},
        lambda body: (body["incomplete_details"] or {"reason": ""})["reason"], "responses",
    ),
    "/api/chat": ({**HI, **TOOLS, "stream": False}, lambda body: body["done_reason"], "ollama"),
    "/api/generate": ({"prompt": "Hi", "stream": False}, lambda body: body["done_reason"], "ollama"),
    "/completion": ({"prompt": "Hi"}, lambda body: body["stop_type"], "llama_server"),
}  # fmt: skip


class Ending(PacedEngine):
    """Its answers end for `reason`."""

    def __init__(self, reason: FinishReason) -> None:
        super().__init__(CALL if reason is FinishReason.TOOL_CALLS else "Hello")
        self.reason = FinishReason.STOP if reason is FinishReason.TOOL_CALLS else reason

    def _sequence(self, request: Any, index: int) -> Any:
        sequence = super()._sequence(request, index)
        make = sequence.next_piece

        def next_piece(*given: Any) -> Any:
            piece = make(*given)
            return replace(piece, finish_reason=self.reason) if piece.finished else piece

        sequence.next_piece = next_piece  # type: ignore[method-assign]
        return sequence


@pytest.mark.parametrize("reason", ANSWERED)
def test_every_api_spells_it(reason: FinishReason, start: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "candle_vllm.server.generations")
    engine = Ending(reason)
    running = start(engine, tool_parser="hermes", log_requests=True)
    with httpx.Client(base_url=running.url, trust_env=False, timeout=20) as client:
        for path, (body, read, api) in APIS.items():
            answer = client.post(path, json={"model": "scripted", **body})
            assert answer.status_code == 200, answer.text
            called = reason is FinishReason.TOOL_CALLS and "tools" not in body
            assert read(answer.json()) == getattr(engine.reason if called else reason, api), path
        samples = Samples(client.get("/metrics").text)
    assert samples.sum("vllm:request_success_total", finished_reason=engine.reason) == len(APIS)
    assert samples.sum("vllm:request_success_total") == len(APIS)
    lines = [record.__dict__[FIELDS] for record in caplog.records if FIELDS in record.__dict__]
    assert [(line["finish_reason"], line["status"]) for line in lines] == [(engine.reason.value, "ok")] * len(APIS)


@pytest.mark.parametrize("reason", [FinishReason.STOP, *(one for one in FinishReason if one.cut)])
def test_a_conversation_on_the_server_has_the_value(reason: FinishReason) -> None:
    state = ExecutionState(ToolRegistry(), reasons=False)
    result = ConversationResult(
        final_message="", turns_taken=1, completed=not reason.cut, stop_reason=reason, usage=ConversationUsage()
    )
    assert msgspec.json.decode(msgspec.json.encode(result), type=ConversationResult) == result
    state.add(ConversationFinished(result=result, messages=()))
    assert (state.finish_reason, state.limit) == (reason.value, UNSET)


@pytest.mark.parametrize("reason", ANSWERED)
def test_no_spelling_is_missing(reason: FinishReason) -> None:
    assert reason.anthropic
    assert reason.ollama
    assert reason.llama_server
    assert reason.cut == bool(reason.responses) == bool(reason.limit)
    assert FinishReason.read(reason.upper()) is reason
    for spelled in (reason.anthropic, reason.ollama, reason.llama_server):
        read = FinishReason.read(spelled)
        assert read is not None
        assert read.cut == reason.cut


@pytest.mark.parametrize("reason", FinishReason)
def test_the_library_of_vllm_has_the_value(reason: FinishReason) -> None:
    made = _completion(CompletionOutput(index=0, text="", token_ids=(), finish_reason=reason))  # type: ignore[arg-type]
    assert made.finish_reason == reason.value


def test_an_answer_that_failed_has_no_reason() -> None:
    assert [(one.anthropic, one.ollama, one.llama_server, one.responses, one.cut) for one in FinishReason
            if not one.complete] == [("", "", "", "", False)] * 2  # fmt: skip
