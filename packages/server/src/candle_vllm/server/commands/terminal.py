"""What `generate` and `chat` share: a conversation as a request, its answer as text, and safe output.

Step 2 and the first half of step 10 of a request's life, without HTTP.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from candle_vllm.core import InferenceEngine
from candle_vllm.openai import OpenAIAdapter, parse_chat_request

Message = dict[str, str]


def conversation(system: str | None, text: str) -> list[Message]:
    """A conversation that begins with one user message."""
    start = [{"role": "system", "content": system}] if system is not None else []
    return [*start, {"role": "user", "content": text}]


async def answer_text(
    engine: InferenceEngine,
    messages: Sequence[Message],
    sampling: Mapping[str, Any],
    max_tokens: int | None,
    stop: Sequence[str] = (),
) -> AsyncGenerator[str, None]:
    """The pieces of the model's answer to a conversation; closing the iterator aborts the request."""
    adapter = OpenAIAdapter(engine, served_model_names=[engine.model_info.name])
    wire: dict[str, Any] = {"model": engine.model_info.name, "messages": list(messages), "stream": True, **sampling}
    if max_tokens is not None:
        wire["max_completion_tokens"] = max_tokens
    if stop:
        wire["stop"] = list(stop)
    chunks = await adapter.chat_stream(parse_chat_request(wire))
    try:
        async for chunk in chunks:
            for choice in chunk.choices:
                if choice.delta.content:
                    yield choice.delta.content
    finally:
        await chunks.aclose()


def terminal_safe(text: str) -> str:
    """On a terminal, the text without control characters, which could move the cursor or retitle the window."""
    if not sys.stdout.isatty():
        return text
    return "".join(char for char in text if char in "\n\t" or (char >= " " and not "\x7f" <= char <= "\x9f"))
