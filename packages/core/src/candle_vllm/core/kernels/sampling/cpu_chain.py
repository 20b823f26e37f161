# SPDX-License-Identifier: MIT
"""llama.cpp's sampler chain as a compiled function: each sampler sets removed tokens to -inf; no row is sorted.

`chain.py` defines the samplers; chunk and key: see `cpu_chunks.py`. After a sampler has removed tokens, the chunks'
maxima are computed again, so that later samplers skip chunks without tokens. (In Numba `float` of a float32 is a
float32, hence `np.float64`.)
"""

from __future__ import annotations

import math

import numpy as np

from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, float64_at, int32_at, int64_at
from candle_vllm.core.kernels.sampling import cpu_select
from candle_vllm.core.kernels.sampling.contract import (
    BINS,
    BINS_AT,
    CHUNK,
    DISTANCES_AT,
    LIKELIEST,
    MAXIMA_AT,
    MAXIMA_BYTES,
    SUMS_AT,
    TAIL_AT,
    WEIGHTS_AT,
    Link,
)
from candle_vllm.core.kernels.sampling.cpu_chunks import above, chunk_at, inner, reaches, weigh_chunk

_LN_2 = math.log(2.0)
_HIGH_BITS, _LOW_BITS = 19, 7  # split the 31 bits of a distance into 12 high, 12 middle and 7 low bits


@inner
def _has_tokens(work, number):
    """Whether a chunk has tokens that were not removed."""
    return reaches(work + MAXIMA_AT + number * MAXIMA_BYTES, cpu_select.LOWEST)


@inner
def _remove_below(row, vocabulary, work, cut, last_tie):
    """Remove tokens with logits below `cut`, or equal to `cut` with ids above `last_tie`; return the largest logit."""
    logits = float32_at(row)
    for number in range((vocabulary + CHUNK - 1) // CHUNK):
        if _has_tokens(work, number):
            for token in range(number * CHUNK, min((number + 1) * CHUNK, vocabulary)):
                value = logits[token]
                logits[token] = value if value > cut or (value == cut and token <= last_tie) else -cpu_select.INFINITE
    return cpu_select.survey(row, vocabulary, work)


@inner
def _at_least(value):
    """Return the smallest float32 that is at least `value`."""
    near = np.float32(value)
    return above(near) if np.float64(near) < value else near


@inner
def _sigma_bound(row, vocabulary, top, sigma):
    logits, count, total, squares, largest = float32_at(row), 0, 0.0, 0.0, np.float64(top)
    for token in range(vocabulary):
        if logits[token] >= cpu_select.LOWEST:
            difference = np.float64(logits[token]) - largest
            count += 1
            total += difference
            squares += difference * difference
    mean = total / count
    return _at_least(largest - sigma * math.sqrt(max(squares / count - mean * mean, 0.0)))


@inner
def _mass(row, vocabulary, work, top, rate):
    """Return the sum of exp((x - top) * rate)."""
    chunks, mass, scale = (vocabulary + CHUNK - 1) // CHUNK, 0.0, np.float32(rate * cpu_select.LOG2_E)
    for number in range(chunks):
        if _has_tokens(work, number):
            at = chunk_at(row, work + TAIL_AT, chunks, number)
            mass += weigh_chunk(at, top, scale, cpu_select.LOWEST, work + WEIGHTS_AT)
    return mass


@inner
def _entropy(row, vocabulary, work, top, mass):
    """Return the entropy in nats of the probabilities exp(x - top) / mass."""
    chunks, weights = (vocabulary + CHUNK - 1) // CHUNK, float32_at(work + WEIGHTS_AT)
    weighted, largest = 0.0, np.float64(top)
    for number in range(chunks):
        if _has_tokens(work, number):
            at = chunk_at(row, work + TAIL_AT, chunks, number)
            weigh_chunk(at, top, np.float32(cpu_select.LOG2_E), cpu_select.LOWEST, work + WEIGHTS_AT)
            logits, even, odd = float32_at(at), 0.0, 0.0
            for place in range(0, CHUNK, 2):  # two independent sums, for instruction-level parallelism
                even += weights[place] * (np.float64(max(logits[place], cpu_select.LOWEST)) - largest)
                odd += weights[place + 1] * (np.float64(max(logits[place + 1], cpu_select.LOWEST)) - largest)
            weighted += even + odd
    return math.log(mass) - weighted / mass


@inner
def _distances(row, vocabulary, work, own, number, shift):
    """Store |shift - x| of chunk `number`, infinite for removed tokens; return the chunk's address. See `_typical`."""
    at = chunk_at(row, work + TAIL_AT, (vocabulary + CHUNK - 1) // CHUNK, number)
    logits, to = float32_at(at), float32_at(own + DISTANCES_AT)
    for place in range(CHUNK):
        to[place] = np.float32(abs(shift - np.float64(logits[place])))
    return at


@inner
def _typical(row, vocabulary, work, own, top, typical_p):
    """Apply typical_p by a radix search for the largest kept distance, from its high bits to its low bits.

    A token's distance is |shift - x| with shift = ln(mass) + top - entropy.
    """
    mass = _mass(row, vocabulary, work, top, 1.0)
    shift = math.log(mass) + np.float64(top) - _entropy(row, vocabulary, work, top, mass)
    bins, keys, weights = float64_at(own + BINS_AT), int32_at(own + DISTANCES_AT), float32_at(work + WEIGHTS_AT)
    chunks, before, target, known, cut = (vocabulary + CHUNK - 1) // CHUNK, 0.0, 0.0, 31, 0
    for low in (_HIGH_BITS, _LOW_BITS, 0):
        for place in range(BINS):
            bins[place] = 0.0
        for number in range(chunks):
            if not _has_tokens(work, number):
                continue
            at = _distances(row, vocabulary, work, own, number, shift)
            weigh_chunk(at, top, np.float32(cpu_select.LOG2_E), cpu_select.LOWEST, work + WEIGHTS_AT)
            for place in range(CHUNK):
                if keys[place] >> known == cut and weights[place] > 0:
                    bins[(keys[place] >> low) & ((1 << (known - low)) - 1)] += weights[place]
        if known == 31:
            for place in range(BINS):
                target += bins[place]
            target *= typical_p
        chosen = 0
        for place in range(1 << (known - low)):
            if bins[place] > 0:
                chosen = place
                if before + bins[place] >= target:
                    break
                before += bins[place]
        cut, known = (cut << (known - low)) | chosen, low
    logits = float32_at(row)
    for number in range(chunks):
        if _has_tokens(work, number):
            _distances(row, vocabulary, work, own, number, shift)
            for token in range(number * CHUNK, min((number + 1) * CHUNK, vocabulary)):
                if keys[token - number * CHUNK] > cut:
                    logits[token] = -cpu_select.INFINITE
    return cpu_select.survey(row, vocabulary, work)


@inner
def _xtc(row, vocabulary, work, top, threshold):
    """Apply XTC: remove the tokens with p >= threshold except the least likely; return the largest logit."""
    mass = _mass(row, vocabulary, work, top, 1.0)
    bound = math.log(threshold * mass) if threshold > 0 else -cpu_select.INFINITE
    logits, least, stays, count = float32_at(row), cpu_select.INFINITE, -1, 0
    for number in range((vocabulary + CHUNK - 1) // CHUNK):
        if _has_tokens(work, number):
            for token in range(number * CHUNK, min((number + 1) * CHUNK, vocabulary)):
                value = logits[token]
                if value >= cpu_select.LOWEST and np.float64(value) - np.float64(top) >= bound:
                    count += 1
                    if value <= least:
                        least, stays = value, token
    if count < 2:
        return top
    for token in range(vocabulary):
        if token != stays and logits[token] >= least:
            logits[token] = -cpu_select.INFINITE
    return cpu_select.survey(row, vocabulary, work)


@inner
def _num_left(row, vocabulary):
    """Return the number of tokens that were not removed."""
    logits, count = float32_at(row), 0
    for token in range(vocabulary):
        count += logits[token] >= cpu_select.LOWEST
    return count


@inner
def _keep_first(row, vocabulary, work, top):
    first = cpu_select.first_at(row, (vocabulary + CHUNK - 1) // CHUNK, work, top, cpu_select.INFINITE, np.int64(0))
    return _remove_below(row, vocabulary, work, top, first)


@inner
def _estimated_k(row, vocabulary, work, values, mu, rate):
    """Return mirostat 1's k, see `chain._estimated_k`; `values` is memory for the likeliest tokens' sorted logits."""
    logits, count = float32_at(row), 0
    for number in range((vocabulary + CHUNK - 1) // CHUNK):
        at = work + MAXIMA_AT + number * MAXIMA_BYTES
        if not reaches(at, values[count - 1] if count == LIKELIEST else cpu_select.LOWEST):
            continue
        for token in range(number * CHUNK, min((number + 1) * CHUNK, vocabulary)):
            value = logits[token]
            if value < cpu_select.LOWEST or (count == LIKELIEST and value <= values[count - 1]):
                continue
            place = min(count, LIKELIEST - 1)
            count = place + 1
            while place > 0 and values[place - 1] < value:
                values[place] = values[place - 1]
                place -= 1
            values[place] = value
    if count < 2:
        return 1
    products, squares = 0.0, 0.0
    for place in range(count - 1):
        step = math.log((place + 2.0) / (place + 1.0))
        products += step * (np.float64(values[place]) - np.float64(values[place + 1])) * rate
        squares += step * step
    exponent, wide = products / squares, np.float64(vocabulary)
    excess = exponent - 1.0
    if exponent <= 0.0:
        return vocabulary if mu * _LN_2 > math.log(wide - 1.0) else 1
    rest = math.log(wide) if abs(excess) < 1e-9 else (1.0 - wide**-excess) / excess
    logarithm = (mu * _LN_2 - math.log(rest)) / exponent
    return vocabulary if logarithm >= math.log(wide) else max(int(math.exp(logarithm)), 1)


@inner
def _dynamic_temperature(row, vocabulary, work, top, low, high, exponent):
    """Divide a row with at least two tokens by a temperature that depends on its entropy."""
    mass = _mass(row, vocabulary, work, top, 1.0)
    share = _entropy(row, vocabulary, work, top, mass) / math.log(np.float64(_num_left(row, vocabulary)))
    temperature = low + (high - low) * min(max(share, 0.0), 1.0) ** exponent
    if temperature < 1e-5:
        return _keep_first(row, vocabulary, work, top)
    logits, largest = float32_at(row), np.float64(top)
    for token in range(vocabulary):
        if logits[token] >= cpu_select.LOWEST:
            logits[token] = np.float32(
                max((np.float64(logits[token]) - largest) / temperature, np.float64(cpu_select.LOWEST))
            )
    return cpu_select.survey(row, vocabulary, work)


@inner
def _mirostat(row, vocabulary, work, top, mode, mu, rate):
    chunks = (vocabulary + CHUNK - 1) // CHUNK
    if mode == 1:
        values = float32_at(work + SUMS_AT + chunks * (MAXIMA_BYTES + 8))
        k = _estimated_k(row, vocabulary, work, values, mu, rate)
        cut, _ = cpu_select.kth_largest(row, chunks, work, k, top)
        _remove_below(row, vocabulary, work, cut, cpu_select.ALL)
        return
    mass = _mass(row, vocabulary, work, top, rate)
    bound = math.log(mass) - mu * _LN_2  # (x - top) * rate of a token with mu bits of surprise
    if bound > 0:
        _keep_first(row, vocabulary, work, top)
    else:
        least = _at_least(max(bound / rate + np.float64(top), np.float64(cpu_select.LOWEST)))
        _remove_below(row, vocabulary, work, least, cpu_select.ALL)


def narrow(row, vocabulary, numbers_at, work):
    """See `chain.narrow`. Takes addresses: of a row of logits, of its parameters, and of `chain_bytes` of workspace."""
    numbers, chunks = float64_at(numbers_at), (vocabulary + CHUNK - 1) // CHUNK
    own = work + SUMS_AT + chunks * (MAXIMA_BYTES + 8 + 4 * CHUNK) + 4 * CHUNK
    top = cpu_select.survey(row, vocabulary, work)
    if not -cpu_select.INFINITE < top < cpu_select.INFINITE:
        return
    cut = cpu_select.LOWEST
    if numbers[Link.TOP_N_SIGMA.value] > 0:
        cut = max(cut, _sigma_bound(row, vocabulary, top, numbers[Link.TOP_N_SIGMA.value]))
    if numbers[Link.TOP_K.value] > 0:
        bound, _ = cpu_select.kth_largest(row, chunks, work, int(numbers[Link.TOP_K.value]), top)
        cut = max(cut, bound)
    if cut > cpu_select.LOWEST:
        top = _remove_below(row, vocabulary, work, cut, cpu_select.ALL)
    if numbers[Link.TYPICAL_P.value] < 1:
        top = _typical(row, vocabulary, work, own, top, numbers[Link.TYPICAL_P.value])
    cut, last_tie = cpu_select.LOWEST, cpu_select.ALL
    if numbers[Link.TOP_P.value] < 1:
        cut, ties = cpu_select.nucleus(row, chunks, work, cpu_select.LOWEST, numbers[Link.TOP_P.value], top, 1.0)
        if ties != cpu_select.ALL:
            last_tie = cpu_select.first_at(row, chunks, work, cut, above(cut), ties - 1)
    if numbers[Link.MIN_P.value] > 0:
        bound = cpu_select.min_p_bound(numbers[Link.MIN_P.value], top, 1.0)
        if bound > cut:
            cut, last_tie = bound, cpu_select.ALL
    if cut > cpu_select.LOWEST or last_tie != cpu_select.ALL:
        top = _remove_below(row, vocabulary, work, cut, last_tie)
    if numbers[Link.XTC.value] <= 0.5:
        top = _xtc(row, vocabulary, work, top, numbers[Link.XTC.value])
    rate = 1.0 / numbers[Link.TEMPERATURE.value] if numbers[Link.TEMPERATURE.value] > 0 else 0.0
    if numbers[Link.HIGH.value] > 0:
        rate = 1.0
        if _num_left(row, vocabulary) > 1:
            low, high, exponent = numbers[Link.LOW.value], numbers[Link.HIGH.value], numbers[Link.EXPONENT.value]
            top = _dynamic_temperature(row, vocabulary, work, top, low, high, exponent)
    if numbers[Link.MIROSTAT.value] > 0 and rate > 0:
        _mirostat(row, vocabulary, work, top, int(numbers[Link.MIROSTAT.value]), numbers[Link.MU.value], rate)


def repeats(tokens_at, size, lengths_at):
    """See `chain.repeats`; the last of `size` lengths is `size` itself."""
    tokens, lengths, left, right, end = int64_at(tokens_at), int64_at(lengths_at), 0, 0, size - 1
    lengths[end] = size
    for place in range(1, size):
        length = min(lengths[end - place + left], right - place) if place < right else 0
        while place + length < size and tokens[end - length] == tokens[end - place - length]:
            length += 1
        if place + length > right:
            left, right = place, place + length
        lengths[end - place] = length
