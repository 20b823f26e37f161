# SPDX-License-Identifier: MIT
"""Observers of requests, notified of all outputs, for metrics, logs and traces (beside steps 3 to 10)."""

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
    """Options of every call in addition to inputs and parameters.

    Attributes:
        request_id: the id for `abort`; the engine generates one if it is left out.
        priority: a lower number runs first.
        lora_request: the adapter, or pairs of adapters and scales.
    """

    request_id: str | None
    priority: int
    lora_request: LoraChoice


class TextOptions(CallOptions, total=False):
    """Options of calls with texts.

    Attributes:
        add_special_tokens: add the tokenizer's special tokens, such as BOS, to a text; true by default.
    """

    add_special_tokens: bool


class ScoreOptions(CallOptions, total=False):
    """Options of calls in an event loop for vectors, scores or classes.

    Attributes:
        watcher: is notified of the request.
        apart: runs a slow function in a thread, as `asyncio.to_thread` does.
    """

    watcher: RequestWatcher | None
    apart: Apart


class PoolingOptions(ScoreOptions, TextOptions, total=False):
    """The options of `EngineFront.aembed` and `aclassify`."""


@dataclass(frozen=True)
class RequestInfo:
    """A request as the caller passed it, before it is checked.

    Attributes:
        request_id: the engine's id of the request, which the client sees in the answer.
        operation: the called operation.
        inputs: the prompt, the text or texts, or the pairs.
        params: sampling parameters of a generation; None for other operations.
        detokenize: the engine's `detokenize`.
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
        """Number of sequences of a generation, else of texts or pairs."""
        return len(as_prompts(self.inputs)) if self.params is None else self.params.n

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the request's adapters; raises InvalidParameterError if `lora_request` is wrong."""
        return tuple(use.name for use in adapter_uses(self.lora_request))

    def prompt(self, most: int) -> str:
        """Return the first `most` characters of the first text; "" for pairs."""
        first: Any = "" if self.operation == "score" else next(iter(as_prompts(self.inputs)), "")
        if isinstance(first, Mapping):
            first = first.get("prompt") or first.get("prompt_token_ids") or ""
        return first[:most] if isinstance(first, str) else self.detokenize(first[:most], False)[:most]


class RequestWatch(Protocol):
    """Observer of one request, notified in the caller's thread. It must ignore calls after the request's end."""

    def reject(self, error: Exception) -> None:
        """Note that the engine refused the request with this error."""
        ...

    def take(self, piece: TokenOutput) -> None:
        """Note an output that goes to the caller; the last one of a sequence has its finish reason."""
        ...

    def pooled(self, outputs: Pooled) -> None:
        """Note the vectors, scores or classes that go to the caller."""
        ...

    def fail(self, error: Exception) -> None:
        """Note that the caller gets this error."""
        ...

    def close(self) -> None:
        """Note that the caller has closed the request before its end."""
        ...

    def drop(self) -> None:
        """Note that the caller has dropped the request. It must take no lock: a finaliser calls it at any point."""
        ...


class RequestWatcher(Protocol):
    """Observer of all requests to an engine."""

    def begin(self, info: RequestInfo) -> RequestWatch:
        """Return the observer of a request that is about to be checked and queued."""
        ...


@contextmanager
def watched_submit(watcher: RequestWatcher | None, info: RequestInfo) -> Iterator[RequestWatch | None]:
    """Notify the watcher around checking and queueing a generation; its stream continues with the yielded watch."""
    watch = None if watcher is None else watcher.begin(info)
    try:
        yield watch
    except Exception as error:
        if watch is not None:
            watch.reject(error)
        raise


@contextmanager
def watched_pooling(watcher: RequestWatcher | None, info: RequestInfo) -> Iterator[Callable[[Pooled], None]]:
    """Notify the watcher around a whole pooling request, which passes its outputs to the yielded function."""
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
