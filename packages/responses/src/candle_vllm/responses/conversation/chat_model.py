# SPDX-License-Identifier: MIT
"""Who answers a turn: an engine of this process, or any server with OpenAI's chat API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

from candle_vllm.core.errors import ConfigError
from candle_vllm.openai import EngineLike, OpenAIAdapter
from candle_vllm.openai.events import Event
from candle_vllm.openai.task import Task

if TYPE_CHECKING:
    from candle_vllm.responses.conversation.http_model import HttpModel


class ChatModel(Protocol):
    """Answers tasks in events."""

    def stream(self, request: Task | Mapping[str, Any]) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """What happens while one request is answered; see `candle_vllm.openai.events`.

        A library's user says in OpenAI's form what is asked for; that is passed on as it is to where it is read.

        Leaving the context before the end aborts the request.

        Raises:
            CandleVllmError: the request is wrong, or the model failed.
        """
        ...


class Eyes(Protocol):
    """How a model is shown the images that its tools return."""

    @property
    def max_images(self) -> int:
        """Of all messages of a turn; 0 where it reads text alone."""
        ...

    async def try_picture(self, data: bytes) -> None:
        """Raises `RequestError` where the model cannot be shown this file as the result of a tool."""
        ...


def eyes_of(model: ChatModel) -> Eyes | None:
    """The `eyes` of a model; None for a model that sees no images, or of which that is not known."""
    return getattr(model, "eyes", None)


class InProcessModel:
    """Asks an adapter: steps 2 to 10 of a request's life, without HTTP.

    Attributes:
        eyes: the adapter's.
    """

    def __init__(self, adapter: OpenAIAdapter) -> None:
        self._adapter = adapter
        self.eyes: Eyes = adapter

    @asynccontextmanager
    async def stream(self, request: Task | Mapping[str, Any]) -> AsyncGenerator[AsyncIterator[Event]]:
        """See `ChatModel`."""
        if isinstance(request, Task):
            events = await self._adapter.answer(lambda: request)
        else:
            events = await self._adapter.chat_events({**request, "stream": True})
        try:
            yield events
        finally:
            await events.aclose()


ModelSource = EngineLike | OpenAIAdapter | ChatModel | str
"""An engine, an adapter, any `ChatModel`, or the base URL of a server with OpenAI's chat API."""


def http_model(base_url: str, api_key: str | None, model: str | None) -> HttpModel:
    """The model behind a base URL; see `HttpModel`."""
    from candle_vllm.responses.conversation.http_model import HttpModel

    return HttpModel(base_url, api_key=api_key, model=model)


def local_model(source: Any) -> ChatModel:
    """The model for an engine, an adapter, or a model as it is.

    Raises:
        ConfigError: it is none of them.
    """
    is_class = isinstance(source, type)
    if isinstance(source, OpenAIAdapter):
        return InProcessModel(source)
    if hasattr(source, "apply_chat_template") and not is_class:
        return InProcessModel(OpenAIAdapter(cast(EngineLike, source)))
    if hasattr(source, "stream") and not is_class:
        return cast(ChatModel, source)
    given = f"the class {source.__name__} itself" if is_class else f"a {type(source).__name__}"
    raise ConfigError(
        f"the model must be an engine, an OpenAIAdapter, a ChatModel or a base URL, not {given}",
        "model",
    )
