# SPDX-License-Identifier: MIT
"""Models of real sizes beside llama.cpp and ik_llama.cpp: prompts, decoding at depths, eight streams, the start.

    python benchmarks/cpu/sizes.py 1.5b=FILE.gguf [4b=FILE.gguf ...] [--out FILE.jsonl] [--pairs N] [--columns NAME ...]
        [--llama-bench PATH --llama-batched-bench PATH] [--ik-bench PATH --ik-batched-bench PATH]

Files of a published model's shape come from `shapes.py`. `SIZES` has the columns of each size: `prompt_N` is a prompt
of N tokens, `decode_N` 64 tokens of one stream behind N, `streams_8` the output of 8 streams of 128 + 64 tokens over
the whole time, all in tokens a second; `start` is the seconds of a process from its start to its end with one token.
Before the first pair candle-vllm starts once, so that the file of packed weights exists. A pair runs every engine
once, each in processes of its own, in an order that turns. A process reads a context once and decodes three times
from it, and its figure is the median (ik_llama.cpp reads it each time, once). Eight streams of two tokens run before
the measured ones. ik_llama.cpp runs with and without repacked weights, and the better figure counts. Without a path
to its batched bench, an engine has no figure of streams. Drafts are off. The last line of a size has, by column, the
median of the ratios to the pair's best other engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compare import llama_rates, llama_streams, output_of

from candle_vllm.core.threads import physical_cores

STEPS, STREAMS = 64, 8


@dataclass(frozen=True)
class Size:
    """Columns of a size, and the number of its pairs."""

    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    pairs: int

    @property
    def columns(self) -> list[str]:
        named = [*(f"prompt_{n}" for n in self.prompts), *(f"decode_{n}" for n in self.depths)]
        return [*named, f"streams_{STREAMS}", "start"]


SIZES = {
    "0.8b": Size((1024,), (128, 1024, 7000), 6),
    "1.5b": Size((512, 4096), (128, 2048, 8192, 16384), 6),
    "4b": Size((512,), (128, 2048, 8192), 4),
    "8b": Size((512,), (128, 2048), 3),
    "experts": Size((512,), (128, 2048), 4),
}

OURS = """
import json, statistics, sys, time
import numpy as np
from candle_vllm.core import InferenceEngine, SamplingParams

model, asked, steps, streams = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
deepest = max([2048, *(int(name.split("_")[1]) for name in asked if name[:6] in ("prompt", "decode"))])
engine = InferenceEngine(model, speculative_config={"method": "none"}, max_model_len=deepest + steps + 16)
chance, most = np.random.default_rng(time.time_ns()), engine.model_info.vocab_size

def prompts(number, length):
    return [chance.integers(0, most, length).tolist() for _ in range(number)]

def seconds(prompts, count):
    began = time.perf_counter()
    list(engine.generate(prompts, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)))
    return time.perf_counter() - began

def decode(depth):
    prompt = prompts(1, depth)
    seconds(prompt, 1)  # the prefix cache keeps it
    return steps / statistics.median([seconds(prompt, steps + 1) - seconds(prompt, 1) for _ in range(3)])

seconds(prompts(1, 64), 8)
for name in asked:
    kind, number = name.split("_")
    number = int(number)
    if kind == "prompt":
        value = number / seconds(prompts(1, number), 1)
    elif kind == "decode":
        value = decode(number)
    else:
        seconds(prompts(streams, 128), 2)
        value = streams * steps / seconds(prompts(streams, 128), steps)
    print(json.dumps({name: round(value, 3)}), flush=True)
"""

Row = dict[str, float]
Engine = Callable[[str, list[str]], Row]


def ours(model: str, columns: list[str]) -> Row:
    """One process measures all columns but the start."""
    asked = [name for name in columns if name != "start"]
    row: Row = {}
    if asked:
        text = output_of(sys.executable, "-c", OURS, model, json.dumps(asked), str(STEPS), str(STREAMS))
        for line in text.splitlines():
            if line.startswith("{"):
                row |= json.loads(line)
    if "start" in columns:
        command = ("generate", "The sky is", "--m", model, "--max-tokens", "1")
        row["start"] = timed(sys.executable, "-m", "candle_vllm.server.cli", *command)
    return row


def timed(*command: str) -> float:
    """Return the seconds that a program takes."""
    began = time.perf_counter()
    output_of(*command)
    return time.perf_counter() - began


def llama(bench: str, batched: str | None, *, ik: bool) -> Engine:
    """Return what measures llama.cpp by its own tools, or ik_llama.cpp in its two modes."""

    def measure(model: str, columns: list[str]) -> Row:
        rows = [once(model, columns, mode) for mode in (((), ("-rtr", "1")) if ik else ((),))]
        return {name: (min if name == "start" else max)(row[name] for row in rows if name in row) for name in rows[0]}

    def once(model: str, columns: list[str], mode: tuple[str, ...]) -> Row:
        def rate(*arguments: str, repeat: int = 1) -> float:
            return llama_rates(bench, model, *arguments, *mode, repeat=repeat)[0]

        row: Row = {}
        for name in columns:
            kind, _, number = name.partition("_")
            if kind == "prompt":
                row[name] = rate("-p", number, "-n", "0")
            elif kind == "decode" and ik:
                row[name] = rate("-p", "0", "-n", "0", "-gp", f"{number},{STEPS}")
            elif kind == "decode":
                row[name] = rate("-p", "0", "-n", str(STEPS), "-d", number, repeat=3)
            elif kind == "streams":
                if batched is None:
                    continue
                row[name] = llama_streams(batched, model, 128, STEPS, STREAMS, *mode[:1])
            else:
                row[name] = timed(
                    bench, "-m", model, "-t", str(physical_cores()), "-p", "0", "-n", "1", "-r", "1", *mode
                )
        return row

    return measure


def main() -> None:
    """Prints, and appends to `--out`, a JSON line for each engine and pair, and one with the ratios of each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="SIZE=FILE.gguf")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--columns", nargs="*")
    for name in ("llama-bench", "llama-batched-bench", "ik-bench", "ik-batched-bench"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    engines: dict[str, Engine] = {"candle-vllm": ours}
    if options.llama_bench:
        engines["llama.cpp"] = llama(options.llama_bench, options.llama_batched_bench, ik=False)
    if options.ik_bench:
        engines["ik_llama.cpp"] = llama(options.ik_bench, options.ik_batched_bench, ik=True)

    def show(line: dict[str, object]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(text + "\n")

    for given in options.models:
        name, _, model = given.partition("=")
        size = SIZES[name]
        columns = [column for column in size.columns if not options.columns or column in options.columns]
        ratios: dict[str, list[float]] = {column: [] for column in columns}
        ours(model, ["decode_128"])  # the first start of a model packs its weights and writes them to a file
        for pair in range(options.pairs or size.pairs):
            rows: dict[str, Row] = {}
            order = list(engines)
            for engine in order[pair % len(order) :] + order[: pair % len(order)]:
                rows[engine] = {name: round(value, 3) for name, value in engines[engine](model, columns).items()}
                show({"size": name, "pair": pair, "engine": engine, **rows[engine]})
            mine = rows.pop("candle-vllm")
            for column in columns:
                others = [row[column] for row in rows.values() if column in row]
                if others and column == "start":
                    ratios[column].append(min(others) / mine[column])
                elif others:
                    ratios[column].append(mine[column] / max(others))
        show({"size": name, "ratios": {c: round(statistics.median(found), 3) for c, found in ratios.items() if found}})


if __name__ == "__main__":
    main()
