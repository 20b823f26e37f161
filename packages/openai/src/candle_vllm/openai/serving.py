# SPDX-License-Identifier: MIT
"""Parts that the API adapters of one engine share: names of its model, and threads.

The threads do the work that would block the event loop: on prompts, on images, and on grammars, which may take seconds.
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
_LISTED = 20  # names listed in a message
_SURE_BYTES = 8  # bytes per token of the context: a longer prompt is tokenized in chunks
_CHUNK = 16_384  # characters of a longer prompt that are tokenized at a time
_SEAM = 256  # tokens that a boundary between chunks may add, because it splits a token or a word


Uses = Sequence[tuple[LoRARequest, float]]
"""LoRA adapters of a request, each with its scale."""


class AdapterNames(Protocol):
    """The LoRA adapters of one model."""

    def is_known(self, name: str) -> bool:
        """Whether an adapter has this name."""

    def uses(self, name: str | None, scales: Mapping[int, float] | None) -> Uses:
        """Return the adapter of this name; for the model or None, adapters with `scales` by id, or default scales.

        Raises:
            InvalidParameterError: an adapter is named and there are `scales`, or an id is unknown.
            ModelNotServedError: the name is of neither the model nor an adapter.
        """


def answered_by(name: str, served: Sequence[str], *, strict: bool) -> str:
    """Return the first served name, for a request with a name that is not served.

    The client gets a warning, also for an empty name, which clients of the Rust candle-vllm send.

    Raises:
        ModelNotServedError: `strict` is true.
    """
    if strict:
        shown = ", ".join(served[:_LISTED]) + (", ..." if len(served) > _LISTED else "")
        raise ModelNotServedError(f"The model {name!r:.200} is not served here; served models are: {shown}.", "model")
    remark([f"the model {name!r:.100} is not served here: {served[0]!r:.100} answers instead"])
    return served[0]


class ServedNames:
    """Names of the model; the first is used for requests without a name or, unless `strict`, with an unknown name.

    Attributes:
        strict: whether a request that names another model is refused.
        adapters: LoRA adapters, whose names are served as well.
    """

    def __init__(self, names: Sequence[str], *, strict: bool = False, adapters: AdapterNames | None = None) -> None:
        self.all = tuple(names)
        self.strict = strict
        self.adapters = adapters

    def served(self, name: str | None) -> str:
        """Return the name of the model or adapter that answers; raises `ModelNotServedError`."""
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
        """Return the engine's argument for LoRA adapters; empty if no adapter applies.

        Args:
            name: the model name in the request, which ends with the name of `adapter` if the request has one.
            scales: scales of adapters by id.
            adapter: `lora_path` of the request.

        Raises:
            InvalidParameterError, ModelNotServedError: as in `AdapterNames.uses`, or the model has no adapters.
        """
        if self.adapters is None:
            if scales or adapter is not None:
                field = "lora" if scales else "lora_path"
                raise InvalidParameterError(f"{field}: this model is served without adapters (--enable-lora)", field)
            return {}
        uses = self.adapters.uses(None if name in self.all else name, scales)
        return {"lora_request": uses} if uses else {}


class Tokenizes(Protocol):
    """Engine methods that `check_length` needs."""

    @property
    def model_info(self) -> ModelInfo: ...

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


def check_length(engine: Tokenizes, text: str) -> None:
    """Refuse a very long prompt that exceeds the context, without tokenizing all of it; the engine refuses others.

    Raises:
        PromptTooLongError: the beginning of the prompt has more tokens than the context.
    """
    most, found = engine.model_info.max_model_len, 0
    try:
        if len(text.encode()) <= _SURE_BYTES * most:
            return
    except UnicodeEncodeError:
        return  # the tokenizer reports the position
    for start in range(0, len(text), _CHUNK):
        found += len(engine.tokenize(text[start : start + _CHUNK], add_special_tokens=False)) - _SEAM
        if found > most:
            raise PromptTooLongError(
                f"the prompt has more than {most} tokens and this model's maximum context length is {most} tokens: "
                "shorten the prompt, or load the model with a larger `max_model_len` where the model and the memory "
                "allow it",
                "prompt",
            )


T = TypeVar("T")

MAX_COMPILING = 1024  # waiting requests with a grammar or with images
MAX_TOKENIZING = 4096  # waiting requests with a prompt


class WorkerThreads:
    """Threads that the API adapters of one engine share; they end when the adapters are freed."""

    def __init__(self) -> None:
        self._prompts = FairThreads("prompts", 4, MAX_TOKENIZING)
        self._images = FairThreads("images", 1, MAX_COMPILING)
        self._grammars = FairThreads("grammars", 4, MAX_COMPILING)

    async def prepare(self, function: Callable[..., T], *arguments: object) -> T:
        """Run work on a prompt, then release the request's bytes. Raises what `compile` raises."""
        made = await self._prompts.run(partial(function, *arguments))
        this_request().release()
        return made

    async def look(self, function: Callable[..., T], *arguments: object) -> T:
        """Run work on images, one request at a time. Raises what `compile` raises."""
        return await self._images.run(partial(function, *arguments))

    async def compile(self, function: Callable[..., T], *arguments: object) -> T:
        """Run work on a grammar.

        Raises:
            EngineOverloadedError: too many requests wait, or this one has waited too long.
        """
        return await self._grammars.run(partial(function, *arguments))
