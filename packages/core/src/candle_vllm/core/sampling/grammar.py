# SPDX-License-Identifier: MIT
"""Grammars: what a backend of structured output implements, and a sequence's place in one (step 7 of ten).

A backend knows the vocabulary. A grammar is a place in a text: which tokens may come next there. A mask depends on
nothing but the tokens before it. So it is begun, in a thread of the backend, as soon as the last of them is known, and
waited for only when logits are there to be masked.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.structured import StructuredOutputsParams

_WALK_SECONDS = 0.005  # that others wait at most for masks that may not be needed; answers do not depend on it
_FEW = 64  # tokens that may come: the beginnings of what must, and some that go on behind it


class Grammar(Protocol):
    """The grammar of one text, at the place that the text has reached. One thread at a time may use it."""

    def fill_mask(self, bits: NDArray[np.int32]) -> None:
        """Writes which tokens may come next.

        Args:
            bits: [ceil(V / 32)] int32, contiguous; bit i % 32 of word i // 32 becomes 1 where token i may come. Where
                the text may end, these include the end tokens.

        Raises:
            InvalidParameterError: the grammar needs more time or memory than one token may take.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Goes one token on. False where the token may not come; the grammar cannot be used any more then."""
        ...

    def fresh(self) -> Grammar:
        """The same grammar at the start of another text; costs little, and any thread may ask for it at any time."""
        ...

    def rollback(self, count: int) -> None:
        """Goes back by the last `count` tokens that were accepted."""
        ...

    def copy(self) -> Grammar | None:
        """The same at the same place, for a look ahead; None where that would cost more than it is worth."""
        ...

    def legal(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may come behind each other from here, none of them an end. Stays where it is."""
        ...

    def ff_tokens(self) -> list[int]:
        """Tokens that must come next, whatever the model says, as the tokenizer writes them; often none."""
        ...

    @property
    def may_end(self) -> bool:
        """Whether the text may end here."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether nothing but the end may follow."""
        ...


class GrammarBackend(Protocol):
    """Makes grammars for one vocabulary. Thread-safe."""

    def compile(self, spec: StructuredOutputsParams) -> Grammar:
        """The grammar at the start of a text.

        Raises:
            InvalidParameterError: `spec` is wrong or asks for what cannot be guaranteed.
        """
        ...

    @property
    def workers(self) -> Executor:
        """Threads in which masks are filled.

        Raises:
            EngineDeadError: the backend was closed.
        """
        ...


class GrammarState:
    """The grammar of one sequence.

    Args:
        backend: makes the grammar.
        spec: of which form.
        vocab_size: V.
        held_back: end tokens that are allowed only where nothing else is (`ignore_eos`).
        grammar: of this form, at the start of a text, where it is compiled already.

    Attributes:
        exhausted: nothing but the end may follow.
        looks_ahead: `look_ahead` finds anything.
        waits: a mask is begun when `begin` says so, and not behind each token: other things are asked before.

    Raises:
        InvalidParameterError: see `GrammarBackend.compile`.
    """

    def __init__(
        self,
        backend: GrammarBackend,
        spec: StructuredOutputsParams,
        vocab_size: int,
        held_back: Sequence[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self._failure: InvalidParameterError | None = None
        self.exhausted = False  # a grammar of nothing but the empty text is refused
        self.waits = False
        self._backend = backend
        self._spec = spec
        self._vocab_size = vocab_size
        self._held_back = tuple(held_back)
        self._grammar = backend.compile(spec) if grammar is None else grammar
        self.looks_ahead = self._grammar.copy() is not None
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)
        self._ahead: list[tuple[int, NDArray[np.int32]]] = []  # tokens that may come, and the mask behind each
        self._is_due = False  # a mask is to be begun
        self._filling: Future[None] = backend.workers.submit(self._fill)

    def sibling(self) -> GrammarState:
        """The same grammar at the start of another text; nothing is compiled or looked up for it."""
        fresh = self._grammar.fresh()
        return GrammarState(self._backend, self._spec, self._vocab_size, self._held_back, fresh)

    def bits(self) -> NDArray[np.int32]:
        """[ceil(V / 32)] the mask of the next token, valid until the next `accept`; no bit is set after a failure."""
        self._finish()
        return self._bits

    def accept(self, token_id: int) -> None:
        """Takes note of a token and begins the mask of the next one.

        Raises:
            InvalidParameterError: the token was allowed, and the grammar cannot go on behind it.
            RuntimeError: the grammar has no such token here.
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
        """Begins the mask of the next token, if that is not begun."""
        if self._is_due:
            self._is_due = False
            self._filling = self._backend.workers.submit(self._fill)

    def look_ahead(self, token_ids: Sequence[int]) -> None:
        """Begins that mask, and those behind tokens that may come; see `masks_ahead`. `accept` makes none of these
        again."""
        self._filling.result()
        self._filling = self._backend.workers.submit(self._walk, token_ids, self._is_due)
        self._is_due = False

    def masks_ahead(self) -> list[NDArray[np.int32]]:
        """Masks as of `bits`: behind the first token that `look_ahead` was told, behind the second, ...; as far as the
        grammar takes them, goes on behind them, and can say what comes there."""
        self._filling.result()
        return [bits for _, bits in self._ahead]

    @property
    def failure(self) -> InvalidParameterError | None:
        """Why there are no more masks, or None."""
        self._finish()
        return self._failure

    def legal(self, token_ids: Sequence[int]) -> int:
        """See `Grammar`."""
        self._filling.result()
        return 0 if self.exhausted else self._grammar.legal(token_ids)

    def ahead(self) -> Grammar | None:
        """Return a copy that can be queried about later tokens; None if the grammar has ended or failed."""
        self._filling.result()
        return None if self.exhausted or self._failure is not None else self._grammar.copy()

    def forced(self) -> list[int]:
        """See `Grammar.ff_tokens`. Waits for no mask that is not begun."""
        self._filling.result()
        if self.exhausted or self._failure is not None:
            return []
        many = not self._is_due and int.from_bytes(self._bits.tobytes()).bit_count() > _FEW  # none must come then
        return [] if many else self._grammar.ff_tokens()

    def rollback(self, count: int) -> None:
        """Goes back by the last `count` tokens, and begins the mask that there was."""
        self._filling.result()
        self._grammar.rollback(count)
        self.exhausted, self._failure, self._ahead, self._is_due = False, None, [], True
        if not self.waits:
            self.begin()

    def _refusal(self, token_id: int) -> Exception:
        """Why a token was not taken: it was allowed and met a limit of the grammar, or it should never have come."""
        if self._bits.view(np.uint32)[token_id // 32] >> token_id % 32 & 1:
            self._fill()
            if self._failure is not None:
                return self._failure
        return RuntimeError(f"the grammar does not take token {token_id}")

    def _fill(self) -> None:
        try:
            self._fill_mask(self._bits, self._grammar)
        except InvalidParameterError as error:  # of this sequence; its neighbours are drawn in the same step
            self._failure = error
            self._bits[:] = 0

    def _finish(self) -> None:
        """What is to be made is made."""
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
        with contextlib.suppress(InvalidParameterError):  # said when the text is there, if it comes there
            for token in token_ids:
                if time.perf_counter() > end or not grammar.accept(token) or grammar.exhausted:
                    break
                bits = np.empty_like(self._bits)
                self._fill_mask(bits, grammar)
                self._ahead.append((token, bits))

    def _fill_mask(self, bits: NDArray[np.int32], grammar: Grammar) -> None:
        grammar.fill_mask(bits)
        if self._held_back:
            self._hold_back(bits)

    def _hold_back(self, bits: NDArray[np.int32]) -> None:
        """Takes the end tokens out, unless they are all there is."""
        others = bits.copy()
        for token in self._held_back:
            others.view(np.uint32)[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
        if others.any():
            bits[:] = others
