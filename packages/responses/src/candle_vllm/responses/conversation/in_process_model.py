"""InProcessModel: an engine of this process answers the turns (steps 2 to 10 of a request's life, without HTTP)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.protocol.chat import ChatCompletionChunk


class InProcessModel:
    """Asks an adapter; see `ChatModel`."""

    def __init__(self, adapter: OpenAIAdapter) -> None:
        self._adapter = adapter

    @asynccontextmanager
    async def stream(self, request: Mapping[str, Any]) -> AsyncGenerator[AsyncIterator[ChatCompletionChunk]]:
        """The chunks of the answer; leaving the context early aborts the request in the engine."""
        streamed = {**request, "stream": True, "stream_options": {"include_usage": True}}
        chunks = await self._adapter.chat_stream(streamed)
        try:
            yield chunks
        finally:
            await chunks.aclose()
