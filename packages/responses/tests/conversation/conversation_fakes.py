# SPDX-License-Identifier: MIT
"""Engines that call tools by a script, tools that can be watched, and what to look at afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.responses.conversation.chat_model import InProcessModel
from candle_vllm.responses.conversation.events import ConversationFinished, Event
from candle_vllm.responses.conversation.loop import ConversationLoop
from candle_vllm.responses.conversation.options import ConversationOptions, ConversationResult
from candle_vllm.responses.tools.registry import ToolRegistry


def call_text(name: str, **arguments: Any) -> str:
    """A call as the scripted model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def turns(*texts: str) -> Callable[[str], str]:
    """A script that says one text per turn, and the last one for ever."""
    left = list(texts)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def adapter_of(*texts: str, **options: Any) -> OpenAIAdapter:
    return OpenAIAdapter(engine_of(*texts, **options), tool_parser="hermes")


def engine_of(*texts: str, **options: Any) -> ScriptedEngine:
    return ScriptedEngine(turns(*texts), **{"max_model_len": 200_000, **options})


class Bench:
    """A loop over a scripted engine; `events` are those of the last run."""

    def __init__(self, *texts: str, tools: Sequence[Any] = (), model: Any = None, **options: Any) -> None:
        self.engine = engine_of(*texts or ("unused",))
        self.model = model or InProcessModel(OpenAIAdapter(self.engine, tool_parser="hermes"))
        self.tools = ToolRegistry(tools)
        self.options = ConversationOptions(**options)
        self.events: list[Event] = []
        self.added: tuple[dict[str, Any], ...] = ()

    def events_of(self, messages: Any, **given: Any) -> Any:
        return ConversationLoop(self.model, self.tools, self.options).run(messages, **given)

    async def run(self, messages: Any = "go", **given: Any) -> ConversationResult:
        if isinstance(messages, str):
            messages = [user(messages)]
        self.events = []
        async with contextlib.aclosing(self.events_of(messages, **given)) as events:
            async for event in events:
                self.events.append(event)
        last = self.events[-1]
        assert isinstance(last, ConversationFinished)
        self.added = last.messages
        return last.result

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class Gate:
    """A tool that waits until it is let through, and knows how often it began and was cancelled."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.begun = 0
        self.cancelled = 0
        self.together = 0
        self._inside = 0

    async def wait(self, number: int = 0) -> str:
        """Waits."""
        self.begun += 1
        self._inside += 1
        self.together = max(self.together, self._inside)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self._inside -= 1
        return f"through {number}"


def other_tasks() -> set[asyncio.Task[Any]]:
    """Tasks beside the test's own."""
    return asyncio.all_tasks() - {asyncio.current_task()}
