# SPDX-License-Identifier: MIT
"""Kept responses in memory, and answers that tests write themselves."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from candle_vllm.responses.api.background import Background
from candle_vllm.responses.api.response_store import ResponseStore
from candle_vllm.responses.protocol.response import ConversationOut, MessageOut, OutputText, Response
from candle_vllm.responses.store.backend import StoreOptions


@pytest_asyncio.fixture
async def kept() -> AsyncIterator[ResponseStore]:
    made = ResponseStore(StoreOptions())
    await made.start()
    yield made
    await made.close()


@pytest_asyncio.fixture
async def background(kept: ResponseStore) -> AsyncIterator[Background]:
    made = Background(kept)
    yield made
    await made.close()


@pytest.fixture
def answered() -> Callable[..., Response]:
    """A response with one message: `answered("resp_1", status="queued")`."""

    def answered(
        name: str = "resp_1", text: str = "Hello!", conversation: str | None = None, **fields: Any
    ) -> Response:
        status = fields.setdefault("status", "completed")
        said = MessageOut(id=f"msg_out_{name}", status="completed", content=(OutputText(text=text),))
        values: dict[str, Any] = {
            "id": name, "created_at": int(time.time()), "model": "m", "previous_response_id": None,
            "conversation": None if conversation is None else ConversationOut(id=conversation), "instructions": None,
            "output": (said,) if status in ("completed", "incomplete") else (), "tools": (), "tool_choice": "auto",
            "parallel_tool_calls": True, "max_tool_calls": None, "max_output_tokens": None, "truncation": "disabled",
            "text": {"format": {"type": "text"}}, "reasoning": None, "temperature": 1.0, "top_p": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_logprobs": 0, "store": True, "background": False,
            "metadata": {}, "safety_identifier": None, "prompt_cache_key": None, "user": None, **fields,
        }  # fmt: skip
        return Response(**values)

    return answered
