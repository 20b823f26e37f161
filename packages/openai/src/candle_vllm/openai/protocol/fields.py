"""What every request object shares: strict types, no unknown names, and the tables of names with no effect here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_NAME = 256  # characters of a model name, participant name or call id
MAX_MESSAGES = 2048
MAX_PARTS = 1024  # content parts of one message
MAX_TOOL_CALLS = 128  # of one message
MAX_DOCUMENTS = 256
MAX_TEMPLATE_KWARGS = 64
MAX_PROMPTS = 128  # of one completion request
MAX_CHOICES = 256  # prompts times n
MAX_BAD_WORDS = 256
MAX_LOGIT_BIAS = 1024
MAX_PROMPT_LOGPROBS = 1 << 18  # of an answer: prompt tokens x n x (logprobs + 1)
MAX_PRIORITY = (1 << 31) - 1

TokenId = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class Refusal(NamedTuple):
    """Why a name that others define is refused, and the values that ask for nothing and so may stand."""

    reason: str
    neutral: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """True for null and the neutral values."""
        return value is None or any(type(value) is type(one) and value == one for one in self.neutral)


_LATER_TOOLS = "tool calls are not implemented yet"
_LATER_STRUCTURED = "structured output is not implemented yet"
_OLD_FUNCTIONS = "OpenAI replaced it by tools, and tool calls are not implemented yet"
_INTERNAL = "it belongs to another server's internals"

REFUSED_FIELDS: Mapping[str, Refusal] = {
    "tools": Refusal(_LATER_TOOLS, ([],)),
    "tool_choice": Refusal(_LATER_TOOLS, ("none", "auto")),
    "functions": Refusal(_OLD_FUNCTIONS, ([],)),
    "function_call": Refusal(_OLD_FUNCTIONS, ("none", "auto")),
    "structured_outputs": Refusal(_LATER_STRUCTURED),
    "guided_json": Refusal(_LATER_STRUCTURED),
    "guided_regex": Refusal(_LATER_STRUCTURED),
    "guided_choice": Refusal(_LATER_STRUCTURED),
    "guided_grammar": Refusal(_LATER_STRUCTURED),
    "audio": Refusal("audio output is not implemented"),
    "prediction": Refusal("predicted output is not implemented"),
    "web_search_options": Refusal("the server searches no web"),
    "moderation": Refusal("the server moderates nothing"),
    "suffix": Refusal("filling in the middle is not implemented", ("",)),
    "use_beam_search": Refusal("beam search is not implemented", (False,)),
    "length_penalty": Refusal("beam search is not implemented", (1, 1.0)),
    "repeat_last_n": Refusal("penalties look at the whole text"),
    "chat_template": Refusal("only the model's own template is used, because a template is a program"),
    "chat_template_format": Refusal("only the model's own template is used"),
    "mm_processor_kwargs": Refusal("the server takes text only", ({},)),
    "spaces_between_special_tokens": Refusal("spacing is the tokenizer's", (True,)),
    "return_tokens_as_token_ids": Refusal("use return_token_ids", (False,)),
    "truncate_prompt_tokens": Refusal("prompts are never cut"),
    "logits_processors": Refusal("a request cannot bring code", ([],)),
    "kv_transfer_params": Refusal(_INTERNAL, ({},)),
    "vllm_xargs": Refusal(_INTERNAL, ({},)),
}

ADVISORY_FIELDS: Mapping[str, str] = {
    "user": "names the caller's user; the server keeps no per-user state",
    "safety_identifier": "names the caller's user; the server keeps no per-user state",
    "metadata": "labels stored answers; nothing is stored",
    "store": "asks to keep the answer; nothing is stored",
    "service_tier": "chooses a price; there is one tier",
    "prompt_cache_key": "routes to a warm cache; there is one prefix cache for all",
    "prompt_cache_retention": "bounds the cache's life; blocks stay until memory is needed",
    "prompt_cache_options": "sets cache breakpoints; every full block of every prompt is cached",
    "parallel_tool_calls": "without tools there is nothing to allow",
    "verbosity": "a hint that open models are not trained on",
}


def rule_error(kind: str, field: str, text: str) -> PydanticCustomError:
    """A refusal at `field` (a dotted path below the object being checked).

    `kind` is `unknown_field`, `unsupported_field` or `invalid_field`; `text` follows the path in the message.
    """
    return PydanticCustomError(kind, "{text}", {"field": field, "text": text})  # pyright: ignore[reportArgumentType]


def unsupported(field: str, reason: str) -> PydanticCustomError:
    """Something that is defined elsewhere and not implemented here."""
    return rule_error("unsupported_field", field, f"is not supported: {reason}")


def invalid(field: str, text: str) -> PydanticCustomError:
    """A value that cannot be."""
    return rule_error("invalid_field", field, text)


class WireModel(BaseModel):
    """An object of a request: exact types (no "1" for 1, no true for 1), finite numbers, no unknown names."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, hide_input_in_errors=True)

    refused_fields: ClassVar[Mapping[str, Refusal]] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_known_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        cls.check_kind(data)
        extra = [name for name in data if name not in cls.model_fields]
        if not extra:
            return data
        for name in extra:
            refusal = cls.refused_fields.get(name)
            if refusal is None:
                raise rule_error("unknown_field", str(name), cls._suggestion(str(name)))
            if not refusal.accepts(data[name]):
                raise unsupported(name, refusal.reason)
        return {name: value for name, value in data.items() if name not in extra}

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Refuses objects of another kind before their names are looked at."""

    @classmethod
    def _suggestion(cls, name: str) -> str:
        near = difflib.get_close_matches(name[:MAX_NAME], [*cls.model_fields, *cls.refused_fields], n=1)
        return f"is not a known field; did you mean {near[0]!r}?" if near else "is not a known field"
