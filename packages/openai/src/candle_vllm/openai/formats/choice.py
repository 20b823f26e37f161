# SPDX-License-Identifier: MIT
"""Choice of a model's tool-call and reasoning formats: by option, tokenizer, chat template or model type."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from candle_vllm.core.errors import ConfigError, UnsupportedModelError
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.template_needs import TemplateNeeds, TemplateProbe, template_needs
from candle_vllm.openai.formats.layout import Layout, ReasoningFormat, ToolFormat
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS, reasoning_names, tool_names
from candle_vllm.openai.formats.template_rows import (
    marked_reasoning,
    marked_tools,
    response_reasoning,
    response_tools,
    writer_of_calls,
    writer_of_thoughts,
)

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
    needs: TemplateNeeds | None = None

    @property
    def layout(self) -> Layout:
        """The layout with both formats."""
        return Layout(self.reasoning, self.tools)

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
    text = _text(template)
    probe = _probe(template, chat_template)
    needs = template_needs(probe) if probe is not None else None
    kind = _plain(model_type or "")

    def tools_by_template() -> tuple[ToolFormat | None, str]:
        if probe is not None and needs is not None and needs.writes_calls:
            row = writer_of_calls(probe, as_text=needs.arguments_as_text)
            if row is not None:
                return row, "the chat template writes it"
        return marked_tools(text), "the chat template contains the format's marks"

    given = response_template, response_tools, tools_by_template, kind
    tools, tools_reason = _first(tool_parser, "tool_parser", tool_names(), TOOL_FORMATS, *given)
    if tools is None and not tools_reason:
        reads = needs.writes_tools if needs is not None else re.search(r"\btools\b", text) is not None
        tools = tool_names()[_GENERIC] if reads else None
        tools_reason = "the chat template uses tools, in no known format" if reads else "no sign of tools"

    def reasoning_by_template() -> tuple[ReasoningFormat | None, str]:
        row, reason = writer_of_thoughts(probe) if probe is not None else None, "the chat template writes it"
        if row is None:
            row, reason = marked_reasoning(text), "the chat template contains the format's marks"
        return row and _with_answer_marks(row, text, kind), reason

    given = response_template, response_reasoning, reasoning_by_template, kind
    reasoning, reasoning_reason = _first(
        reasoning_parser, "reasoning_parser", reasoning_names(), REASONING_FORMATS, *given
    )
    return Choice(tools, reasoning, tools_reason, reasoning_reason or "no sign of reasoning", needs)


def _first(
    option: str | None,
    setting: str,
    names: Mapping[str, _Row],
    rows: tuple[_Row, ...],
    response_template: Any | None,
    translate: Callable[[Any], _Row | str],
    by_template: _ByTemplate[_Row],
    kind: str,
) -> tuple[_Row | None, str]:
    """Return the format that is found first, and the reason; the reason is empty if no source decides."""
    if option is not None and _plain(option) != _AUTO:
        return _named(option, setting, names), f"{setting} is {option!r}"
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


def _text(template: str | Mapping[str, str] | None) -> str:
    """Return the text of the template that is used with tools."""
    if isinstance(template, Mapping):
        return next((template[name] for name in ("tool_use", "default") if name in template), "")
    return template or ""


def _probe(template: str | Mapping[str, str] | None, compiled: ChatTemplate | None) -> TemplateProbe | None:
    """Return a probe of the template; None without a template, or if it cannot be compiled."""
    if compiled is None and template:
        try:
            compiled = ChatTemplate(template, dict.fromkeys(_SPECIAL, ""))
        except UnsupportedModelError:
            return None
    return TemplateProbe(compiled) if compiled is not None else None
