# SPDX-License-Identifier: MIT
"""Layout of a model's messages: its reasoning and call formats; and a layout that is bound to one vocabulary.

In a bound layout and in the parsed text, each special token of a mark is one surrogate character, which decoded UTF-8
never contains: the mark is then found where the model generated the token, not where text spells it.
"""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from candle_vllm.openai.formats.output import CallSink, Output, call_id
from candle_vllm.openai.formats.reader import SPACE, Need, Reader

THOUGHTS, CALL = "thoughts", "call"
"""States of `StopMarks` (`core/text/detokenizer.py`) in which a message is not text of the answer."""


class Body(Protocol):
    """A format of tool calls."""

    def read(self, reader: Reader, calls: CallSink) -> Need[bool]:
        """Parse calls, after their opening mark if any; return False, without any event, if there is no call."""


class Flow(Protocol):
    """A format of whole messages, for messages that are not text with marks."""

    def run(self, reader: Reader, output: Output, *, tools: bool, in_reasoning: bool = False) -> Need[None]:
        """Parse a message to its end; calls are text unless `tools`. `in_reasoning`: the prompt opened reasoning."""

    def states(self, tools: Collection[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Return `StopMarks.states` and `StopMarks.fresh` of a message in which tools of these names may be called."""


@dataclasses.dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning between two marks.

    Attributes:
        open, close: the marks.
        others: further pairs of opening and closing marks.
        strays: marks that have no meaning for the parser, such as marks around an answer; the answer omits them.
        answer: pairs of strays before and after the text of an answer; the first of a pair, if special, ends reasoning.
        flow: the format of whole messages, if messages are not text with marks.
        aliases: names of the format in other servers.
        hints: texts in a chat template that indicate the format if no marks do; with `answer`, also beside its marks.
        model_types: types of models that write it, as in `config.json` and GGUF files.
    """

    name: str
    open: str = "<think>"
    close: str = "</think>"
    others: tuple[tuple[str, str], ...] = ()
    strays: tuple[str, ...] = ()
    answer: tuple[tuple[str, str], ...] = ()
    flow: Flow | None = None
    aliases: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()

    @property
    def pairs(self) -> dict[str, str]:
        """Opening mark -> closing mark; empty if there is a `flow`."""
        return {self.open: self.close, **dict(self.others)} if self.flow is None else {}

    def open_mark(self, prompt_tail: str, *, continued: bool = False) -> str:
        """Return the mark with which a prompt opens the reasoning, so that the answer begins in it; "" without one.

        Args:
            prompt_tail: end of the prompt, long enough to contain the beginning of the answer.
            continued: whether the prompt ends with the beginning of an answer, which may contain reasoning.
        """
        ends = {opening: (closing,) for opening, closing in self.pairs.items()}
        if self.flow is not None:
            ends = {self.open: getattr(self.flow, "ends", (self.close,))}
        found, last = "", -1
        for opening, closing in ends.items():
            place = prompt_tail.rfind(opening)
            rest = prompt_tail[place + len(opening) :]
            if place > last and (not any(end in rest for end in closing) if continued else not rest.strip(SPACE)):
                found, last = opening, place
        return found

    def led_by(self, opening: str) -> ReasoningFormat:
        """Return the format with the pair of the mark `opening` first; a prompt may open the reasoning by this mark."""
        if opening == self.open or opening not in self.pairs:
            return self
        closing = self.pairs[opening]
        others = tuple((begin, end) for begin, end in self.pairs.items() if begin != opening)
        return dataclasses.replace(self, open=opening, close=closing, others=others)


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """Format of the tool calls in a message.

    Attributes:
        opens: marks that begin calls.
        bodies: call formats that may follow such a mark; the first that matches is used.
        names: marks that begin both calls and their body, such as a function's tag without an enclosing tag.
        named: format of calls that begin with `names`, stricter because text may mention such a tag; None: `bodies`.
        ends_thoughts: whether calls end unclosed reasoning; a call whose mark is text must have an offered tool's name.
        line_start: whether marks in `opens` that are not special tokens begin calls only at the beginning of a line.
        on_lines: whether a call in reasoning whose mark is text begins only at the beginning of a line.
        bare: format of calls without an opening mark, at the beginning of a message or after reasoning.
        unmarked: like `bare`, for models that omit the mark by mistake; grammars never write this format.
        bare_starts: first characters of calls without an opening mark.
        fenced: format of calls that some models write in a JSON code block instead of after a mark.
        strays, answer, flow: see `ReasoningFormat`.
        argument_tags: whether an argument is a tag with its name (`<path>`); special tokens of this form are text.
        make_id: see `CallSink`.
        aliases: names of the format in other servers.
        hints: texts in a chat template that indicate the format if the template writes no calls itself.
        model_types: types of models that write it, as in `config.json` and GGUF files.
    """

    name: str
    opens: tuple[str, ...] = ()
    bodies: tuple[Body, ...] = ()
    names: tuple[str, ...] = ()
    named: Body | None = None
    ends_thoughts: bool = False
    line_start: bool = False
    on_lines: bool = False
    bare: Body | None = None
    unmarked: Body | None = None
    bare_starts: str = ""
    fenced: Body | None = None
    strays: tuple[str, ...] = ()
    answer: tuple[tuple[str, str], ...] = ()
    flow: Flow | None = None
    argument_tags: bool = False
    make_id: Callable[[int], str] = call_id
    aliases: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """Formats of the reasoning and the calls in a message; either may be None.

    Attributes:
        reasoning, tools: the formats.
        elsewhere: call formats of other models that are parsed too: pairs of opening mark ("" without one) and format.
    """

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    elsewhere: tuple[tuple[str, Body], ...] = ()


_FIRST = 0xD800
_MOST = 0x800
_TAG = re.compile(r"</?[A-Za-z_][A-Za-z0-9_.-]*>")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class BoundLayout:
    """A layout for one vocabulary.

    Attributes:
        layout: the layout with characters instead of special tokens.
        characters: token id -> character, for special tokens in marks; or -> text, for special tokens that are read
            as text.
        names: token id -> text, for every special token.
    """

    layout: Layout
    characters: Mapping[int, str]
    names: Mapping[int, str]

    @property
    def shown(self) -> dict[str, str]:
        """Character -> text of the special token."""
        return {character: self.names[index] for index, character in self.characters.items()}


def bind(layout: Layout, special_tokens: Mapping[str, int]) -> BoundLayout:
    """Return the layout for a vocabulary with these special tokens (name -> id)."""
    literals = "\n".join(_literals(layout))
    used = [name for name in sorted(special_tokens, key=len, reverse=True) if name and name in literals][:_MOST]
    table = {name: chr(_FIRST + index) for index, name in enumerate(used)}
    named = layout.tools is not None and layout.tools.argument_tags
    tags = {name: name for name in special_tokens if named and name not in table and _TAG.fullmatch(name)}
    return BoundLayout(
        layout=_translated(layout, table),
        characters={special_tokens[name]: character for name, character in (table | tags).items()},
        names={index: name for name, index in special_tokens.items()},
    )


class SpecialText:
    """Text of one sequence with special tokens as characters; special tokens outside of marks are removed.

    Args:
        keep: whether special tokens outside of marks stay as text.
    """

    def __init__(self, bound: BoundLayout, *, keep: bool = False) -> None:
        self._bound = bound
        self._keep = keep
        self._text = ""  # text that is not returned yet
        self._offset = 0  # offset of its first character
        self._tokens: deque[tuple[int, int]] = deque()

    def add(self, text: str, special_tokens: Iterable[tuple[int, int]]) -> str:
        """Add text and its special tokens, (offset in the sequence's whole text, id); return the complete part."""
        self._tokens.extend(special_tokens)
        if not self._tokens and not self._text:
            self._offset += len(text)
            return text
        self._text += text
        parts: list[str] = []
        while self._tokens:
            offset, token = self._tokens[0]
            name = self._bound.names.get(token, "")
            start = offset - self._offset
            if len(self._text) < start + len(name):
                parts.append(self._take(max(0, start)))
                return "".join(parts)
            parts.append(self._take(start))
            self._take(len(name))
            parts.append(self._bound.characters.get(token, name if self._keep else ""))
            self._tokens.popleft()
        parts.append(self._take(len(self._text)))
        return "".join(parts)

    def finish(self) -> str:
        """Return the text that was held back: an incomplete special token is plain text."""
        return self._take(len(self._text))

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        self._offset += len(taken)
        return taken


def _literals(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _literals(one)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _literals(getattr(value, field.name))


def _translated(value: _T, table: Mapping[str, str]) -> _T:
    """Replace special tokens by their characters in all strings of a value."""
    new: Any = value
    if isinstance(value, str):
        for name, character in table.items():
            new = new.replace(name, character)
    elif isinstance(value, tuple):
        new = tuple(_translated(one, table) for one in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        new = dataclasses.replace(value, **{name: _translated(part, table) for name, part in fields.items()})
    return new
