# SPDX-License-Identifier: MIT
"""How long a request with an image takes, and how long the next ones with the same image, which is not encoded again.

    python benchmarks/cpu/images.py MODEL [--mmproj FILE] [--tokenizer FOLDER] [--rounds 3] [--threads 2]

An image of 640 x 480 random pixels in each round, `<image>` in the prompt, and one token of answer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from candle_vllm.core import InferenceEngine, SamplingParams


def main() -> None:
    """Prints seconds, medians last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    generator, params = np.random.default_rng(0), SamplingParams(max_tokens=1, temperature=0)
    first, again = list[float](), list[float]()
    with InferenceEngine(given.model, mmproj=given.mmproj, tokenizer=given.tokenizer, threads=given.threads) as engine:
        for _ in range(given.rounds):
            pixels = generator.integers(0, 256, (480, 640, 3), dtype=np.uint8)
            for times in (first, again, again, again):
                started = time.perf_counter()
                (output,) = engine.generate(
                    [{"prompt": "Look <image> now", "multi_modal_data": {"image": pixels}}], params
                )
                times.append(time.perf_counter() - started)
            print(f"{len(output.prompt_token_ids)} tokens: {first[-1]:.2f} s, then {again[-3:]}", flush=True)
    whole, later = statistics.median(first), statistics.median(again)
    print(f"first {whole:.2f} s, again {later:.3f} s, {whole / later:.0f} times as long")


if __name__ == "__main__":
    main()
