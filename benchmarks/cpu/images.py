# SPDX-License-Identifier: MIT
"""How long a request with an image takes, and how long the next ones with the same image, which is not encoded again.

    python benchmarks/cpu/images.py MODEL [--mmproj FILE] [--tokenizer FOLDER] [--rounds 3] [--threads 2]
        [--size 640x480] [--prompt TEXT] [--beside 4]

An image of random pixels in each round, `<image>` or what the model has in the prompt, and one token of answer. With
`--beside` so many streams of text go on meanwhile: said is the longest gap between two of their tokens while an image
is encoded and its prompt is read, before it came, and while a text of as many tokens is read.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from candle_vllm.core import InferenceEngine, SamplingParams


class Beside:
    """Streams of text that go on until they are stopped, and when their tokens came."""

    def __init__(self, engine: InferenceEngine, count: int) -> None:
        self._going, self._times = True, [list[float]() for _ in range(count)]
        self._threads = [Thread(target=self._read, args=(engine, times)) for times in self._times]
        for thread in self._threads:
            thread.start()

    def _read(self, engine: InferenceEngine, times: list[float]) -> None:
        params = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
        for _ in engine.generate_stream("Go on", params):
            times.append(time.perf_counter())
            if not self._going:
                break

    def gap(self, begin: float, end: float) -> float:
        """The longest between two tokens of a stream of which the second came within these times."""
        return max(later - before for times in self._times for before, later in pairwise(times) if begin < later < end)

    def stop(self) -> None:
        """Ends the streams."""
        self._going = False
        for thread in self._threads:
            thread.join()


def gaps(engine: InferenceEngine, prompts: list[Any], count: int) -> None:
    """Prints what images do to streams beside them."""
    params, longer = SamplingParams(max_tokens=1, temperature=0), list[float]()
    for prompt in prompts:
        beside = Beside(engine, count)
        time.sleep(0.5)
        times = [time.perf_counter()]
        time.sleep(2)
        times.append(time.perf_counter())
        (output,) = engine.generate([prompt], params, use_tqdm=False)
        times.append(time.perf_counter())
        as_long = {"prompt_token_ids": [number % 250 for number in range(len(output.prompt_token_ids))]}
        engine.generate([as_long], params, use_tqdm=False)
        times.append(time.perf_counter())
        beside.stop()
        usual, seen, read = (1e3 * beside.gap(*each) for each in pairwise(times))
        longer.append(seen - max(usual, read))
        print(
            f"{times[2] - times[1]:.2f} s, longest gap {seen:.1f} ms; {usual:.1f} in two seconds before, "
            f"{read:.1f} beside a text as long", flush=True,
        )  # fmt: skip
    print(f"longer by {statistics.median(longer):.1f} ms (median of {len(prompts)}), at most {max(longer):.1f}")


def main() -> None:
    """Prints seconds, medians last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--prompt", default="Look <image> now")
    parser.add_argument("--beside", type=int, default=0)
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    generator, params = np.random.default_rng(0), SamplingParams(max_tokens=1, temperature=0)
    first, again = list[float](), list[float]()
    with InferenceEngine(given.model, mmproj=given.mmproj, tokenizer=given.tokenizer, threads=given.threads) as engine:
        if given.beside:
            shape = (given.rounds, height, width, 3)
            pictures = generator.integers(0, 256, shape, dtype=np.uint8)
            prompts = [{"prompt": given.prompt, "multi_modal_data": {"image": each}} for each in pictures]
            gaps(engine, prompts, given.beside)
            return
        for _ in range(given.rounds):
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            for times in (first, again, again, again):
                started = time.perf_counter()
                (output,) = engine.generate([{"prompt": given.prompt, "multi_modal_data": {"image": pixels}}], params)
                times.append(time.perf_counter() - started)
            print(f"{len(output.prompt_token_ids)} tokens: {first[-1]:.2f} s, then {again[-3:]}", flush=True)
    whole, later = statistics.median(first), statistics.median(again)
    print(f"first {whole:.2f} s, again {later:.3f} s, {whole / later:.0f} times as long")
    # The largest since this program began: `ru_maxrss` counts what stood here before it, its parent, as well.
    print(*(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
