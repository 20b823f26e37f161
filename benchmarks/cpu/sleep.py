# SPDX-License-Identifier: MIT
"""How long an engine takes to sleep and to wake, and what memory it gives back, beside loading it anew.

    python benchmarks/cpu/sleep.py MODEL.gguf [--tokens 2048] [--rounds 5]

A prompt fills a part of the cache, then the engine sleeps and wakes at both levels, in turns; each time the same answer
is compared with the first one. `loading` makes a new engine of the same files, which are in the system's memory then.
Memory is what the process has resident.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

from candle_vllm.core import InferenceEngine, SamplingParams


def resident() -> float:
    """Megabytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    prompt = [1000 + 7 * n % 9973 for n in range(options.tokens)]
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def answer(engine: InferenceEngine) -> list[int]:
        return list(engine.generate([prompt], greedy, use_tqdm=False)[0].outputs[0].token_ids)

    loading: list[float] = []
    for _ in range(options.rounds):
        began = time.perf_counter()
        InferenceEngine(options.model).close()
        loading.append(time.perf_counter() - began)
    with InferenceEngine(options.model) as engine:
        right = answer(engine)
        size = engine.model_info.weight_bytes / 1e6
        print(f"{size:.0f} MB of weights, {resident():.0f} MB resident; loading {statistics.median(loading):.2f} s")
        seconds: dict[tuple[int, str], list[float]] = {}
        left: dict[int, list[float]] = {}
        for _ in range(options.rounds):
            for level in (1, 2):
                for what, work in (("sleep", lambda level=level: engine.sleep(level)), ("wake", engine.wake_up)):
                    began = time.perf_counter()
                    work()
                    seconds.setdefault((level, what), []).append(time.perf_counter() - began)
                    if what == "sleep":
                        left.setdefault(level, []).append(resident())
                assert answer(engine) == right
        for level in (1, 2):
            times = ", ".join(f"{what} {statistics.median(seconds[level, what]):.3f} s" for what in ("sleep", "wake"))
            print(f"level {level}: {times}, {statistics.median(left[level]):.0f} MB resident meanwhile")


if __name__ == "__main__":
    main()
