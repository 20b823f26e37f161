# SPDX-License-Identifier: MIT
"""The tokens of a vocabulary sorted by their bytes, and masks without tokens with parts of several array elements.

Used for arrays of unique elements (`unique_items`), and made once for a model when it is first needed.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

WHITE = b" \t\r\n"
STOPS = b",]}" + WHITE  # bytes that end a number or a name

_SPACE = rb"[ \t\r\n]*"
_TEXT = rb'"(?:[^"\\]|\\.)*"'
_NAME = rb"[-+.0-9A-Za-z]+"
_ELEMENT = rb"(?:" + _TEXT + rb"|" + _NAME + rb")"
_LEADING = re.compile(rb'(?:\A|,)([ \t\r\n]*)(?=[-0-9A-Za-z",])')
_IN_STRING = re.compile(rb'(?:[^"\\]|\\.)*"', re.DOTALL)  # the rest of a string
_COMMA = re.compile(_SPACE + rb",")
_OPENS_NEXT = re.compile(_SPACE + rb"," + _SPACE + rb'"?')
_BEFORE = re.compile(_SPACE + _ELEMENT + _SPACE + rb",", re.DOTALL)
_AFTER = re.compile(_SPACE + rb"," + _SPACE + _ELEMENT + _SPACE + rb",", re.DOTALL)
_NAME_ENDS = re.compile(rb"[-+.0-9A-Za-z]*" + _SPACE + rb",")

_NUMBER = rb"([-+.0-9eE]*)(?=[ \t\r\n,\]}]|\Z)"
_LEADS = {
    "value": re.compile(_SPACE + rb"(?=[-0-9])" + _NUMBER),
    "after": re.compile(_SPACE + rb"," + _SPACE + rb"(?=[-0-9])" + _NUMBER),
    "name": re.compile(_NUMBER),
}
_DIGITS = [bytes([digit]) for digit in b"0123456789"]
_EXPONENT = re.compile(rb"[eE+]")
_MAX_DIGITS = 15  # two different decimals of at most this many digits are different floats


class Neighbours:
    """Tokens by their bytes.

    Args:
        tokens: the bytes of each token; tokens without bytes are ignored.
        special: ids that are not text.
        words: int32 words of a mask.

    Attributes:
        whole: the span of all tokens in their order.
        leading: the whitespace, or b"", that tokens have before an element or a comma.
        outside: masks [words] of the tokens that may come outside of strings, by mode.
        in_string: masks of tokens allowed in a string, by whether it follows a backslash, and is an array's element.
        not_going_on: masks without the tokens that end an element and have a comma after it, by mode.
        not_opening: masks without the tokens that end an element and open a string, by mode.
    """

    def __init__(self, tokens: Sequence[bytes], special: Iterable[int], words: int) -> None:
        ids = sorted({token for token, text in enumerate(tokens) if text} - set(special), key=tokens.__getitem__)
        self._texts = [tokens[token] for token in ids]
        self._ids = np.array(ids, np.int64)
        self._words = words
        self.whole = (0, len(ids))
        self.leading = sorted({white for text in self._texts for white in _LEADING.findall(text)})
        self._with_comma = [(token, tokens[token]) for token in ids if b"," in tokens[token]]
        free, value, after, name = map(self._without, (_opens, _repeats_before, _repeats_after, _repeats_behind_name))
        self.outside = {"free": free, "key": free, "colon": free, "value": value, "after": after, "name": name}
        self.in_string = {
            (escaped, element): self._without(partial(_repeats_behind_text, escaped=escaped, element=element))
            for escaped in (False, True)
            for element in (False, True)
        }
        self._plain: dict[tuple[str, int, bool, bytes], NDArray[np.int32]] = {}
        self._numbers = {mode: self._with_number(lead) for mode, lead in _LEADS.items()}
        self.not_going_on = {mode: self._without(partial(_goes_on, mode=mode)) for mode in ("string", "name")}
        self.not_opening = {mode: self._without(partial(_opens_text, mode=mode)) for mode in ("string", "name")}

    def behind(self, said: bytes, span: tuple[int, int]) -> tuple[int, int] | None:
        """Return the span of the tokens in `span` that begin with `said`; None if no token does."""
        first = bisect_left(self._texts, said, *span)
        if first == span[1] or not self._texts[first].startswith(said):
            return None
        most = said.rstrip(b"\xff")  # with its last byte plus 1 it follows all texts with this beginning
        last = bisect_left(self._texts, most[:-1] + bytes([most[-1] + 1]), first, span[1]) if most else span[1]
        return first, last

    def take_out(self, bits: NDArray[np.int32], spans: Iterable[tuple[int, int]]) -> None:
        """Clear the bits of spans of tokens."""
        for first, last in spans:
            self._clear(bits, self._ids[first:last])

    def take_out_numbers(self, bits: NDArray[np.int32], mode: str, begun: bytes) -> None:
        """Clear the bits of tokens that would spell a number in another way than the plain one.

        `mode` is value, after or name; for name, `begun` is the number's beginning, b"" if the name is no number.
        """
        if mode == "name" and not begun:
            return
        digits, fraction = sum(map(begun.count, _DIGITS)), b"." in begun
        key = mode, digits, fraction, begun[:2] if len(begun) <= 2 else b""  # everything that the rule depends on
        if key not in self._plain:
            wrong = [token for token, text, ends in self._numbers[mode] if not is_plain_number(begun + text, ends=ends)]
            self._plain[key] = np.full(self._words, -1, np.int32)
            self._clear(self._plain[key], np.array(wrong, np.int64))
        np.bitwise_and(bits, self._plain[key], out=bits)
        if mode == "name" and not is_plain_number(begun, ends=True):
            self.take_out(bits, filter(None, (self.behind(bytes([stop]), self.whole) for stop in STOPS)))

    def _without(self, forbids: Callable[[bytes], bool]) -> NDArray[np.int32]:
        bits = np.full(self._words, -1, np.int32)
        self._clear(bits, np.array([token for token, text in self._with_comma if forbids(text)], np.int64))
        return bits

    def _with_number(self, lead: re.Pattern[bytes]) -> list[tuple[int, bytes, bool]]:
        """Return the tokens that have a part of a number after `lead`: id, part, whether the number ends in it."""
        found = list[tuple[int, bytes, bool]]()
        for token, text in zip(self._ids.tolist(), self._texts):
            if (match := lead.match(text)) is not None and match[1]:
                found.append((token, match[1], match.end() < len(text)))
        return found

    @staticmethod
    def _clear(bits: NDArray[np.int32], ids: NDArray[np.int64]) -> None:
        np.bitwise_and.at(bits.view(np.uint32), ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))


def is_plain_number(text: bytes, *, ends: bool = False) -> bool:
    """Return whether a number that `ends`, or a number's beginning, has the plain spelling (see `unique_items`)."""
    digits = len(text) - text.count(b"-") - text.count(b".")
    if _EXPONENT.search(text) is not None or digits > _MAX_DIGITS:
        return False
    open_end = b"." in text and text[-1:] in b"0."  # a digit other than 0 must follow
    return not (text == b"-0" or open_end) if ends else not (open_end and digits == _MAX_DIGITS)


def _goes_on(text: bytes, mode: str) -> bool:
    return (mode == "name" or text[:1] == b'"') and _COMMA.match(text, mode == "string") is not None


def _opens_text(text: bytes, mode: str) -> bool:
    return _goes_on(text, mode) and text[1:].endswith(b'"')


def _opens(text: bytes, start: int = 0) -> bool:
    """Return whether an array opens after `start` and a comma follows, which may end its first element."""
    return 0 <= text.find(b"[", start) < text.rfind(b",")


def _repeats_before(text: bytes) -> bool:
    return _BEFORE.match(text) is not None or _opens(text)


def _repeats_after(text: bytes) -> bool:
    return _AFTER.match(text) is not None or _opens(text)


def _repeats_behind_name(text: bytes) -> bool:
    return _opens(text) or (_NAME_ENDS.match(text) is not None and _OPENS_NEXT.fullmatch(text) is None)


def _repeats_behind_text(text: bytes, *, escaped: bool, element: bool) -> bool:
    end = _IN_STRING.match(text, 1 if escaped else 0)
    if end is None:
        return False
    if _opens(text, end.end()):
        return True
    if not element or _COMMA.match(text, end.end()) is None:
        return False
    return escaped or end.end() > 1 or _OPENS_NEXT.fullmatch(text, 1) is None
