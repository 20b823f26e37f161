# SPDX-License-Identifier: MIT
"""Fields that chat and completion requests share: those of OpenAI, vLLM, llama.cpp and other servers."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, create_model, field_validator, model_validator

from candle_vllm.core.engine.requests import MAX_ADAPTER_SCALE
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling import params as caps
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.setting_kinds import Integer
from candle_vllm.openai.protocol import fields
from candle_vllm.openai.protocol.structured import (
    LlamaForms,
    ResponseFormat,
    StructuredOutputs,
    blamed_field,
    structured_params,
)

Text = Annotated[str, Field(min_length=1, max_length=caps.MAX_STOP_LENGTH)]
MaxTokens = Annotated[int, fields.bounded("max_tokens")]
Logprobs = Annotated[int, fields.bounded("logprobs")]
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def _token_id_keys(bias: Any) -> Any:
    wrong = [
        f"{key!r:.60}"
        for key in (bias if isinstance(bias, dict) else ())
        if not isinstance(key, str) or not _TOKEN_ID.fullmatch(key) or int(key) > caps.MAX_TOKEN_ID
    ]
    if wrong:
        said = f"{wrong[0]} is no token id" if len(wrong) == 1 else f"{', '.join(wrong[:8])} are no token ids"
        raise fields.invalid("", f"maps token ids, written as strings, to numbers; {said}")
    return bias


_Bias = Annotated[
    dict[str, Annotated[float, Field(ge=caps.BIAS.low, le=caps.BIAS.high)]],
    BeforeValidator(_token_id_keys),
    fields.few_entries(fields.MAX_LOGIT_BIAS),
]


Stop = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[list[Text], Field(max_length=caps.MAX_STOP_STRINGS, fail_fast=True), Tag("<list>")],
    Discriminator(fields.list_form),
]


class StreamOptions(fields.WireModel):
    """Token counts in a stream.

    Attributes:
        include_usage: whether the last chunk has the token counts and no choices; earlier ones then have `usage: null`.
        continuous_usage_stats: whether earlier chunks have the counts so far instead, if `include_usage` is true.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = {
        "include_obfuscation": fields.Refusal("chunks are never padded with random characters", (False,)),
    }


_MAX_LORAS = 1024  # including adapters with a scale of 0
# Names of `SamplingParams` whose values have another form in requests, or depend on other fields.
_READ_APART = frozenset({
    "max_tokens", "logprobs", "prompt_logprobs", "logit_bias", "structured_outputs", "thinking_token_budget",
    "prediction",
})  # fmt: skip


@functools.cache
def sampling_names(request: type[fields.WireModel]) -> tuple[str, ...]:
    """Return the fields of a request that have the same name and form in `SamplingParams`."""
    known = request.model_fields.keys() - _READ_APART
    return tuple(name for name in caps.SamplingParams.__struct_fields__ if name in known)


def sampling_values(request: fields.WireModel) -> dict[str, Any]:
    """Return the values that a request sets for the fields of `sampling_names`."""
    return {name: value for name in sampling_names(type(request)) if (value := getattr(request, name)) is not None}


_numbers: dict[str, Any] = {
    name: (Annotated[int if isinstance(caps.BOUNDS[name], Integer) else float, fields.bounded(name)] | None, None)
    for name in caps.OFFERED_FIELDS
}
_Offered: Any = create_model("_Offered", __base__=fields.WireModel, **_numbers)


OTHER_NAMES: Mapping[str, str] = {
    "repeat_penalty": "repetition_penalty",
    "mirostat_mode": "mirostat",
    "typ_p": "typical_p",
    "speculative.n_max": "num_speculative_tokens",
    "random_seed": "seed",
    "sampling_seed": "seed",
}
"""Names of fields in llama.cpp, Ollama, text-generation-webui, Mistral's API and SGLang -> their names here."""


class SamplerFields(_Offered):
    """How tokens are sampled, by names of OpenAI, vLLM or llama.cpp.

    `SamplingParams` documents the fields; `OFFERED_FIELDS` have the same form in requests.
    """

    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES

    stop: Stop | None = None
    dry_sequence_breakers: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=caps.MAX_BREAKER_LENGTH)]],
            Field(max_length=caps.MAX_BREAKERS, fail_fast=True),
        ]
        | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not any(name in data for name in cls.other_names):
            return data
        others = {other: name for other, name in cls.other_names.items() if other not in cls.wire_names()}
        renamed = {name: value for name, value in data.items() if name not in others}
        for other, name in others.items():
            if data.get(other) is None:
                continue
            if renamed.get(name) is None:
                renamed[name] = data[other]
            elif renamed[name] != data[other]:
                raise fields.invalid(other, f"and {name} are the same field; give one of them")
        return renamed

    @field_validator("dry_sequence_breakers", mode="before")
    @classmethod
    def _listed_breakers(cls, value: Any) -> Any:
        """Read the list that text-generation-webui sends as one text without its brackets."""
        if not isinstance(value, str) or len(value) > MAX_BREAKERS_TEXT:
            return value
        try:
            return json.loads(value if value.lstrip().startswith("[") else f"[{value}]")
        except (ValueError, RecursionError):
            return value


def llama_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename sampling values from their names in `SamplingParams` to those of llama.cpp and Ollama."""
    return {"repeat_penalty" if name == "repetition_penalty" else name: value for name, value in values.items()}


class LlamaFields(SamplerFields):
    """Sampling fields by the names of llama.cpp and of Ollama; null always means absent.

    Attributes:
        seed: -1 means no seed.
        repeat_penalty: `repetition_penalty` of other APIs.
    """

    repeat_penalty: Annotated[float, fields.bounded("repetition_penalty")] | None = None

    def given_values(self) -> dict[str, Any]:
        """Return the fields that are set, by their names in `SamplingParams`."""
        given = sampling_values(self) | {"repetition_penalty": self.repeat_penalty}
        return {name: value for name, value in given.items() if value is not None and (name, value) != ("seed", -1)}


GUIDED = {
    f"guided_{name}": name for name in ("json", "regex", "choice", "grammar", "json_object", "whitespace_pattern")
}
"""vLLM's older fields -> their names in `structured_outputs`."""
MAX_BREAKERS_TEXT = 4096  # characters


class LoraScale(fields.WireModel):
    """llama.cpp's scale of an adapter: the adapter's id in `GET /lora-adapters`, and a factor."""

    id: Annotated[int, Field(ge=0, le=1 << 31)]
    scale: Annotated[float, Field(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE)]


LoraScales = Annotated[list[LoraScale], Field(max_length=_MAX_LORAS, fail_fast=True)]


def lora_scales(given: Sequence[LoraScale] | None) -> Mapping[int, float] | None:
    """Return the scales by adapter id; adapters without an entry have scale 0. Raises if one has two entries."""
    if given is None:
        return None
    scales = {each.id: each.scale for each in given}
    if len(scales) < len(given):
        raise InvalidParameterError("lora: an adapter is named twice", "lora")
    return scales


class GenerationFields(LlamaForms, SamplerFields, fields.CutFields, fields.ModelFields):
    """How to generate; null means absent: then the model's default applies or, without one, the server's.

    Attributes:
        use_beam_search: find the `n` best answers, at most 10, by beam search, which ranks them by the model's own
            log-probabilities; `max_tokens` x `n` x prompts is 4096 at most.
        return_progress: whether a stream has chunks with `prompt_progress` before the first token.
        length_penalty: the sum of a beam's log-probabilities is divided by its number of tokens to this power.
    """

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = fields.REFUSED_FIELDS

    n: Annotated[int, fields.bounded("n")] | None = None
    best_of: Annotated[int, fields.bounded("n")] | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    repetition_penalty: Annotated[float, fields.bounded("repetition_penalty")] | None = None
    min_tokens: Annotated[int, fields.bounded("min_tokens")] | None = None
    stop_token_ids: Annotated[list[fields.TokenId], Field(max_length=caps.MAX_TOKEN_LIST, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Logprobs | None = None
    logprob_token_ids: (
        Annotated[list[fields.TokenId], Field(max_length=caps.MAX_NAMED_LOGPROBS, fail_fast=True)] | None
    ) = None
    logit_bias: _Bias | None = None
    allowed_token_ids: (
        Annotated[list[fields.TokenId], Field(min_length=1, max_length=caps.MAX_ALLOWED_TOKENS, fail_fast=True)] | None
    ) = None
    bad_words: Annotated[list[Text], Field(max_length=fields.MAX_BAD_WORDS, fail_fast=True)] | None = None
    cache_salt: fields.CacheSalt | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    echo: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_draft_counts: bool | None = None
    return_progress: bool | None = None
    lora: LoraScales | None = None
    priority: fields.Priority | None = None
    request_id: fields.RequestId | None = None

    # ADVISORY_FIELDS: validated, without effect.
    user: str | None = None
    metadata: (
        Annotated[dict[str, str], fields.few_entries(fields.MAX_NAME), Field(max_length=fields.MAX_NAME)] | None
    ) = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    session_id: str | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    _unlimited: bool = False

    @model_validator(mode="before")
    @classmethod
    def _guided(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not any(name in data for name in GUIDED):
            return data
        given = {name: value for name, value in data.items() if name in GUIDED and value not in (None, False)}
        rest = {name: value for name, value in data.items() if name not in GUIDED}
        if given and rest.get("structured_outputs") is not None:
            raise fields.invalid(next(iter(given)), "and structured_outputs exclude each other; give one of them")
        return rest | {"structured_outputs": {GUIDED[name]: value for name, value in given.items()}} if given else rest

    @model_validator(mode="wrap")
    @classmethod
    def _no_limit(cls, data: Any, handler: Callable[[Any], Self]) -> Self:
        """Convert llama.cpp's name of `max_tokens`; -1, which its clients and LM Studio's send, means no limit."""
        if not isinstance(data, dict) or not ("n_predict" in data or data.get("max_tokens") == -1):
            return handler(data)
        limit, other = data.get("max_tokens"), data.get("n_predict")
        if None not in (limit, other) and limit != other:
            raise fields.invalid("n_predict", "and max_tokens are the same field; give one of them")
        limit = other if limit is None else limit
        data = {name: value for name, value in data.items() if name not in ("n_predict", "max_tokens")}
        made = handler(data if limit == -1 else data | {"max_tokens": limit})
        made._unlimited = limit == -1
        return made

    @property
    def unlimited(self) -> bool:
        """Whether the request says that the answer has no maximum length but the context's."""
        return self._unlimited

    @model_validator(mode="after")
    def _shared_rules(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise fields.unsupported("best_of", "every sequence is returned, so it can only equal n")
        if self.use_beam_search:
            if self.stream:
                raise fields.unsupported("use_beam_search", "beams are not streamed; send the request without stream")
            if self.sequences > caps.MAX_BEAMS:
                raise fields.invalid("n", f"is the number of beams with use_beam_search, at most {caps.MAX_BEAMS}")
        elif self.length_penalty not in (None, 1):
            raise fields.invalid("length_penalty", "needs use_beam_search: true")
        if self.stream_options is not None and not self.stream:
            raise fields.invalid("stream_options", "needs stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise fields.unsupported(
                "prompt_logprobs", "they are not part of a stream; send the request without stream"
            )
        given = getattr(self, "logprobs", None)  # a number, also 0, for completions; a boolean for chat
        if self.logprob_token_ids and (given is None or given is False):
            raise fields.invalid("logprob_token_ids", "needs logprobs")
        self.structured()
        return self

    def structured(self) -> StructuredOutputsParams | None:
        """Return the constraint on the answer; None if any text is allowed."""
        if not (self.response_format or self.structured_outputs or self.grammar or self.json_schema):
            return None
        form, given = structured_params(self.response_format, self.structured_outputs), self.llama_form()
        if form is not None and given is not None:
            other = blamed_field(self.response_format, self.structured_outputs)
            raise fields.invalid(given[0], f"and {other} exclude each other; give one of them")
        return form if given is None else given[1]

    @property
    def structured_field(self) -> str:
        """Path of the field that core calls `structured_outputs`, for errors that core finds later."""
        if self.grammar or self.json_schema:
            return "grammar" if self.grammar else "json_schema"
        return blamed_field(self.response_format, self.structured_outputs)

    @property
    def sequences(self) -> int:
        """`n`, or its default."""
        return self.n or 1

    @property
    def beam_penalty(self) -> float | None:
        """The length penalty of a beam search; None without one."""
        return (1.0 if self.length_penalty is None else self.length_penalty) if self.use_beam_search else None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk has the counts so far."""
        return bool(self.include_usage and self.stream_options and self.stream_options.continuous_usage_stats)
