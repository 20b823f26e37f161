# SPDX-License-Identifier: MIT
"""The protocol of models that answer turns, and the model of an engine of this process (servers: `http_model.py`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, cast

from candle_vllm.core.errors import ConfigError
from candle_vllm.openai import EngineLike, OpenAIAdapter
from candle_vllm.openai.events import Event
from candle_vllm.openai.task import Task


class ChatModel(Protocol):
    """Answers a request with a stream of events."""

    def stream(self, request: Task | Mapping[str, Any]) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Open the events of one answer; see `candle_vllm.openai.events`. Leaving the context early aborts the request.

        A request that is not a `Task` has the fields of a chat completion request; the model checks them. Raises
        CandleVllmError if the request is invalid, or the model failed.
        """


class Eyes(Protocol):
    """Image input of a model, for images that its tools return."""

    @property
    def max_images(self) -> int:
        """Maximum number of images in the messages of a request; 0 if the model reads only text."""

    async def try_picture(self, data: bytes) -> None:
        """Raise `RequestError` if the model cannot read this image file in a tool's result."""


def eyes_of(model: ChatModel) -> Eyes | None:
    """Return the attribute `eyes` of a model; a model without it gives None, and sees no images of tools."""
    return getattr(model, "eyes", None)


class InProcessModel:
    """A model that is an `OpenAIAdapter` of this process, without HTTP; `eyes` is the adapter's image input."""

    def __init__(self, adapter: OpenAIAdapter) -> None:
        self._adapter = adapter
        self.eyes: Eyes = adapter

    @asynccontextmanager
    async def stream(self, request: Task | Mapping[str, Any]) -> AsyncGenerator[AsyncIterator[Event]]:
        if isinstance(request, Task):
            events = await self._adapter.answer(lambda: request)
        else:
            events = await self._adapter.chat_events({**request, "stream": True})
        try:
            yield events
        finally:
            await events.aclose()


ModelSource = EngineLike | OpenAIAdapter | ChatModel | str
"""An engine, an `OpenAIAdapter`, any `ChatModel`, or the base URL of a server with OpenAI's chat API."""


def local_model(source: Any) -> ChatModel:
    """Return the model for an engine or an `OpenAIAdapter`; a model stays unchanged. ConfigError for another type."""
    is_class = isinstance(source, type)
    if isinstance(source, OpenAIAdapter):
        return InProcessModel(source)
    if hasattr(source, "render_messages") and not is_class:
        return InProcessModel(OpenAIAdapter(cast(EngineLike, source)))
    if hasattr(source, "stream") and not is_class:
        return cast(ChatModel, source)
    given = f"the class {source.__name__} itself" if is_class else f"a {type(source).__name__}"
    raise ConfigError(
        f"the model must be an engine, an OpenAIAdapter, a ChatModel or a base URL, not {given}",
        "model",
    )
