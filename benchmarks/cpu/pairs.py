# SPDX-License-Identifier: MIT
"""candle-vllm and one other engine in turns, both loaded and warm, on one shape: each pair, and the median ratio.

    python benchmarks/cpu/pairs.py MODEL.gguf --shape prompt|batch [--pairs 5] [--peer-model OTHER.gguf]
        --openvino-python PATH                                 a Python with openvino-genai
        | --batched-bench PATH                                 llama.cpp's tool, or ik_llama.cpp's; batch only

`prompt` is 1,024 tokens and the first of the answer; `batch` output tokens of 32 streams of 64 + 64 tokens over the
whole time; both in tokens per second. Each side runs once more before it is measured.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import time
from collections.abc import Callable

import numpy as np
from compare import OPENVINO, output_of

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.threads import physical_cores

ASKED = """
for shape in sys.stdin:
    if shape.strip() == "prompt":
        print(1024 / seconds([ids[:, :1024]], 1), flush=True)
    else:
        print(32 * 64 / seconds([ids[:, i : i + 64] for i in range(32)], 64), flush=True)
"""


def ours(model: str, shape: str) -> Callable[[], float]:
    """This engine's rate, prompts never being the same."""
    engine = InferenceEngine(model, enable_prefix_caching=False, speculative_config={"method": "none"})
    chance, most = np.random.default_rng(0), engine.model_info.vocab_size
    streams, length, count = (1, 1024, 1) if shape == "prompt" else (32, 64, 64)
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)

    def rate() -> float:
        prompts = [chance.integers(most // 2, size=length).tolist() for _ in range(streams)]
        began = time.perf_counter()
        list(engine.generate(prompts, params))
        return (length if shape == "prompt" else streams * count) / (time.perf_counter() - began)

    return rate


def openvino(python: str, model: str, shape: str) -> Callable[[], float]:
    """OpenVINO's, in a process of its own that stays."""
    code = OPENVINO.partition("\nseconds(")[0] + ASKED
    process = subprocess.Popen([python, "-c", code, model], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    asked, told = process.stdin, process.stdout

    def rate() -> float:
        print(shape, file=asked, flush=True)
        return float(told.readline())

    return rate


def batched(tool: str, model: str) -> Callable[[], float]:
    """That of llama.cpp's kind, which loads the model each time; loading is not measured."""
    threads = str(physical_cores())
    more = ("-c", "8192", "-b", "2048", "-ub", "512", "-npp", "64", "-ntg", "64", "-npl", "32")

    def rate() -> float:
        text = output_of(tool, "-m", model, "-t", threads, "-tb", threads, *more)
        cells = re.findall(r"^\|\s+64 \|\s+64 \|\s+32 \|.*$", text, re.MULTILINE)[0].split("|")
        return 32 * 64 / float(cells[9])

    return rate


def main() -> None:
    """Runs the pairs and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--shape", choices=("prompt", "batch"), required=True)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peer-model", help="file that the other engine reads; default: the same")
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--openvino-python")
    other.add_argument("--batched-bench")
    options = parser.parse_args()
    mine, theirs = ours(options.model, options.shape), options.peer_model or options.model
    if options.openvino_python:
        peer = openvino(options.openvino_python, theirs, options.shape)
        peer()
    else:
        peer = batched(options.batched_bench, theirs)
    mine()
    ratios = []
    for _ in range(options.pairs):
        here, there = mine(), peer()
        ratios.append(here / there)
        print(f"{here:8.1f} {there:8.1f} {ratios[-1]:6.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
