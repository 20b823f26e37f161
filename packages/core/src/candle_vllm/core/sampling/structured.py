# SPDX-License-Identifier: MIT
"""StructuredOutputsParams: the format of a text. Field names are vLLM's, except `reasoning_*` and `around`.

This module checks types and sizes; `LlguidanceBackend` checks the rest when it compiles.
"""

from __future__ import annotations

import json as _json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from msgspec.structs import force_setattr

from candle_vllm.core.arguments import ExplainedStruct
from candle_vllm.core.errors import InvalidParameterError

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
MAX_SCHEMA = 1 << 20  # characters of a schema or a structural tag, as JSON
MAX_REGEX = 1 << 16  # characters
MAX_GRAMMAR = 1 << 20  # characters
MAX_CHOICES = 50_000
MAX_CHOICE_CHARACTERS = 1 << 20  # maximum characters of all choices together
MAX_WHITESPACE_PATTERN = 256  # characters
MAX_REASONING_MARK = 256  # characters
_PARAM = "structured_outputs"
_MARKS = ("__dataclass_fields__", "__total__", "__struct_fields__")  # dataclass, TypedDict, msgspec struct


class HasJsonSchema(Protocol):
    """A class with a JSON schema of its objects, such as a pydantic model."""

    def model_json_schema(self) -> Mapping[str, Any]: ...


if TYPE_CHECKING:
    Schema = str | Mapping[str, Any] | bool | HasJsonSchema | type
else:
    Schema = str | Mapping[str, Any] | bool  # the types that can be sent to another process


class StructuredOutputsParams(ExplainedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The format that a generated text must have. Exactly one of the first six attributes must be given.

    The format has priority over `SamplingParams.min_tokens` and `ignore_eos`: the text ends if nothing else may follow.

    Attributes:
        json: a JSON schema as a mapping or a string; true for any JSON value; or a pydantic class, dataclass, TypedDict
            or msgspec Struct with that schema.
        regex: a regular expression in the syntax of Rust's `regex` crate that the whole text matches.
        choice: strings, one of which is the whole text.
        grammar: a grammar in llguidance's dialect of Lark, or in llama.cpp's GBNF.
        json_object: true for any JSON object.
        structural_tag: tagged parts in free text: vLLM's older form (`structures`, `triggers`), or xgrammar's newer one
            (`type` "structural_tag", `format`), as a mapping or a JSON string.
        whitespace_pattern: a regular expression for whitespace between JSON tokens. The default, at most two spaces or
            a newline and indentation, prevents whitespace without end.
        disable_any_whitespace: no whitespace between JSON tokens.
        reasoning_start: mark with which the text may begin (after whitespace); from there to `reasoning_end` the text
            is free. If only `reasoning_end` is given, the text begins inside the reasoning.
        reasoning_end: mark that ends the reasoning; the format applies after it. The name of a special token means that
            token, in both marks and in the texts of a structural tag.
        around: a grammar, in the syntax of `grammar`, of the whole text after the reasoning; in it, `@form` stands for
            the format. It allows marks around an answer, or tool calls instead of an answer.
    """

    json: Schema | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    reasoning_start: str | None = None
    reasoning_end: str | None = None
    around: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.json, type):
            force_setattr(self, "json", schema_of(self.json))
        given = [name for name in KINDS if getattr(self, name) not in (None, *_NOT_ASKED.get(name, ()))]
        if len(given) != 1:
            what = f"it has {' and '.join(given)}" if given else "it has none"
            raise refused(f"must have exactly one of {', '.join(KINDS)}; {what}")
        for name, most in _MAX_CHARACTERS.items():
            _text(name, getattr(self, name), most)
        for name in ("json", "structural_tag"):
            if isinstance(getattr(self, name), str):
                _text(name, getattr(self, name), MAX_SCHEMA)
        self._check_kinds()
        if self.reasoning_start is not None and self.reasoning_end is None:
            raise refused("reasoning_start needs reasoning_end: give the mark that ends the reasoning too")
        if self.around is not None and "@form" not in self.around:
            raise refused("around must have @form, which stands for the format")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise refused("give whitespace_pattern or disable_any_whitespace, not both")

    @property
    def kind(self) -> str:
        """The name in `KINDS` of the given format."""
        return next(name for name in KINDS if getattr(self, name) not in (None, *_NOT_ASKED.get(name, ())))

    def _check_kinds(self) -> None:
        if not isinstance(self.json, (str, Mapping, bool, type(None))):
            raise refused(f"json must be a JSON schema: an object, its JSON, or true, not {type(self.json).__name__}")
        if not isinstance(self.structural_tag, (str, Mapping, type(None))):
            raise refused("structural_tag must be an object or a JSON string")
        for name in ("json_object", "disable_any_whitespace"):
            if getattr(self, name) not in (None, True, False):
                raise refused(f"{name} must be true or false")
        if self.choice is None:
            return
        if isinstance(self.choice, (str, bytes)) or not isinstance(self.choice, Sequence):
            raise refused("choice must be a list of texts")
        if not 0 < len(self.choice) <= MAX_CHOICES:
            raise refused(f"choice must have 1 to {MAX_CHOICES} texts, not {len(self.choice)}")
        if not all(isinstance(text, str) and text for text in self.choice):
            raise refused("every choice must be a text of at least one character")
        if sum(map(len, self.choice)) > MAX_CHOICE_CHARACTERS:
            raise refused(f"the choices have more than {MAX_CHOICE_CHARACTERS} characters together")


_NOT_ASKED: Mapping[str, tuple[bool, ...]] = {"json_object": (False,)}
_MAX_CHARACTERS: Mapping[str, int] = {
    "regex": MAX_REGEX, "grammar": MAX_GRAMMAR, "around": MAX_GRAMMAR, "whitespace_pattern": MAX_WHITESPACE_PATTERN,
    "reasoning_start": MAX_REASONING_MARK, "reasoning_end": MAX_REASONING_MARK,
}  # fmt: skip


def refused(message: str) -> InvalidParameterError:
    """Return the error for a request whose format is invalid or not supported."""
    return InvalidParameterError(f"structured_outputs: {message}", _PARAM)


def schema_of(model: Any) -> Mapping[str, Any]:
    """Return the JSON schema of a pydantic class (without importing pydantic), dataclass, TypedDict or msgspec Struct.

    Raises InvalidParameterError if the class has no JSON schema.
    """
    pydantics = callable(getattr(model, "model_json_schema", None))
    if not pydantics and not any(hasattr(model, mark) for mark in _MARKS):
        raise refused(
            f"json is the class {model.__name__:.80}, which has no model_json_schema and is no dataclass, TypedDict or "
            "Struct of msgspec: give a JSON schema"
        )
    try:
        return model.model_json_schema() if pydantics else msgspec.json.schema(model)
    except Exception as error:  # a field of the class has no JSON type
        raise refused(f"json: {model.__name__:.80} has no JSON schema: {error!s:.300}") from error


def parsed_json(name: str, value: Schema) -> Any:
    """Parse a schema or a structural tag into fresh dicts and lists, which the caller may change.

    Raises InvalidParameterError for invalid JSON, nested too deeply, or longer than `MAX_SCHEMA`.
    """
    try:
        text = value if isinstance(value, str) else _json.dumps(value, default=plain_json, allow_nan=False)
        if len(text) > MAX_SCHEMA:
            raise refused(f"{name} has {len(text)} characters as JSON; at most {MAX_SCHEMA} are allowed")
        return _json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise refused(f"{name} is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise refused(f"{name} is not JSON: {error}") from None


def plain_json(value: object) -> object:
    """Convert any mapping or sequence to a type that JSON encoders accept."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _text(name: str, value: Any, most: int) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise refused(f"{name} must be a text, not {type(value).__name__}")
    if not 0 < len(value) <= most:
        raise refused(f"{name} must have 1 to {most} characters, not {len(value)}")
    check_whole(name, value)


def check_whole(name: str, text: str) -> None:
    """Refuse a text that has half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(f"{name} has half a surrogate pair, which UTF-8 cannot encode: send whole characters") from None


_RAN_OUT = MappingProxyType({
    "too many expressions": "a token needs more states of the grammar's regular expressions than are allowed",
    "too many states": "the answers with this grammar have used all states that its regular expressions may have",
})  # fmt: skip
_MAX_SHORTENED = 300  # characters of a compiler's message after which it is cut


def shortened(error: str) -> str:
    """Shorten a message of the compiler to one line, without the text that it quotes."""
    if "oneOf constraints are not supported" in error:
        return "oneOf needs options that exclude each other for certain, as by a required const; use anyOf"
    text = error.removesuffix("<non-verbose/>").replace("NoExtensionBias", "no token is allowed here")
    if "\nerror: " in text:
        text = text[text.rindex("\nerror: ") + len("\nerror: ") :]
    if "lexer error: " in text:
        text = next((said for what, said in _RAN_OUT.items() if what in text), text)
    line = " ".join(text.split("\n   ")[0].split())
    return line if len(line) <= _MAX_SHORTENED else line[:_MAX_SHORTENED] + "..."
