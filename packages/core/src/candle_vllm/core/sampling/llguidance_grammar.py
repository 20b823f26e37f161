# SPDX-License-Identifier: MIT
"""One text's place in a grammar of llguidance (step 7 of ten)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.sampling.structured import refused
from candle_vllm.core.sampling.token_trie import TokenTrie

if TYPE_CHECKING:
    from llguidance import LLMatcher

_MOST_FORCED = 256  # bytes of what must come that are cut into tokens at a time
MAX_ERROR = 300  # characters of a message of the compiler


_SIMPLER = "a simpler form may help, with fewer alternatives and fewer optional properties"


class LlguidanceGrammar:
    """One text's place in a grammar; see `Grammar`.

    Args:
        compiled: at the start of a text; it stays there, for this text has a copy.
        trie: the vocabulary.
    """

    def __init__(self, compiled: LLMatcher, trie: TokenTrie) -> None:
        self._compiled = compiled
        self._matcher = compiled.deep_copy()
        self._trie = trie
        self._behind_end = 0  # end tokens that were said when the text had ended

    def fill_mask(self, bits: NDArray[np.int32]) -> None:
        """See `Grammar`."""
        trie = self._trie
        whole = bits if len(bits) == trie.words else np.zeros(trie.words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(whole.ctypes.data, whole.nbytes)
        if self._matcher.is_error():  # the mask is that of an end then
            raise refused(f"the grammar cannot go on here: {shortened(self._matcher.get_error())}; {_SIMPLER}")
        np.bitwise_and(whole[: len(bits)], trie.usable, out=bits)

    def accept(self, token_id: int) -> bool:
        """See `Grammar`."""
        if self.exhausted:
            self._behind_end += token_id in self._trie.eos_ids
            return token_id in self._trie.eos_ids
        return self._matcher.consume_token(token_id)

    def fresh(self) -> LlguidanceGrammar:
        """See `Grammar`."""
        return LlguidanceGrammar(self._compiled, self._trie)

    def rollback(self, count: int) -> None:
        """See `Grammar`."""
        inside = max(0, count - self._behind_end)
        self._behind_end -= count - inside
        if inside and not self._matcher.rollback(inside):
            raise ValueError(f"cannot go back by {count} tokens: {shortened(self._matcher.get_error())}")

    def copy(self) -> LlguidanceGrammar:
        """See `Grammar`."""
        other = LlguidanceGrammar(self._matcher, self._trie)
        other._behind_end = self._behind_end
        return other

    def legal(self, token_ids: Sequence[int]) -> int:
        """See `Grammar`."""
        ends = self._trie.eos_ids
        inside = list(itertools.takewhile(lambda token: token not in ends, token_ids))
        return 0 if self.exhausted else self._matcher.validate_tokens(inside)

    def ff_tokens(self) -> list[int]:
        """See `Grammar`. The last is left out where what follows might be cut in another way."""
        if self.exhausted:
            return []
        data = self._matcher.compute_ff_bytes()[:_MOST_FORCED]
        if not data:  # as in most places; a tokenizer that is asked about no text takes ten times as long as all this
            return []
        tokens = list(self._trie.written(data))
        return tokens[: self._matcher.validate_tokens(tokens)]

    @property
    def may_end(self) -> bool:
        """See `Grammar`."""
        return self._matcher.is_accepting()

    @property
    def exhausted(self) -> bool:
        """See `Grammar`."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


def shortened(error: str) -> str:
    """A message of the compiler in one line, without the text that it quotes."""
    if "oneOf constraints are not supported" in error:
        return "oneOf needs options that exclude each other for certain, as by a required const; use anyOf"
    text = error.removesuffix("<non-verbose/>").replace("NoExtensionBias", "no token may come here")
    if "\nerror: " in text:
        text = text[text.rindex("\nerror: ") + len("\nerror: ") :]
    line = " ".join(text.split("\n   ")[0].split())
    return line if len(line) <= MAX_ERROR else line[:MAX_ERROR] + "..."
