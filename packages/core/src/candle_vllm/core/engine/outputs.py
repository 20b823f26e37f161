# SPDX-License-Identifier: MIT
"""What the engine hands back: small frozen structs that may cross from its process.

It gives `TokenOutput`s, one per sequence and step in which the sequence has something new to say; `GenerationOutput` is
their sum, made by `OutputCollector`. A `PoolingRequest` has one piece, with numbers in place of tokens.
"""

from __future__ import annotations

import builtins
import enum
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec

from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.shown import ShownStruct

if TYPE_CHECKING:
    Numbers = array[float]
else:
    Numbers = array  # what decodes a struct looks its annotations up, and Python 3.11 has no array[float]


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # the caller went away, or the engine shut down
    ERROR = "error"  # the engine failed on this request

    @property
    def cut(self) -> bool:
        """Whether more would have come."""
        return self is FinishReason.LENGTH

    @property
    def complete(self) -> bool:
        """Whether the answer is all that was asked for."""
        return self in (FinishReason.STOP, FinishReason.LENGTH)


class TokenLogprob(ShownStruct, frozen=True):
    """The log-probability of one token, before penalties, bias and temperature.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability, at most 0.
        rank: 1 for the likeliest token of the vocabulary.
        text: the token alone as text ("\\ufffd" where its bytes are no complete character).
        bytes: the token's bytes.
    """

    token_id: int
    logprob: float
    rank: int
    text: str
    bytes: builtins.bytes


class PositionLogprobs(ShownStruct, frozen=True):
    """Log-probabilities at one position: the token that stands there, and the likeliest ones in falling order."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


class RequestMetrics(ShownStruct, frozen=True):
    """Times of one request, `time.monotonic()` seconds, None while not reached; and what came of guesses.

    Attributes:
        draft_tokens, accepted_draft_tokens: guessed tokens that were tried, and how many of the answer's tokens came of
            them; as many steps were saved.
        predicted_tokens, accepted_predicted_tokens: of `SamplingParams.prediction`, and how many of them stand in the
            answer, tried or not.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    predicted_tokens: int = 0
    accepted_predicted_tokens: int = 0


class TokenOutput(ShownStruct, frozen=True, kw_only=True, gc=False):
    """What one sequence has to say after one step.

    `text` is the new text that is safe to show: never half a character, never part of a possible stop string. It
    may be empty while tokens arrive, and the last piece may carry text of earlier tokens. Concatenated over a
    sequence, `text` is exactly the text of the whole output.

    Attributes:
        request_id: the request.
        index: which of its `n` sequences.
        text: new text.
        token_ids: new tokens.
        special_tokens: (offset, id) of new special tokens whose names stand in the text, where they are not skipped;
            offsets in characters of the sequence's whole text, which may not have come that far.
        logprobs: one entry per new token when asked for.
        prompt_logprobs: on the first piece of sequence 0 when asked for; one per prompt token, None for the first.
        finish_reason: set on the last piece of the sequence.
        stop_reason: the stop string or stop token id that ended it; None for the model's own end token.
        num_prompt_tokens: length of the prompt.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        metrics: set on the last piece.
        error: the message when `finish_reason` is ERROR.
        error_kind: "request" when the request's own parameters led to the error, "engine" otherwise.
        error_param: the parameter to blame, where it is one.
        pooled: on the only piece of a `PoolingRequest`: its vector, or its score alone; float32.
        vectors: how many stand behind each other in `pooled`, where each token has one; else None.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    special_tokens: tuple[tuple[int, int], ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: str | None = None
    error_kind: Literal["request", "engine"] | None = None
    error_param: str | None = None
    pooled: Numbers | None = None
    vectors: int | None = None

    @property
    def finished(self) -> bool:
        """True on the last piece of this sequence."""
        return self.finish_reason is not None


def joined(pieces: Sequence[TokenOutput]) -> TokenOutput:
    """What a sequence has to say after a step that gave it several tokens: the pieces of these tokens as one."""
    first, last = pieces[0], pieces[-1]
    if first is last:
        return first
    return msgspec.structs.replace(
        last,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        special_tokens=tuple(entry for piece in pieces for entry in piece.special_tokens),
        logprobs=None if first.logprobs is None else tuple(entry for piece in pieces for entry in piece.logprobs or ()),
        prompt_logprobs=first.prompt_logprobs,
    )


class CompletionOutput(ShownStruct, frozen=True, kw_only=True):
    """One finished sequence of a request."""

    unshown: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[PositionLogprobs, ...] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the chosen tokens' log-probabilities, where they were asked for."""
        return None if self.logprobs is None else sum(entry.chosen.logprob for entry in self.logprobs)


class GenerationOutput(ShownStruct, frozen=True, kw_only=True):
    """A finished request: its prompt and its `n` sequences in order of index."""

    unshown: ClassVar[frozenset[str]] = frozenset({"request_id", "prompt_logprobs", "metrics"})

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    metrics: RequestMetrics | None = None

    @property
    def text(self) -> str:
        """Text of the first sequence."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first sequence."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sequence ended."""
        return self.outputs[0].finish_reason


class OutputCollector:
    """Adds up the `TokenOutput`s of one request until every sequence has finished."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._pieces: dict[int, list[TokenOutput]] = {index: [] for index in range(request.params.n)}
        self._unfinished = request.params.n

    def add(self, piece: TokenOutput) -> bool:
        """Takes one piece; True once the request is complete."""
        self._pieces[piece.index].append(piece)
        self._unfinished -= piece.finished
        return self._unfinished == 0

    def result(self) -> GenerationOutput:
        """The whole output; every sequence must have finished."""
        assert self._unfinished == 0
        first, last = self._pieces[0], [pieces[-1] for pieces in self._pieces.values()]
        return GenerationOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=tuple(self.request.prompt_token_ids),
            outputs=tuple(_completion(index, pieces) for index, pieces in self._pieces.items()),
            num_cached_tokens=first[-1].num_cached_tokens,
            prompt_logprobs=next((p.prompt_logprobs for p in first if p.prompt_logprobs is not None), None),
            metrics=_of_all([piece.metrics for piece in last if piece.metrics]),
        )


GUESS_COUNTS = ("draft_tokens", "accepted_draft_tokens", "predicted_tokens", "accepted_predicted_tokens")
"""What `RequestMetrics` counts, and the sequences of a request add up to."""


def _of_all(known: Sequence[RequestMetrics]) -> RequestMetrics | None:
    """Times of the sequence that ended last, and what came of the guesses of all."""
    if len(known) < 2:
        return known[0] if known else None
    last = max(known, key=lambda metrics: metrics.finished_time or 0.0)
    return msgspec.structs.replace(last, **{name: sum(getattr(each, name) for each in known) for name in GUESS_COUNTS})


def _completion(index: int, pieces: Sequence[TokenOutput]) -> CompletionOutput:
    last = pieces[-1]
    assert last.finish_reason is not None
    asked = any(piece.logprobs is not None for piece in pieces)
    return CompletionOutput(
        index=index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs or ()) if asked else None,
    )


class EmbeddingOutput(ShownStruct, frozen=True, kw_only=True):
    """The vector of one text, or its vectors, where a model gives one of each token.

    Attributes:
        request_id: of the text.
        embedding: float32 numbers, `array("f")`: numpy takes them without copying, `tobytes` is little-endian,
            `tolist` for JSON.
        vectors: how many vectors stand behind each other in it, where each token has one; None where there is one.
        prompt_token_ids: the text's tokens, those that the tokenizer adds included.
        num_cached_tokens: how many of them came from the prefix cache.
    """

    unshown: ClassVar[frozenset[str]] = frozenset({"request_id"})

    request_id: str
    embedding: array[float]
    prompt_token_ids: tuple[int, ...]
    num_cached_tokens: int = 0
    vectors: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return len(self.prompt_token_ids)


class ScoreOutput(ShownStruct, frozen=True, kw_only=True):
    """How well two texts belong together.

    Attributes:
        score: what the model's head says (a cross-encoder), or the cosine of the texts' vectors.
        num_tokens: tokens that were run for the pair. A text that stands in several pairs is run once for its vector
            and counts in the first of them.
        prompt_token_ids: the tokens of both texts, those that the tokenizer adds included; none of a cosine that
            `ascore` gives.
    """

    unshown: ClassVar[frozenset[str]] = frozenset({"prompt_token_ids"})

    score: float
    num_tokens: int
    prompt_token_ids: tuple[int, ...] = ()


class ClassificationOutput(ShownStruct, frozen=True, kw_only=True):
    """How likely each class is for one text.

    Attributes:
        request_id: of the text.
        probs: float32 numbers in the order of `ModelInfo.labels`, `array("f")`; they add up to 1 unless a text may be
            of several classes. A model of regression gives its numbers as they are.
        vectors: how many tokens' classes stand behind each other in it, where the model tells tokens apart; else None.
        prompt_token_ids: the text's tokens, those that the tokenizer adds included.
    """

    unshown: ClassVar[frozenset[str]] = frozenset({"request_id"})

    request_id: str
    probs: array[float]
    prompt_token_ids: tuple[int, ...]
    vectors: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that were run for the text."""
        return len(self.prompt_token_ids)
