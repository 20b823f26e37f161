# SPDX-License-Identifier: MIT
"""The generator against its published vectors, and what a seed promises."""

from __future__ import annotations

import numpy as np
import pytest

from candle_vllm.core.sampling.random import fresh_seed, philox4x32, seed_words, uniforms

# The philox4x32 lines, 10 rounds, of the known-answer file of Random123, the authors' own library.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox4x32(np.array([counter], np.uint32), np.array([key], np.uint32)).tolist() == [expected]


def test_rows_are_independent() -> None:
    counters = np.array([counter for counter, _, _ in KNOWN_ANSWERS], np.uint32)
    keys = np.array([key for _, key, _ in KNOWN_ANSWERS], np.uint32)
    assert philox4x32(counters, keys).tolist() == [expected for _, _, expected in KNOWN_ANSWERS]


def test_layout_of_the_counter() -> None:
    words = seed_words(0x0123456789ABCDEF, 7)
    block = philox4x32(np.array([[5, 7, 0, 0]], np.uint32), np.array([[0x89ABCDEF, 0x01234567]], np.uint32))[0]
    bits = (int(block[0]) << 20) | (int(block[1]) >> 12)
    assert uniforms([words], [5], 1).tolist() == [[(bits + 0.5) / 2**52]]


def test_positions_do_not_depend_on_how_they_are_grouped() -> None:
    words = seed_words(3, 0)
    (whole,) = uniforms([words], [0], 100)
    assert np.array_equal(whole[40:], np.concatenate([uniforms([words], [at], 1)[0] for at in range(40, 100)]))


def test_sequences_do_not_depend_on_each_other() -> None:
    words, first = [seed_words(seed, index) for seed, index in ((3, 0), (-1, 2), (1 << 63, 1))], [7, 0, 1 << 31]
    alone = [uniforms([own], [at], 5)[0] for own, at in zip(words, first)]
    assert np.array_equal(uniforms(words, first, 5), alone)


def test_uniform_and_open() -> None:
    (numbers,) = uniforms([seed_words(1, 0)], [0], 20_000)
    assert 0 < numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    bins = np.bincount((numbers * 20).astype(int), minlength=20)
    assert ((bins - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_extremes_of_the_bits_stay_inside() -> None:
    assert (2**52 - 1 + 0.5) * 2.0**-52 < 1  # what `uniforms` computes from all ones


def test_seeds_signs_and_sequences_are_distinct() -> None:
    seeds = [0, 1, -1, -(1 << 63), (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 32]
    streams = {tuple(uniforms([seed_words(seed, index)], [0], 4)[0]) for seed in seeds for index in range(3)}
    assert len(streams) == 3 * len(seeds)


def test_fresh_seeds_differ() -> None:
    seeds = {fresh_seed() for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 1 << 64 for seed in seeds)
