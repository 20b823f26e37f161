# SPDX-License-Identifier: MIT
"""What a caller hands to the engine: requests and their adapters, as small frozen structs that cross to its process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.shown import ShownStruct
from candle_vllm.core.vision.inputs import ImageInput

MAX_REQUEST_ID = 256
MAX_ADAPTER_NAME = 512
MAX_ADAPTER_PATH = 4096
MAX_ADAPTERS = 16
"""Most adapters of one request."""
MAX_ADAPTER_SCALE = 1000.0
MAX_PRIORITY = 1 << 31


class LoRARequest(ShownStruct, frozen=True):
    """An adapter by its name, with vLLM's fields.

    Attributes:
        lora_name: what it is called; two are the same adapter where their names are equal.
        lora_int_id: a number that some programs know it by; nothing is found by it but through `AsyncLLM`.
        lora_path: a PEFT folder or a GGUF adapter; empty for one that is known already.
        base_model_name: what the base is called; told, and not compared.
        load_inplace: read the files anew, in the place of what is there by this name.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lora_int_id, int) or isinstance(self.lora_int_id, bool) or self.lora_int_id < 0:
            raise InvalidParameterError("lora_int_id must be a whole number of 0 or more", "lora_request")
        AdapterUse(name=self.lora_name, path=str(self.lora_path), load_inplace=self.load_inplace)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and self.lora_name == other.lora_name

    def __hash__(self) -> int:
        return hash(self.lora_name)

    def use(self, scale: float = 1.0) -> AdapterUse:
        """What a request has of it."""
        return AdapterUse(
            name=self.lora_name, path=str(self.lora_path), scale=scale, load_inplace=bool(self.load_inplace)
        )


class AdapterUse(ShownStruct, frozen=True, kw_only=True):
    """An adapter that a request's rows go through.

    Attributes:
        name: of the adapter.
        path: where its files are, if it may not be known yet.
        scale: what its part of every product is multiplied by, on top of the adapter's own scale.
        load_inplace: read the files anew.
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
            raise InvalidParameterError(f"adapter {self.name!r:.80}: the path is none", "lora_request")
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
    """The adapters that a call names for one request.

    Raises:
        InvalidParameterError: they are none.
    """
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
    """The adapters of each prompt of a call: one choice for all, or one each.

    Raises:
        InvalidParameterError: there are not as many as prompts.
    """
    if not isinstance(given, (list, tuple)) or _is_mix(given):
        return [given] * count  # type: ignore[list-item]
    if len(given) != count:
        raise InvalidParameterError(f"{count} prompts and {len(given)} lora_requests", "lora_request")
    return list(given)  # type: ignore[arg-type]


def each_adapter_uses(given: LoraChoice | Sequence[LoraChoice], count: int) -> list[tuple[AdapterUse, ...]]:
    """`adapter_uses` of each prompt of a call."""
    return [adapter_uses(each) for each in each_lora_choice(given, count)]


def _is_mix(given: object) -> bool:
    return isinstance(given, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], LoRARequest)
        and not isinstance(pair[1], LoRARequest) for pair in given
    )  # fmt: skip


def serving_rank(priority: int, *, running: int = 0, arrival: int = 0) -> tuple[int, int, int]:
    """Sort key of the policy by which the scheduler and a server's admission queue choose whom to serve next.

    Args:
        priority: of the request; the lowest number is served first.
        running: sequences that the request's API key has in the engine, where keys share it: the fewest go first.
        arrival: number of arrival; the scheduler has it, and the queue gives its candidates in order.
    """
    return priority, running, arrival


class GenerationRequest(ShownStruct, frozen=True, kw_only=True):
    """One prompt and how to continue it.

    Attributes:
        request_id: unique among the engine's live requests.
        prompt_token_ids: at least one id.
        params: how the tokens are chosen.
        prompt: the text behind the ids, where there is one; only echoed in the output.
        priority: lower runs first; equal priorities run in order of arrival.
        arrival_time: seconds, `time.monotonic()`.
        adapters: what is added to the model's matrices for it; their sum, where there are several.
        images: pictures whose embeddings stand in the place of the marks among the ids, in this order.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    arrival_time: float = msgspec.field(default_factory=time.monotonic)
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
        raise InvalidParameterError(f"{len(uses)} adapters; one request may have {MAX_ADAPTERS}", "lora_request")
    names = [use.name for use in uses]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidParameterError(f"adapter {twice!r:.80} is there twice", "lora_request")


class PoolingRequest(GenerationRequest, frozen=True, kw_only=True):
    """One text, or a pair of them, of which numbers are wanted rather than a continuation.

    Attributes:
        pooling: how a vector is made of it.
        task: "embed" for a vector, "score" for the number of a cross-encoder, "classify" for those of a classifier.
        token_type_ids: which of a pair's texts each token belongs to, 0 or 1; None is 0 throughout.
    """

    params: SamplingParams = msgspec.field(default_factory=SamplingParams)
    pooling: PoolingParams = msgspec.field(default_factory=PoolingParams)
    task: Literal["embed", "score", "classify"] = "embed"
    token_type_ids: Sequence[int] | None = None
