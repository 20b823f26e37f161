# SPDX-License-Identifier: MIT
"""What crosses the engine's boundary: small frozen structs, so that the engine can move to its own process.

A caller hands in a `GenerationRequest`; the engine hands back `TokenOutput`s, one per sequence and step in which
the sequence has something new to say; `GenerationOutput` is their sum, made by `OutputCollector`. A `PoolingRequest`
has one piece, with numbers in place of tokens.
"""

from __future__ import annotations

import builtins
import enum
import itertools
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, get_type_hints

import msgspec

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.shown import ShownStruct
from candle_vllm.core.vision.inputs import ImageInput

if TYPE_CHECKING:
    Numbers = array[float]
else:
    Numbers = array  # what decodes a struct looks its annotations up, and Python 3.11 has no array[float]

MAX_REQUEST_ID = 256
MAX_ADAPTER_NAME = 512
MAX_ADAPTER_PATH = 4096
MAX_ADAPTERS = 16
"""Most adapters of one request."""
MAX_ADAPTER_SCALE = 1000.0
MAX_PRIORITY = 1 << 31


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


class AdapterInfo(ShownStruct, frozen=True, kw_only=True):
    """An adapter that an engine knows.

    Attributes:
        name, path: as it was given.
        digest: SHA-256 of its files, as hexadecimal digits; empty until it was read.
        rank: the highest of its matrices.
        modules: how many matrices of the model it changes.
        delta_norm: Frobenius norm of all that it adds.
        nbytes: bytes in memory, now or when it was there last.
        state: "cold" on disk alone, "loading", "ready" in memory, "failed".
        pinned: stays in memory.
        base: the base that its files name.
        notes: what its files say that counts for nothing here, and the like.
        error: why it could not be loaded.
    """

    unshown: ClassVar[frozenset[str]] = frozenset({"digest", "notes"})

    name: str
    path: str
    digest: str = ""
    rank: int = 0
    modules: int = 0
    delta_norm: float = 0.0
    nbytes: int = 0
    state: Literal["cold", "loading", "ready", "failed"] = "cold"
    pinned: bool = False
    base: str | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


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
    """The vector of one text.

    Attributes:
        request_id: of the text.
        embedding: float32 numbers, `array("f")`: numpy takes them without copying, `tobytes` is little-endian,
            `tolist` for JSON.
        prompt_token_ids: the text's tokens, those that the tokenizer adds included.
        num_cached_tokens: how many of them came from the prefix cache.
    """

    unshown: ClassVar[frozenset[str]] = frozenset({"request_id"})

    request_id: str
    embedding: array[float]
    prompt_token_ids: tuple[int, ...]
    num_cached_tokens: int = 0

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
        prompt_token_ids: the text's tokens, those that the tokenizer adds included.
    """

    unshown: ClassVar[frozenset[str]] = frozenset({"request_id"})

    request_id: str
    probs: array[float]
    prompt_token_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that were run for the text."""
        return len(self.prompt_token_ids)


class ModelInfo(ShownStruct, frozen=True, kw_only=True):
    """What is served, for people and for `/v1/models`.

    Attributes:
        default_sampling: what counts where a request says nothing of it.
        model_sampling: what the model's files say of it, and how many tokens an answer has ("max_tokens").
        tasks: what the model does: "generate", "embed", "score", "classify".
        modalities: what it reads: "text", and "image" where it sees.
        max_images: of a prompt; 0 where it reads text alone.
        image_text: what its template writes for one; empty there.
        labels: names of what a classifier tells apart, or of a cross-encoder's score.
        embedding_size: length of its vectors; 0 where it gives none.
        implementation: whose layers run, "native" or "transformers", and with "one sequence at a time" behind it where
            these keep a cache of their own.
        max_num_seqs: most sequences in one step.
        kv_cache_bytes: size of the KV cache when it is full, states of layers included; memory of a CPU is taken as it
            fills.
        state_bytes: bytes of these for states of layers and their checkpoints.
    """

    unshown: ClassVar[frozenset[str]] = frozenset(
        {
            "vocab_size",
            "weight_bytes",
            "eos_token_ids",
            "has_chat_template",
            "embedding_size",
            "implementation",
            "max_num_seqs",
            "kv_cache_bytes",
            "state_bytes",
            "model_sampling",
            "max_images",
            "image_text",
            "labels",
        }
    )

    name: str
    architecture: str
    num_parameters: int
    max_model_len: int
    vocab_size: int
    dtype: str
    device: str
    quantization: str | None
    weight_bytes: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    default_sampling: Mapping[str, float | int]
    model_sampling: Mapping[str, float | int] = msgspec.field(default_factory=dict)
    tasks: tuple[str, ...] = ("generate",)
    modalities: tuple[str, ...] = ("text",)
    max_images: int = 0
    image_text: str = ""
    labels: tuple[str, ...] = ()
    embedding_size: int = 0
    implementation: str = "native"
    max_num_seqs: int = 1
    kv_cache_bytes: int = 0
    state_bytes: int = 0


class ReplicaStats(ShownStruct, frozen=True, kw_only=True):
    """One of several engines with the same model.

    Attributes:
        alive: it takes requests; one that has died is started again.
        restarts: how often it was, since the start of all.
        num_running, num_waiting, num_blocks, num_free_blocks: as of `EngineStats`; 0 while it is not alive.
        prompt_tokens, cached_prompt_tokens: as of `EngineStats`, since it was started last.
    """

    alive: bool
    restarts: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0


def _by_key(values: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, values), Counter[str]()))


def _by_place(values: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(sum, itertools.zip_longest(*values, fillvalue=0)))


def _first(values: Sequence[Sequence[float]]) -> Sequence[float]:
    return next(filter(None, values), ())


class Stat(NamedTuple):
    """What is done with a number of `EngineStats`, as its annotation.

    Attributes:
        series: the counter of `/metrics` that shows it; empty where none does by itself.
        help: what that counts.
        now: it is of this moment, and ends with its engine; others count since the start.
        join: makes one of those of several replicas: their sum, or where all have it alike or share it, the largest.
    """

    series: str = ""
    help: str = ""
    now: bool = False
    join: Callable[[Sequence[Any]], Any] = sum


class EngineStats(ShownStruct, frozen=True, kw_only=True):
    """A snapshot of the engine's counters.

    Attributes:
        num_running, num_waiting: sequences, now.
        num_blocks, num_free_blocks, block_size: the KV cache, now.
        checkpoints, checkpoint_slots: states of layers from which prompts may go on, now, and most of them.
        prompt_tokens, cached_prompt_tokens: of every request whose prompt has been run, since the start.
        generation_tokens: tokens sampled, since the start.
        finished: sequences by finish reason, since the start.
        preemptions, steps: since the start.
        drafts, draft_tokens, accepted_draft_tokens: sequences' steps with guessed tokens, those tokens, and how many of
            them were right, since the start.
        accepted_per_position: of each place in a draft, how often it was right.
        step_seconds: how long a step of one row takes, of two, and so on, as far as steps were seen, else on a line
            through those that were; by these it is chosen how many guesses are tried. Empty where nothing is guessed.
        adapters, adapters_in_memory, adapter_bytes: adapters that are known, those in memory and their bytes, now.
        adapter_loads, adapter_load_failures, adapter_evictions: since the start.
        adapter_load_seconds: what those loads took together.
        max_adapters: most adapters in one step; 0 where there are none.
        running_adapters, waiting_adapters: sequences by adapter, now; the names with most sequences.
        kept_block_bytes: of blocks besides the cache, now: on disk, in main memory, in Redis; 0 where none are kept.
            In main memory and in Redis those of the first rank.
        kept_blocks_read, kept_blocks_written: since the start.
        kept_blocks_skipped: not written because that was behind, since the start.
        kept_block_failures: blocks that could not be read or written, were damaged or late, since the start.
        sleep_level: 0 while it is awake; see `InferenceEngine.sleep`.
        images_encoded, images_reused, image_failures: images whose embeddings were made, those that requests found
            made, and those that could not be, since the start.
        image_seconds: what making them took, since the start.
        replicas: what each of several engines has of it; empty where there is one.
    """

    # fmt: off
    num_running: Annotated[int, Stat(now=True)]
    num_waiting: Annotated[int, Stat(now=True)]
    num_blocks: Annotated[int, Stat(now=True)]
    num_free_blocks: Annotated[int, Stat(now=True)]
    block_size: Annotated[int, Stat(join=max)]
    generation_tokens: int
    finished: Annotated[Mapping[str, int], Stat(join=_by_key)]
    preemptions: Annotated[int, Stat(
        "vllm:num_preemptions_total", "Sequences that were stopped for want of cache and run again.")]
    prompt_tokens: Annotated[int, Stat(
        "vllm:prefix_cache_queries_total", "Tokens of prompts that the engine has run.")]
    cached_prompt_tokens: Annotated[int, Stat(
        "vllm:prefix_cache_hits_total", "Those of them that were in the prefix cache.")]
    drafts: Annotated[int, Stat(
        "vllm:spec_decode_num_drafts_total", "Steps of sequences that tried guessed tokens.")] = 0
    draft_tokens: Annotated[int, Stat(
        "vllm:spec_decode_num_draft_tokens_total", "Guessed tokens that were tried.")] = 0
    accepted_draft_tokens: Annotated[int, Stat(
        "vllm:spec_decode_num_accepted_tokens_total", "Those of them that were right.")] = 0
    accepted_per_position: Annotated[tuple[int, ...], Stat(join=_by_place)] = ()
    step_seconds: Annotated[tuple[float, ...], Stat(join=_first)] = ()
    steps: Annotated[int, Stat("candle_vllm:engine_steps_total", "Steps of the engine.")]
    adapters: Annotated[int, Stat(now=True, join=max)] = 0
    adapters_in_memory: Annotated[int, Stat(now=True)] = 0
    adapter_bytes: Annotated[int, Stat(now=True)] = 0
    adapter_loads: Annotated[int, Stat("candle_vllm:lora_loads_total", "Adapters that were brought to memory.")] = 0
    adapter_load_failures: Annotated[int, Stat(
        "candle_vllm:lora_load_failures_total", "Adapters that could not be.")] = 0
    adapter_load_seconds: Annotated[float, Stat(
        "candle_vllm:lora_load_seconds_total", "Time of all that, seconds.")] = 0.0
    adapter_evictions: Annotated[int, Stat(
        "candle_vllm:lora_evictions_total", "Adapters that left memory for others.")] = 0
    max_adapters: Annotated[int, Stat(join=max)] = 0
    running_adapters: Annotated[Mapping[str, int], Stat(now=True, join=_by_key)] = msgspec.field(default_factory=dict)
    waiting_adapters: Annotated[Mapping[str, int], Stat(now=True, join=_by_key)] = msgspec.field(default_factory=dict)
    checkpoints: Annotated[int, Stat(now=True)] = 0
    checkpoint_slots: Annotated[int, Stat(now=True)] = 0
    sleep_level: Annotated[int, Stat(now=True, join=max)] = 0
    images_encoded: Annotated[int, Stat("candle_vllm:images_encoded_total", "Images whose embeddings were made.")] = 0
    images_reused: Annotated[int, Stat(
        "candle_vllm:images_reused_total", "Images whose embeddings requests found made.")] = 0
    image_failures: Annotated[int, Stat(
        "candle_vllm:image_failures_total", "Images whose embeddings could not be made.")] = 0
    image_seconds: Annotated[float, Stat(
        "candle_vllm:image_encoding_seconds_total", "Time of making them, seconds.")] = 0.0
    kept_block_bytes: Annotated[int, Stat(now=True, join=max)] = 0
    kept_blocks_read: Annotated[int, Stat(
        "candle_vllm:prompt_cache_blocks_read_total", "KV blocks that were read from there.")] = 0
    kept_blocks_written: Annotated[int, Stat(
        "candle_vllm:prompt_cache_blocks_written_total", "KV blocks that were written there.")] = 0
    kept_blocks_skipped: Annotated[int, Stat(
        "candle_vllm:prompt_cache_blocks_skipped_total", "KV blocks that were not, for that was behind.")] = 0
    kept_block_failures: Annotated[int, Stat(
        "candle_vllm:prompt_cache_failures_total",
        "KV blocks that were damaged or late, or could not be read or written.")] = 0
    replicas: Annotated[tuple[ReplicaStats, ...], Stat(join=lambda _: ())] = ()
    # fmt: on


def _stat(hint: Any) -> Stat:
    return next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Stat)), Stat())


_HINTS = get_type_hints(EngineStats, include_extras=True)
STATS: Mapping[str, Stat] = {name: _stat(_HINTS[name]) for name in EngineStats.__struct_fields__}
"""What is done with each number of `EngineStats`."""
