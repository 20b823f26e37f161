"""Special tokens of a vocabulary in a text: each becomes one character that no text can have.

A mark that is a special token is then found where the model wrote that token, and nowhere else: not in a text that
reads like it. The characters are halves of surrogate pairs, which decoded UTF-8 never has.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from candle_vllm.openai.formats.layout import Layout

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
        """What was held back: a special token whose text was cut is none."""
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
