# SPDX-License-Identifier: MIT
"""What adapters of one engine share: the names of its model, and threads beside the event loop.

Threads are for what would hold up an event loop: some for prompts, others for grammars, which may take seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from candle_vllm.core.config import DEMO, DEMO_NAME
from candle_vllm.core.engine.request import LoRARequest
from candle_vllm.core.errors import EngineOverloadedError, InvalidParameterError
from candle_vllm.openai.errors import ModelNotServedError

ANY_MODEL = "default"  # the name that always means the served model


Uses = Sequence[tuple[LoRARequest, float]]
"""Adapters that a request goes through, and how much of each is added."""


class AdapterNames(Protocol):
    """The adapters of one model."""

    def is_known(self, name: str) -> bool:
        """Whether an adapter is called so."""
        ...

    def uses(self, name: str | None, scales: Mapping[int, float] | None) -> Uses:
        """What a request goes through that calls its model so, or says how much it has of which.

        Raises:
            InvalidParameterError: it says both, or there is no adapter of a number.
            ModelNotServedError: neither an adapter nor the model is called so any more.
        """
        ...


class ServedNames:
    """One name or more; the first is used where a request names none, or, unless `strict`, calls it otherwise.

    Attributes:
        all: the names.
        strict: whether a request that names another model is refused.
        adapters: whose names are served as well.
    """

    def __init__(self, names: Sequence[str], *, strict: bool = False, adapters: AdapterNames | None = None) -> None:
        self.all = tuple(names)
        self.strict = strict
        self.adapters = adapters

    def served(self, name: str | None) -> str:
        """The name to answer with, which says who answers; raises `ModelNotServedError`."""
        if name is not None and (name in self.all or (name == DEMO and DEMO_NAME in self.all)):
            return name
        if name is not None and self.adapters is not None and self.adapters.is_known(name):
            return name
        if name is None or name == ANY_MODEL or not self.strict:
            return self.all[0]
        raise ModelNotServedError(f"The model {name!r} is not served here; served are: {', '.join(self.all)}.", "model")

    def options(
        self, name: str | None, scales: Mapping[int, float] | None = None, adapter: str | None = None
    ) -> dict[str, Any]:
        """What an engine is told besides the prompt; nothing where the model answers as it is.

        Args:
            name: what the request calls the model.
            scales: of adapters by their numbers.
            adapter: named beside the model; it is in `name` already.

        Raises:
            InvalidParameterError, ModelNotServedError: as `AdapterNames.uses`, or the model has no adapters.
        """
        if self.adapters is None:
            if scales or adapter is not None:
                field = "lora" if scales else "lora_path"
                raise InvalidParameterError(f"{field}: this model is served without adapters (--enable-lora)", field)
            return {}
        uses = self.adapters.uses(None if name in self.all else name, scales)
        return {"lora_request": uses} if uses else {}


T = TypeVar("T")

MAX_COMPILING = 1024  # requests whose grammars wait or are compiled


class WorkerThreads:
    """Work of one adapter; the threads end with it."""

    def __init__(self) -> None:
        self._prompts = ThreadPoolExecutor(4, "candle-vllm-prompt")
        self._images = ThreadPoolExecutor(1, "candle-vllm-images")
        self._grammars = ThreadPoolExecutor(2, "candle-vllm-compile")
        self._compiling = 0

    async def prepare(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs work on a prompt."""
        return await asyncio.get_running_loop().run_in_executor(self._prompts, function, *arguments)

    async def look(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs work on images; one is decoded at a time, and texts wait for none."""
        return await asyncio.get_running_loop().run_in_executor(self._images, function, *arguments)

    async def compile(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs work on a grammar.

        Raises:
            EngineOverloadedError: too many wait.
        """
        if self._compiling >= MAX_COMPILING:
            raise EngineOverloadedError(
                f"the grammars of {self._compiling} requests wait to be compiled, and no more may: try again later"
            )
        self._compiling += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._grammars, function, *arguments)
        finally:
            self._compiling -= 1
