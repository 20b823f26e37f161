# SPDX-License-Identifier: MIT
"""Check a request in the caller's process, and serialise it for the engine's process (after step 3 of its life).

Errors that follow from the request, the vocabulary and the context are raised here, before anything is sent. Other
errors, such as a grammar that does not compile, are raised by the engine.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import msgspec

from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.requests import GenerationRequest, PoolingRequest
from candle_vllm.core.engine.step.preparation import check_encoder_task, check_pooling_request, check_request
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.pooling import ModelPooling
from candle_vllm.core.remote.wire import MAX_FRAME, Check, FrameTooLargeError, Pool, Submit, encode
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.state import SamplingState
from candle_vllm.core.sampling.structured import StructuredOutputsParams, parsed_json, refused
from candle_vllm.core.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Payload:
    """A checked request with its serialised message."""

    request: GenerationRequest
    ticket: str
    data: bytes


class RequestWriter:
    """Checks and serialises requests to one model. Thread-safe.

    Args:
        info: information about the model.
        pooling: how vectors are pooled; None for an encoder whose model computes scores (`EncoderConfig.scores`).
        seed: seed that makes requests without a seed reproducible, in order of preparation.
    """

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer, pooling: ModelPooling | None, seed: int | None) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._seeds = random.Random(seed) if seed is not None else random.SystemRandom()  # noqa: S311
        self._tickets = itertools.count()

    def prepare(self, request: GenerationRequest) -> list[Payload]:
        """Check a request; return the same `Payload` for each of its sequences. Raises InvalidParameterError or
        PromptTooLongError if the request cannot be served in this form."""
        ticket = f"{next(self._tickets):d}"
        if isinstance(request, PoolingRequest):
            self._check_pooled(request)
            message = Pool(msgspec.structs.replace(request, request_id=ticket, prompt=None))
        else:
            params = self._checked_params(request)
            message = Submit(msgspec.structs.replace(request, request_id=ticket, prompt=None, params=params))
        return [Payload(request, ticket, _written(message))] * request.params.n

    def _check_pooled(self, request: PoolingRequest) -> None:
        info = self._info
        if "generate" not in info.tasks:
            check_encoder_task(info.name, request.task, info.tasks)
        check_pooling_request(request, info.vocab_size, info.max_model_len)
        if self._pooling is not None:
            self._pooling.plan(request.pooling)

    def _checked_params(self, request: GenerationRequest) -> SamplingParams:
        """Check the request's sampling parameters; return them with a seed, so that the result can be reproduced."""
        info, params = self._info, request.params
        if any(not isinstance(each, str) for each in params.logits_processors or ()):
            said = (
                "logits_processors: the engine is in another process, to which no code is sent; name processors of an "
                "installed package, or use InferenceEngine"
            )
            raise InvalidParameterError(said, "logits_processors")
        if "generate" not in info.tasks:
            check_encoder_task(info.name, "generate", info.tasks)
        check_request(request, info.vocab_size, info.max_model_len)
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=self._seeds.getrandbits(63))
        if params.allowed_token_ids or params.stop_token_ids or params.logit_bias or params.bad_words:
            SamplingState(
                params,
                request.prompt_token_ids,
                vocab_size=info.vocab_size,
                eos_token_ids=info.eos_token_ids,
                bad_word_token_ids=self._bad_words(params),
            )
        if params.structured_outputs is not None:
            params = msgspec.structs.replace(params, structured_outputs=portable(params.structured_outputs))
        return params

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Tokenize bad words, because `SamplingState` checks their tokens."""
        ids = self._tokenizer.encode_batch(list(params.bad_words or ()), add_special_tokens=False)
        return [word for word in ids if word]


def portable(params: StructuredOutputsParams) -> StructuredOutputsParams:
    """Return structured outputs with the schema as JSON text, because JSON has numbers that MessagePack lacks.

    Raises:
        InvalidParameterError: the schema is not JSON, or is too large.
    """
    changes = {}
    for name in ("json", "structural_tag"):
        value = getattr(params, name)
        if value is not None and not isinstance(value, (str, bool)):
            changes[name] = json.dumps(parsed_json(name, value))
    try:
        return msgspec.structs.replace(params, **changes) if changes else params
    except RecursionError:
        raise refused("the schema is nested too deeply") from None


def write_check(number: int, params: StructuredOutputsParams) -> bytes:
    """Serialise a check of structured outputs; raises as `RequestWriter.prepare`."""
    return _written(Check(number, portable(params)))


def _written(message: Submit | Pool | Check) -> bytes:
    try:
        return encode(message)
    except UnicodeEncodeError as error:
        raise InvalidParameterError(
            f"a text of the request has half a surrogate pair (U+{ord(error.object[error.start]):04X}), which UTF-8 "
            "cannot carry; send whole characters"
        ) from None
    except FrameTooLargeError as error:
        images = message.request.images if isinstance(message, Submit) else ()
        if images:
            took = sum(len(image.tiles) for image in images) >> 20
            raise InvalidParameterError(
                f"image: the {len(images)} images of the request take {took} MB after preprocessing, and an engine in "
                f"its own process accepts at most {MAX_FRAME >> 20} MB: send fewer or smaller images",
                "image",
            ) from None
        raise InvalidParameterError(f"the request is too large: {error}") from None
