# SPDX-License-Identifier: MIT
"""Messages between an engine's process and its parent, as MessagePack, decoded into typed structs.

A request is identified by its ticket, a number that is never reused: the caller's request id stays in the caller's
process, and may be reused as soon as the request has ended. Decoding a message loads no code.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from tokenizers import Tokenizer as Backend

from candle_vllm.core import errors
from candle_vllm.core.engine.adapters.adapter_store import AdapterCall
from candle_vllm.core.engine.model_info import AdapterInfo, ModelInfo
from candle_vllm.core.engine.outputs import TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest, PoolingRequest
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.errors import CandleVllmError, ConfigError, RequestError
from candle_vllm.core.pooling import ModelPooling
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.tokenizer import ChatTemplateSource, Tokenizer
from candle_vllm.core.vision.prompts import VisionDescription

MAX_FRAME: Final = 1 << 28  # maximum bytes of a message; images and log-probabilities of a whole prompt are the largest
MAX_QUEUED: Final = 10_000  # maximum number of messages in a socket; after that its sender waits
PATIENCE: Final = 10.0  # seconds that the parent waits for a full socket, or for a child to end

T = TypeVar("T")


class WireError(msgspec.Struct, frozen=True, array_like=True):
    """A `CandleVllmError`: its class, its message, and the field or setting that it names."""

    kind: str
    message: str
    blamed: str | None = None


# ---- to the child ----------------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """A prompt to continue; its request id is the ticket."""

    request: GenerationRequest


class Pool(msgspec.Struct, frozen=True, array_like=True, tag="pool"):
    """A text to embed, score or classify; its request id is the ticket."""

    request: PoolingRequest


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Abort a request."""

    ticket: str


class Reset(msgspec.Struct, frozen=True, array_like=True, tag="reset"):
    """Clear the prefix cache."""


class Sleep(msgspec.Struct, frozen=True, array_like=True, tag="sleep"):
    """Sleep at this level; level 0 wakes up what `tags` name. The answer is `Told` with the same number."""

    number: int
    level: int
    tags: tuple[str, ...] = ()


class Check(msgspec.Struct, frozen=True, array_like=True, tag="check"):
    """Check structured outputs. The answer is `Told` with the same number."""

    number: int
    params: StructuredOutputsParams


class Ask(msgspec.Struct, frozen=True, array_like=True, tag="adapters"):
    """An operator's call to the adapter store. The answer is `Told` with the same number."""

    number: int
    call: AdapterCall


# ---- from the child --------------------------------------------------------------------------------------------------


class TokenizerParts(msgspec.Struct, frozen=True, kw_only=True):
    """A `Tokenizer`; its backend is the JSON text of a tokenizer.json."""

    backend: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, str]
    chat_template: ChatTemplateSource | None
    response_template: dict[str, Any] | None
    types_pairs: bool
    named_ids: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerParts:
        """Return the parts of a tokenizer."""
        response = tokenizer.response_template
        return cls(
            backend=tokenizer.backend.to_str(),
            vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_ids=tokenizer.eos_token_ids,
            special_tokens=tokenizer.special_tokens,
            chat_template=tokenizer.chat_template,
            response_template=None if response is None else dict(response),
            types_pairs=tokenizer.types_pairs,
            named_ids=tokenizer.named_ids,
        )

    def tokenizer(self) -> Tokenizer:
        """Return a tokenizer with these parts."""
        given = msgspec.structs.asdict(self)
        size = given.pop("vocab_size")
        tokenizer = Tokenizer(Backend.from_str(given.pop("backend")), **given)
        tokenizer.cover(size)
        return tokenizer


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded: its description.

    Attributes:
        info: information about the model.
        tokenizer: the tokenizer, with its vocabulary extended to the rows of the embedding table.
        template: the chat template in use, several templates by name, or None.
        pooling: how vectors are pooled; None for an encoder whose model returns scores instead of vectors.
        max_step_tokens: maximum number of tokens of one step.
        stats: statistics before the first request.
        vision: how images become tokens of a prompt; None for a text-only model.
    """

    info: ModelInfo
    tokenizer: TokenizerParts
    template: ChatTemplateSource | None
    pooling: ModelPooling | None
    max_step_tokens: int
    stats: EngineStats
    vision: VisionDescription | None = None


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag="loading"):
    """Progress of loading; see `Progress`."""

    what: str
    done: int
    total: int
    unit: str


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The model cannot be loaded."""

    error: WireError


class Pieces(msgspec.Struct, frozen=True, array_like=True, tag="pieces"):
    """Outputs of one step, and statistics when they are due; request ids are tickets."""

    pieces: list[TokenOutput]
    stats: EngineStats | None = None


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """A request was refused, or its output is too large for a message."""

    ticket: str
    error: WireError


class Told(msgspec.Struct, frozen=True, array_like=True, tag="told"):
    """The answer to `Ask`, `Check` and `Sleep`; `error` is None if they succeed, and only `Ask` gets `infos`."""

    number: int
    infos: tuple[AdapterInfo, ...] = ()
    error: WireError | None = None


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="ended"):
    """The engine has failed for good."""

    message: str


ToChild = Submit | Pool | Abort | Check | Reset | Ask | Sleep
FromChild = Pieces | Refused | Told | Ended
Greeting = Ready | Failed | Loading


# ---- writing and reading ---------------------------------------------------------------------------------------------


def encode(message: msgspec.Struct) -> bytes:
    """Serialise a message.

    Raises:
        FrameTooLargeError: the message has more than `MAX_FRAME` bytes.
        TypeError, ValueError, OverflowError: a value in the message cannot be serialised.
    """
    data = msgspec.msgpack.encode(message, enc_hook=_plain)
    if len(data) > MAX_FRAME:
        raise FrameTooLargeError(f"a message has {len(data)} bytes; at most {MAX_FRAME} are possible")
    return data


class Reader:
    """Decodes messages of one struct, or of a union of structs."""

    def __init__(self, kinds: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kinds, dec_hook=_numbers)

    def read(self, data: bytes) -> Any:
        """Decode one message; raises MalformedMessageError if the bytes are not a message of these structs."""
        try:
            return self._decoder.decode(data)
        except (msgspec.MsgspecError, ValueError, TypeError, CandleVllmError, RecursionError) as error:
            raise MalformedMessageError(f"{type(error).__name__}: {error}") from None


class FrameTooLargeError(ValueError):
    """A message is larger than the other process accepts."""


class MalformedMessageError(ValueError):
    """Bytes from the other process are not a valid message."""


def _plain(value: Any) -> Any:
    """Convert a value of a type that MessagePack lacks: `SamplingParams` accepts any sequence and mapping."""
    if isinstance(value, array):
        return value.tobytes()
    for kind in (str, int, float):  # a value of a subclass, such as numpy's float64
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be sent to another process")


def _numbers(kind: type[T], value: Any) -> T:
    """Decode a vector that `_plain` has converted: float32, little-endian."""
    if kind is array and isinstance(value, bytes) and len(value) % 4 == 0:
        return array("f", value)  # type: ignore[return-value]
    raise TypeError(f"{type(value).__name__} is no {kind.__name__}")


# ---- errors ----------------------------------------------------------------------------------------------------------


def describe_error(error: CandleVllmError) -> WireError:
    """Describe an error for the other process, by the nearest base class that the other process knows."""
    kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _kinds())
    blamed = getattr(error, "param", None) or getattr(error, "setting", None)
    return WireError(kind, writable(str(error)), None if blamed is None else writable(str(blamed)))


def make_error(described: WireError) -> CandleVllmError:
    """Make the error that the other process described."""
    kind = _kinds().get(described.kind, CandleVllmError)
    if issubclass(kind, (RequestError, ConfigError)):
        return kind(described.message, described.blamed)
    return kind(described.message)


def writable(text: str) -> str:
    """Return a text that UTF-8 can encode, with lone surrogates escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _kinds() -> dict[str, type[CandleVllmError]]:
    return {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, CandleVllmError)
    }
