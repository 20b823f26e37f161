"""Responders: who answers `/v1/responses` in the name of each model.

Between steps 1 and 2 of a request's life. What a model's template takes is found out once, when a request needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.conversation import TemplateHabits, template_habits

if TYPE_CHECKING:
    from candle_vllm.responses.api.kept import KeptResponses
    from candle_vllm.responses.api.mcp_source import McpSource
    from candle_vllm.responses.api.responder import Responder
    from candle_vllm.server.models.slot import ServedModel


class Responders:
    """Makes a responder for a request.

    Args:
        kept: keeps responses; None keeps nothing.
        servers: where MCP servers of requests come from; None is none.
    """

    def __init__(self, kept: KeptResponses | None, servers: McpSource | None = None) -> None:
        self.kept = kept
        self.servers = servers
        self._habits: WeakKeyDictionary[OpenAIAdapter, TemplateHabits] = WeakKeyDictionary()

    def of(self, model: ServedModel) -> Responder:
        """Who answers with this model."""
        from candle_vllm.responses.api.responder import Responder, ResponderOptions
        from candle_vllm.responses.conversation.chat_model import InProcessModel

        adapter, settings = model.adapter, model.entry.settings

        async def habits() -> TemplateHabits:
            if adapter not in self._habits:
                self._habits[adapter] = await template_habits(adapter.count_tokens)
            return self._habits[adapter]

        options = ResponderOptions(
            model=model.entry.names[0],
            sampling_defaults=settings.default_sampling,
            model_defaults=model.engine.model_info.default_sampling,
            timeout=settings.request_timeout,
        )
        return Responder(
            InProcessModel(adapter),
            count=adapter.count_tokens,
            habits=habits,
            servers=self.servers,
            memory=self.kept,
            options=options,
        )
