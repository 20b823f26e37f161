# SPDX-License-Identifier: MIT
"""DRY ("don't repeat yourself"): penalties of tokens that would continue a repetition (step 7 of a request's life).

As in llama.cpp: if the last n tokens occurred before and were followed by token t, the logit of t is reduced by
multiplier * base ** (n - allowed length). n is the length of the longest such match, and at least the allowed length.
A match does not include a sequence breaker, and a token that is a breaker has no penalty.

A breaker is a text. It matches every token that contains it, and every token that ends with a beginning of the
breaker, if the tokens of the breaker's rest follow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.sampling.chain import repeats
from candle_vllm.core.sampling.params import DRY_BREAKERS, SamplingParams
from candle_vllm.core.text.tokenizer import Tokenizer

_LONGEST_TAIL = 20  # maximum number of tokens of a breaker's rest that are compared
_LARGEST = float(np.finfo(np.float32).max)
_KEPT = 16  # maximum number of lists of breakers in the cache


class Breakers:
    """Token sequences of sequence breakers: `singles` of one token, and `sequences` of two tokens or more."""

    def __init__(self, sequences: Sequence[tuple[int, ...]]) -> None:
        self.singles = frozenset(ids[0] for ids in sequences if len(ids) == 1)
        self.sequences = frozenset(ids for ids in sequences if len(ids) > 1)
        self._lengths = sorted({len(ids) for ids in self.sequences})

    def ending(self, tokens: NDArray[np.int64]) -> int:
        """Return the number of tokens of the shortest breaker at the end of `tokens`; 0 if no breaker is there."""
        if int(tokens[-1]) in self.singles:
            return 1
        return next((n for n in self._lengths if tuple(tokens[-n:].tolist()) in self.sequences), 0)


class BreakerTable:
    """Cache of `Breakers` by their texts. Thread-safe; reads the texts of ids below `vocab_size` at the first use."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._size = min(vocab_size, tokenizer.vocab_size)
        self.of = functools.lru_cache(_KEPT)(self._made)

    def of_request(self, params: SamplingParams) -> Breakers:
        """Return the breakers of a request with DRY: its own or the usual ones."""
        given = params.dry_sequence_breakers
        return self.of(DRY_BREAKERS if given is None else tuple(given))

    @functools.cached_property
    def _texts(self) -> tuple[list[str], dict[str, list[int]]]:
        """Return the texts of all tokens, and the tokens by the last character of their text."""
        texts = [self._tokenizer.token_text(token) for token in range(self._size)]
        ends: dict[str, list[int]] = {}
        for token, text in enumerate(texts):
            ends.setdefault(text[-1:], []).append(token)
        return texts, ends

    def _made(self, breakers: tuple[str, ...]) -> Breakers:
        texts, ends = self._texts
        found: list[tuple[int, ...]] = []
        for breaker in breakers:
            found += ((token,) for token, text in enumerate(texts) if breaker in text)
            beginnings = [breaker[:length] for length in range(1, len(breaker))]
            rests = [breaker[len(beginning) :] for beginning in beginnings]
            tails = self._tokenizer.encode_batch(rests, add_special_tokens=False) if rests else []
            for beginning, tail in zip(beginnings, tails):
                heads = (token for token in ends.get(beginning[-1], ()) if texts[token].endswith(beginning))
                found += ((head, *tail[:_LONGEST_TAIL]) for head in heads if breaker not in texts[head])
        return Breakers(found)


class DryState:
    """The tokens of one sequence, with the positions of its breakers."""

    def __init__(self, params: SamplingParams, breakers: Breakers, tokens: Sequence[int]) -> None:
        self._params = params
        self._breakers = breakers
        self._tokens = np.zeros(len(tokens) + 64, np.int64)
        self._size = 0
        self._breaks: list[tuple[int, int]] = []  # for each token, first and last token of the last breaker up to it
        for token in tokens:
            self.append(token)

    def sibling(self, tokens: Sequence[int]) -> DryState:
        """Return the state of another sequence of the same request."""
        return DryState(self._params, self._breakers, tokens)

    def append(self, token_id: int) -> None:
        """Append a token."""
        if self._size == len(self._tokens):  # doubling keeps the cost per token constant
            self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
        self._tokens[self._size] = token_id
        self._size += 1
        last = self._breaks[-1] if self._breaks else (-1, -1)
        length = self._breakers.ending(self._tokens[: self._size])
        self._breaks.append(max(last, (self._size - length, self._size - 1)) if length else last)

    def rollback(self, count: int) -> None:
        """Remove the last `count` tokens."""
        self._size -= count
        del self._breaks[self._size :]

    def penalties(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return distinct token ids [N] in ascending order, and the penalties [N] that their logits are reduced by."""
        params, lookback = self._params, self._params.dry_penalty_last_n
        count = self._size if lookback < 0 else min(lookback, self._size)
        allowed = params.dry_allowed_length
        if count <= allowed:
            return _NOTHING
        begin, end = self._breaks[-1]
        limit = self._size - 1 - end if begin >= self._size - count else count
        if limit < allowed:
            return _NOTHING
        tokens = self._tokens[self._size - count : self._size]
        lengths = np.minimum(repeats(tokens), limit)
        places = np.flatnonzero(lengths >= allowed)
        followers, lengths = tokens[places + 1], lengths[places]
        order = np.lexsort((lengths, followers))
        followers, lengths = followers[order], lengths[order]
        longest = np.diff(followers, append=-1) != 0
        ids, exponents = followers[longest], lengths[longest] - allowed
        if self._breakers.singles and len(ids):
            spared = np.fromiter((token not in self._breakers.singles for token in ids.tolist()), np.bool_, len(ids))
            ids, exponents = ids[spared], exponents[spared]
        most = int(math.log(_LARGEST) / math.log(params.dry_base)) if params.dry_base > 1.000001 else 0
        powers = params.dry_base ** (np.minimum(exponents, most) if most else exponents).astype(np.float64)
        return ids, np.minimum(params.dry_multiplier * powers, _LARGEST).astype(np.float32)


_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.float32))
