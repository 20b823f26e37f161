# SPDX-License-Identifier: MIT
"""What adapters of one engine share: the names of its model, and threads beside the event loop.

Threads are for what would hold up an event loop: some for prompts, others for grammars, which may take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from candle_vllm.core.config import DEMO, DEMO_NAME
from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.requests import LoRARequest
from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError
from candle_vllm.openai.errors import ModelNotServedError
from candle_vllm.openai.fair_threads import FairThreads, this_request
from candle_vllm.openai.remarks import remark

ANY_MODEL = "default"  # the name that always means the served model
_LISTED = 20  # names in a message
_SURE = 8  # bytes for each token of the context: shorter prompts are tokenized as a whole, most others are too long
_PIECE = 16_384  # characters of longer ones that are tokenized at a time
_SEAM = 256  # tokens that a cut makes at most, where it parts a long token or a word


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


def answered_by(name: str, served: Sequence[str], *, strict: bool) -> str:
    """The first served name, for a request that calls the only model by `name`, which is not served.

    The sender gets a warning, also of an empty name, by which candle-vllm's own client means the model that is there.

    Raises:
        ModelNotServedError: names are strict.
    """
    if strict:
        shown = ", ".join(served[:_LISTED]) + (", ..." if len(served) > _LISTED else "")
        raise ModelNotServedError(f"The model {name!r:.200} is not served here; served are: {shown}.", "model")
    remark([f"the model {name!r:.100} is not served here: {served[0]!r:.100} answers"])
    return served[0]


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
        if name is None or name == ANY_MODEL:
            return self.all[0]
        return answered_by(name, self.all, strict=self.strict)

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


class Tokenizes(Protocol):
    """What counting tokens needs of an engine."""

    @property
    def model_info(self) -> ModelInfo: ...

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


def check_length(engine: Tokenizes, text: str) -> None:
    """Refuses a prompt that is too long before all of it is tokenized.

    Raises:
        PromptTooLongError: its beginning has more tokens than the context.
    """
    most, found = engine.model_info.max_model_len, 0
    try:
        if len(text.encode()) <= _SURE * most:
            return
    except UnicodeEncodeError:
        return  # the tokenizer says where
    for start in range(0, len(text), _PIECE):
        found += len(engine.tokenize(text[start : start + _PIECE], add_special_tokens=False)) - _SEAM
        if found > most:
            raise PromptTooLongError(
                f"the prompt has more than {most} tokens and the model's maximum context length is {most} tokens: "
                "shorten the prompt, or load the model with a larger `max_model_len` where the model and the memory "
                "allow it",
                "prompt",
            )


T = TypeVar("T")

MAX_COMPILING = 1024  # requests whose grammars, or whose images, wait
MAX_TOKENIZING = 4096  # requests whose prompts wait, one for each connection


class WorkerThreads:
    """Work of one adapter; the threads end with it."""

    def __init__(self) -> None:
        self._prompts = FairThreads("prompts", 4, MAX_TOKENIZING)
        self._images = FairThreads("images", 1, MAX_COMPILING)
        self._grammars = FairThreads("grammars", 4, MAX_COMPILING)

    async def prepare(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs work on a prompt, behind which the request's bytes do not count. Raises what `compile` raises."""
        made = await self._prompts.run(partial(function, *arguments))
        this_request().release()
        return made

    async def look(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs work on images; one is decoded at a time, and texts wait for none. Raises what `compile` raises."""
        return await self._images.run(partial(function, *arguments))

    async def compile(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs work on a grammar.

        Raises:
            EngineOverloadedError: too many wait, or this one has waited too long.
        """
        return await self._grammars.run(partial(function, *arguments))
