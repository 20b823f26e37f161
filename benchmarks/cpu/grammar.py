# SPDX-License-Identifier: MIT
"""Structured output: what grammars cost, one JSON line per result.

    python benchmarks/cpu/grammar.py qwen2.5-coder-0.5b-q4_k_m.gguf [--properties 100] [--walks 5]

The vocabulary is that of a GGUF file; its weights are not read. `start` is what the first form of an engine takes:
the bytes of all tokens, their trie, a grammar. `schema` has as many properties as asked for, of six kinds; `compile`
is the first time, `again` when it is asked for once more, `first_mask` the first of a fresh sequence. `walk` draws
random tokens of the masks until the text is whole, mostly short strings; its percentiles are over the masks of all
walks, and over the tokens that were taken. `apply` is the mask on one row of logits.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.sampling.device_edits import mask_flags
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.processors import mask_row
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.tokenizer import Tokenizer

KINDS: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "integer", "minimum": 0, "maximum": 1000},
    {"type": "number"},
    {"type": "boolean"},
    {"enum": ["red", "green", "blue"]},
    {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
]
MOST_TOKENS = 20_000


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and its milliseconds."""
    start = time.perf_counter()
    result = work()
    return result, round(1e3 * (time.perf_counter() - start), 3)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Microseconds."""
    names = {"p50_us": 50, "p90_us": 90, "p99_us": 99, "max_us": 100}
    return {name: round(1e6 * float(np.percentile(seconds, share)), 1) for name, share in names.items()}


def walk(
    backend: LlguidanceBackend, spec: StructuredOutputsParams, quotes: np.ndarray, seed: int
) -> tuple[list[float], list[float]]:
    """Seconds of each mask and of each token of one whole text."""
    rng, grammar = random.Random(seed), backend.compile(spec)  # noqa: S311
    masks, tokens = [], []
    bits = np.zeros(-(-len(quotes) // 32), np.int32)
    while not grammar.exhausted and len(tokens) < MOST_TOKENS:
        start = time.perf_counter()
        grammar.fill_mask(bits)
        masks.append(time.perf_counter() - start)
        flags = mask_flags(bits, len(quotes))
        ending = np.flatnonzero(flags & quotes)
        choices = ending if len(ending) and rng.random() < 0.3 else np.flatnonzero(flags)
        token = int(rng.choice(choices))
        start = time.perf_counter()
        grammar.accept(token)
        tokens.append(time.perf_counter() - start)
    return masks, tokens


def apply_cost(vocabulary: int) -> list[float]:
    """Seconds of masking a row, at several shares of allowed tokens."""
    rng, seconds = np.random.default_rng(0), []
    for share in (0.0001, 0.01, 0.3, 0.9):
        flags = np.zeros(32 * -(-vocabulary // 32), np.uint8)
        flags[:vocabulary] = rng.random(vocabulary) < share
        bits = np.packbits(flags, bitorder="little").view(np.int32)
        row = rng.standard_normal(vocabulary).astype(np.float32)
        for _ in range(100):
            logits = row.copy()
            start = time.perf_counter()
            mask_row(logits, bits)
            seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a GGUF file, for its vocabulary")
    parser.add_argument("--properties", type=int, default=100)
    parser.add_argument("--walks", type=int, default=5)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_gguf(open_gguf(options.file).metadata)
    size = tokenizer.vocab_size
    backend = LlguidanceBackend(tokenizer, size, tokenizer.eos_token_ids)
    versions = {"machine": platform.processor() or platform.machine(), "llguidance": version("llguidance")}
    machine = {**versions, "vocabulary": size}

    def report(name: str, **figures: Any) -> None:
        print(json.dumps({"grammar": name, **figures, **machine}), flush=True)

    _, start = timed(lambda: backend.compile(StructuredOutputsParams(json_object=True)))
    report("start", ms=start)
    fields = {f"field_{number:03d}": KINDS[number % len(KINDS)] for number in range(options.properties)}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    spec = StructuredOutputsParams(json=schema)
    _, compiled = timed(lambda: backend.compile(spec))
    grammar, again = timed(lambda: backend.compile(spec))
    bits = np.zeros(-(-size // 32), np.int32)
    _, first = timed(lambda: grammar.fill_mask(bits))
    report("schema", properties=options.properties, compile_ms=compiled, again_ms=again, first_mask_ms=first)
    quotes = np.array([tokenizer.token_bytes(token).startswith(b'"') for token in range(size)])
    walks = [walk(backend, spec, quotes, seed) for seed in range(options.walks)]
    masks, tokens = ([second for each in walks for second in each[part]] for part in (0, 1))
    report("walk: masks", tokens=len(masks), **percentiles(masks))
    report("walk: tokens", tokens=len(tokens), **percentiles(tokens))
    report("apply", **percentiles(apply_cost(size)))
    backend.close()


if __name__ == "__main__":
    main()
