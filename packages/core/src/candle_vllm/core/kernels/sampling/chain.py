# SPDX-License-Identifier: MIT
"""llama.cpp's sampler chain: remove tokens of a row by samplers that depend on the whole distribution.

Contract: a row of V logits in float32, changed in place, and float64 numbers in the order of `Link`. A removed token
gets -inf; a fixed temperature is applied by `draw`. The rules, in this order, each for the tokens that the previous
rules left, with x the logits, p their softmax (without temperature), and equal logits in order of their ids:

  - top_n_sigma keeps x of at least max x - n * the standard deviation of all x that are finite (Tang et al.,
    "Top-nsigma", 2024);
  - top_k keeps x of at least the k-th largest;
  - typical_p keeps tokens whose |-ln p - entropy| is at most the least at which their p sum up to it (Meister et al.,
    "Locally typical sampling", 2022); ties are all kept;
  - top_p and min_p are those of `draw`;
  - XTC removes all tokens with p of at least the threshold except the least likely of them;
  - a dynamic temperature is low + (high - low) * (entropy / ln number of tokens) ** exponent; the row is then
    (x - max x) / that, to be sampled at temperature 1. A single token is left as it is; at a temperature below 1e-5 the
    first of the largest stays;
  - mirostat uses p with the temperature. 1 estimates from the 100 likeliest tokens which k gives a surprise of mu
    (Basu et al., "Mirostat", 2021) and keeps x of at least the k-th largest; 2 keeps tokens of at most mu bits, at
    least the first.

The definitions are those of llama.cpp's samplers of these names, in the order of its default chain. A row whose largest
logit is not finite is not changed. A row's result has the same bits whatever the other rows are.

`narrow_in_numpy` is the reference; `cpu_chain.py` is compiled, `triton_chain.py` is for GPUs.
"""

from __future__ import annotations

import enum
import math

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.cpu_runtime.kernel_cache import can_compile
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, c_function
from candle_vllm.core.kernels.sampling.contract import chain_bytes

# The compiled functions, and how many arguments they take.
CHAIN = ("sampling.cpu_chain:narrow", 4)
REPEATS = ("sampling.cpu_chain:repeats", 3)
LIKELIEST = 100  # tokens from which mirostat 1 estimates k


class Link(enum.IntEnum):
    """Parameters of a row, [12] float64."""

    TOP_N_SIGMA = 0  # 0 where unused
    TOP_K = 1  # 0 where unused
    TYPICAL_P = 2  # 1 where unused
    TOP_P = 3  # 1 where unused
    MIN_P = 4  # 0 where unused
    XTC = 5  # the threshold; 1 if nothing is removed for this token
    TEMPERATURE = 6  # mirostat's; 0 is greedy, which ignores mirostat
    LOW = 7  # of a dynamic temperature
    HIGH = 8  # 0 for a fixed one
    EXPONENT = 9
    MIROSTAT = 10  # 0, 1 or 2
    MU = 11  # bits


def narrow(row: NDArray[np.float32], numbers: NDArray[np.float64]) -> None:
    """Apply the chain to a row in place.

    Args:
        row: [V], contiguous.
        numbers: [12], see `Link`.
    """
    if not can_compile():
        narrow_in_numpy(row, numbers)
        return
    work = np.empty(chain_bytes(len(row)), np.uint8)
    c_function(*CHAIN)(address_of(row), len(row), address_of(numbers), address_of(work))


def surprise(row: NDArray[np.float32], token_id: int, temperature: float) -> float:
    """Return the surprise of a token in bits, among the tokens that the chain left of its row."""
    kept = row[row > -np.inf].astype(np.float64)
    if temperature < 1e-5 or len(kept) == 1:
        return 0.0
    largest = kept.max()
    mass = np.exp((kept - largest) / temperature).sum()
    return float(np.log(mass) - (row[token_id] - largest) / temperature) / math.log(2)


def repeats(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for each position but the last, the length of the longest common suffix with the whole text, [N - 1].

    These are the lengths of DRY's repetitions. The time is linear in N, whatever the tokens are.

    Args:
        tokens: [N], contiguous, at least one.
    """
    if not can_compile():
        return np.array(z_lengths(tokens[::-1].tolist())[:0:-1], np.int64)
    lengths = np.empty(len(tokens), np.int64)
    c_function(*REPEATS)(address_of(tokens), len(tokens), address_of(lengths))
    return lengths[:-1]


def z_lengths(text: list[int]) -> list[int]:
    """Return, for each position, the length of the longest common prefix with the whole text: reference of `repeats`.

    The Z-algorithm (Gusfield, "Algorithms on strings, trees and sequences", 1997).
    """
    size, lengths, left, right = len(text), [len(text)], 0, 0  # text[left:right] is a copy of the beginning
    for place in range(1, size):
        length = min(lengths[place - left], right - place) if place < right else 0
        while place + length < size and text[length] == text[place + length]:
            length += 1
        if place + length > right:
            left, right = place, place + length
        lengths.append(length)
    return lengths


def narrow_in_numpy(row: NDArray[np.float32], numbers: NDArray[np.float64]) -> None:
    """As `narrow`: the reference, and what machines without Numba use."""
    sigma, top_k, typical_p, top_p, min_p, xtc, temperature, low, high, exponent, mirostat, mu = numbers.tolist()
    if not np.isfinite(row.max()):
        return
    ids = np.argsort(-row, kind="stable")
    ids = ids[row[ids] > -np.inf]
    x = row[ids].astype(np.float64)  # falling
    if sigma > 0:
        ids, x = ids[kept := x >= x[0] - sigma * x.std()], x[kept]
    if top_k:
        ids, x = ids[kept := x >= x[min(int(top_k), len(x)) - 1]], x[kept]
    if typical_p < 1:
        p = _softmax(x)
        distances = np.abs(_entropy(p) + np.log(p)).astype(np.float32)
        nearest = np.argsort(distances, kind="stable")
        last = min(int((p[nearest].cumsum() < typical_p).sum()), len(x) - 1)
        ids, x = ids[kept := distances <= distances[nearest[last]]], x[kept]
    if top_p < 1:
        p = _softmax(x)
        kept = p.cumsum() - p < top_p
        kept[0] = True
        ids, x = ids[kept], x[kept]
    if min_p > 0:
        ids, x = ids[kept := x - x[0] >= np.log(min_p)], x[kept]
    if (likely := int((_softmax(x) >= xtc).sum())) > 1:
        ids, x = ids[likely - 1 :], x[likely - 1 :]
    if high and len(x) > 1:
        share = _entropy(_softmax(x)) / math.log(len(x))
        temperature = low + (high - low) * min(max(share, 0.0), 1.0) ** exponent
        if temperature < 1e-5:
            ids, x = ids[:1], x[:1]
        else:
            x, temperature = np.maximum((x - x[0]) / temperature, np.finfo(np.float32).min), 1.0
    if mirostat == 1 and temperature:
        k = _estimated_k(x / temperature, mu, len(row))
        ids, x = ids[kept := x >= x[min(k, len(x)) - 1]], x[kept]
    elif mirostat == 2 and temperature:
        count = max(int((-np.log2(_softmax(x / temperature)) <= mu).sum()), 1)
        ids, x = ids[:count], x[:count]
    left = row[ids].copy() if not high else x.astype(np.float32)
    row[:] = -np.inf
    row[ids] = left


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(x - x[0])
    return weights / weights.sum()


def _entropy(p: NDArray[np.float64]) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def _estimated_k(x: NDArray[np.float64], mu: float, vocabulary: int) -> int:
    """Mirostat 1: the k whose tokens have a surprise of about mu, from Zipf's exponent of the likeliest."""
    likeliest = x[:LIKELIEST]
    if len(likeliest) < 2:
        return 1
    ranks = np.arange(1, len(likeliest), dtype=np.float64)
    steps = np.log((ranks + 1) / ranks)
    exponent = float((steps * -np.diff(likeliest)).sum() / (steps * steps).sum())
    excess = exponent - 1
    if exponent <= 0:  # all are alike: the limit of what follows
        return vocabulary if mu * math.log(2) > math.log(vocabulary - 1) else 1
    rest = math.log(vocabulary) if abs(excess) < 1e-9 else (1 - vocabulary**-excess) / excess
    logarithm = (mu * math.log(2) - math.log(rest)) / exponent
    return vocabulary if logarithm >= math.log(vocabulary) else max(int(math.exp(logarithm)), 1)
