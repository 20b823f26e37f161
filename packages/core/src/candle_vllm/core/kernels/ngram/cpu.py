# SPDX-License-Identifier: MIT
"""Look up hashed n-grams and gate streams by them on the CPU (step 6 of a request's life)."""

from __future__ import annotations

import math

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import (
    float32_at,
    float_from_bits,
    int64_at,
    read,
    step_number,
    uint8_at,
)
from candle_vllm.core.kernels.ngram import LEAST, GateArguments, LookUpArguments

_TOKENS = StepNumber.TOKENS.value


def look_up(row, thread, threads):
    given = read(LookUpArguments, row)
    tokens, size, each = step_number(row, _TOKENS), given.size, given.heads // given.count
    factors, sizes, offsets = int64_at(given.factors), int64_at(given.sizes), int64_at(given.offsets)
    starts, addresses = int64_at(given.starts), int64_at(given.addresses)
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        before, out = float32_at(given.before + t * given.before_stride * 4), given.out + t * given.out_stride * 4
        mixed, ended = int64_at(given.token_ids)[t] * factors[0], False
        for n in range(given.count):
            token = int(before[n]) - 1
            ended = ended or token < 0 or token == given.eos
            mixed ^= (given.eos if ended else token) * factors[n + 1]
            for h in range(n * each, (n + 1) * each):
                number, low, high = mixed % sizes[h] + offsets[h], 0, given.parts
                while high - low > 1:
                    middle = (low + high) >> 1
                    if starts[middle] <= number:
                        low = middle
                    else:
                        high = middle
                source = addresses[low] + (number - starts[low]) * size * given.itemsize
                to = float32_at(out + h * size * 4)
                for i in range(size):
                    if given.itemsize == 4:
                        to[i] = float32_at(source)[i]
                    else:
                        bits = uint8_at(source + 2 * i)
                        to[i] = float_from_bits((int(bits[0]) << 16) | (int(bits[1]) << 24))


def gate_streams(row, thread, threads):
    given = read(GateArguments, row)
    tokens, size = step_number(row, _TOKENS), given.size
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        value = float32_at(given.value + t * given.value_stride * 4)
        for s in range(given.streams):
            key = float32_at(given.key + (t * given.key_stride + s * size) * 4)
            query = float32_at(given.query + (t * given.query_stride + s * size) * 4)
            out, g = float32_at(given.out + (t * given.out_stride + s * size) * 4), 0.0
            for i in range(size):
                g += float(key[i]) * float(query[i])
            g /= math.sqrt(size)
            root = math.sqrt(max(abs(g), LEAST))
            if g == 0.0:
                root = 0.0
            gate = 1.0 / (1.0 + math.exp(-root if g > 0.0 else root))
            for i in range(size):
                out[i] = gate * value[i]
