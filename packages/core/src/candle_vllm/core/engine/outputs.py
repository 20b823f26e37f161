# SPDX-License-Identifier: MIT
"""Outputs of the engine: small frozen structs that can be sent from an engine's process.

A step returns a `TokenOutput` for each sequence that got tokens, ended or reports progress. `OutputCollector` joins
these to a `GenerationOutput`. A `PoolingRequest` has one output, with a vector in place of tokens.
"""

from __future__ import annotations

import builtins
import enum
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import msgspec

from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.shown import ShownStruct

if TYPE_CHECKING:
    Numbers = array[float]
else:
    Numbers = array  # msgspec evaluates annotations when it decodes, and Python 3.11 has no array[float]


class FinishReason(enum.StrEnum):
    """Reason for which an answer ended, and how each API spells it.

    The value is the reason in vLLM's classes, in metrics and in the request log.

    Attributes:
        complete: whether the answer ended by itself or by a limit, and not by an abort or an error.
        anthropic, ollama, llama_server: the reason's name in these APIs, except for a stop string in Anthropic and
            llama-server, and for a full context window in Anthropic; "" for a reason that is an error there.
        responses: the Responses API's reason why an answer is incomplete; "" for an answer that was not cut.
        limit: a phrase for the limit that cut the answer; "" for an answer that was not cut.
        openai: the reason in OpenAI's chat and completions, which is the value.
    """

    STOP = "stop", "end_turn", "stop", "eos"  # end-of-sequence token, stop token or stop string
    LENGTH = "length", "max_tokens", "length", "limit", "max_output_tokens", "its token limit"  # or the context length
    TOOL_CALLS = "tool_calls", "tool_use", "stop", "eos"  # the engine's STOP becomes this if an answer has calls
    ABORT = "abort"  # the caller went away, or the engine shut down; in the APIs an error
    ERROR = "error"  # the engine failed on this request; in the APIs an error

    complete: bool
    anthropic: str
    ollama: str
    llama_server: str
    responses: str
    limit: str
    openai: str

    def __new__(cls, value: str, *spelled: str) -> Self:
        reason = str.__new__(cls, value)
        reason._value_ = reason.openai = value
        reason.complete = bool(spelled)
        reason.anthropic, reason.ollama, reason.llama_server, reason.responses, reason.limit = (spelled + ("",) * 5)[:5]
        return reason

    @property
    def cut(self) -> bool:
        """Whether the answer was truncated: its text or its last call may be incomplete."""
        return bool(self.limit)

    @classmethod
    def read(cls, spelled: str) -> FinishReason | None:
        """Return the reason of an API's spelling, ignoring case; None for an unknown spelling."""
        return _SPELLED.get(spelled.lower())


_SPELLED = {"function_call": FinishReason.TOOL_CALLS} | {  # that was OpenAI's reason before `tool_calls`
    name: reason
    for reason in reversed(FinishReason)  # a spelling of several reasons stands for the first of them
    if reason.complete
    for name in (reason.llama_server, reason.ollama, reason.anthropic, reason.value)
}


class TokenLogprob(ShownStruct, frozen=True):
    """The log-probability of one token, before penalties, bias and temperature.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability, at most 0.
        rank: 1 for the likeliest token of the vocabulary; 0 if it is not known (`SamplingParams.logprob_token_ids`).
        text: the text of the single token ("\\ufffd" for bytes that are not a complete character).
        bytes: the token's bytes.
    """

    token_id: int
    logprob: float
    rank: int
    text: str
    bytes: builtins.bytes


class PositionLogprobs(ShownStruct, frozen=True):
    """Log-probabilities at one position: the sampled or prompt token, and the likeliest tokens in descending order.

    If the request names tokens (`SamplingParams.logprob_token_ids`), `top` of a sampled token has this and the named.
    """

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


class RequestMetrics(ShownStruct, frozen=True):
    """Times of one sequence, `time.monotonic()` seconds, None while not reached; and counts of draft tokens.

    Attributes:
        draft_tokens, accepted_draft_tokens: draft tokens that were tried, and how many were accepted.
        predicted_tokens, accepted_predicted_tokens: tokens of `SamplingParams.prediction`, and how many of them occur
            in the answer, tried as draft tokens or not.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    predicted_tokens: int = 0
    accepted_predicted_tokens: int = 0


class PromptProgress(ShownStruct, frozen=True):
    """How many prompt tokens are computed or were cached, and seconds since the first step of the request."""

    tokens: int
    seconds: float


class TokenOutput(ShownStruct, frozen=True, kw_only=True, gc=False):
    """Output of one sequence after one step: new tokens, the text delta, and how the sequence ended.

    Before the last output, `text` has only complete characters, and no possible beginning of a stop string. So it may
    be empty, and a later output has the text. An incomplete character at the end is U+FFFD. The concatenated `text` of
    all outputs of a sequence is the text of the whole output.

    Attributes:
        index: the sequence's index among the request's `n` sequences.
        special_tokens: (offset, id) of new special tokens whose names are part of the text, if they are not skipped;
            offsets are into the sequence's whole text, and may lie in text that later outputs bring.
        text_sizes: characters of `text` from each new token, if several outputs were joined; else empty.
        logprobs: one entry per new token, if the request asks for logprobs.
        prompt_logprobs: if requested, on the first output of sequence 0 with a token; one per prompt token, first None.
        finish_reason: set on the last output of the sequence.
        stop_reason: the stop string or stop token id that ended it; None otherwise, as for the model's own end token.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        progress: set on outputs that only report progress: in the first step, and after each chunk of the prompt.
        metrics: set on the last output.
        error: the message if `finish_reason` is ERROR.
        error_kind: "request" if the request's own parameters led to the error, "engine" otherwise.
        error_param: the parameter that led to the error, if it was a parameter.
        pooled: on the only output of a `PoolingRequest`: its vectors, its score, its probabilities or logits; float32.
        vectors: number of vectors concatenated in `pooled`, if each token has a vector; else None.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    special_tokens: tuple[tuple[int, int], ...] = ()
    text_sizes: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    progress: PromptProgress | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None
    error_kind: Literal["request", "engine"] | None = None
    error_param: str | None = None
    pooled: Numbers | None = None
    vectors: int | None = None

    @property
    def finished(self) -> bool:
        """True on the last output of this sequence."""
        return self.finish_reason is not None


def joined(pieces: Sequence[TokenOutput]) -> TokenOutput:
    """Join outputs of one sequence that follow each other."""
    first, last = pieces[0], pieces[-1]
    if first is last:
        return first
    return msgspec.structs.replace(
        last,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        special_tokens=tuple(entry for piece in pieces for entry in piece.special_tokens),
        text_sizes=tuple(
            size for piece in pieces for size in piece.text_sizes or (len(piece.text),) * len(piece.token_ids)
        ),
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
        """Sum of the chosen tokens' log-probabilities; None if the request did not ask for logprobs."""
        return None if self.logprobs is None else sum(entry.chosen.logprob for entry in self.logprobs)


class GenerationOutput(ShownStruct, frozen=True, kw_only=True):
    """A finished request and its `n` sequences by index. `metrics`: times of the last one to end, counts of all."""

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
    """Collects the `TokenOutput`s of one request until every sequence has finished."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._pieces: dict[int, list[TokenOutput]] = {index: [] for index in range(request.params.n)}
        self._unfinished = request.params.n

    def add(self, piece: TokenOutput) -> bool:
        """Add one output; return True if the request is complete now."""
        self._pieces[piece.index].append(piece)
        self._unfinished -= piece.finished
        return self._unfinished == 0

    def result(self) -> GenerationOutput:
        """Return the whole output; every sequence must have finished."""
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


DRAFT_COUNTS = ("draft_tokens", "accepted_draft_tokens", "predicted_tokens", "accepted_predicted_tokens")
"""Fields of `RequestMetrics` that are added up over the sequences of a request."""


def _of_all(known: Sequence[RequestMetrics]) -> RequestMetrics | None:
    """Return the times of the sequence that ended last, with the sums of `DRAFT_COUNTS` over all sequences."""
    if len(known) < 2:
        return known[0] if known else None
    last = max(known, key=lambda metrics: metrics.finished_time or 0.0)
    return msgspec.structs.replace(last, **{name: sum(getattr(each, name) for each in known) for name in DRAFT_COUNTS})


def _completion(index: int, pieces: Sequence[TokenOutput]) -> CompletionOutput:
    whole = joined([piece for piece in pieces if piece.progress is None])
    assert whole.finish_reason is not None
    return CompletionOutput(
        index=index,
        text=whole.text,
        token_ids=whole.token_ids,
        finish_reason=whole.finish_reason,
        stop_reason=whole.stop_reason,
        logprobs=whole.logprobs,
    )


class EmbeddingOutput(ShownStruct, frozen=True, kw_only=True):
    """The embedding of one text; for a multi-vector model, the vectors of its tokens.

    Attributes:
        embedding: float32 `array("f")`: numpy reads it without a copy; `tobytes` is little-endian, `tolist` for JSON.
        vectors: number of vectors concatenated in `embedding`, if each token has a vector; None for a single vector.
        prompt_token_ids: the text's tokens, including tokens that the tokenizer adds.
        num_cached_tokens: number of these tokens that came from the prefix cache.
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
    """The similarity of two texts.

    Attributes:
        score: the output of a cross-encoder's head, or the similarity of the texts' vectors: cosine, MaxSim for several
            vectors of a text, or the dot product of sparse vectors.
        num_tokens: number of tokens that were run for the pair. An embedding model runs a text that several pairs share
            once, counted in the first pair.
        prompt_token_ids: the tokens of both texts, with added special tokens; empty if `ascore` compares vectors.
    """

    unshown: ClassVar[frozenset[str]] = frozenset({"prompt_token_ids"})

    score: float
    num_tokens: int
    prompt_token_ids: tuple[int, ...] = ()


class ClassificationOutput(ShownStruct, frozen=True, kw_only=True):
    """Probabilities of the classes of one text, or of each of its tokens.

    Attributes:
        probs: float32 elements in the order of `ModelInfo.labels`, `array("f")`; their sum is 1 unless several classes
            may apply. A regression model, or `use_activation=False`, gives the outputs of the head unchanged.
        vectors: number of tokens whose probabilities are concatenated, for a token classifier; else None.
        prompt_token_ids: the text's tokens, including tokens that the tokenizer adds.
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
