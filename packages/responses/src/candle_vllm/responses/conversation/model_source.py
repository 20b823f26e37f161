"""What a session was given -> the model that answers its turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from candle_vllm.core.errors import ConfigError
from candle_vllm.openai import EngineLike, OpenAIAdapter
from candle_vllm.responses.conversation.chat_model import ChatModel
from candle_vllm.responses.conversation.in_process_model import InProcessModel

if TYPE_CHECKING:
    from candle_vllm.responses.conversation.http_model import HttpModel

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
