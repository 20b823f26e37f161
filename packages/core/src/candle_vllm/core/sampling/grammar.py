"""What a backend of structured output implements: a compiler, and the grammar of one text (step 7 of ten).

A backend knows the vocabulary. A grammar is a place in a text: which tokens may come next there.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.sampling.structured import StructuredOutputsParams


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
