# SPDX-License-Identifier: MIT
"""`uniqueItems` (step 7 of a request's life): find the tokens that would repeat an element of an array.

A grammar does not remember earlier elements, so this module parses the text too. The schemas that apply at each
position tell which arrays must have unique elements; the elements of such an array are stored as a trie of bytes
(`Elements`). A byte is forbidden if every element that it can lead to exists already. To know this, a twin of the
grammar, compiled for single bytes, counts the bytes that may follow each node of the trie: the end of a stored element
is dead, and so is a node if all bytes that may follow it lead to dead nodes. Elements are strings, integers, booleans
and null, which the grammar spells in only one way, except -0, which is forbidden; and fractions, restricted to one
spelling: decimals of few digits, which differ as floats, without an exponent or trailing zeros. Tokens with parts of
several elements are forbidden, except tokens that end one element and begin the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.sampling.json_facts import FRACTION
from candle_vllm.core.sampling.llguidance_grammar import Follower, Form, LlguidanceGrammar, cannot_go_on
from candle_vllm.core.sampling.structured import refused
from candle_vllm.core.sampling.token_trie import TokenTrie
from candle_vllm.core.sampling.unique_sites import Site, Sites
from candle_vllm.core.sampling.unique_tokens import STOPS, WHITE, Neighbours, is_plain_number

_STOPS = frozenset(STOPS)
_END = 256  # key in the trie for any byte of `_STOPS`
_TWIN_WORDS = 9  # int32 words of a mask over single bytes and the few special tokens after them


class Elements:
    """The elements of one array as a trie of bytes. A place is the index of a node; 0 is the root, before an element.

    Attributes:
        next: the child places of each place, by byte.
        dead: for each place, whether all elements that it can lead to exist already.
        fractions: whether the elements may be numbers with fractions.
    """

    def __init__(self, ways: int, *, fractions: bool = False) -> None:
        self.fractions = fractions
        self.next: list[dict[int, int]] = [{}]
        self.dead = [False]
        self._before = [0]
        self._ways = [ways]  # number of bytes that may follow a place; 0 while it is not known
        self._closed = [0]  # number of these bytes that lead to dead places
        if not fractions:
            minus = self.add(0, ord("-"))
            self.dead[self.add(minus, ord("0"))] = True
            self._closed[minus] = 1

    def add(self, place: int, byte: int) -> int:
        """Add a child to a place and return it."""
        new = self.next[place][byte] = len(self.next)
        self.next.append({})
        self.dead.append(False)
        self._before.append(place)
        self._ways.append(0)
        self._closed.append(0)
        return new

    def enter(self, place: int, ways: int) -> None:
        """Record that the text has reached a place after which `ways` bytes may follow."""
        self._ways[place] = ways

    def close(self, place: int) -> None:
        """Record that an element has ended at this place."""
        while not self.dead[place]:
            self.dead[place] = True
            if place == 0:
                break
            place = self._before[place]
            self._closed[place] += 1
            if self._closed[place] < self._ways[place]:
                break

    def is_last(self, place: int, above: int = 0) -> bool:
        """Return whether an element that ends at this place would be the last one possible below the place `above`."""
        while self._closed[place] + 1 >= self._ways[place]:
            if place in (0, above):
                return place == above
            place = self._before[place]
        return False


class _Frame(NamedTuple):
    """An open array or object."""

    is_array: bool
    site: Site
    before: int  # number of elements before the current or next one
    elements: Elements | None


class Unrepeated:
    """Parser of one text, which removes from masks the tokens that would repeat an array's element.

    `twin` is the grammar over single bytes.
    """

    def __init__(self, sites: Sites, twin: Form, neighbours: Neighbours) -> None:
        self._sites = sites
        self._twin = Follower(twin)
        self._tokens = neighbours
        self._stack: list[_Frame] = []
        self._site = sites.root  # site of the current or next value
        self._mode = "value"  # or key, colon, string, name (a number or literal), after
        self._escaped = False
        self._key: bytearray | None = None  # the key, if the current string is a key
        self._place = 0  # place of the current element
        self._number = b""  # the number that has begun, if the array's elements may have fractions

    def say(self, text: bytes) -> None:
        """Read further text. Raises InvalidParameterError if the twin reached one of its limits."""
        for byte in text:
            if not self._twin.consume(byte):
                raise cannot_go_on(self._twin.matcher)
            self._take(byte)

    def keep(self, bits: NDArray[np.int32]) -> None:
        """Remove the tokens that would repeat an element from a mask, see `LlguidanceGrammar.fill_mask`."""
        elements = self._elements
        if self._mode == "string":
            table = self._tokens.in_string[self._escaped, self._in_element]
        else:
            table = self._tokens.outside[self._mode if elements is not None else "free"]
        np.bitwise_and(bits, table, out=bits)
        if elements is None or (self._mode == "string" and not self._in_element):
            return
        self._tokens.take_out(bits, self._repeating(elements))
        if elements.fractions and self._mode != "string":
            self._tokens.take_out_numbers(bits, self._mode, self._number)
        if self._mode in ("string", "name") and not self._escaped:
            if elements.is_last(self._place):
                np.bitwise_and(bits, self._tokens.not_going_on[self._mode], out=bits)
            texts = elements.next[0].get(ord('"'), 0)
            if texts and (elements.dead[texts] or elements.is_last(self._place, texts)):
                np.bitwise_and(bits, self._tokens.not_opening[self._mode], out=bits)

    @property
    def _elements(self) -> Elements | None:
        return self._stack[-1].elements if self._stack else None

    @property
    def _in_element(self) -> bool:
        return self._key is None and self._elements is not None

    # ---- the text ----------------------------------------------------------------------------------------------------

    def _take(self, byte: int) -> None:
        mode = self._mode
        if mode == "string":
            self._in_string(byte)
        elif mode == "name" and byte not in _STOPS:
            self._step(byte)
        elif byte in WHITE and mode != "name":
            return
        elif mode == "value" and byte != ord("]"):
            self._begin(byte)
        elif mode == "key" and byte == ord('"'):
            self._mode, self._key = "string", bytearray()
        elif mode == "colon":
            self._mode = "value"
        else:
            self._between(byte)

    def _begin(self, byte: int) -> None:
        """Handle the first byte of a value."""
        if byte in b"[{":
            if self._stack and self._elements is not None:  # another alternative of the schema, which is not compared
                self._stack[-1] = self._stack[-1]._replace(elements=None)
            is_array = byte == ord("[")
            differing = self._site.differing if is_array else ()
            elements = Elements(self._ways(before=True), fractions=FRACTION in differing) if differing else None
            self._stack.append(_Frame(is_array, self._site, 0, elements))
            self._mode = "value" if is_array else "key"
            if is_array:
                self._site = self._sites.element(self._site, 0)
            return
        self._mode, self._key, self._place = ("string" if byte == ord('"') else "name"), None, 0
        self._step(byte)

    def _in_string(self, byte: int) -> None:
        ends = byte == ord('"') and not self._escaped
        self._escaped = byte == ord("\\") and not self._escaped
        if self._key is None:
            self._step(byte, ends=ends)
            self._mode = "after" if ends else "string"
        elif ends:
            key = json.loads(b'"' + bytes(self._key) + b'"')
            self._site, self._mode, self._key = self._sites.member(self._stack[-1].site, key), "colon", None
        else:
            self._key.append(byte)

    def _between(self, byte: int) -> None:
        """Handle a byte between values, which ends a name (number or literal) before it."""
        if self._mode == "name":
            if (elements := self._elements) is not None:
                elements.close(elements.next[self._place].get(_END) or elements.add(self._place, _END))
            self._mode, self._number = "after", b""
        if byte == ord(","):
            frame = self._stack[-1]
            self._mode = "value" if frame.is_array else "key"
            if frame.is_array:
                self._stack[-1] = frame._replace(before=frame.before + 1)
                self._site = self._sites.element(frame.site, frame.before + 1)
        elif byte in b"]}":
            self._stack.pop()
            self._mode = "after"

    def _step(self, byte: int, *, ends: bool = False) -> None:
        """Handle the next byte of an element."""
        elements = self._elements
        if elements is None:
            return
        self._place = elements.next[self._place].get(byte) or elements.add(self._place, byte)
        if elements.fractions and self._mode == "name" and (self._number or byte in b"-0123456789"):
            self._number += bytes([byte])
        if ends:
            elements.close(self._place)
        else:
            elements.enter(self._place, self._ways())

    def _ways(self, before: bool = False) -> int:
        """Return the number of bytes that may begin an element, or continue the current one (all ends count as 1)."""
        bits = np.zeros(_TWIN_WORDS, np.int32)
        if not self._twin.fill_mask(bits):
            raise cannot_go_on(self._twin.matcher)
        allowed = set(np.flatnonzero(np.unpackbits(bits[:8].view(np.uint8), bitorder="little")).tolist())
        if before:
            return len(allowed - _STOPS)
        if self._mode != "name":
            return len(allowed)
        on, may_end = allowed - _STOPS, bool(allowed & _STOPS)
        if self._number:
            on = {byte for byte in on if is_plain_number(self._number + bytes([byte]))}
            may_end &= is_plain_number(self._number, ends=True)
        return len(on) + may_end

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def _repeating(self, elements: Elements) -> Iterator[tuple[int, int]]:
        """Yield spans of tokens that lead to a dead place."""
        tokens = self._tokens
        if self._mode == "value":
            yield from self._before_element(elements, b"", tokens.whole)
        elif self._mode != "after":
            yield from self._within(elements, self._place, b"", tokens.whole)
        else:
            for white in tokens.leading:
                said = white + b","
                inside = tokens.behind(said, tokens.whole)
                if inside and elements.dead[0]:
                    yield inside
                elif inside:
                    yield from self._before_element(elements, said, inside)

    def _before_element(self, elements: Elements, said: bytes, span: tuple[int, int]) -> Iterator[tuple[int, int]]:
        for white in self._tokens.leading:
            if inside := self._tokens.behind(said + white, span):
                yield from self._within(elements, 0, said + white, inside)

    def _within(self, elements: Elements, place: int, said: bytes, span: tuple[int, int]) -> Iterator[tuple[int, int]]:
        for byte, behind in elements.next[place].items():
            for one in _STOPS if byte == _END else (byte,):
                inside = self._tokens.behind(said + bytes([one]), span)
                if inside and elements.dead[behind]:
                    yield inside
                elif inside:
                    yield from self._within(elements, behind, said + bytes([one]), inside)


# ---- the grammar -----------------------------------------------------------------------------------------------------


Mark = bytes | int
"""A mark that begins or ends the reasoning: a text, or a special token."""


class Compared(NamedTuple):
    """Data to compare the array elements that must differ, in the texts of one form.

    Attributes:
        sites: the sites of the form's schema, see `unique_sites`.
        twin: the form's grammar, compiled for a vocabulary of single bytes.
        start, end: marks of the reasoning before the form.
    """

    sites: Sites
    twin: Form
    start: Mark | None
    end: Mark | None


class _Reasoning:
    """Finds where the form begins, after the text that the grammar's rules for reasoning match."""

    def __init__(self, start: Mark | None, end: Mark | None) -> None:
        self._start = start
        self._end = end
        self.place = "form" if end is None else "thought" if start is None else "start"
        self._held = b""

    def form(self, token: int, text: bytes) -> bytes:
        """Return the text in the form that this token adds, with earlier text that might have been an opening mark."""
        if self.place == "start":
            self._held += text if self._held else text.lstrip(WHITE)
            text = self._begun(token)
        if self.place == "thought":
            text = self._behind_thought(token, text)
        if self.place == "gap":
            text = text.lstrip(b"\n")
            self.place = "form" if text else "gap"
        return text if self.place == "form" else b""

    def _begun(self, token: int) -> bytes:
        held = self._held
        if isinstance(self._start, bytes) and held.startswith(self._start):
            self.place, self._held = "thought", b""
            return held[len(self._start) :]
        if token == self._start:
            self.place, self._held = "thought", b""
            return b""
        if held and not (isinstance(self._start, bytes) and self._start.startswith(held)):
            self.place = "form"
        return held

    def _behind_thought(self, token: int, text: bytes) -> bytes:
        if isinstance(self._end, bytes):
            self._held += text
            before, mark, behind = self._held.partition(self._end)
            self.place, self._held = ("gap", b"") if mark else ("thought", before[1 - len(self._end) :])
            return behind
        self.place = "gap" if token == self._end else "thought"
        return b""


class ComparedGrammar(LlguidanceGrammar):
    """Grammar that also forbids tokens that would repeat an element of an array.

    `compared` has the data to find the elements that must differ.
    """

    def __init__(self, form: Form, compared: Compared, trie: TokenTrie) -> None:
        super().__init__(form, trie)
        self._compared = compared
        self._said: list[int] = []
        self._begin()

    def fill_mask(self, bits: NDArray[np.int32]) -> None:
        super().fill_mask(bits)
        np.bitwise_and(bits, self._kept(), out=bits)
        if not bits.any():
            raise refused("the grammar cannot go on here: the array already has every element that its schema allows")

    def accept(self, token_id: int) -> bool:
        if not (self.exhausted or self._allows(token_id)) or not super().accept(token_id):
            return False
        self._say(token_id)
        return True

    def fresh(self) -> ComparedGrammar:
        return ComparedGrammar(self._form, self._compared, self._trie)

    def copy(self) -> None:
        """Return None, because the copy would have to read the whole text again."""

    def rollback(self, count: int) -> None:
        super().rollback(count)
        self._follow(self._said[: len(self._said) - count])  # reads the remaining text again

    def legal(self, token_ids: Sequence[int]) -> int:
        said, legal = list(self._said), 0
        for token in token_ids[: super().legal(token_ids)]:
            if not self._allows(token):
                break
            legal += 1
            if legal < len(token_ids):
                self._say(token)
        if len(self._said) > len(said):
            self._follow(said)
        return legal

    def ff_tokens(self) -> list[int]:
        tokens = super().ff_tokens()
        return tokens[: self.legal(tokens)]

    def _begin(self) -> None:
        compared = self._compared
        self._reasoning = _Reasoning(compared.start, compared.end)
        self._arrays = Unrepeated(compared.sites, compared.twin, self._trie.neighbours)
        self._bits: NDArray[np.int32] | None = None  # a bit for each token that repeats no element here

    def _follow(self, said: Sequence[int]) -> None:
        self._said = []
        self._begin()
        for token in said:
            self._say(token)

    def _say(self, token: int) -> None:
        self._said.append(token)
        self._bits = None
        if token not in self._trie.eos_ids:
            self._arrays.say(self._reasoning.form(token, self._trie.tokens[token]))

    def _kept(self) -> NDArray[np.int32]:
        if self._bits is None:
            self._bits = np.full(-(-self._trie.vocab_size // 32), -1, np.int32)
            if self._reasoning.place != "thought":
                self._arrays.keep(self._bits)
        return self._bits

    def _allows(self, token: int) -> bool:
        return bool(self._kept().view(np.uint32)[token // 32] >> np.uint32(token % 32) & np.uint32(1))
