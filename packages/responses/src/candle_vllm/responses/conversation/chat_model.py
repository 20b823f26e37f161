"""Who answers a turn: an engine of this process, or any server with OpenAI's chat API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from candle_vllm.openai.protocol.chat import ChatCompletionChunk


class ChatModel(Protocol):
    """Answers chat requests in chunks."""

    def stream(self, request: Mapping[str, Any]) -> AbstractAsyncContextManager[AsyncIterator[ChatCompletionChunk]]:
        """The chunks of the answer to one request in OpenAI's form; the last one has the usage.

        Leaving the context before the end aborts the request.

        Raises:
            CandleVllmError: the request is wrong, or the model failed.
        """
        ...
