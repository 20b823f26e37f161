# SPDX-License-Identifier: MIT
"""llama.cpp's sampler chain: its samplers remove tokens of a row, depending on the row's whole distribution.

Contract: the arguments are a row of V logits in float32, changed in place, and float64 numbers in the order of `Link`.
The logit of a removed token becomes -inf; a fixed temperature is left to `draw`. The rules are applied in this order,
each to the tokens that are left. x are these tokens' logits, p the softmax of x (without temperature); ties are in
order of id:

  - top_n_sigma keeps x of at least max x - n * the standard deviation of all x that are finite (Tang et al.,
    "Top-nsigma", 2024);
  - top_k keeps x of at least the k-th largest;
  - typical_p keeps the tokens with the smallest |-ln p - entropy| whose p sum up to at least typical_p (Meister et al.,
    "Locally typical sampling", 2022); all ties are kept;
  - top_p and min_p are those of `draw`;
  - XTC removes all tokens whose p is at least the threshold, except the least likely of them;
  - a dynamic temperature t is low + (high - low) * (entropy / ln number of tokens) ** exponent; the row becomes
    (x - max x) / t, and is sampled at temperature 1. A single token is not changed; if t is below 1e-5, only the first
    of the largest logits is kept;
  - mirostat uses p with the temperature. Mirostat 1 estimates from the 100 likeliest tokens which k gives a surprise of
    mu (Basu et al., "Mirostat", 2021) and keeps x of at least the k-th largest. Mirostat 2 keeps tokens whose surprise
    is at most mu bits, and always the first token.

The names, definitions and order are those of llama.cpp's default chain, which mirostat replaces there. A row whose
largest logit is not finite is not changed. A row's result does not depend on the other rows, bit for bit.

`narrow_in_numpy` is the reference, `cpu_chain.py` is compiled, and `triton_chain.py` is for GPUs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.cpu_runtime.kernel_cache import can_compile
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, c_function
from candle_vllm.core.kernels.sampling.contract import LIKELIEST, Link, chain_bytes

# The compiled functions, and their numbers of arguments.
CHAIN = ("sampling.cpu_chain:narrow", 4)
REPEATS = ("sampling.cpu_chain:repeats", 3)


def narrow(row: NDArray[np.float32], numbers: NDArray[np.float64]) -> None:
    """Apply the chain to a row in place.

    Args:
        row: [V], contiguous.
        numbers: [len(Link)].
    """
    if not can_compile():
        narrow_in_numpy(row, numbers)
        return
    work = np.empty(chain_bytes(len(row)), np.uint8)
    c_function(*CHAIN)(address_of(row), len(row), address_of(numbers), address_of(work))


def surprise(row: NDArray[np.float32], token_id: int, temperature: float) -> float:
    """Return the surprise of a token in bits, among the tokens of its row that the chain did not remove."""
    kept = row[row > -np.inf].astype(np.float64)
    if temperature < 1e-5 or len(kept) == 1:
        return 0.0
    largest = kept.max()
    mass = np.exp((kept - largest) / temperature).sum()
    return float(np.log(mass) - (row[token_id] - largest) / temperature) / math.log(2)


def repeats(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [N - 1] lengths: for each n below N - 1, of the longest common suffix of `tokens` and `tokens[: n + 1]`.

    These are the lengths of DRY's repetitions. The time is linear in N for any tokens.

    Args:
        tokens: [N], contiguous, at least one.
    """
    if not can_compile():
        return np.array(z_lengths(tokens[::-1].tolist())[:0:-1], np.int64)
    lengths = np.empty(len(tokens), np.int64)
    c_function(*REPEATS)(address_of(tokens), len(tokens), address_of(lengths))
    return lengths[:-1]


def z_lengths(text: list[int]) -> list[int]:
    """Return, for each position, the length of the longest common prefix of `text` and `text[position:]`.

    The Z-algorithm (Gusfield, "Algorithms on strings, trees and sequences", 1997): the reference of `repeats`.
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
    """Do what `narrow` does: the reference, used without compiled functions, and by `narrow_tensors`."""
    given = numbers.tolist()
    if not np.isfinite(row.max()):
        return
    ids = np.argsort(-row, kind="stable")
    ids = ids[row[ids] > -np.inf]
    x = row[ids].astype(np.float64)  # in descending order
    if (sigma := given[Link.TOP_N_SIGMA]) > 0:
        ids, x = ids[kept := x >= x[0] - sigma * x.std()], x[kept]
    if top_k := given[Link.TOP_K]:
        ids, x = ids[kept := x >= x[min(int(top_k), len(x)) - 1]], x[kept]
    if (typical_p := given[Link.TYPICAL_P]) < 1:
        p = _softmax(x)
        distances = np.abs(_entropy(p) + np.log(p)).astype(np.float32)
        nearest = np.argsort(distances, kind="stable")
        last = min(int((p[nearest].cumsum() < typical_p).sum()), len(x) - 1)
        ids, x = ids[kept := distances <= distances[nearest[last]]], x[kept]
    if (top_p := given[Link.TOP_P]) < 1:
        p = _softmax(x)
        kept = p.cumsum() - p < top_p
        kept[0] = True
        ids, x = ids[kept], x[kept]
    if (min_p := given[Link.MIN_P]) > 0:
        ids, x = ids[kept := x - x[0] >= np.log(min_p)], x[kept]
    if (likely := int((_softmax(x) >= given[Link.XTC]).sum())) > 1:
        ids, x = ids[likely - 1 :], x[likely - 1 :]
    temperature, low, high = given[Link.TEMPERATURE], given[Link.LOW], given[Link.HIGH]
    if high and len(x) > 1:
        share = _entropy(_softmax(x)) / math.log(len(x))
        temperature = low + (high - low) * min(max(share, 0.0), 1.0) ** given[Link.EXPONENT]
        if temperature < 1e-5:
            ids, x = ids[:1], x[:1]
        else:
            x, temperature = np.maximum((x - x[0]) / temperature, np.finfo(np.float32).min), 1.0
    mirostat, mu = given[Link.MIROSTAT], given[Link.MU]
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
    """Mirostat 1: estimate the k at which the surprise is about mu, from Zipf's exponent of the likeliest tokens."""
    likeliest = x[:LIKELIEST]
    if len(likeliest) < 2:
        return 1
    ranks = np.arange(1, len(likeliest), dtype=np.float64)
    steps = np.log((ranks + 1) / ranks)
    exponent = float((steps * -np.diff(likeliest)).sum() / (steps * steps).sum())
    excess = exponent - 1
    if exponent <= 0:  # all tokens are equally likely: the limit of the formula below for exponent 0
        return vocabulary if mu * math.log(2) > math.log(vocabulary - 1) else 1
    rest = math.log(vocabulary) if abs(excess) < 1e-9 else (1 - vocabulary**-excess) / excess
    logarithm = (mu * math.log(2) - math.log(rest)) / exponent
    return vocabulary if logarithm >= math.log(vocabulary) else max(int(math.exp(logarithm)), 1)
