# SPDX-License-Identifier: MIT
"""Requests to the engine and their adapters: small frozen structs that can be sent to an engine's process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from os import PathLike
from typing import Literal, Protocol

import msgspec

from candle_vllm.core.arguments import ExplainedStruct
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.vision.inputs import ImageInput

MAX_REQUEST_ID = 256
MAX_ADAPTER_NAME = 512
MAX_ADAPTER_PATH = 4096
MAX_ADAPTERS = 16
"""Maximum number of adapters of one request."""
MAX_ADAPTER_SCALE = 1000.0
MAX_PRIORITY = (1 << 31) - 1


class LoRARequest(ExplainedStruct, frozen=True):
    """An adapter that a call names, with vLLM's fields.

    Attributes:
        lora_name: the adapter's name; requests with equal names use the same adapter.
        lora_int_id: vLLM's number of the adapter; only `AsyncLLM` finds adapters by it.
        lora_path: a PEFT folder or a GGUF adapter; empty for an adapter that the engine knows already.
        base_model_name: name of the base model; has no effect.
        load_inplace: read the files again, and replace the adapter of this name.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lora_int_id, int) or isinstance(self.lora_int_id, bool) or self.lora_int_id < 0:
            raise InvalidParameterError("lora_int_id must be a whole number of 0 or more", "lora_request")
        self.use()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and self.lora_name == other.lora_name

    def __hash__(self) -> int:
        return hash(self.lora_name)

    def use(self, scale: float = 1.0) -> AdapterUse:
        """Return this adapter as an `AdapterUse` with a scale."""
        path = str(self.lora_path) if isinstance(self.lora_path, PathLike) else self.lora_path
        return AdapterUse(name=self.lora_name, path=path, scale=scale, load_inplace=self.load_inplace)


class AdapterUse(ExplainedStruct, frozen=True, kw_only=True):
    """An adapter of a request.

    Attributes:
        path: path of its files; empty for an adapter that the engine knows already.
        scale: factor of the adapter's output, in addition to the adapter's own scale.
        load_inplace: read the files again.
    """

    name: str
    path: str = ""
    scale: float = 1.0
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= MAX_ADAPTER_NAME or not self.name.isprintable():
            raise InvalidParameterError(
                f"an adapter's name must have 1 to {MAX_ADAPTER_NAME} printable characters", "lora_request"
            )
        if not isinstance(self.path, str) or len(self.path) > MAX_ADAPTER_PATH or "\0" in self.path:
            most = f"a text of at most {MAX_ADAPTER_PATH} characters without NUL"
            raise InvalidParameterError(f"adapter {self.name!r:.80}: the path must be {most}", "lora_request")
        wrong = isinstance(self.scale, bool) or not isinstance(self.scale, (int, float))
        if wrong or not abs(self.scale) <= MAX_ADAPTER_SCALE:
            raise InvalidParameterError(
                f"adapter {self.name!r:.80}: the scale must be a number within ±{MAX_ADAPTER_SCALE:g}", "lora_request"
            )
        if not isinstance(self.load_inplace, bool):
            raise InvalidParameterError("load_inplace must be true or false", "lora_request")


LoraChoice = LoRARequest | Sequence[tuple[LoRARequest, float]] | None
"""The adapters of one request: none, one, or several with their scales."""


def adapter_uses(given: LoraChoice) -> tuple[AdapterUse, ...]:
    """Return the adapters that a call names for one request; raises InvalidParameterError if `given` is neither a
    LoRARequest nor pairs of one and a scale, or a scale is not valid."""
    if given is None:
        return ()
    if isinstance(given, LoRARequest):
        return (given.use(),)
    if not _is_mix(given):
        raise InvalidParameterError(
            f"lora_request must be a LoRARequest, or pairs of one and its scale, not {type(given).__name__}",
            "lora_request",
        )
    return tuple(one.use(scale) for one, scale in given)


def each_lora_choice(given: LoraChoice | Sequence[LoraChoice], count: int) -> list[LoraChoice]:
    """Return the adapters of each prompt of a call, from one choice for all prompts or one choice for each. Raises
    InvalidParameterError if the number of choices is not the number of prompts."""
    if not isinstance(given, (list, tuple)) or _is_mix(given):
        return [given] * count  # type: ignore[list-item]
    if len(given) != count:
        raise InvalidParameterError(f"{count} prompts and {len(given)} lora_requests", "lora_request")
    return list(given)  # type: ignore[arg-type]


def each_adapter_uses(given: LoraChoice | Sequence[LoraChoice], count: int) -> list[tuple[AdapterUse, ...]]:
    """Return `adapter_uses` of each prompt of a call."""
    return [adapter_uses(each) for each in each_lora_choice(given, count)]


def each_priority(given: int | Sequence[int], count: int) -> list[int]:
    """Return the priority of each prompt of a call; arguments and errors as in `each_lora_choice`."""
    orders = list(given) if isinstance(given, Iterable) else [given] * count
    if len(orders) != count:
        raise InvalidParameterError(f"{count} prompts need as many priorities, not {len(orders)}", "priority")
    return orders


def _is_mix(given: object) -> bool:
    return isinstance(given, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], LoRARequest)
        and not isinstance(pair[1], LoRARequest) for pair in given
    )  # fmt: skip


arrived: ContextVar[float | None] = ContextVar("arrived", default=None)
"""The `time.monotonic()` at which the server got the current request; None outside a server's requests."""


def arrival_time() -> float:
    """Return when the server got the current request, else the time now; for metrics, logs, queues and the engine."""
    known = arrived.get()
    return time.monotonic() if known is None else known


class Ranked(Protocol):
    """A request in a queue of the server or of the engine; its `arrival_time` comes from the function of that name."""

    @property
    def priority(self) -> int: ...

    @property
    def arrival_time(self) -> float: ...


def serving_rank(request: Ranked) -> int:
    """Return the rank of a request in the scheduler's queues: the lowest is served first, of equal ranks the oldest.

    A rank never changes.
    """
    return request.priority


def may_preempt(waiting: Ranked, running: Ranked) -> bool:
    """Return whether a waiting request may take the place of the running one that is served last."""
    return waiting.priority < running.priority


def admission_rank(request: Ranked) -> int:
    """Return the rank of a request in the server's queue before the engine: the lowest enters first.

    API keys share the engine fairly among requests of equal rank: the key with the fewest running sequences is next.
    """
    return request.priority


class GenerationRequest(ExplainedStruct, frozen=True, kw_only=True):
    """One prompt and how to continue it.

    Attributes:
        request_id: unique among the engine's live requests.
        prompt_token_ids: at least one token id.
        params: sampling parameters.
        prompt: the prompt's text, if known; only echoed in the output.
        priority: a lower number runs first; equal priorities run in order of arrival.
        arrival_time: `time.monotonic()` at which it arrived at the server or, without one, here.
        adapters: LoRA adapters; the outputs of several are added.
        images: images whose embeddings replace the image tokens among the ids, in order.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    arrival_time: float = msgspec.field(default_factory=arrival_time)
    adapters: tuple[AdapterUse, ...] = ()
    images: tuple[ImageInput, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.request_id, str) or not 0 < len(self.request_id) <= MAX_REQUEST_ID:
            raise InvalidParameterError(f"request_id must be a text of 1 to {MAX_REQUEST_ID} characters", "request_id")
        if isinstance(self.priority, bool) or not isinstance(self.priority, int) or abs(self.priority) > MAX_PRIORITY:
            raise InvalidParameterError(f"priority must be a whole number within ±{MAX_PRIORITY}", "priority")
        if not isinstance(self.params, SamplingParams):
            raise InvalidParameterError("sampling_params must be SamplingParams", "sampling_params")
        if self.adapters:
            _check_adapters(self.adapters)


def _check_adapters(uses: Sequence[AdapterUse]) -> None:
    if len(uses) > MAX_ADAPTERS:
        raise InvalidParameterError(
            f"the request names {len(uses)} adapters; at most {MAX_ADAPTERS} are allowed", "lora_request"
        )
    names = [use.name for use in uses]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidParameterError(f"adapter {twice!r:.80} is named twice", "lora_request")


class PoolingRequest(GenerationRequest, frozen=True, kw_only=True):
    """One text, or a pair of texts, for embedding, scoring or classification.

    Attributes:
        pooling: pooling parameters.
        task: "embed" for a vector, "score" for a cross-encoder's score, "classify" for a classifier's probabilities.
        token_type_ids: for each token, 0 or 1 for the first or second text of a pair; None for all 0.
    """

    params: SamplingParams = msgspec.field(default_factory=SamplingParams)
    pooling: PoolingParams = msgspec.field(default_factory=PoolingParams)
    task: Literal["embed", "score", "classify"] = "embed"
    token_type_ids: Sequence[int] | None = None
