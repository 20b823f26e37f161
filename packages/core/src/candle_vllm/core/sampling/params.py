# SPDX-License-Identifier: MIT
"""SamplingParams: sampling parameters of one request. Field names and meanings are vLLM's."""

from __future__ import annotations

import copy
import enum
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_origin, get_type_hints

from msgspec.structs import force_setattr, replace

from candle_vllm.core.arguments import ExplainedStruct, unknown_name
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.sampling.thoughts import MAX_BUDGET, ThoughtBudget
from candle_vllm.core.setting_kinds import SEED, Integer, Number
from candle_vllm.core.text.detokenizer import StopMarks, StopScanner

MAX_SEQUENCES = 128  # maximum number of sequences of one prompt (`n`)
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters of one stop string or bad word
MAX_LOGPROBS = 20  # alternatives reported per token
MAX_BEAMS = MAX_LOGPROBS // 2  # a search with w beams reads 2 w log-probabilities; as in vLLM by default
MAX_NAMED_LOGPROBS = 128  # entries of logprob_token_ids, as in vLLM
MAX_TOKEN_LIST = 4096  # entries of logit_bias, stop_token_ids, bad_words
MAX_ALLOWED_TOKENS = 1_000_000
MAX_TOKEN_ID = (1 << 31) - 1
MAX_TOKENS = 1 << 24
MAX_LOOKBACK = 1 << 24  # tokens of `repeat_last_n` and `dry_penalty_last_n`
MAX_BREAKERS = 16  # maximum number of `dry_sequence_breakers`
MAX_BREAKER_LENGTH = 40  # maximum characters of a breaker, as in llama.cpp
MAX_PROCESSORS = 16
MAX_DRAFT_TOKENS = 128  # maximum of `num_speculative_tokens`
MAX_PREDICTION = 1 << 20  # maximum characters of `prediction`
MAX_SALT = 256  # maximum characters of `cache_salt`

BIAS = Number(-100, 100)
"""Bounds of a value of `logit_bias`."""

OFFERED = "offered"
"""Annotates a number that requests with `SamplerFields` (`openai/protocol`) have with the same name and bounds."""

DRY_BREAKERS = ("\n", ":", '"', "*")
"""Default sequence breakers of DRY, as in llama.cpp."""

DEFAULT_SAMPLING: Mapping[str, float | int] = MappingProxyType(
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
)
"""Sampling defaults that apply if neither the request nor the model's files set a value, as in llama.cpp."""


class _Open(float):
    """Default of a field that was not given. Copies are the same object, because msgspec omits defaults by identity."""

    __slots__ = ()
    known: ClassVar[dict[float, _Open]] = {}

    def __new__(cls, value: float) -> _Open:
        return cls.known.setdefault(value, super().__new__(cls, value))


class _OpenCount(int):
    __slots__ = ()
    known: ClassVar[dict[int, _OpenCount]] = {}

    def __new__(cls, value: int) -> _OpenCount:
        return cls.known.setdefault(value, super().__new__(cls, value))


class RequestOutputKind(enum.IntEnum):
    """Contents of each output of `AsyncLLM.generate`."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # only new tokens and text
    FINAL_ONLY = 2  # only one output, with everything


class SamplingParams(  # pyrefly: ignore[invalid-inheritance]
    ExplainedStruct,
    frozen=False,  # fields may be assigned; engines keep copies
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """Sampling parameters of one request.

    An engine fills temperature, top_p, top_k, min_p, typical_p and repetition_penalty from its
    `ModelInfo.default_sampling` if they were not given. A given value stays, even if it equals the default here; two
    objects are equal only if the same fields were not given. Assigning a field checks it like the constructor does. An
    engine keeps a copy, so that later changes do not affect a request; `msgspec.structs.replace(params, seed=1)` makes
    a changed copy. msgspec's encoders omit fields with their default, so that fields that were not given remain so.

    Attributes:
        n: sequences generated for the prompt, [1, 128].
        temperature: 0 is greedy; [0, 100].
        top_p: keep the smallest set of likeliest tokens whose total probability reaches it, (0, 1].
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than `min_p` times the likeliest, [0, 1].
        presence_penalty: subtracted once from the logit of every token already generated, [-2, 2].
        frequency_penalty: subtracted from a token's logit for each occurrence in the generated text, [-2, 2].
        seed: makes the request reproducible whatever else is in the batch; any 64-bit integer.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output, (0, 100].
        repeat_last_n: how many of the last tokens, prompt and output, the three penalties count; -1 for all.
        top_n_sigma: keep logits within this many standard deviations of the largest, up to 100; 0 or less keeps all.
        typical_p: keep the tokens whose surprise is nearest to the entropy, up to this total probability, (0, 1].
        xtc_probability: probability with which XTC removes the likeliest tokens, [0, 1].
        xtc_threshold: of the tokens at least this likely, XTC keeps only the least likely, [0, 1]; no effect above 0.5.
        dynatemp_range: the temperature rises with the entropy from `temperature` minus this to plus this, [0, 100].
        dynatemp_exponent: exponent of the entropy divided by its maximum, see `dynatemp_range`, [0, 100].
        mirostat: 1 or 2 keep the text's surprise at `mirostat_tau` by removing less likely tokens; 0 is off. It
            replaces top_k, top_p, min_p and typical_p if these were not given.
        mirostat_tau: target surprise in bits, [0, 100].
        mirostat_eta: learning rate of mirostat, [0, 10].
        dry_multiplier: DRY subtracts this times `dry_base` ** (length - `dry_allowed_length`) from the logit of a token
            that would continue a repetition of `length` tokens, [0, 1000]; 0 is off.
        dry_base: see `dry_multiplier`, [1, 1000].
        dry_allowed_length: the shortest repetition with a penalty, 1 to 2 ** 24.
        dry_penalty_last_n: DRY searches this many of the last tokens, prompt and output; -1 for all.
        dry_sequence_breakers: at most 16 texts (of up to 40 characters) that end a repetition; None for `DRY_BREAKERS`.
        logits_processors: functions of the tokens so far, prompt included, and of a row of logits, an array [V] float32
            that they may change; they return the row to use. They are called in order for each token, before all other
            edits of its logits, in the engine's thread, so that all requests of the batch wait for them. Instead of a
            function, the name of one in the entry-point group `candle_vllm.logits_processors` of an installed package
            is accepted; an engine in another process accepts names only. HTTP requests cannot have either.
        max_tokens: maximum number of generated tokens; None, the default in `chat`, means up to the context length.
        min_tokens: no end-of-sequence or stop before this many tokens. `structured_outputs` wins: if it allows only the
            end, the text ends there, however short it is.
        stop: strings that end the text; not part of the text unless `include_stop_str_in_output`.
        stop_marks: marks around parts of the text in which stop strings are ignored, such as reasoning and tool calls.
        stop_token_ids: token ids that end the sequence, in addition to the model's end-of-sequence tokens.
        ignore_eos: continue after the model's end-of-sequence tokens.
        include_stop_str_in_output: keep the stop string, or the text of the stop token, in the text.
        skip_special_tokens: leave special tokens out of the text.
        continues_prompt: if the prompt ends within a UTF-8 character, the text begins with the complete character; for
            callers that show prompt and text as one text.
        logprobs: report the log-probability of each sampled token and of this many of the likeliest ones, [0, 20].
        prompt_logprobs: the same report for the tokens of the prompt.
        prompt_progress: also report progress while the prompt is computed, see `TokenOutput.progress`.
        logprob_token_ids: instead of the likeliest tokens, report these, at most 128, besides the sampled one;
            `logprobs` is then 0 if it was not given.
        logit_bias: token id -> value added to its logit, [-100, 100].
        allowed_token_ids: only these tokens may be chosen.
        bad_words: texts that must not be produced.
        structured_outputs: the form that the text must have. If only the end may follow, the sequence ends with
            `FinishReason.STOP`, also before `min_tokens` and with `ignore_eos`.
        thoughts: budget of reasoning tokens, and the marks around reasoning. After the budget the closing mark is
            forced, as soon as `structured_outputs` and `allowed_token_ids` allow it.
        thinking_token_budget: the same budget, 0 to 2 ** 24 tokens, between marks that the vocabulary has as tokens
            (`<think>`); refused for a vocabulary without them. -1 is no limit.
        cache_salt: prefix-cache blocks are shared only between requests with the same salt.
        skip_reading_prefix_cache: compute the whole prompt even if cached blocks exist.
        num_speculative_tokens: maximum draft tokens of a step, [0, 128], in an engine with speculation; the engine's
            limit applies too. 0 turns speculation off. The generated tokens stay the same.
        prediction: the text that most of the output will equal, up to 2 ** 20 characters; draft tokens are also taken
            from it. The generated tokens stay the same.
        stream_interval: new tokens of each output of an asynchronous stream, after the first token; the engine's
            `stream_interval` applies if it is larger. Fewer outputs take less time of the event loop.
        output_kind: only for `AsyncLLM.generate`; other methods define whether they return deltas or whole outputs.
    """

    n: Annotated[int, Integer(1, MAX_SEQUENCES)] = 1
    temperature: Annotated[float, Number(0, 100), OFFERED] = _Open(1.0)
    top_p: Annotated[float, Number(0, 1, open_low=True), OFFERED] = _Open(1.0)
    top_k: Annotated[int, Integer(-1, 1 << 24), OFFERED] = _OpenCount(0)
    min_p: Annotated[float, Number(0, 1), OFFERED] = _Open(0.0)
    presence_penalty: Annotated[float, Number(-2, 2), OFFERED] = 0.0
    frequency_penalty: Annotated[float, Number(-2, 2), OFFERED] = 0.0
    seed: Annotated[int | None, SEED, OFFERED] = None
    repetition_penalty: Annotated[float, Number(0, 100, open_low=True)] = _Open(1.0)
    repeat_last_n: Annotated[int, Integer(-1, MAX_LOOKBACK), OFFERED] = -1
    top_n_sigma: Annotated[float, Number(-1, 100), OFFERED] = 0.0
    typical_p: Annotated[float, Number(0, 1, open_low=True), OFFERED] = _Open(1.0)
    xtc_probability: Annotated[float, Number(0, 1), OFFERED] = 0.0
    xtc_threshold: Annotated[float, Number(0, 1), OFFERED] = 0.1
    dynatemp_range: Annotated[float, Number(0, 100), OFFERED] = 0.0
    dynatemp_exponent: Annotated[float, Number(0, 100), OFFERED] = 1.0
    mirostat: Annotated[int, Integer(0, 2), OFFERED] = 0
    mirostat_tau: Annotated[float, Number(0, 100), OFFERED] = 5.0
    mirostat_eta: Annotated[float, Number(0, 10), OFFERED] = 0.1
    dry_multiplier: Annotated[float, Number(0, 1000), OFFERED] = 0.0
    dry_base: Annotated[float, Number(1, 1000), OFFERED] = 1.75
    dry_allowed_length: Annotated[int, Integer(1, MAX_LOOKBACK), OFFERED] = 2
    dry_penalty_last_n: Annotated[int, Integer(-1, MAX_LOOKBACK), OFFERED] = -1
    dry_sequence_breakers: Sequence[str] | None = None
    logits_processors: Sequence[Any] | None = None
    max_tokens: Annotated[int | None, Integer(1, MAX_TOKENS)] = _OpenCount(16)
    min_tokens: Annotated[int, Integer(0, MAX_TOKENS)] = 0
    stop: str | Sequence[str] | None = None
    stop_marks: StopMarks | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    continues_prompt: bool = False
    logprobs: Annotated[int | None, Integer(0, MAX_LOGPROBS)] = None
    prompt_logprobs: Annotated[int | None, Integer(0, MAX_LOGPROBS)] = None
    prompt_progress: bool = False
    logprob_token_ids: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    thoughts: ThoughtBudget | None = None
    thinking_token_budget: Annotated[int | None, Integer(-1, MAX_BUDGET)] = None
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool = False
    num_speculative_tokens: Annotated[int, Integer(0, MAX_DRAFT_TOKENS), OFFERED] = MAX_DRAFT_TOKENS
    prediction: str | None = None
    stream_interval: Annotated[int | None, Integer(1, MAX_TOKENS), OFFERED] = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    if not TYPE_CHECKING:  # type checkers use the fields' types

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in self.__struct_fields__:
                raise AttributeError(unknown_name("SamplingParams", name, self.__struct_fields__))
            before = getattr(self, name)
            force_setattr(self, name, value)
            try:
                self.__post_init__()
            except Exception:
                force_setattr(self, name, before)
                raise

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__struct_fields__)
        return all(mine == theirs and _is_open(mine) == _is_open(theirs) for mine, theirs in pairs)

    def __post_init__(self) -> None:
        for name, kind in BOUNDS.items():
            if (value := getattr(self, name)) is None and name in _OPTIONAL:
                continue
            if isinstance(kind, Integer):
                _integer(name, value, kind.low, kind.high)
            else:
                _number(name, value, kind)
        if self.thoughts is not None and self.thinking_token_budget is not None and self.thinking_token_budget >= 0:
            said = "thinking_token_budget and thoughts are two budgets for the same thoughts: give one"
            raise InvalidParameterError(said, "thinking_token_budget")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameterError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens"
            )
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameterError(f"{name} must be true or false", name)
        for name, (kind, said) in _CLASSES.items():
            if not isinstance(getattr(self, name), kind):
                raise InvalidParameterError(f"{name} must be {said}", name)
        for name, check in _CHECKS.items():
            if (given := getattr(self, name)) is not None:
                check(name, given)
        if self.logprob_token_ids and self.logprobs is None:
            force_setattr(self, "logprobs", 0)

    def leaves_open(self, name: str) -> bool:
        """Whether this field was not given."""
        return _is_open(getattr(self, name))

    def filled(self, defaults: Mapping[str, float | int]) -> SamplingParams:
        """Return a copy in which `defaults` replace the fields that were not given; in it, all count as given.

        Raises InvalidParameterError if a default cannot be used.
        """
        given: dict[str, Any] = {}
        if self.mirostat:
            defaults = without_cuts(defaults)
        for name in self.__struct_fields__:
            if _is_open(value := getattr(self, name)):
                given[name] = defaults.get(name, +value)  # the sign makes it a plain number
        return replace(self, **given) if given else copy.copy(self)  # `copy` does not validate again

    def clone(self) -> SamplingParams:
        """Return a deep copy, as in vLLM."""
        return copy.deepcopy(self)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def stop_scanner(self, special_tokens: Iterable[str]) -> StopScanner:
        """Return a scanner for one text; `special_tokens` are the names of the vocabulary's special tokens."""
        return StopScanner(
            self.stop_strings,
            include_stop=self.include_stop_str_in_output,
            marks=self.stop_marks,
            special_tokens=special_tokens,
        )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always sampled."""
        return self.temperature < 1e-5 and not self.dynatemp_range


def without_cuts(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return sampling defaults without top_k, top_p, min_p and typical_p, which mirostat replaces if not given."""
    return {name: value for name, value in defaults.items() if name not in _CUTS}


_CUTS = ("top_k", "top_p", "min_p", "typical_p")
_HINTS = get_type_hints(SamplingParams, include_extras=True)
BOUNDS: Mapping[str, Integer | Number] = MappingProxyType(
    {name: hint.__metadata__[0] for name, hint in _HINTS.items() if get_origin(hint) is Annotated}
)
"""Bounds of the numbers of `SamplingParams`; the requests of every API and the server's settings use this table."""
OFFERED_FIELDS = tuple(name for name in BOUNDS if OFFERED in _HINTS[name].__metadata__)
_OPTIONAL = frozenset(name for name in BOUNDS if get_origin(_HINTS[name].__origin__) is UnionType)
_SWITCHES = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "continues_prompt",
             "skip_reading_prefix_cache", "prompt_progress")  # fmt: skip
_CLASSES = {
    "output_kind": (RequestOutputKind, "a RequestOutputKind"),
    "structured_outputs": (StructuredOutputsParams | None, "StructuredOutputsParams"),
    "thoughts": (ThoughtBudget | None, "a ThoughtBudget"),
    "stop_marks": (StopMarks | None, "StopMarks"),
}


def _is_open(value: object) -> bool:
    return isinstance(value, (_Open, _OpenCount))


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameterError(f"{name} must be an integer, not {value!r:.60}", name)
    if not low <= value <= high:
        raise InvalidParameterError(f"{name} must be between {low} and {high}, not {_shown(value)}", name)


def _number(name: str, value: Any, kind: Number) -> None:
    low, high = kind.low, kind.high
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidParameterError(f"{name} must be a number, not {value!r:.60}", name)
    if not low <= value <= high or (kind.open_low and value == low):  # true for NaN
        bound = "above" if kind.open_low else "at least"
        raise InvalidParameterError(f"{name} must be {bound} {low} and at most {high}, not {_shown(value)}", name)


def _allowed_ids(name: str, ids: Any) -> None:
    _token_ids(name, ids, MAX_ALLOWED_TOKENS)
    if not ids:
        raise InvalidParameterError(f"{name} must not be empty", name)


def _processors(name: str, processors: Any) -> None:
    _count(name, processors, MAX_PROCESSORS)
    for each in processors:
        if not callable(each) and not (isinstance(each, str) and each in installed_processors()):
            installed = ", ".join(installed_processors()) or "none is"
            raise InvalidParameterError(
                f"{name} must be functions of the tokens so far and a row of logits, or names of installed ones "
                f"({installed} installed), not {each!r:.60}",
                name,
            )


def _stop(name: str, stop: Any) -> None:
    if not isinstance(stop, Sequence) or isinstance(stop, bytes):
        raise InvalidParameterError(f"{name} must be a text or a list of texts", name)
    strings = (stop,) if isinstance(stop, str) else stop
    _count(name, strings, MAX_STOP_STRINGS)
    if not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in strings):
        raise InvalidParameterError(f"stop strings must be texts of 1 to {MAX_STOP_LENGTH} characters", name)


def _bias(name: str, bias: Any) -> None:
    if not isinstance(bias, Mapping):
        raise InvalidParameterError(f"{name} must map token ids to numbers", name)
    for token in bias:
        if isinstance(token, bool) or not isinstance(token, int):
            said = f"{name} maps token ids, which are integers, to numbers; {token!r:.60} is no token id"
            raise InvalidParameterError(said, name)
    _token_ids(name, list(bias), MAX_TOKEN_LIST)
    for value in bias.values():
        _number(name, value, BIAS)


def _salt(name: str, salt: Any) -> None:
    if not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT):
        raise InvalidParameterError(f"{name} must be a text of 1 to {MAX_SALT} characters", name)


def _prediction(name: str, text: Any) -> None:
    if not (isinstance(text, str) and len(text) <= MAX_PREDICTION):
        raise InvalidParameterError(f"{name} must be a text of at most {MAX_PREDICTION} characters", name)


_CHECKS: Mapping[str, Callable[[str, Any], object]] = {  # fields that few requests give, and the check of a value
    "bad_words": lambda name, given: _texts(name, given, MAX_TOKEN_LIST, MAX_STOP_LENGTH),
    "dry_sequence_breakers": lambda name, given: _texts(name, given, MAX_BREAKERS, MAX_BREAKER_LENGTH),
    "stop_token_ids": lambda name, given: _token_ids(name, given, MAX_TOKEN_LIST),
    "logprob_token_ids": lambda name, given: _token_ids(name, given, MAX_NAMED_LOGPROBS),
    "allowed_token_ids": _allowed_ids,
    "logits_processors": _processors,
    "stop": _stop,
    "logit_bias": _bias,
    "cache_salt": _salt,
    "prediction": _prediction,
}


def _shown(value: float) -> str:
    """Format a number of any length for a message."""
    return f"{value:.20}" if isinstance(value, float) else f"{value:d}" if abs(value) < 10**20 else "a larger number"


def _count(name: str, values: Any, most: int) -> None:
    if not isinstance(values, Sequence) or len(values) > most:
        raise InvalidParameterError(f"{name} must be a list of at most {most} entries", name)


def _texts(name: str, values: Any, most: int, length: int) -> None:
    if isinstance(values, str):
        raise InvalidParameterError(f"{name} must be a list of texts", name)
    _count(name, values, most)
    if not all(isinstance(text, str) and 0 < len(text) <= length for text in values):
        raise InvalidParameterError(f"{name} must be texts of 1 to {length} characters", name)


def _token_ids(name: str, values: Any, most: int) -> None:
    if isinstance(values, (str, bytes)):
        raise InvalidParameterError(f"{name} must be a list of token ids", name)
    _count(name, values, most)
    for value in values:
        _integer(name, value, 0, MAX_TOKEN_ID)


@functools.cache
def installed_processors() -> Mapping[str, Callable[..., Any]]:
    """Return the logits processors of installed packages, by the name of the entry point."""
    return {point.name: point.load() for point in entry_points(group="candle_vllm.logits_processors")}
