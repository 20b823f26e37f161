# SPDX-License-Identifier: MIT
"""Vocabulary for llguidance: a trie of the bytes of all tokens, and the special tokens (step 7).

The trie is built once for each model.
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
# Groups of tokens: white space, and text of a JSON string by length. llguidance allows or forbids whole groups, so that
# masks stay fast inside strings with a maxLength.
_SLICES = (
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_CHARACTER}{{1,{n}}}" for n in (2, 4, 6, 8, 10, 12, 16, 20, 30)),
    f"{_CHARACTER}+",
)
_KEPT = 1024  # maximum number of cached tokenizations of forced texts, which are short


class Vocabulary(Protocol):
    """The part of `Tokenizer` that a grammar backend needs."""

    @property
    def vocab_size(self) -> int: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def is_special(self, token_id: int) -> bool: ...

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]: ...


class TokenTrie:
    """The trie, and the vocabulary's data for masks.

    Args:
        vocab_size: V, the width of the logits.
        eos_ids: tokens that end a text, each below V.

    Attributes:
        words: number of int32 words of llguidance's mask.
        usable: [ceil(V / 32)] int32, a bit for each token: whether it has bytes or ends a text.
        tokens: the bytes of each token; without `eos_ids`, one more without bytes, as llguidance's end token.
    """

    def __init__(self, tokenizer: Vocabulary, vocab_size: int, eos_ids: Sequence[int]) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)
        known = min(vocab_size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(token) for token in range(known)] + [b""] * (vocab_size - known)
        # An end token is special even if the tokenizer treats it as text.
        self.special = {token for token in range(known) if tokenizer.is_special(token)} | self.eos_ids
        usable = np.zeros(32 * -(-vocab_size // 32), np.uint8)
        usable[[token for token in range(vocab_size) if self.tokens[token] or token in self.eos_ids]] = 1
        self.usable = np.packbits(usable, bitorder="little").view(np.int32)
        ends = list(eos_ids) or [vocab_size]
        if not eos_ids:
            self.tokens.append(b"")  # llguidance needs an end token
        self.words = -(-len(self.tokens) // 32)
        wrapped = _LlguidanceVocabulary(tokenizer, self.tokens, sorted(self.special), ends[0])
        self.ll: LLTokenizer = LLTokenizer(TokenizerWrapper(wrapped), eos_token=ends, slices=list(_SLICES))

    def _as_written(self, data: bytes) -> tuple[int, ...]:
        text = data.decode("utf-8", "ignore")
        tokens = self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)[:-1]
        covered = b"".join(self.tokens[token] for token in tokens)
        return tuple(tokens) if data.startswith(covered) else ()  # else the tokenizer has added a space

    @cached_property
    def written(self) -> Callable[[bytes], tuple[int, ...]]:
        """Function that tokenizes a text and drops the last token; cached, because the names in a grammar repeat."""
        return lru_cache(_KEPT)(self._as_written)

    @cached_property
    def neighbours(self) -> Neighbours:
        """The tokens sorted by their bytes."""
        from candle_vllm.core.sampling.unique_tokens import Neighbours

        return Neighbours(self.tokens[: self.vocab_size], self.special, -(-self.vocab_size // 32))

    @cached_property
    def literals(self) -> Literals:
        """Parser of texts that contain names of special tokens."""
        from candle_vllm.core.sampling.lark import Literals

        return Literals({self.tokens[token].decode("utf-8", "replace"): token for token in self.special})


class _LlguidanceVocabulary:
    """Vocabulary with the interface that llguidance expects.

    It must not refer to the trie: the trie holds llguidance's object, which holds this one, and the garbage collector
    does not see this cycle, so it would never be freed.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Vocabulary, tokens: list[bytes], special: list[int], end: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokenize; llguidance calls this in its constructor, and later only to force tokens."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)
