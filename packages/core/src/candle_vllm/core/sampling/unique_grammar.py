# SPDX-License-Identifier: MIT
"""Grammar of llguidance with arrays of unique elements (step 7 of a request's life); see `unique_items`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.sampling.llguidance_grammar import Form, LlguidanceGrammar
from candle_vllm.core.sampling.structured import refused
from candle_vllm.core.sampling.token_trie import TokenTrie
from candle_vllm.core.sampling.unique_items import Unrepeated
from candle_vllm.core.sampling.unique_sites import Sites
from candle_vllm.core.sampling.unique_tokens import WHITE

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


class ComparedGrammar:
    """Grammar that also forbids tokens that would repeat an element of an array; see `Grammar`.

    Args:
        compared: data to find the elements that must differ.
    """

    def __init__(self, inner: LlguidanceGrammar, compared: Compared, trie: TokenTrie) -> None:
        self._inner = inner
        self._compared = compared
        self._trie = trie
        self._said: list[int] = []
        self._begin()

    def fill_mask(self, bits: NDArray[np.int32]) -> None:
        self._inner.fill_mask(bits)
        np.bitwise_and(bits, self._kept(), out=bits)
        if not bits.any():
            raise refused("the grammar cannot go on here: the array already has every element that its schema allows")

    def accept(self, token_id: int) -> bool:
        ended = self._inner.exhausted
        if not (ended or self._allows(token_id)) or not self._inner.accept(token_id):
            return False
        self._say(token_id)
        return True

    def fresh(self) -> ComparedGrammar:
        return ComparedGrammar(self._inner.fresh(), self._compared, self._trie)

    def copy(self) -> None:
        """See `Grammar`: None, because the copy would have to read the whole text again."""

    def rollback(self, count: int) -> None:
        """See `Grammar`. The remaining text is read again."""
        self._inner.rollback(count)
        self._follow(self._said[: len(self._said) - count])

    def legal(self, token_ids: Sequence[int]) -> int:
        said, legal = list(self._said), 0
        for token in token_ids[: self._inner.legal(token_ids)]:
            if not self._allows(token):
                break
            legal += 1
            if legal < len(token_ids):
                self._say(token)
        if len(self._said) > len(said):
            self._follow(said)
        return legal

    def ff_tokens(self) -> list[int]:
        tokens = self._inner.ff_tokens()
        return tokens[: self.legal(tokens)]

    @property
    def may_end(self) -> bool:
        return self._inner.may_end

    @property
    def exhausted(self) -> bool:
        return self._inner.exhausted

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
