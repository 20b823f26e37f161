# SPDX-License-Identifier: MIT
"""Hashes of n-grams, by which tokens find the rows of a table of embeddings (Qwen4): sizes, and the config's keys.

Source: transformers' `Qwen4ExpTextNGramEmbedding`; Steele, Lea and Flood, 2014 (SplitMix64).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.kernels.short_conv import state_shape
from candle_vllm.core.loading.cache_specs import StatePart, StateSpec

MOST_HEADS, MOST_SPAN, _MOST_ROWS = 1024, 16, 1 << 28


@dataclasses.dataclass(frozen=True)
class NGramHash:
    """How a layer's n-grams of up to N tokens become rows; see `kernels/ngram`.

    Attributes:
        factors: N factors.
        sizes, offsets: of each head.
        eos: the id that begins a text.
    """

    factors: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    eos: int

    @property
    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Factors int64 [N], sizes int64 [heads] and offsets int64 [heads]."""
        factors, sizes, offsets = (np.array(each, np.int64) for each in (self.factors, self.sizes, self.offsets))
        return factors, sizes, offsets

    def rows(self, token_ids: NDArray[np.int64], before: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the row of each head, [T, heads], for ids [T] and the ids before them plus 1, [T, N - 1]."""
        (factors, sizes, offsets), found = self.arrays, list[NDArray[np.int64]]()
        mixed, ended = token_ids * factors[0], np.zeros(len(token_ids), bool)
        before = np.where((before >= 0) & (before <= MAX_COUNT), before, 0)  # memory that no kernel has written yet
        by_length = zip(np.split(sizes, before.shape[1]), before.T, factors[1:], strict=True)
        for own, earlier, factor in by_length:
            token = earlier.astype(np.int64) - 1
            ended |= (token < 0) | (token == self.eos)
            mixed = mixed ^ np.where(ended, self.eos, token) * factor
            found.append(mixed[:, None] % own)
        return np.concatenate(found, 1) + offsets


@dataclasses.dataclass(frozen=True)
class NGrams:
    """Sizes of the layers with n-grams.

    Attributes:
        size: elements of a token's embedding.
        longest: N, tokens of the longest n-gram, which is also the dilation of the convolution.
        taps: kernel size of the convolution.
        hashes: the hash of each of these layers, by its index in the model.
        rows: rows of the table of each of these layers.
    """

    size: int
    longest: int
    taps: int
    hashes: Mapping[int, NGramHash]
    rows: Mapping[int, int]

    @property
    def span(self) -> int:
        """Kernel size of the convolution with zeros between its taps."""
        return (self.taps - 1) * self.longest + 1

    def checked(self, fields: Fields, vocab_size: int) -> NGrams:
        """Return these n-grams, which `fields` describe, after a check of their sizes and ids."""
        taps, longest, ends = self.taps, self.longest, {each.eos for each in self.hashes.values()}
        if taps < 2 or self.span > MOST_SPAN:
            raise UnsupportedModelError(
                f"{fields.path}: a convolution of {taps} taps (ple_conv_kernel_size), {longest} tokens apart "
                f"(ngram_size), is not implemented: 2 taps or more, within {MOST_SPAN} tokens, are"
            )
        if not all(0 <= eos < vocab_size for eos in ends):
            raise InvalidFileError(f"{fields.path}: n-grams need an eos_token_id that is a token, not {[*ends]}")
        return self

    def state(self, channels: int) -> StateSpec:
        """The state that a layer stores for a sequence: inputs of the convolution, and ids."""
        before = self.longest - 1
        ids = StatePart(state_shape(before, self.longest), before)
        return StateSpec((StatePart(state_shape(channels, self.span), channels, exact=False), ids))


def ngrams_from_hf(
    fields: Fields, allowed: Collection[int], hidden_size: int, vocab_size: int, eos: int | None
) -> NGrams | None:
    """Read the n-grams of the layers that `ple_layer_ids` counts from 1; None without such layers.

    Args:
        fields: the text model's config.
        allowed: layers that may have n-grams.
        hidden_size, vocab_size: sizes of the model.
        eos: the id that begins a text; None if the config has no such id.
    """
    ids = fields.get("ple_layer_ids", list, [])
    if not all(type(each) is int and each - 1 in allowed for each in ids):
        raise InvalidFileError(f"{fields.path}: ple_layer_ids is {ids!r:.80}, not layers with delta nets, from 1 on")
    if not ids:
        return None
    size, longest = fields.count("ple_embed_dim", hidden_size), fields.count("ngram_size", 3, most=MOST_SPAN)
    heads, taps = fields.count("heads_per_ngram", 8), fields.count("ple_conv_kernel_size", 4, most=MOST_SPAN)
    count = (longest - 1) * heads
    if not 0 < count * len(ids) <= MOST_HEADS or size % count:
        raise InvalidFileError(f"{fields.path}: ple_embed_dim {size} cannot be divided into {count} heads of n-grams")
    primes = filter(_is_prime, itertools.count(fields.count("ngram_vocab_size_base", 20_000_000, most=_MOST_ROWS)))
    padding, seed = fields.count("make_ngram_vocab_size_divisible_by", 128), fields.get("seed", int, 1234)
    hashes, rows = dict[int, NGramHash](), dict[int, int]()
    for number, layer in enumerate(sorted(set(ids))):
        sizes = tuple(itertools.islice(primes, count))
        factors = tuple(_factors(vocab_size, longest, seed + 10007 * number))
        *offsets, total = itertools.accumulate(sizes, initial=0)
        hashes[layer - 1] = NGramHash(factors, sizes, tuple(offsets), -1 if eos is None else eos)
        rows[layer - 1] = -(-total // padding) * padding
    return NGrams(size, longest, taps, hashes, rows).checked(fields, vocab_size)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _factors(vocab_size: int, count: int, seed: int) -> list[int]:
    """Odd numbers from SplitMix64, so small that no product with a token overflows."""
    gamma, mask, found = 0x9E3779B97F4A7C15, (1 << 64) - 1, list[int]()
    bound = max(1, ((1 << 63) - 1) // vocab_size // 2)
    for index in range(count):
        value = (seed + gamma * (index + 2)) & mask
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = ((value ^ (value >> shift)) * factor) & mask
        found.append(2 * ((value ^ (value >> 31)) % bound) + 1)
    return found
