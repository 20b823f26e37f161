# SPDX-License-Identifier: MIT
"""Sampling on the CPU: microseconds per row, one JSON line per result, the reference in torch beside the compiled way.

Logits are noise with a few tokens far above it, as a model's are; `--flat` leaves the noise alone, which is the worst
case of top_p. The times are those of `Sampler.sample`, Python included. Every figure is the best of `--rounds`.

    python benchmarks/cpu/sampling.py [--vocabularies 49152,151936] [--rows 1,32] [--flat] [--no-reference]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from candle_vllm.core.devices import CPU
from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.sampling.dry import Breakers
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.sampler import Sampler
from candle_vllm.core.sampling.state import SamplingState

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top_p": {"top_p": 0.95},
    "top_k": {"top_k": 50},
    "top_k and top_p": {"top_k": 50, "top_p": 0.95},
    "min_p": {"min_p": 0.05},
    "hot top_p": {"temperature": 5.0, "top_p": 0.9},
    "penalties": {"temperature": 0, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
    "min_tokens": {"temperature": 0, "min_tokens": 10},
    "logprobs": {"temperature": 0, "logprobs": 5},
    "top_n_sigma": {"top_n_sigma": 1.0},
    "typical_p": {"typical_p": 0.9},
    "typical_p of top_k": {"typical_p": 0.9, "top_k": 40},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.01},
    "dynatemp": {"dynatemp_range": 0.5},
    "mirostat 1": {"mirostat": 1},
    "mirostat 2": {"mirostat": 2},
    "dry": {"dry_multiplier": 0.8},
    "repeat_last_n": {"temperature": 0, "repetition_penalty": 1.1, "repeat_last_n": 64},
    "processor": {"temperature": 0, "logits_processors": [lambda _, row: row]},
}
PROMPT = 2000  # distinct tokens that a repetition penalty looks at


def best(work: Callable[[], object], rounds: int, restore: Callable[[], object]) -> float:
    """Seconds of the fastest round, after one that does not count; before each what it changes is restored."""
    work()
    times = []
    for _ in range(rounds):
        restore()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(vocabulary: int, rows: int, params: dict[str, Any], options: argparse.Namespace) -> dict:
    """Microseconds per row of one mode."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    if not options.flat:
        logits[:, :: vocabulary // 50] += 14
    states = [
        SamplingState(
            SamplingParams(seed=row, **params),
            range(PROMPT),
            vocab_size=vocabulary,
            eos_token_ids=[2],
            breakers=Breakers([]) if "dry_multiplier" in params else None,
        )
        for row in range(rows)
    ]
    sampler = Sampler()

    given = logits.clone()

    def restore() -> object:
        return logits.copy_(given)

    def work() -> object:
        return sampler.sample(logits, states)

    result = {"us": round(1e6 * best(work, options.rounds, restore) / rows, 1)}
    if not options.no_reference:
        with mock.patch.object(kernels, "can_compile", return_value=False):
            result["reference_us"] = round(1e6 * best(work, 2, restore) / rows, 1)
        result["speedup"] = round(result["reference_us"] / result["us"], 1)
    return result


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", default="49152,151936")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--flat", action="store_true", help="noise without tokens that stand out")
    parser.add_argument("--no-reference", action="store_true", help="leave the slow way out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    Sampler.prepare(CPU)
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    sys.stdout.write(json.dumps({"prepare_s": round(time.perf_counter() - start, 2), **machine}) + "\n")
    for vocabulary in map(int, options.vocabularies.split(",")):
        for rows in map(int, options.rows.split(",")):
            for name, params in MODES.items():
                line = {"mode": name, "vocabulary": vocabulary, "rows": rows}
                sys.stdout.write(json.dumps(line | measure(vocabulary, rows, params, options)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
