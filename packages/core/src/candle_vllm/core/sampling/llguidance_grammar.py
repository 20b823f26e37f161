# SPDX-License-Identifier: MIT
"""State of one text in a grammar of llguidance (step 7 of a request's life).

Copies of a matcher share one lexer with its states, so that later masks are fast, and with its limits. An exhausted
lexer is unusable for every copy, and llguidance cannot copy a matcher with a separate lexer. So a text whose lexer is
exhausted continues with a new matcher, which consumes the text's tokens again (`Form.renewed`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.structured import refused, shortened
from candle_vllm.core.sampling.token_trie import TokenTrie

if TYPE_CHECKING:
    from llguidance import LLMatcher

_MOST_FORCED = 256  # maximum number of forced bytes that are tokenized at a time
_MOST_RENEWING = 1.0  # seconds of compiling a form again, while answers wait, after which no text gets a new lexer


class Form:
    """A compiled form, at the start of a text. Thread-safe; `make` compiles it to a matcher at the start of a text."""

    def __init__(self, make: Callable[[], LLMatcher]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._seconds = 0.0  # time spent on renewals
        self._start: LLMatcher | None = make()

    def start(self) -> LLMatcher:
        """Return a matcher at the start, to be copied, with the lexer that new texts share."""
        with self._lock:
            if self._start is None:
                self._start = self._timed()
            return self._start

    @property
    def is_spent(self) -> bool:
        """Whether lexers were exhausted so often that no text gets a new one; the next request compiles the form."""
        return self._seconds > _MOST_RENEWING

    def renewed(self, lost: LLMatcher, *, alone: bool) -> tuple[LLMatcher, bool] | None:
        """Return a new matcher at the start, to replace one with an exhausted lexer, and whether it is used alone.

        The first text that finds a lexer exhausted has probably exhausted it, and gets its own lexer, so that it cannot
        affect other texts. All other texts share a new lexer, unless `alone`. `lost` is the exhausted matcher, from
        `start`. The result is None if renewals already took too long; the engine's steps wait for them.
        """
        if self.is_spent:
            return None
        with self._lock:
            if self._start is lost:
                self._start, alone = None, True
        if not alone:
            return self.start(), False
        return self._timed(), True

    def _timed(self) -> LLMatcher:
        began = time.thread_time()
        made = self._make()
        self._seconds += time.thread_time() - began
        return made


class Follower:
    """The matcher of one text in a form. An exhausted lexer is replaced by a new one.

    Attributes:
        matcher: the matcher after the text; in an error state if the text cannot be continued.
        is_alone: whether no other matcher shares its lexer. Then only the text itself may be matched, because draft
            tokens that exhaust the lexer would end the answer.
    """

    def __init__(self, form: Form) -> None:
        self._form: Form | None = form
        self._start = form.start()
        self.matcher = self._start.deep_copy()
        self.is_alone = False
        self._moved = False
        self._said: list[int] = []

    def copy(self) -> Follower:
        """Copy for looking ahead; an exhausted lexer of the copy is not replaced."""
        other = copy(self)
        other._form, other._said, other.matcher = None, [], self.matcher.deep_copy()
        return other

    def fill_mask(self, bits: NDArray[np.int32]) -> bool:
        """Write llguidance's mask of the allowed next tokens; return False if the text cannot be continued."""
        self.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        while self.matcher.is_error() and self._renew():
            self.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return not self.matcher.is_error()

    def consume(self, token: int) -> bool:
        """Consume a token; return False if it is not allowed, or if the text cannot be continued after it."""
        while not self.matcher.consume_token(token):
            if not self._renew():
                return False
        self._said.append(token)
        return True

    def rollback(self, count: int) -> None:
        """Undo the last `count` tokens. An exhausted lexer is replaced; the next mask reports any other error."""
        if count > len(self._said):
            raise ValueError(f"cannot go back by {count} tokens: the text has {len(self._said)}")
        del self._said[len(self._said) - count :]
        if not self.matcher.rollback(count):
            self._renew()

    def _renew(self) -> bool:
        """Replace an exhausted lexer, and bring a new matcher to the same position; return whether there is a new one.

        Each token's mask is computed again too, because this resets the lexer's fuel.
        """
        if self._form is None or self.is_alone or not _is_lost(self._start):
            return False
        renewed = self._form.renewed(self._start, alone=self._moved)
        if renewed is None:
            return False
        self._start, self.is_alone = renewed
        self._moved = True
        self.matcher = self._start.deep_copy()
        for token in self._said:
            self.matcher.compute_bitmask()
            self.matcher.consume_token(token)
        return True


def _is_lost(start: LLMatcher) -> bool:
    probe = start.deep_copy()
    probe.compute_bitmask()
    return probe.is_error()


def cannot_go_on(matcher: LLMatcher) -> InvalidParameterError:
    """Return the error for a request whose text reached a limit of its grammar."""
    return refused(
        f"the grammar cannot go on here: {shortened(matcher.get_error())}; a simpler form may help, with fewer "
        "alternatives and fewer optional properties"
    )


class LlguidanceGrammar:
    """Position of one text in a grammar, which one thread at a time may use."""

    def __init__(self, form: Form, trie: TokenTrie) -> None:
        self._form = form
        self._text = Follower(form)
        self._trie = trie
        self._behind_end = 0  # end tokens after the end of the text

    def fill_mask(self, bits: NDArray[np.int32]) -> None:
        """Write the mask of the next token to `bits` [ceil(V / 32)] int32, contiguous.

        Bit i % 32 of word i // 32 becomes 1 if token i may follow; end tokens may if the text may end. Raises
        InvalidParameterError if this needs more time or memory than one token, or all texts of the grammar, may take.
        """
        trie = self._trie
        whole = bits if len(bits) == trie.words else np.zeros(trie.words, np.int32)
        if not self._text.fill_mask(whole):  # the mask would allow only an end
            raise cannot_go_on(self._text.matcher)
        np.bitwise_and(whole[: len(bits)], trie.usable, out=bits)

    def accept(self, token_id: int) -> bool:
        """Advance by a token. Return False, and become unusable, if it may not follow or a limit is reached."""
        if self.exhausted:
            self._behind_end += token_id in self._trie.eos_ids
            return token_id in self._trie.eos_ids
        return self._text.consume(token_id)

    def fresh(self) -> LlguidanceGrammar:
        """Return the same grammar at the start of another text; cheap, and allowed in any thread at any time."""
        return LlguidanceGrammar(self._form, self._trie)

    def rollback(self, count: int) -> None:
        """Undo the last `count` accepted tokens."""
        inside = max(0, count - self._behind_end)
        self._behind_end -= count - inside
        if inside:
            self._text.rollback(inside)

    def copy(self) -> LlguidanceGrammar | None:
        """Copy at the same position, for looking ahead; None if a copy costs too much, or could end the text."""
        if self._text.is_alone:
            return None
        other = copy(self)
        other._text = self._text.copy()
        return other

    def legal(self, token_ids: Sequence[int]) -> int:
        """Return how many of these tokens may follow in a row, up to an end token; does not advance. 0 if unknown."""
        ends = self._trie.eos_ids
        inside = list(itertools.takewhile(lambda token: token not in ends, token_ids))
        return 0 if self.exhausted or self._text.is_alone else self._text.matcher.validate_tokens(inside)

    def ff_tokens(self) -> list[int]:
        """Return the forced next tokens, as the tokenizer tokenizes their text; often empty.

        The last token is left out, because the following text might change the tokenization.
        """
        if self.exhausted:
            return []
        # On a copy: after this call, a matcher at a forced special token cannot compute its next mask.
        data = self._text.matcher.deep_copy().compute_ff_bytes()[:_MOST_FORCED]
        if not data:  # the usual case, which needs no tokenizing
            return []
        tokens = list(self._trie.written(data))
        return tokens[: self._text.matcher.validate_tokens(tokens)]

    @property
    def may_end(self) -> bool:
        """Whether the text may end here."""
        return self._text.matcher.is_accepting()

    @property
    def exhausted(self) -> bool:
        """Whether only the end may follow."""
        return self._text.matcher.is_stopped() and not self._text.matcher.is_error()
