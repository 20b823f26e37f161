# SPDX-License-Identifier: MIT
"""Base of all request objects: strict types, no unknown names, and tables of fields that have no effect here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, LiteralString, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from candle_vllm.core.engine.requests import MAX_PRIORITY
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling import params as caps
from candle_vllm.core.setting_kinds import Number
from candle_vllm.openai.remarks import remark, unknown_fields_pass

MAX_NAME = 256  # characters of a model name, participant name or call id
_MOST = 1 << 31  # limit for numbers in fields that have no effect
_MAX_FIELD = 128  # characters of a field's path in an error
MAX_MESSAGES = 2048
MAX_PARTS = 1024  # content parts of one message
MAX_TOOL_CALLS = 128  # tool calls of one message
MAX_TOOLS = 1024  # tools of one request; OpenAI's limit is 128, but agents with several MCP servers send hundreds
MAX_TOOL_NAME = 64  # characters of a function's name: OpenAI's rule
MAX_TOOLS_SIZE = 2 << 20  # characters of all tools of a request as JSON
MAX_SCHEMA_DEPTH = 48  # nesting depth of lists and objects in one JSON schema
MAX_DOCUMENTS = 256
MAX_TEMPLATE_KWARGS = 64
MAX_PROMPTS = 128  # prompts of one completion request
MAX_CHOICES = 256  # prompts times n
MAX_BAD_WORDS = 256
MAX_LOGIT_BIAS = 1024
MAX_BEAM_TOKENS = 1 << 12  # maximum tokens of a beam search: max_tokens x n x prompts
MAX_LOGPROBS = 1 << 18  # log-probabilities of a request's generated tokens, or of its prompts' tokens
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]


def bounded(name: str, *, ge: float | None = None, le: float | None = None) -> Any:
    """Return the bounds of a field of `SamplingParams`; `ge` replaces a closed lower bound, `le` the upper one."""
    kind = caps.BOUNDS[name]
    above = kind.low if isinstance(kind, Number) and kind.open_low else None
    least = None if above is not None else kind.low if ge is None else ge
    return Field(gt=above, ge=least, le=kind.high if le is None else le)


TokenId = Annotated[int, Field(ge=0, le=caps.MAX_TOKEN_ID)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=caps.MAX_SALT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
ModelName = Annotated[str, Field(max_length=MAX_NAME)]  # may be empty: some clients have no model name to send


class Refusal(NamedTuple):
    """Treatment of a field that another server defines and that has no effect here.

    Attributes:
        reason: why the field has no effect.
        neutral: values that are accepted, because they ask for nothing.
        idle: whether other values are ignored with a warning, because the answer is right without them; else refused.
    """

    reason: str
    neutral: tuple[Any, ...] = ()
    idle: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether `value` is null or a neutral value."""
        return value is None or any(type(value) is type(one) and value == one for one in self.neutral)


_OLD_FUNCTIONS = "OpenAI replaced it by tools and tool_choice"
_ONE_BACKEND = "there is one backend for structured output; use structured_outputs"
_INTERNAL = "it is an internal field of another server"
_PREPARED = "images are preprocessed as the model's files define"
_ALWAYS_APART = "reasoning is always separate from the answer; include_reasoning: false leaves it out"
_ONE_ORDER = "samplers have a fixed order"
_NO_SAMPLER = "this sampler is not implemented"
_NEVER_CUT = "prompts are truncated by truncate_prompt_tokens"
_CACHED = "prompt prefixes are always cached"
_NO_SLOTS = "requests share the cache and have no slots"
_CHAT_ONLY = "it belongs to chat requests"

_MEASURED = "the number of draft tokens follows from earlier acceptance; num_speculative_tokens bounds it"

DRAFT_FIELDS: Mapping[str, Refusal] = {
    "speculative.n_min": Refusal(_MEASURED, (0,), idle=True),
    "speculative.p_min": Refusal(_MEASURED, (0, 0.0), idle=True),
    "speculative.type": Refusal("the operator chooses it, --speculative-config", idle=True),
}
"""llama.cpp's fields for draft tokens."""

REFUSED_FIELDS: Mapping[str, Refusal] = {
    **DRAFT_FIELDS,
    "functions": Refusal(_OLD_FUNCTIONS, ([],)),
    "function_call": Refusal(_OLD_FUNCTIONS, ("none", "auto")),
    "guided_decoding_backend": Refusal(_ONE_BACKEND, idle=True),
    "ebnf": Refusal("use structured_outputs with grammar"),
    "regex": Refusal("use structured_outputs with regex"),
    "structural_tag": Refusal("use structured_outputs with structural_tag"),
    "separate_reasoning": Refusal(_ALWAYS_APART, (True,)),
    "stream_reasoning": Refusal("reasoning is streamed as it is generated", (True,), idle=True),
    "audio": Refusal("audio output is not implemented"),
    "web_search_options": Refusal("web search is not implemented"),
    "moderation": Refusal("moderation is not implemented"),
    "suffix": Refusal("it belongs to text completions, /v1/completions", ("",)),
    "samplers": Refusal(_ONE_ORDER, idle=True),
    "sampler_seq": Refusal(_ONE_ORDER, idle=True),
    "min_keep": Refusal("every sampler keeps at least one token", (0, 1), idle=True),
    "tfs_z": Refusal(_NO_SAMPLER, (1, 1.0)),
    "tfs": Refusal(_NO_SAMPLER, (1, 1.0)),
    "top_a": Refusal(_NO_SAMPLER, (0, 0.0)),
    "epsilon_cutoff": Refusal(_NO_SAMPLER, (0, 0.0)),
    "eta_cutoff": Refusal(_NO_SAMPLER, (0, 0.0)),
    "smoothing_factor": Refusal(_NO_SAMPLER, (0, 0.0)),
    "repetition_detection": Refusal("only stop, stop_token_ids and max_tokens end a text early", idle=True),
    "watermarking": Refusal("watermarks are not implemented", (False,)),
    "chat_template_format": Refusal("templates are Jinja templates"),
    "mm_processor_kwargs": Refusal(_PREPARED, ({},)),
    "media_io_kwargs": Refusal(_PREPARED, ({},)),
    "return_mm_kwargs": Refusal(_PREPARED, (True,), idle=True),
    "prompt_embeds": Refusal("prompts are texts or token ids"),
    "spaces_between_special_tokens": Refusal("the tokenizer decides about spaces", (True,), idle=True),
    "return_token_offsets": Refusal("use return_token_ids", (False,)),
    "return_prompt_text": Refusal("use return_token_ids, which has the prompt's tokens", (False,)),
    "logits_processors": Refusal("only the library takes them, in SamplingParams", ([],)),
    "kv_transfer_params": Refusal(_INTERNAL, ({},)),
    "ec_transfer_params": Refusal(_INTERNAL, ({},)),
    "routed_experts_prompt_start": Refusal(_INTERNAL, (0,), idle=True),
    "vllm_xargs": Refusal(_INTERNAL, ({},), idle=True),
    "cache_prompt": Refusal(_CACHED, (True,), idle=True),
    "n_cache_reuse": Refusal(_CACHED, (0,), idle=True),
    "id_slot": Refusal(_NO_SLOTS, (-1,), idle=True),
    "slot_id": Refusal(_NO_SLOTS, (-1,), idle=True),
    "n_keep": Refusal(_NEVER_CUT, (0,), idle=True),
    "n_discard": Refusal(_NEVER_CUT, (0,), idle=True),
    "t_max_predict_ms": Refusal(
        "max_tokens limits the answer, and the operator its time (--request-timeout)", idle=True
    ),
    "parse_tool_calls": Refusal("tool calls are parsed whenever a request has tools", (True,), idle=True),
    "reasoning_format": Refusal(_ALWAYS_APART, ("auto", "deepseek"), idle=True),
    "backend_sampling": Refusal("the server chooses where tokens are sampled", idle=True),
    "ttl": Refusal("the operator sets how long a model stays loaded (--idle-unload-secs)", idle=True),
    "draft_model": Refusal("the operator chooses it, --speculative-config", idle=True),
}

COMPLETION_REFUSED_FIELDS: Mapping[str, Refusal] = {
    **{name: refusal for name, refusal in REFUSED_FIELDS.items() if name != "suffix"},
    "messages": Refusal(_CHAT_ONLY),
    "verbose": Refusal(_CHAT_ONLY, (False,), idle=True),
    "tools": Refusal(_CHAT_ONLY, ([],)),
    "tool_choice": Refusal(_CHAT_ONLY, ("none", "auto")),
    "parallel_tool_calls": Refusal(_CHAT_ONLY, (True, False)),
    "chat_template": Refusal(_CHAT_ONLY),
    "chat_template_kwargs": Refusal(_CHAT_ONLY, ({},)),
    "include_reasoning": Refusal(_CHAT_ONLY, (True,)),
    "thinking_token_budget": Refusal(_CHAT_ONLY, (-1,)),
    "prediction": Refusal(_CHAT_ONLY),
}

NOT_DEFERRED = {"defer_loading": Refusal("every tool is shown to the model from the start", (False,), idle=True)}

ADVISORY_FIELDS: Mapping[str, str] = {
    "user": "names the caller's user; the server keeps no per-user state",
    "safety_identifier": "names the caller's user; the server keeps no per-user state",
    "metadata": "labels stored answers; answers are not stored",
    "store": "asks to store the answer; answers are not stored",
    "service_tier": "chooses a service tier; there is only one",
    "prompt_cache_key": "routes to a server with a warm cache; there is one prefix cache",
    "prompt_cache_retention": "sets how long the cache is kept; blocks are kept until memory is needed",
    "prompt_cache_options": "sets cache breakpoints; every full block of every prompt is cached",
    "session_id": "routes related requests to one server; there is one",
    "verbosity": "is a hint that open models were not trained on",
}


def rule_error(kind: LiteralString, field: str, text: str) -> PydanticCustomError:
    """Return a validation error for `field`, a dotted path relative to the object that is validated.

    `kind` is `unknown_field`, `unsupported_field` or `invalid_field`; in the message, `text` follows the path.
    """
    return PydanticCustomError(kind, "{text}", {"field": field[:_MAX_FIELD], "text": text})


def unsupported(field: str, reason: str) -> PydanticCustomError:
    """Return the error for a field of other servers that is not implemented here."""
    return rule_error("unsupported_field", field, f"is not supported: {reason}")


def invalid(field: str, text: str) -> PydanticCustomError:
    return rule_error("invalid_field", field, text)


def few_entries(most: int) -> BeforeValidator:
    """Return a validator for objects of at most `most` entries: pydantic needs seconds to list a million errors."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise invalid("", f"must have at most {most} entries, not {len(value)}")
        return value

    return BeforeValidator(check)


class WireModel(BaseModel):
    """Base of request objects: exact types (no "1" for 1, no true for 1), finite numbers, known names.

    If the operator allows unknown names, they give warnings. The validator is built when the first object is parsed.
    """

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        hide_input_in_errors=True,
        defer_build=True,
    )

    refused_fields: ClassVar[Mapping[str, Refusal]] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_known_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        cls.check_kind(data)
        known = cls.wire_names()
        extra = [name for name in data if name not in known]
        if not extra:
            return data
        for name in extra:
            refusal = cls.refused_fields.get(name)
            if refusal is None:
                if not unknown_fields_pass():
                    raise rule_error("unknown_field", str(name), cls._suggestion(str(name)))
                remark([f"the field {str(name)[:_MAX_FIELD]!r} is unknown and has no effect"])
            elif not refusal.accepts(data[name]):
                if not refusal.idle:
                    raise unsupported(name, refusal.reason)
                if type(data[name]) in (int, float) and not abs(data[name]) < _MOST:
                    raise invalid(name, f"must be a number below {_MOST}")
                remark([f"the field {name!r} has no effect: {refusal.reason}"])
        return {name: value for name, value in data.items() if name not in extra}

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Hook for subclasses: refuse an object of another kind before its field names are checked."""

    @classmethod
    @cache
    def wire_names(cls) -> frozenset[str]:
        """Return the names of the fields that an object of this class may have."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def _suggestion(cls, name: str) -> str:
        if name in _OF_THE_OPERATOR:
            return f"is not a known field: {_OF_THE_OPERATOR[name]}"
        if _NAMES_HERE.get(name) in cls.wire_names():
            return f"is not a known field; here it is called {_NAMES_HERE[name]!r}"
        near = difflib.get_close_matches(name[:MAX_NAME], sorted({*cls.wire_names(), *cls.refused_fields}), n=1)
        return f"is not a known field; did you mean {near[0]!r}?" if near else "is not a known field"


_NAMES_HERE = {"num_predict": "max_tokens", "max_new_tokens": "max_tokens", "max_output_tokens": "max_tokens",
               "temp": "temperature", "reasoning": "reasoning_effort"}  # fmt: skip
_OF_THE_OPERATOR = {
    "options": "put its values into the request itself, num_predict as max_tokens",
    "num_ctx": "the operator sets the context with --max-model-len",
    "n_ctx": "the operator sets the context with --max-model-len",
}
"""Fields of llama.cpp, Ollama and transformers, and where they are set here."""


def spelled(pattern: str, rule: str) -> AfterValidator:
    """Return a validator of strings that match `pattern`; `rule` is the error's text, with {} for the string."""
    form = re.compile(pattern)

    def check(value: str) -> str:
        if not form.fullmatch(value):
            raise invalid("", rule.format(value))
        return value

    return AfterValidator(check)


RequestId = Annotated[str, spelled(r"[A-Za-z0-9._:-]{1,128}", "must be 1 to 128 letters, digits and . _ : -")]


def type_of(value: Any) -> Any:
    """Return the `type` of a validated object or of a plain dict."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def by_type(*kinds: str, otherwise: str) -> Callable[[Any], str]:
    """Return a function of pydantic's union tag: an object's `type` if it is one of `kinds`, else `otherwise`."""
    return lambda value: f"<{kind if (kind := type_of(value)) in kinds else otherwise}>"


def list_form(value: Any) -> str:
    """Return pydantic's union tag for a list or, for anything else, for a text."""
    return "<list>" if isinstance(value, list) else "<string>"


def prompt_form(value: Any) -> str:
    """Return pydantic's union tag for a prompt: a text, token ids, or a list of either."""
    if not isinstance(value, list):
        return "<string>"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "<token lists>"
    return "<tokens>" if isinstance(first, (int, float)) else "<strings>"


def entries(prompts: Any) -> list[Any]:
    """Return a list of prompts, each a text or token ids, from a validated value of one or several."""
    return prompts if prompt_form(prompts) in ("<strings>", "<token lists>") else [prompts]


FunctionName = Annotated[
    str,
    spelled(
        rf"[a-zA-Z0-9_-]{{1,{MAX_TOOL_NAME}}}",
        f"must be 1 to {MAX_TOOL_NAME} of the characters a-z, A-Z, 0-9, _ and -, which is OpenAI's rule for names; "
        "{!r:.80} is not: rename it, and map the name back when it is called",
    ),
]


_MODEL_NAME = {"type": "string", "maxLength": MAX_NAME}
_NULL = {"type": "null"}
_LORA_PATH = {"anyOf": [_MODEL_NAME, {"type": "array", "items": {"anyOf": [_MODEL_NAME, _NULL]}}, _NULL]}


class Cut(NamedTuple):
    """How prompts that are too long are truncated.

    Attributes:
        tokens: maximum number of tokens that remain; -1 for the longest prompt that the caller of `of` allows.
        side: side from which tokens are removed.
    """

    tokens: int
    side: Literal["left", "right"] = "left"

    def of(self, prompt: Sequence[int], context: int, around: Sequence[int] = ()) -> Sequence[int]:
        """Return the truncated prompt; InvalidParameterError if `tokens` is 0 or above `context`, the longest prompt.

        `around` are the special tokens of an empty text. They remain if they are at the ends of the prompt and fit.
        """
        field = "truncate_prompt_tokens"
        if self.tokens == 0:
            raise InvalidParameterError(f"{field} is 0, and a prompt needs at least one token", field)
        if self.tokens > context:
            said = f"{field} value is greater than max_model_len. Please request a smaller truncation size."
            raise InvalidParameterError(said, field)
        most = context if self.tokens < 0 else self.tokens
        if len(prompt) <= most:
            return prompt
        count = len(around) if len(around) <= most else 0
        fronts = (n for n in range(count + 1) if [*prompt[:n], *prompt[len(prompt) - count + n :]] == [*around])
        if (front := next(fronts, None)) is None:
            front = count = 0
        first = len(prompt) - most + front if self.side == "left" else front
        return [*prompt[:front], *prompt[first : first + most - count], *prompt[len(prompt) - count + front :]]

    def written(self) -> dict[str, Any]:
        """Return the `CutFields` of a request that truncates in this way."""
        return {"truncate_prompt_tokens": self.tokens, "truncation_side": self.side}


class CutFields(WireModel):
    """vLLM's fields that truncate prompts that are too long; without them such prompts are refused.

    Attributes:
        truncate_prompt_tokens: maximum number of prompt tokens; -1 for the model's maximum.
        truncation_side: side from which tokens are removed; null means right for texts to embed or classify, else left.
    """

    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=(1 << 31) - 1)] | None = None
    truncation_side: Literal["left", "right"] | None = None

    def cut(self, otherwise: Literal["left", "right"]) -> Cut | None:
        """Return how prompts are truncated, by default from the side `otherwise`; None without truncation."""
        given = self.truncate_prompt_tokens
        return None if given is None else Cut(given, self.truncation_side or otherwise)


class ModelFields(WireModel):
    """The model that answers, and its LoRA adapter.

    Attributes:
        model: name of the model or of an adapter.
        lora_path: SGLang's field for the adapter; may be a list that repeats one name for every prompt. The name is
            appended to the model's name (`model:adapter`), or becomes it if the request names no model.
    """

    model: ModelName | None = None
    lora_path: Annotated[ModelName | None, WithJsonSchema(_LORA_PATH)] = None

    @model_validator(mode="before")
    @classmethod
    def _joined(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("lora_path") is None:
            return data
        path, model = data["lora_path"], data.get("model")
        if isinstance(path, list):
            if any(each != path[0] for each in path):
                raise invalid("lora_path", "must name one adapter for all prompts: send a request for each")
            path = path[0] if path else None
        if path is None:
            return {name: value for name, value in data.items() if name != "lora_path"}
        if isinstance(path, str) and (model is None or isinstance(model, str)):
            if model in (None, "", "default"):
                model = path
            elif model != path and not model.endswith(f":{path}"):
                model = f"{model}:{path}"
        return data | {"lora_path": path, "model": model}
