# SPDX-License-Identifier: MIT
"""Grammar state of a sequence (step 7 of a request's life).

A grammar (`LlguidanceGrammar`) has a position in a text and determines which tokens may follow: the mask. The next mask
depends only on the tokens so far, so a thread of the backend begins to compute it when the last token is known, and the
engine waits for the mask only before logits are masked.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.structured import StructuredOutputsParams

if TYPE_CHECKING:
    from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
    from candle_vllm.core.sampling.llguidance_grammar import LlguidanceGrammar

_WALK_SECONDS = 0.005  # after it, `_walk` begins no further mask, because the other sequences of the step wait
_FEW = 64  # if more tokens than this are allowed, the grammar is not asked for forced tokens


class GrammarState:
    """Grammar state of one sequence.

    Args:
        held_back: end tokens that are allowed only if no other token is (`ignore_eos`).
        grammar: the compiled grammar, at the start of a text; None to compile `spec`.

    Attributes:
        exhausted: whether only the end may follow.
        looks_ahead: whether `look_ahead` could compute masks at the start of the text.
        waits: whether `accept` and `rollback` do not start the next mask; a caller asks for `forced` tokens first.

    Raises the errors of `LlguidanceBackend.compile`.
    """

    def __init__(
        self,
        backend: LlguidanceBackend,
        spec: StructuredOutputsParams,
        vocab_size: int,
        held_back: Sequence[int] = (),
        grammar: LlguidanceGrammar | None = None,
    ) -> None:
        self._failure: InvalidParameterError | None = None
        self.exhausted = False  # a grammar that allows only the empty text is refused
        self.waits = False
        self._backend = backend
        self._spec = spec
        self._vocab_size = vocab_size
        self._held_back = tuple(held_back)
        self._grammar = backend.compile(spec) if grammar is None else grammar
        self.looks_ahead = self._grammar.copy() is not None
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)
        self._ahead: list[tuple[int, NDArray[np.int32]]] = []  # draft tokens, and the mask after each
        self._is_due = False  # whether the next mask must be computed
        self._filling: Future[None] = backend.workers.submit(self._fill)

    def sibling(self) -> GrammarState:
        """Return the same grammar at the start of another text, without compiling again."""
        fresh = self._grammar.fresh()
        return GrammarState(self._backend, self._spec, self._vocab_size, self._held_back, fresh)

    def bits(self) -> NDArray[np.int32]:
        """Return the mask [ceil(V / 32)] of the next token, all 0 after a failure; valid until the position changes."""
        self._finish()
        return self._bits

    def accept(self, token_id: int) -> None:
        """Advance by a token and start to compute the mask of the next one.

        Raises:
            InvalidParameterError: the token was allowed, but the grammar cannot continue after it.
            RuntimeError: the grammar does not allow the token here.
        """
        self._filling.result()
        if not self._grammar.accept(token_id):
            raise self._refusal(token_id)
        if self._ahead and self._ahead[0][0] == token_id:
            self._bits = self._ahead.pop(0)[1]
            return
        self._ahead = []
        self.exhausted = self._grammar.exhausted
        self._is_due = not self.exhausted
        if not self.waits:
            self.begin()

    def begin(self) -> None:
        """Start to compute the mask of the next token, if that has not started."""
        if self._is_due:
            self._is_due = False
            self._filling = self._backend.workers.submit(self._fill)

    def look_ahead(self, token_ids: Sequence[int]) -> None:
        """Start to compute the next mask, and the mask after each draft token, for `masks_ahead` and `accept`."""
        self._filling.result()
        self._filling = self._backend.workers.submit(self._walk, token_ids, self._is_due)
        self._is_due = False

    def masks_ahead(self) -> list[NDArray[np.int32]]:
        """Return the masks after the tokens of `look_ahead`, up to the first token without a mask."""
        self._filling.result()
        return [bits for _, bits in self._ahead]

    @property
    def failure(self) -> InvalidParameterError | None:
        """Why the grammar has failed, or None."""
        self._finish()
        return self._failure

    def legal(self, token_ids: Sequence[int]) -> int:
        """See `LlguidanceGrammar`."""
        self._filling.result()
        return 0 if self.exhausted else self._grammar.legal(token_ids)

    def ahead(self) -> LlguidanceGrammar | None:
        """Return the grammar's `copy` for queries about later tokens; None also if the grammar has ended or failed."""
        self._filling.result()
        return None if self.exhausted or self._failure is not None else self._grammar.copy()

    def forced(self) -> list[int]:
        """See `LlguidanceGrammar.ff_tokens`. Does not wait for a mask that has not begun."""
        self._filling.result()
        if self.exhausted or self._failure is not None:
            return []
        many = not self._is_due and int.from_bytes(self._bits.tobytes()).bit_count() > _FEW
        return [] if many else self._grammar.ff_tokens()

    def rollback(self, count: int) -> None:
        """Undo the last `count` tokens, and start the mask at that position again, unless `waits` is set."""
        self._filling.result()
        self._grammar.rollback(count)
        self.exhausted, self._failure, self._ahead, self._is_due = False, None, [], True
        if not self.waits:
            self.begin()

    def _refusal(self, token_id: int) -> Exception:
        """Return the error for a rejected token: it reached a limit of the grammar, or was never allowed."""
        if self._bits.view(np.uint32)[token_id // 32] >> token_id % 32 & 1:
            self._fill()
            if self._failure is not None:
                return self._failure
        return RuntimeError(f"the grammar does not take token {token_id}")

    def _fill(self) -> None:
        try:
            self._fill_mask(self._bits, self._grammar)
        except InvalidParameterError as error:  # only this sequence fails; others are sampled in the same step
            self._failure = error
            self._bits[:] = 0

    def _finish(self) -> None:
        """Wait for the masks that are being computed, and compute the next one if `begin` has not started it."""
        self._filling.result()
        if self._is_due:
            self._is_due = False
            self._fill()

    def _walk(self, token_ids: Sequence[int], also_here: bool) -> None:
        self._ahead = []
        if also_here:
            self._fill()
        grammar = None if self.exhausted or self._failure is not None else self._grammar.copy()
        if grammar is None:
            return
        end = time.perf_counter() + _WALK_SECONDS
        with contextlib.suppress(InvalidParameterError):  # raised later, if the text reaches this position
            for token in token_ids:
                if time.perf_counter() > end or not grammar.accept(token) or grammar.exhausted:
                    break
                bits = np.empty_like(self._bits)
                self._fill_mask(bits, grammar)
                self._ahead.append((token, bits))

    def _fill_mask(self, bits: NDArray[np.int32], grammar: LlguidanceGrammar) -> None:
        """Write the mask, without the tokens that are held back unless no other token is allowed."""
        grammar.fill_mask(bits)
        others = bits.copy() if self._held_back else bits
        for token in self._held_back:
            others.view(np.uint32)[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
        if self._held_back and others.any():
            bits[:] = others
