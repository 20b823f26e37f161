# SPDX-License-Identifier: MIT
"""Choice of a model's tool-call and reasoning formats: by option, tokenizer, chat template or model type.

A response template (transformers 5) names fields of a message, each with its marks and its content's format. If it has
the marks of a row, that row is chosen; for other calls that are JSON between marks, and for reasoning between other
marks, a new row is made. Source: transformers, `utils/chat_parsing/response_templates.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from candle_vllm.core.errors import ConfigError, UnsupportedModelError
from candle_vllm.core.text import template_needs
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.openai.formats.events import CallArguments, CallStart, TextPiece
from candle_vllm.openai.formats.gemma import Gemma
from candle_vllm.openai.formats.json_calls import ARGUMENT_KEYS, NAME_KEYS, JsonCalls
from candle_vllm.openai.formats.layout import Body, Layout, ReasoningFormat, ToolFormat
from candle_vllm.openai.formats.named_calls import NamedJson
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS, by_name
from candle_vllm.openai.formats.tagged import Tagged

_OFF = ("none", "passthrough", "off")
_AUTO = "auto"
_GENERIC = "json"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")  # variables of templates
_Row = TypeVar("_Row", ToolFormat, ReasoningFormat)
_ByTemplate = Callable[[], tuple[_Row | None, str]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The formats of a model, and why they were chosen.

    Attributes:
        tools, reasoning: the formats; None if calls or reasoning are not parsed.
        needs: what the chat template requires of messages; None without a usable template.
    """

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    tools_reason: str
    reasoning_reason: str
    needs: template_needs.TemplateNeeds | None = None

    @property
    def shows_tools(self) -> bool:
        """Whether prompts show the tools of a request, and calls can be parsed."""
        return self.tools is not None and (self.needs is None or self.needs.writes_tools)


def choose_layout(
    *,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    template: str | Mapping[str, str] | None = None,
    response_template: Any | None = None,
    model_type: str | None = None,
    chat_template: ChatTemplate | None = None,
) -> Choice:
    """Choose the formats of a model.

    The first of these decides: the option; the tokenizer's response template; the output of the chat template, or the
    marks in its source; the model type. If none does and the chat template uses tools, calls are JSON.

    Args:
        tool_parser, reasoning_parser: names of formats here, in vLLM, SGLang or the Rust candle-vllm; "none", "off" and
            "passthrough" turn parsing off, and None and "auto" choose automatically.
        template: the chat template, or several by name.
        response_template: response template of the tokenizer (`tokenizer_config.json`).
        model_type: type in `config.json`, or a GGUF file's architecture.
        chat_template: `template`, already compiled; if it is None, it is compiled here.

    Raises:
        ConfigError: no format has the name in the option.
    """
    named = template if isinstance(template, Mapping) else {"default": template or ""}
    text = next((named[name] for name in ("tool_use", "default") if name in named), "")  # it is used with tools
    if chat_template is None and template:
        with suppress(UnsupportedModelError):
            chat_template = ChatTemplate(template, dict.fromkeys(_SPECIAL, ""))
    probe = template_needs.TemplateProbe(chat_template) if chat_template is not None else None
    needs = template_needs.template_needs(probe) if probe is not None else None
    kind = _plain(model_type or "")

    def tools_by_template() -> tuple[ToolFormat | None, str]:
        if probe is not None and needs is not None and needs.writes_calls:
            row = writer_of_calls(probe, as_text=needs.arguments_as_text)
            if row is not None:
                return row, "the chat template writes it"
        return marked_tools(text), "the chat template contains the format's marks"

    given = response_template, response_tools, tools_by_template, kind
    tools, tools_reason = _first(tool_parser, "tool_parser", TOOL_FORMATS, *given)
    if tools is None and not tools_reason:
        reads = needs.writes_tools if needs is not None else re.search(r"\btools\b", text) is not None
        tools = by_name(TOOL_FORMATS)[_GENERIC] if reads else None
        tools_reason = "the chat template uses tools, in no known format" if reads else "no sign of tools"

    def reasoning_by_template() -> tuple[ReasoningFormat | None, str]:
        row, reason = writer_of_thoughts(probe) if probe is not None else None, "the chat template writes it"
        if row is None:
            row, reason = marked_reasoning(text), "the chat template contains the format's marks"
        return row and _with_answer_marks(row, text, kind), reason

    given = response_template, response_reasoning, reasoning_by_template, kind
    reasoning, reasoning_reason = _first(reasoning_parser, "reasoning_parser", REASONING_FORMATS, *given)
    return Choice(tools, reasoning, tools_reason, reasoning_reason or "no sign of reasoning", needs)


def _first(
    option: str | None,
    setting: str,
    rows: tuple[_Row, ...],
    response_template: Any | None,
    translate: Callable[[Any], _Row | str],
    by_template: _ByTemplate[_Row],
    kind: str,
) -> tuple[_Row | None, str]:
    """Return the format that is found first, and the reason; the reason is empty if no source decides."""
    if option is not None and _plain(option) != _AUTO:
        return _named(option, setting, by_name(rows)), f"{setting} is {option!r}"
    note = ""
    if response_template is not None:
        found = translate(response_template)
        if not isinstance(found, str):
            return found, "the tokenizer's response_template defines it"
        note = f"; the tokenizer's response_template was not used: {found}"
    row, reason = by_template()
    if row is None and kind:
        row = next((one for one in rows if kind in map(_plain, one.model_types)), None)
        reason = "models of this type write it"
    return row, reason + note if row is not None else ""


def _with_answer_marks(row: ReasoningFormat, text: str, kind: str) -> ReasoningFormat:
    """Return a format with the row's marks and answer marks, if the template or model type indicates it; else `row`."""
    for other in REASONING_FORMATS:
        indicated = kind in map(_plain, other.model_types) or any(hint in text for hint in other.hints)
        if indicated and other.answer and (other.open, other.close) == (row.open, row.close):
            return other
    return row


def _named(option: str, setting: str, names: Mapping[str, _Row]) -> _Row | None:
    plain = _plain(option)
    if plain in _OFF:
        return None
    found = next((row for name, row in names.items() if _plain(name) == plain), None)
    if found is None:
        near = difflib.get_close_matches(option.lower(), names, n=3, cutoff=0.5)
        known = ", ".join(near or sorted({row.name for row in names.values()}))
        what = "the nearest are" if near else "the formats are"
        raise ConfigError(
            f"{setting} is {option!r:.100}, which is not a known format; {what} {known} (and {_AUTO}, {_OFF[0]})",
            setting,
        )
    return found


def _plain(name: str) -> str:
    """Return a name in lower case, without `-`, `_`, `.` and spaces."""
    return re.sub(r"[-_. ]", "", name.strip().lower())


_COMMON = frozenset({"```json", "functools"})  # too common in texts to indicate a format
_SHORT = 3  # minimum length of a text that distinguishes calls


def writer_of_calls(probe: template_needs.TemplateProbe, *, as_text: bool) -> ToolFormat | None:
    """Return the first row that parses the call in the template's output; rows with earlier marks are tried first."""
    written = probe.calls(as_text=as_text)
    if written is None:
        return None
    text, places = written.text, dict[str, int]()
    for row in TOOL_FORMATS:  # a mark that encloses other marks has the smallest offset
        places[row.name] = min((text.find(mark) for mark in (*row.opens, *row.names) if mark in text), default=-1)
    marked = sorted((row for row in TOOL_FORMATS if places[row.name] >= 0), key=lambda row: places[row.name])
    flows = [row for row in TOOL_FORMATS if row.flow is not None]
    bare = [row for row in TOOL_FORMATS if row.bare is not None]
    first = [dataclasses.replace(row, bodies=row.bodies[:1], bare=None) for row in marked]
    unmarked = [row for row in bare if not isinstance(row.bare, JsonCalls) or f'"{row.bare.arguments_key}"' in text]
    for row in (*first, *marked, *flows, *unmarked):
        if _calls(row, written) == [(template_needs.NAME, template_needs.ARGUMENTS)]:
            return next(own for own in TOOL_FORMATS if own.name == row.name)
    return None


def writer_of_thoughts(probe: template_needs.TemplateProbe) -> ReasoningFormat | None:
    """Return the first row that parses the reasoning in the template's output, beside calls or beside content."""
    calling = (probe.calls(as_text=as_text, thoughts=template_needs.THOUGHTS) for as_text in (False, True))
    for written in filter(None, itertools.chain(calling, (probe.thinking(),))):
        if template_needs.THOUGHTS not in written.text:
            continue
        for row in _own_first(REASONING_FORMATS):
            if _thoughts(row, written) == template_needs.THOUGHTS:
                return next(own for own in REASONING_FORMATS if own.name == row.name)
    return None


def marked_tools(text: str) -> ToolFormat | None:
    """Return the row whose marks in the source of a template have the most characters, or None."""
    sizes = {row.name: _tool_marks(row, text) for row in TOOL_FORMATS}
    best = max(TOOL_FORMATS, key=lambda row: sizes[row.name])
    return best if sizes[best.name] else None


def marked_reasoning(text: str) -> ReasoningFormat | None:
    """Return the row with both its marks, one distinctive mark, or else a hint in the source of a template, or None."""
    for row in _own_first(REASONING_FORMATS):
        for opening, closing in row.pairs.items():
            if (opening in text and closing in text) or ("/" in closing and (opening in text or closing in text)):
                return next(own for own in REASONING_FORMATS if own.name == row.name)
    return next((row for row in REASONING_FORMATS if any(hint in text for hint in row.hints)), None)


def _own_first(rows: Iterable[ReasoningFormat]) -> Iterator[ReasoningFormat]:
    """Yield every row with only its main marks, then with its other marks."""
    listed = list(rows)
    yield from (dataclasses.replace(row, others=()) for row in listed)
    yield from (row for row in listed if row.others)


def _tool_marks(row: ToolFormat, text: str) -> int:
    """Return the length of a row's longest opening mark or hint in a text plus required marks; 0 if one is missing."""
    opens = [mark for mark in (*row.opens, *row.names, *row.hints) if mark in text and mark not in _COMMON]
    needed = list(_literals(row.bodies[0])) if row.bodies else []
    if any(hint in text for hint in row.hints):
        needed = []
    if not opens or any(one not in text for one in needed):
        return 0
    return max(map(len, opens)) + sum(map(len, needed))


def _literals(body: Body) -> Iterator[str]:
    """Yield texts that every call in this form contains and that distinguish it from other forms."""
    found: tuple[str, ...] = ()
    if isinstance(body, Tagged):
        found = (body.name_open, body.name_end, body.key_open)
    elif isinstance(body, NamedJson):
        kinds = (re.sub(r"^\w+", "", name) for name in body.before_name)
        found = (*kinds, body.name_end, body.id_mark, body.id_end, "```json" if body.fenced else "")
    elif isinstance(body, Gemma):
        found = (body.prefix, body.quote)
    elif isinstance(body, JsonCalls) and body.name_key != "name":
        found = (body.name_key,)
    return (one for one in found if len(one) >= _SHORT)


def _calls(row: ToolFormat, written: template_needs.Written) -> list[tuple[str, Any]]:
    parser = OutputParser(Layout(None, row), tools={template_needs.NAME: template_needs.SCHEMA}, make_id=str)
    texts: list[list[str]] = []
    for event in (*parser.feed(written.text), *parser.finish(True)):
        if isinstance(event, CallStart):
            texts.append([event.name, ""])
        elif isinstance(event, CallArguments):
            texts[event.index][1] += event.text
    try:
        return [(name, json.loads(text)) for name, text in texts]
    except ValueError:
        return []


def _thoughts(row: ReasoningFormat, written: template_needs.Written) -> str:
    opening = row.open_mark(written.head)
    parser = OutputParser(Layout(row.led_by(opening), None), in_reasoning=bool(opening))
    events = (*parser.feed(written.text), *parser.finish(True))
    return "".join(event.text for event in events if isinstance(event, TextPiece) and event.kind == "reasoning")


_MOST_MARK = 256
_SPACE = re.compile(r"(?:\\s|\\n| |\n)[*+?]?")
_ESCAPED = re.compile(r"\\([^\w\s])|([^\\.^$*+?{}\[\]()|])")
_PLACEHOLDER = re.compile(r"\{content\.(\w+)\}")


def response_tools(template: Any) -> ToolFormat | str:
    """Return the format of the calls in a response template, or the reason why there is no such format."""
    field = _field(template, "tool_calls")
    if field is None:
        return "it has no field tool_calls"
    opens = tuple(mark.strip() for mark in _marks(field, "open"))
    if not opens:
        return "its calls have no readable opening mark"
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
    """Return the format of the reasoning in a response template, or the reason why there is no such format."""
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
    return "its reasoning has no readable opening and closing marks"


def _field(template: Any, name: str) -> Mapping[str, Any] | None:
    fields = template.get("fields") if isinstance(template, Mapping) else None
    field = fields.get(name) if isinstance(fields, Mapping) else None
    return field if isinstance(field, Mapping) else None


def _marks(field: Mapping[str, Any], side: str) -> Iterator[str]:
    """Yield the texts that a field opens or closes with; for a pattern, the plain text that its matches begin with."""
    given = field.get(side)
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, str) and 0 < len(one.strip()) <= _MOST_MARK:
            yield one
    pattern = field.get(f"{side}_pattern")
    if isinstance(pattern, str) and (text := _plain_beginning(pattern)):
        yield text


def _plain_beginning(pattern: str) -> str:
    """Return the text that every match of a pattern begins with, after white space."""
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
    """Yield each opening mark with the text between it and a name."""
    for body in row.bodies[:1]:
        starts = (body.prefix,) if isinstance(body, Gemma) else getattr(body, "before_name", ())
        yield from (mark + start for mark in row.opens for start in starts)


def _writes(body: Body, kind: str, field: Mapping[str, Any], opened: str) -> bool:
    """Whether the calls of a row have the form that a field describes."""
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
    function = field.get("transform")
    for _ in range(2):
        function = function.get("function", function) if isinstance(function, Mapping) else function
    keys = {"name": "name", "arguments": "arguments"}
    if isinstance(function, Mapping):
        for key in keys:
            found = _PLACEHOLDER.fullmatch(str(function.get(key, "")))
            if found is None:
                return "no format in the table writes calls as its transform does"
            keys[key] = found[1]
    if keys["name"] not in NAME_KEYS or keys["arguments"] not in ARGUMENT_KEYS:
        return f"no format has the keys {keys['name']!r:.40} and {keys['arguments']!r:.40} for a function and arguments"
    body = JsonCalls(
        closers=tuple(mark.strip() for mark in _marks(field, "close")),
        name_key=keys["name"],
        arguments_key=keys["arguments"],
    )
    return ToolFormat("response_template", opens=opens, bodies=(body,))
