# SPDX-License-Identifier: MIT
"""Who is told of a request what its caller sees of it, for counting, logs and traces (beside steps 3 to 10)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

from candle_vllm.core.engine.outputs import ClassificationOutput, EmbeddingOutput, ScoreOutput, TokenOutput
from candle_vllm.core.engine.requests import LoraChoice, adapter_uses
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.text.prompts import Prompt, as_prompts

Operation = Literal["generate", "embed", "score", "classify"]
Pooled: TypeAlias = "Sequence[EmbeddingOutput] | Sequence[ScoreOutput] | Sequence[ClassificationOutput]"
Apart: TypeAlias = Callable[..., Awaitable[Any]]


class CallOptions(TypedDict, total=False):
    """What every call says of its request beside inputs and parameters.

    Attributes:
        request_id: what `abort` knows it by; without one, the engine makes one.
        priority: lower runs first.
        lora_request: the adapter, or pairs of adapters and scales.
    """

    request_id: str | None
    priority: int
    lora_request: LoraChoice


class TextOptions(CallOptions, total=False):
    """What a call with texts says besides.

    Attributes:
        add_special_tokens: a text begins with the token that the model asks for; true where it is left out.
    """

    add_special_tokens: bool


class ScoreOptions(CallOptions, total=False):
    """What a call in an event loop for vectors, scores or classes says besides.

    Attributes:
        watcher: is told of the request.
        apart: runs a function with its arguments in a thread, for what takes long, as `asyncio.to_thread` does.
    """

    watcher: RequestWatcher | None
    apart: Apart


class PoolingOptions(ScoreOptions, TextOptions, total=False):
    """The options of `EngineFront.aembed` and `aclassify`."""


@dataclass(frozen=True)
class RequestInfo:
    """A request as an engine was asked, before it was checked.

    Attributes:
        request_id: of the engine, as the client sees it in the answer.
        operation: what was asked for.
        inputs: the prompt, the text or texts, or the pairs.
        params: of a generation.
        detokenize: the engine's.
        lora_request: the adapters of the request.
    """

    request_id: str
    operation: Operation
    inputs: Prompt | Sequence[Any]
    params: SamplingParams | None
    detokenize: Callable[[Sequence[int], bool], str]
    lora_request: LoraChoice = None

    @property
    def count(self) -> int:
        """Sequences of a generation, texts or pairs of the others."""
        return len(as_prompts(self.inputs)) if self.params is None else self.params.n

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the request's adapters; raises InvalidParameterError where `lora_request` is wrong."""
        return tuple(use.name for use in adapter_uses(self.lora_request))

    def prompt(self, most: int) -> str:
        """The first characters of the first text; of pairs nothing."""
        first: Any = "" if self.operation == "score" else next(iter(as_prompts(self.inputs)), "")
        if isinstance(first, Mapping):
            first = first.get("prompt") or first.get("prompt_token_ids") or ""
        return first[:most] if isinstance(first, str) else self.detokenize(first[:most], False)[:most]


class RequestWatch(Protocol):
    """Is told of one request, in its caller's thread. What comes after its end is to be ignored."""

    def reject(self, error: Exception) -> None:
        """The engine raised instead of taking it."""
        ...

    def take(self, piece: TokenOutput) -> None:
        """A piece goes to the caller; the last one of a sequence says how that ended."""
        ...

    def pooled(self, outputs: Pooled) -> None:
        """Vectors or scores go to the caller."""
        ...

    def fail(self, error: Exception) -> None:
        """The caller gets this error."""
        ...

    def close(self) -> None:
        """The caller wants no more of it."""
        ...

    def drop(self) -> None:
        """The caller has forgotten it: called by a finaliser, which may run anywhere, so that no lock may be taken."""
        ...


class RequestWatcher(Protocol):
    """Watches what an engine is asked."""

    def begin(self, info: RequestInfo) -> RequestWatch:
        """A request is about to be checked and queued."""
        ...


@contextmanager
def watched_submit(watcher: RequestWatcher | None, info: RequestInfo) -> Iterator[RequestWatch | None]:
    """Around what checks and queues a generation; its stream goes on with the watch."""
    watch = None if watcher is None else watcher.begin(info)
    try:
        yield watch
    except Exception as error:
        if watch is not None:
            watch.reject(error)
        raise


@contextmanager
def watched_pooling(watcher: RequestWatcher | None, info: RequestInfo) -> Iterator[Callable[[Pooled], None]]:
    """Around a whole request for vectors or scores, which calls what it is given with the answer."""
    if watcher is None:
        yield lambda outputs: None  # noqa: ARG005
        return
    watch = watcher.begin(info)
    try:
        yield watch.pooled
    except asyncio.CancelledError:
        watch.close()
        raise
    except Exception as error:
        watch.fail(error)
        raise
