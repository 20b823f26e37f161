# SPDX-License-Identifier: MIT
"""How a model lays out a message: what its reasoning and its calls look like, and the same for one vocabulary.

The table of layouts is `table`. For a vocabulary, each special token in a text becomes one character that no text can
have: a mark that is a special token is then found where the model wrote that token, and not in a text that reads like
it. The characters are halves of surrogate pairs, which decoded UTF-8 never has.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from candle_vllm.openai.formats.output import CallSink, Output, call_id
from candle_vllm.openai.formats.reader import Need, Reader

THOUGHTS, CALL = "thoughts", "call"
"""States of `StopMarks` in which a flow's messages are no answer."""


class Body(Protocol):
    """A way to write calls."""

    def read(self, reader: Reader, calls: CallSink) -> Need[bool]:
        """Reads what follows the opening mark; False where that is no call, and nothing was made of it."""
        ...


class Flow(Protocol):
    """A way to write whole messages, where they are not text with marks in it."""

    def run(self, reader: Reader, output: Output, *, tools: bool, in_reasoning: bool = False) -> Need[None]:
        """Reads a message to its end; calls are text unless `tools`. Its thoughts may be open already."""
        ...

    def states(self, tools: Collection[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """`StopMarks.states` and `StopMarks.fresh` of a message in which tools of these names may be called."""
        ...


@dataclasses.dataclass(frozen=True)
class ReasoningFormat:
    """Thoughts between two marks.

    Attributes:
        name: of the format.
        open, close: the marks.
        others: further pairs that mean the same.
        strays: marks that mean nothing where they stand alone, and are left out.
        answer: strays that stand before and behind the text of an answer.
        flow: for messages that are no text with marks in it.
        aliases: names that others know it by.
        hints: texts in a chat template that tell of the format where the template writes no thoughts itself.
        model_types: of models that write it, as `config.json` and GGUF files name them.
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
        """Opening mark -> closing mark."""
        return {self.open: self.close, **dict(self.others)} if self.flow is None else {}

    def led_by(self, opening: str) -> ReasoningFormat:
        """The same with the pair first that `opening` begins; where a prompt opened the thoughts, that one counts."""
        if opening == self.open or opening not in self.pairs:
            return self
        closing = self.pairs[opening]
        others = tuple((begin, end) for begin, end in self.pairs.items() if begin != opening)
        return dataclasses.replace(self, open=opening, close=closing, others=others)


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """Calls in a message.

    Attributes:
        name: of the format.
        opens: marks that begin calls.
        bodies: what may follow such a mark; the first that fits counts.
        names: marks that begin calls and are the beginning of the body too, as a function's tag without the tag around.
        named: what follows those, where it is not the `bodies`: a text may well name such a tag.
        ends_thoughts: models call within thoughts that they have not closed; a call of a tool that is offered ends
            them.
        line_start: marks in `opens` that are text begin calls only at a line's beginning.
        on_lines: in thoughts, a call begins only at a line's beginning.
        bare: what calls without a mark look like; only at the beginning of a message.
        unmarked: the same, where no grammar writes them: models leave the mark out by mistake.
        bare_starts: the characters that those begin with.
        fenced: what calls look like that some models write into a block of JSON code instead.
        strays: marks that mean nothing where they stand alone, and are left out.
        answer: strays that stand before and behind the text of an answer.
        flow: for messages that are no text with marks in it.
        make_id: makes the ids of calls that bring none.
        aliases: names that others know it by.
        hints: texts in a chat template that tell of the format where the template writes no calls itself.
        model_types: of models that write it, as `config.json` and GGUF files name them.
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
    make_id: Callable[[int], str] = call_id
    aliases: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a message may hold; either may be None.

    Attributes:
        reasoning, tools: the formats.
        elsewhere: ways to write calls that are other models': a mark, "" for a way without one, and what follows it.
    """

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    elsewhere: tuple[tuple[str, Body], ...] = ()


_FIRST = 0xD800
_MOST = 0x800
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class BoundLayout:
    """A layout for one vocabulary.

    Attributes:
        layout: with the characters in place of special tokens.
        characters: token id -> character, of the special tokens that are part of a mark.
        names: token id -> text, of every special token.
    """

    layout: Layout
    characters: Mapping[int, str]
    names: Mapping[int, str]

    @property
    def shown(self) -> dict[str, str]:
        """Character -> text, for those who want to see special tokens."""
        return {character: self.names[index] for index, character in self.characters.items()}


def bind(layout: Layout, special_tokens: Mapping[str, int]) -> BoundLayout:
    """The layout for a vocabulary whose special tokens are these, by name."""
    literals = "\n".join(_literals(layout))
    used = [name for name in sorted(special_tokens, key=len, reverse=True) if name and name in literals][:_MOST]
    table = {name: chr(_FIRST + place) for place, name in enumerate(used)}
    return BoundLayout(
        layout=_translated(layout, table),
        characters={special_tokens[name]: character for name, character in table.items()},
        names={index: name for name, index in special_tokens.items()},
    )


class SpecialText:
    """One sequence's text with its special tokens as characters, those that are part of no mark left out.

    Args:
        bound: the layout.
        keep: leave the texts of those in.
    """

    def __init__(self, bound: BoundLayout, *, keep: bool = False) -> None:
        self._bound = bound
        self._keep = keep
        self._text = ""  # what is not given away yet
        self._offset = 0  # of its first character
        self._tokens: deque[tuple[int, int]] = deque()

    def add(self, text: str, special_tokens: Iterable[tuple[int, int]]) -> str:
        """The next text, and where special tokens stand: (offset in the sequence's whole text, id)."""
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
        """What was held back: a special token whose text was cut is plain text."""
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
    """The same with every name of a special token replaced, wherever it stands in a text."""
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
