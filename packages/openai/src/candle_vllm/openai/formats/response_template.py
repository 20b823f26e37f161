"""The `response_template` of a tokenizer (transformers 5) -> formats of the table.

Such a template names fields of a message, each with the marks around it and the way its inside is written. What has
the marks of a row is that row; calls that are JSON between marks make a row of their own.
Source: transformers, `utils/chat_parsing/response_templates.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from candle_vllm.openai.formats.gemma import Gemma
from candle_vllm.openai.formats.json_calls import ARGUMENT_KEYS, NAME_KEYS, JsonCalls
from candle_vllm.openai.formats.layout import Body, ReasoningFormat, ToolFormat
from candle_vllm.openai.formats.named_json import NamedJson
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS
from candle_vllm.openai.formats.tagged import Tagged

_MOST_MARK = 256
_SPACE = re.compile(r"(?:\\s|\\n| |\n)[*+?]?")
_ESCAPED = re.compile(r"\\([^\w\s])|([^\\.^$*+?{}\[\]()|])")
_PLACEHOLDER = re.compile(r"\{content\.(\w+)\}")


def response_tools(template: Any) -> ToolFormat | str:
    """The format of the calls in a response template, or why there is none."""
    field = _field(template, "tool_calls")
    if field is None:
        return "it has no field tool_calls"
    opens = tuple(_marks(field, "open"))
    if not opens:
        return "its calls begin with no mark that can be read"
    kind = field.get("content", "text")
    for row in TOOL_FORMATS:
        marks = (*row.opens, *row.names, *_before_names(row))
        if any(mark.startswith(opened) or opened.startswith(mark) for mark in marks for opened in opens) and (
            _writes(row.bodies[0], kind, field, "".join(opens))
        ):
            return row
    if kind == "json" and not field.get("content_args") and "?P<" not in str(field.get("open_pattern", "")):
        return _json_row(field, opens)
    return f"calls that begin with {opens[0]!r:.60} and are {kind!s:.40} have no row in the table of formats"


def response_reasoning(template: Any) -> ReasoningFormat | str:
    """The format of the thoughts in a response template, or why there is none."""
    field = next(
        (found for name in ("reasoning_content", "thinking", "reasoning") if (found := _field(template, name))), None
    )
    if field is None:
        return "it has no field reasoning_content"
    opens = [mark.strip() for mark in _marks(field, "open")]
    closes = [mark.strip() for mark in _marks(field, "close")]
    for row in REASONING_FORMATS:
        if row.open in opens and row.close in closes:
            return row
    if opens and closes and opens[0] and closes[0] and field.get("content", "text") == "text":
        return ReasoningFormat("response_template", opens[0], closes[0])
    return "its thoughts stand between no marks that can be read"


def _field(template: Any, name: str) -> Mapping[str, Any] | None:
    fields = template.get("fields") if isinstance(template, Mapping) else None
    field = fields.get(name) if isinstance(fields, Mapping) else None
    return field if isinstance(field, Mapping) else None


def _marks(field: Mapping[str, Any], side: str) -> Iterator[str]:
    """The texts that a field opens or closes with; of a pattern, the plain text that it begins with."""
    given = field.get(side)
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, str) and 0 < len(one.strip()) <= _MOST_MARK:
            yield one
    pattern = field.get(f"{side}_pattern")
    if isinstance(pattern, str) and (text := _plain_beginning(pattern)):
        yield text


def _plain_beginning(pattern: str) -> str:
    """The text that every match of a pattern begins with, white space before it left out."""
    place, text = 0, ""
    while place < len(pattern) and len(text) < _MOST_MARK:
        if not text and (space := _SPACE.match(pattern, place)):
            place = space.end()
            continue
        match = _ESCAPED.match(pattern, place)
        if match is None or pattern[match.end() : match.end() + 1] in ("*", "?", "{"):
            break
        text += match[1] or match[2]
        place = match.end()
    return "" if "|" in pattern.replace("\\|", "") else text


def _before_names(row: ToolFormat) -> Iterator[str]:
    """Marks with what stands between them and a name."""
    for body in row.bodies[:1]:
        starts = (body.prefix,) if isinstance(body, Gemma) else getattr(body, "before_name", ())
        yield from (mark + start for mark in row.opens for start in starts)


def _writes(body: Body, kind: str, field: Mapping[str, Any], opened: str) -> bool:
    """Whether a row's calls are written as a field's are."""
    arguments = field.get("content_args")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    if kind == "xml-inline":
        pattern = str(arguments.get("tag_pattern", ""))
        return isinstance(body, Tagged) and bool(body.key_open) and body.key_open in pattern.replace("\\", "")
    if kind != "json":
        return False
    if arguments.get("string_delims"):
        return isinstance(body, Gemma) and body.quote in str(arguments["string_delims"])
    named = "?P<name>" in str(field.get("open_pattern", ""))
    return isinstance(body, NamedJson) if named else isinstance(body, JsonCalls) and bool(opened)


def _json_row(field: Mapping[str, Any], opens: tuple[str, ...]) -> ToolFormat | str:
    """A row for calls that are JSON between marks."""
    function = field.get("transform")
    for _ in range(2):
        function = function.get("function", function) if isinstance(function, Mapping) else function
    keys = {"name": "name", "arguments": "arguments"}
    if isinstance(function, Mapping):
        for key in keys:
            found = _PLACEHOLDER.fullmatch(str(function.get(key, "")))
            if found is None:
                return "its calls are put together in a way that has no row in the table of formats"
            keys[key] = found[1]
    if keys["name"] not in NAME_KEYS or keys["arguments"] not in ARGUMENT_KEYS:
        return f"its calls name the function and the arguments {keys['name']!r:.40} and {keys['arguments']!r:.40}"
    body = JsonCalls(
        closers=tuple(mark.strip() for mark in _marks(field, "close")),
        name_key=keys["name"],
        arguments_key=keys["arguments"],
    )
    return ToolFormat("response_template", opens=tuple(mark.strip() for mark in opens), bodies=(body,))
