# SPDX-License-Identifier: MIT
"""A vocabulary as llguidance wants it: the bytes of every token in a trie, special tokens apart (step 7 of ten).

Made once for a model; it takes a second for 150,000 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from candle_vllm.core.sampling.lark import Literals
    from candle_vllm.core.sampling.unique_tokens import Neighbours

_CHARACTER = r'[^"\\\x00-\x1F\x7F]'
# Tokens that are text of a JSON string, by length: whole groups of them are allowed or forbidden at once, which keeps
# masks fast inside strings that have a maxLength.
_SLICES = (
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_CHARACTER}{{1,{n}}}" for n in (2, 4, 6, 8, 10, 12, 16, 20, 30)),
    f"{_CHARACTER}+",
)
_KEPT = 1024  # texts that grammars left no choice about, each of which is short


class Vocabulary(Protocol):
    """What a backend needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; a special token's are its name."""
        ...

    def is_special(self, token_id: int) -> bool:
        """True for tokens that structure the text and are not part of it."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text."""
        ...


class TokenTrie:
    """The trie, and what masks need to know of the vocabulary.

    Args:
        tokenizer: the vocabulary.
        vocab_size: V, the width of the logits.
        eos_ids: tokens that end a text, each below V.

    Attributes:
        ll: the trie.
        words: int32 words of a mask as llguidance writes it.
        usable: [ceil(V / 32)] int32, a bit for each token that has bytes or ends a text.
        tokens: the bytes of each token.
        eos_ids: as given.
    """

    def __init__(self, tokenizer: Vocabulary, vocab_size: int, eos_ids: Sequence[int]) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)
        known = min(vocab_size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(token) for token in range(known)] + [b""] * (vocab_size - known)
        # An end token must never pass for text, whatever its bytes.
        self.special = {token for token in range(known) if tokenizer.is_special(token)} | self.eos_ids
        usable = np.zeros(32 * -(-vocab_size // 32), np.uint8)
        usable[[token for token in range(vocab_size) if self.tokens[token] or token in self.eos_ids]] = 1
        self.usable = np.packbits(usable, bitorder="little").view(np.int32)
        ends = list(eos_ids) or [vocab_size]
        if not eos_ids:
            self.tokens.append(b"")  # stands for the end that the model cannot say
        self.words = -(-len(self.tokens) // 32)
        shown = _Shown(tokenizer, self.tokens, sorted(self.special), ends[0])
        self.ll: LLTokenizer = LLTokenizer(TokenizerWrapper(shown), eos_token=ends, slices=list(_SLICES))

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)

    def _as_written(self, data: bytes) -> tuple[int, ...]:
        tokens = self(data.decode("utf-8", "ignore"))[:-1]
        said = b"".join(self.tokens[token] for token in tokens)
        return tuple(tokens) if data.startswith(said) else ()  # else the tokenizer writes a space of its own

    @cached_property
    def written(self) -> Callable[[bytes], tuple[int, ...]]:
        """The tokens of a text as the tokenizer writes it, but the last; names of forms come again and are kept."""
        return lru_cache(_KEPT)(self._as_written)

    @cached_property
    def neighbours(self) -> Neighbours:
        """The tokens in the order of their bytes."""
        from candle_vllm.core.sampling.unique_tokens import Neighbours

        return Neighbours(self.tokens[: self.vocab_size], self.special, -(-self.vocab_size // 32))

    @cached_property
    def literals(self) -> Literals:
        """Texts with the names of special tokens in them."""
        from candle_vllm.core.sampling.lark import Literals

        return Literals({self.tokens[token].decode("utf-8", "replace"): token for token in self.special})


class _Shown:
    """What llguidance is shown of a vocabulary, under the names that it looks for.

    It must not lead to the trie: llguidance keeps it, the trie keeps llguidance's, and the garbage collector cannot see
    through that, so neither would ever be freed.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Vocabulary, tokens: list[bytes], special: list[int], end: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end

    def __call__(self, text: bytes | str) -> list[int]:
        """llguidance asks for it when it is made; where nothing is forced, never again."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)
