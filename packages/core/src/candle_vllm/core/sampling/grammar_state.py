"""GrammarState: a sequence's grammar and the mask of its next token, filled beside the model's work (step 7 of ten).

A mask depends on nothing but the tokens before it. So it is begun, in a thread of the backend, as soon as the last of
them is known, and waited for only when logits are there to be masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.grammar import Grammar, GrammarBackend
from candle_vllm.core.sampling.structured import StructuredOutputsParams


class GrammarState:
    """The grammar of one sequence.

    Args:
        backend: makes the grammar.
        spec: of which form.
        vocab_size: V.
        held_back: end tokens that are allowed only where nothing else is (`ignore_eos`).
        grammar: of this form, at the start of a text, where it is compiled already.

    Attributes:
        failure: why there are no more masks, or None.
        exhausted: nothing but the end may follow.

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
        self.failure: InvalidParameterError | None = None
        self.exhausted = False  # a grammar of nothing but the empty text is refused
        self._backend = backend
        self._spec = spec
        self._vocab_size = vocab_size
        self._held_back = tuple(held_back)
        self._grammar = backend.compile(spec) if grammar is None else grammar
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)
        self._filling: Future[None] = backend.workers.submit(self._fill)

    def sibling(self) -> GrammarState:
        """The same grammar at the start of another text; nothing is compiled or looked up for it."""
        fresh = self._grammar.fresh()
        return GrammarState(self._backend, self._spec, self._vocab_size, self._held_back, fresh)

    def bits(self) -> NDArray[np.int32]:
        """[ceil(V / 32)] the mask of the next token, valid until the next `accept`; no bit is set after a failure."""
        self._filling.result()
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
        self.exhausted = self._grammar.exhausted
        if not self.exhausted:
            self._filling = self._backend.workers.submit(self._fill)

    def _refusal(self, token_id: int) -> Exception:
        """Why a token was not taken: it was allowed and met a limit of the grammar, or it should never have come."""
        if self._bits.view(np.uint32)[token_id // 32] >> token_id % 32 & 1:
            self._fill()
            if self.failure is not None:
                return self.failure
        return RuntimeError(f"the grammar does not take token {token_id}")

    def _fill(self) -> None:
        try:
            self._grammar.fill_mask(self._bits)
        except InvalidParameterError as error:  # of this sequence; its neighbours are drawn in the same step
            self.failure = error
            self._bits[:] = 0
            return
        if self._held_back:
            self._hold_back()

    def _hold_back(self) -> None:
        """Takes the end tokens out, unless they are all there is."""
        others = self._bits.copy()
        for token in self._held_back:
            others.view(np.uint32)[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
        if others.any():
            self._bits[:] = others
