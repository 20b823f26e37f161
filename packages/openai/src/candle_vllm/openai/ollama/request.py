# SPDX-License-Identifier: MIT
"""Ollama's requests: bytes -> a validated object (step 2 of a request's life)."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, WithJsonSchema, field_validator

from candle_vllm.core.pooling import MAX_DIMENSIONS
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.openai.json_body import parse_body, rules_below
from candle_vllm.openai.protocol import fields
from candle_vllm.openai.protocol.generation import LlamaFields, Logprobs
from candle_vllm.openai.protocol.pooling import MAX_INPUTS
from candle_vllm.openai.protocol.structured import constraint
from candle_vllm.openai.protocol.tools import FunctionDefinition, Tool, check_chat_tools
from candle_vllm.openai.task import ImagePart

MAX_CONTEXT = 1 << 20  # token ids in `context`
_LONGEST = 1 << 31  # seconds in `keep_alive`; a longer time means forever
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]{1,12}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})(ns|us|µs|μs|ms|s|m|h)")
_NUMBER = re.compile(r"[+-]?[0-9]{1,12}(?:\.[0-9]{1,12})?")
_MAX_DURATION = 64  # characters

# Options of Ollama that configure how a model runs: validated, but without effect. The values are the reasons.
ADVISORY_OPTIONS: Mapping[str, str] = {
    "num_ctx": "the operator sets the context (--max-model-len); a request for a larger one is reported in x-warning",
    "num_keep": "chooses what is kept of a truncated conversation; prompts are never truncated",
    "num_batch": "the operator sets the size of steps (--prefill-chunk-size)",
    "num_gpu": "the operator chooses the device (--device)",
    "main_gpu": "the operator chooses the device (--device)",
    "num_thread": "the operator sets the threads (--threads)",
    "draft_num_predict": "the operator sets speculation (--speculative-config)",
    "numa": "concerns NUMA memory, which the server places itself",
    "low_vram": "concerns GPU memory, which the server manages itself",
    "f16_kv": "the operator sets the type of the KV cache (--kv-cache-dtype)",
    "use_mmap": "weights are mapped while they are loaded",
    "use_mlock": "weights are always in memory",
}

_TEMPLATE = "Ollama's templates are written in Go, the model's in Jinja; send raw: true with a written-out prompt"
REFUSED_OPTIONS: Mapping[str, fields.Refusal] = {
    "tfs_z": fields.Refusal("this sampler is not implemented", (1, 1.0), idle=True),
    "penalize_newline": fields.Refusal("penalties apply to every token", (True,), idle=True),
    "logits_all": fields.Refusal("use logprobs", (False,), idle=True),
    "vocab_only": fields.Refusal("models are always loaded whole", (False,), idle=True),
    "embedding_only": fields.Refusal("the model's files define whether it makes embeddings", (False,), idle=True),
}
REFUSED_CHAT_FIELDS: Mapping[str, fields.Refusal] = {
    "prompt": fields.Refusal("it belongs to /api/generate; use messages"),
    "truncate": fields.Refusal("prompts are never truncated", (False,), idle=True),
    "shift": fields.Refusal("prompts are never truncated", (False,), idle=True),
    "response_format": fields.Refusal("it is OpenAI's; use format"),
    "max_tokens": fields.Refusal("it is OpenAI's; use options.num_predict"),
    "tool_choice": fields.Refusal("it is OpenAI's; the model chooses", ("auto",)),
}
REFUSED_GENERATE_FIELDS: Mapping[str, fields.Refusal] = {
    **{name: each for name, each in REFUSED_CHAT_FIELDS.items() if name not in ("prompt", "tool_choice")},
    "messages": fields.Refusal("they belong to /api/chat; use prompt"),
    "tools": fields.Refusal("they belong to /api/chat", ([],)),
    "template": fields.Refusal(_TEMPLATE, ("",)),
    "width": fields.Refusal("models generate text only", (0,)),
    "height": fields.Refusal("models generate text only", (0,)),
    "steps": fields.Refusal("models generate text only", (0,)),
}


def seconds_of(value: float | str) -> float:
    """Convert `keep_alive` to seconds: a number of seconds, or a duration as Go writes it (`5m`, `1h30m`).

    A negative or very long time means infinity. Raises ValueError or OverflowError for any other value.
    """
    if isinstance(value, str):
        text = value.strip()
        if len(text) > _MAX_DURATION:
            raise ValueError
        if _NUMBER.fullmatch(text):
            value = float(text)
        else:
            sign, unsigned = (-1 if text.startswith("-") else 1), text.removeprefix("-").removeprefix("+")
            parts = _PART.findall(unsigned)
            if not parts or "".join(number + unit for number, unit in parts) != unsigned:
                raise ValueError
            value = sign * math.fsum(float(number) * _UNITS[unit] for number, unit in parts)
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return math.inf if value < 0 or value > _LONGEST else float(value)


def _kept(value: Any) -> Any:
    if value is not None:
        try:
            seconds_of(value)
        except (ValueError, OverflowError):
            raise fields.invalid(
                "", f"must be seconds, or a duration such as '5m' or '1h30m'; 0 and -1 mean at once and never, "
                f"not {value!r:.60}"
            ) from None  # fmt: skip
    return value


def _formed(value: Any) -> Any:
    if value not in (None, "", "json") and not isinstance(value, dict):
        raise fields.invalid("", f"must be 'json' or a JSON schema, not {value!r:.60}")
    return value


def _thought(value: Any) -> Any:
    if value is not None and not isinstance(value, bool) and value not in ("low", "medium", "high", "max"):
        raise fields.invalid("", f"must be true, false, 'low', 'medium', 'high' or 'max', not {value!r:.60}")
    return value


KeepAlive = Annotated[
    Any, AfterValidator(_kept), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "null"}]})
]
Think = Annotated[
    Any,
    AfterValidator(_thought),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": ["low", "medium", "high", "max", None]}]}),
]
Format = Annotated[
    Any, AfterValidator(_formed), WithJsonSchema({"anyOf": [{"enum": ["", "json", None]}, {"type": "object"}]})
]
Streams = Annotated[
    bool, BeforeValidator(lambda value: True if value is None else value), WithJsonSchema({"type": ["boolean", "null"]})
]
_Count = Annotated[int, Field(ge=-1, le=1 << 31)] | None


class Options(LlamaFields):
    """How tokens are sampled; null means the model's default or, without one, the server's.

    Attributes:
        num_predict: maximum number of tokens of the answer; 0, -1 and -2 mean up to the end of the context.
    """

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = REFUSED_OPTIONS

    num_predict: Annotated[int, fields.bounded("max_tokens", ge=-2)] | None = None

    # ADVISORY_OPTIONS, without effect
    num_ctx: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    num_keep: _Count = None
    num_batch: _Count = None
    num_gpu: _Count = None
    main_gpu: _Count = None
    num_thread: _Count = None
    draft_num_predict: _Count = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None

    def sampling(self) -> dict[str, Any]:
        """Return the options of the request under their names in `SamplingParams`."""
        found = self.given_values()
        if found.get("stop") == []:  # an empty list means the same as no list
            del found["stop"]
        if self.num_predict is not None:
            found["max_tokens"] = self.num_predict if self.num_predict > 0 else None
        return found


class _Asked(fields.WireModel):
    """Fields of every request.

    Attributes:
        keep_alive: how long the model stays loaded after the request: seconds, or a duration such as 5m.
    """

    model: fields.Name
    options: Options | None = None
    keep_alive: KeepAlive = None

    _received: int = PrivateAttr(default_factory=time.perf_counter_ns)

    @property
    def received(self) -> int:
        """`time.perf_counter_ns()` when the request was parsed."""
        return self._received

    @property
    def keep_seconds(self) -> float | None:
        """Seconds for which the model stays loaded; None uses the operator's setting."""
        return None if self.keep_alive is None else seconds_of(self.keep_alive)

    @property
    def loads(self) -> bool:
        """Whether the request only asks to load the model."""
        return not any(getattr(self, name, None) for name in ("messages", "prompt", "suffix", "input"))

    def sampling(self) -> dict[str, Any]:
        return {} if self.options is None else self.options.sampling()


class _Generating(_Asked):
    """Fields that chat and generate share.

    Attributes:
        stream: null means true.
        format: format of the answer: json, or a JSON schema.
        think: whether the model thinks before it answers, or the reasoning effort.
        logprobs, top_logprobs: whether tokens have log-probabilities, and the number of alternatives for each token.
    """

    stream: Streams = True
    format: Format = None
    think: Think = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value and not info.data.get("logprobs"):
            raise fields.invalid("", "needs logprobs: true")
        return value

    def form(self) -> StructuredOutputsParams | None:
        """Return the constraint on the answer; raises `InvalidParameterError`."""
        if self.format in (None, ""):
            return None
        json: dict[str, Any] = {"json_object": True} if self.format == "json" else {"json": self.format}
        with rules_below(""):
            return constraint("format", **json)

    def sampling(self) -> dict[str, Any]:
        return {**super().sampling(), **({"logprobs": self.top_logprobs or 0} if self.logprobs else {})}


class OfferedFunction(FunctionDefinition):
    """A function that the model may call; its name may have characters that OpenAI refuses."""

    name: Annotated[
        str,
        fields.spelled(
            rf"[\w.\-:/]{{1,{fields.MAX_NAME}}}",
            f"must be 1 to {fields.MAX_NAME} letters, digits and _ . - : /, which models can write; {{!r:.80}} is not",
        ),
    ]


class OfferedTool(Tool):
    """A tool, which is always a function."""

    function: OfferedFunction


class CalledFunction(fields.WireModel):
    """The function of a call in an earlier answer; `index` and `description` have no effect."""

    name: fields.Name
    arguments: dict[str, Any] | None = None
    index: Annotated[int, Field(ge=0)] | None = None
    description: str | None = None


class ToolCall(fields.WireModel):
    """A call in an assistant's message; `type` has no effect."""

    function: CalledFunction
    id: fields.Name | None = None
    type: Literal["function"] | None = None


Images = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=fields.MAX_PARTS, fail_fast=True)]


def image_parts(images: Sequence[str] | None, path: str) -> tuple[ImagePart, ...]:
    given = [one if one[:5].lower() == "data:" else f"data:;base64,{one}" for one in images or ()]
    return tuple(ImagePart(source, path=f"{path}.{place}") for place, source in enumerate(given))


class Message(fields.WireModel):
    """One message of a conversation.

    Attributes:
        images: images in base64; they precede the text.
        tool_name, tool_call_id: the call that a tool message answers; without both, the first call without a result.
        name: what older clients call `tool_name`.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: Images | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=fields.MAX_TOOL_CALLS, fail_fast=True)] | None = None
    tool_name: fields.Name | None = None
    name: fields.Name | None = None
    tool_call_id: fields.Name | None = None


class ChatRequest(_Generating):
    """A conversation to continue: `POST /api/chat`. A request without messages only loads the model."""

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = REFUSED_CHAT_FIELDS

    messages: Annotated[list[Message], Field(max_length=fields.MAX_MESSAGES, fail_fast=True)] | None = None
    tools: (
        Annotated[
            list[OfferedTool], Field(max_length=fields.MAX_TOOLS, fail_fast=True), AfterValidator(check_chat_tools)
        ]
        | None
    ) = None


_TEMPLATED = ("system",), "system, which only a chat template can place"
_ALONE: Mapping[str, tuple[tuple[str, ...], str]] = {  # field -> fields that exclude it, and why
    "suffix": _TEMPLATED,
    "raw": _TEMPLATED,
    "context": (("suffix",), "suffix: a gap is filled without an earlier answer"),
    "images": (("raw", "suffix", "context"), "raw, suffix or context: only the model's template can place them"),
}


class GenerateRequest(_Generating):
    """A prompt to answer: `POST /api/generate`. Without a prompt or suffix it only loads the model.

    Attributes:
        system: a system message before the prompt.
        suffix: text after the answer; a model trained for fill-in-the-middle fills the gap.
        raw: whether the model continues the prompt itself, without its chat template.
        context: the `context` of an earlier answer, which this request continues.
        images: images in base64; they precede the prompt.
    """

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = REFUSED_GENERATE_FIELDS

    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    raw: bool | None = None
    context: Annotated[list[fields.TokenId], Field(max_length=MAX_CONTEXT, fail_fast=True)] | None = None
    images: Images | None = None

    @field_validator(*_ALONE)
    @classmethod
    def _combines(cls, value: Any, info: Any) -> Any:
        others, reason = _ALONE[info.field_name]
        if value and any(map(info.data.get, others)):
            raise fields.invalid("", f"cannot be combined with {reason}")
        return value


_Text = Annotated[str, Field(min_length=1)]


class EmbedRequest(_Asked):
    """Texts to embed: `POST /api/embed`. A request without a text only loads the model.

    Attributes:
        input: a text or several texts.
        truncate: whether texts that are too long are truncated at their end; false refuses them, None means true.
        dimensions: length of the vectors, for models trained for truncated vectors (Matryoshka).
    """

    input: Annotated[
        list[_Text],
        Field(max_length=MAX_INPUTS, fail_fast=True),
        BeforeValidator(lambda value: [] if value in (None, "") else [value] if isinstance(value, str) else value),
        WithJsonSchema(
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
        ),
    ] = Field(default_factory=list)
    truncate: bool | None = None
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None


class EmbeddingsRequest(_Asked):
    """One text to embed: `POST /api/embeddings`, the older route."""

    prompt: str | None = None


def ollama_parser(kind: type[fields.WireModel]) -> Any:
    """Return a parser of request bodies (bytes or objects), which raises `RequestError`."""
    return partial(parse_body, kind)
