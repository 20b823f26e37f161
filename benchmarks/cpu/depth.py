# SPDX-License-Identifier: MIT
"""What a decoded token costs as its context grows, and what a step costs as its streams grow.

    python benchmarks/cpu/depth.py MODEL.gguf [MODEL2.gguf ...] [--json] [--plot FILE.svg]
        [--depths 128 512 ...] [--streams 1 2 4 ...] [--steps 32] [--repeat 3]

Two tables: one stream at each of `--depths`, and each number of `--streams` at the first depth. A figure is the median
time of `--steps` steps in each of `--repeat` rounds, all points in turns. Prompts are random tokens, read before the
clock runs; the measured steps end at the depth (with many streams some tokens behind it, for the first streams go on
while the last prompts are read). A step is the engine's: scheduler, sampler and detokenizer included. `--plot` draws
both as lines from zero on even axes, so that what grows as the work does is straight.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from candle_vllm.core import InferenceEngine, SamplingParams

DEPTHS = (128, 512, 1024, 2048, 4096, 8192)
STREAMS = (1, 2, 4, 8, 16, 32, 64)
COLOURS = ("#0969da", "#cf222e", "#1a7f37")
"""Of the lines in a chart: as many as its legend has room for."""


class Point(NamedTuple):
    """What runs in a step: streams, and tokens of context of each."""

    streams: int
    depth: int


Times = dict[Point, float]
"""Median seconds of a step."""


def step_times(engine: InferenceEngine, point: Point, steps: int, numbers: random.Random) -> list[float]:
    """Seconds of each of `steps` steps in which every stream decodes one token."""
    length, vocabulary = point.depth - steps - 1, engine.model_info.vocab_size
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    prompts = [[numbers.randrange(vocabulary) for _ in range(length)] for _ in range(point.streams)]
    waiting = {engine.add_request(prompt, params) for prompt in prompts}
    running = set(waiting)
    try:
        while waiting:
            waiting -= {piece.request_id for piece in engine.step() if piece.token_ids or piece.finished}
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            pieces = engine.step()
            times.append(time.perf_counter() - began)
            if sum(bool(piece.token_ids) for piece in pieces) != point.streams:
                raise RuntimeError(f"{point.streams} streams of {point.depth} tokens did not all run in one step")
        return times
    finally:
        for request_id in running:
            engine.abort(request_id)
        while engine.has_unfinished_requests:
            engine.step()


def measure(model: str, points: list[Point], steps: int, repeat: int) -> Times:
    """Median time of a step at each point that the model's context has room for."""
    seqs = max(64, *(point.streams for point in points))
    with InferenceEngine(
        model,
        enable_prefix_caching=False,
        max_num_seqs=seqs,
        max_queued_requests=1024,
        speculative_config={"method": "none"},
    ) as engine:
        longest = engine.model_info.max_model_len
        for point in points:
            if point.depth > longest:
                sys.stderr.write(f"{model}: a depth of {point.depth} is beyond the context of {longest}\n")
        points = [point for point in points if point.depth <= longest]
        numbers, times = random.Random(0), defaultdict(list)  # noqa: S311 - the same prompts in every run
        step_times(engine, Point(1, points[0].depth), steps, numbers)  # not counted: pages are touched, caches filled
        for _ in range(repeat):
            for point in points:
                times[point] += step_times(engine, point, steps, numbers)
    return {point: statistics.median(found) for point, found in times.items()}


# ---- what is shown ---------------------------------------------------------------------------------------------------


def show(model: str, times: Times, as_json: bool) -> None:
    """A line for each point."""
    if not as_json:
        print(f"{model}\n{'streams':>8} {'depth':>6} {'step ms':>9} {'tok/s':>8}")
    for point, seconds in times.items():
        rate = point.streams / seconds
        if as_json:
            row = {"model": model, **point._asdict(), "step_ms": round(seconds * 1e3, 4), "tok_s": round(rate, 2)}
            print(json.dumps(row), flush=True)
        else:
            print(f"{point.streams:8} {point.depth:6} {seconds * 1e3:9.3f} {rate:8.1f}", flush=True)


Lines = dict[str, list[tuple[float, float]]]
"""Points (x, y) of each line by its name."""


def plot(first: Lines, second: Lines, depth: int) -> str:
    """Both charts side by side as an SVG."""
    names = "".join(
        f'<rect x="{60 + 280 * at}" y="14" width="14" height="4" fill="{COLOURS[at]}"/>'
        f'<text x="{80 + 280 * at}" y="20">{html.escape(name)}</text>'
        for at, name in enumerate(first | second)
    )
    left = panel(60, first, "One stream: ms per token", "tokens of context")
    right = panel(510, second, f"At a context of {depth} tokens: ms per step", "streams")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 360" font-family="sans-serif" font-size="12">\n'
        f'<rect width="900" height="360" fill="white"/>{names}\n{left}{right}</svg>\n'
    )


def panel(x0: int, lines: Lines, title: str, x_label: str, width: int = 360, height: int = 230) -> str:
    """Lines over even axes that begin at zero; its left lower corner is at (x0, 310)."""
    y0, points = 310, [point for line in lines.values() for point in line]
    x_most, y_most = (max((point[axis] for point in points), default=1.0) * 1.05 for axis in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        return round(x0 + x / x_most * width, 1), round(y0 - y / y_most * height, 1)

    parts = [f'<text x="{x0}" y="{y0 - height - 14}" font-weight="bold">{title}</text>']
    for tick in ticks(y_most):
        y = at(0, tick)[1]
        parts.append(f'<path d="M{x0} {y}h{width}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{x0 - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(x_most):
        x = at(tick, 0)[0]
        parts.append(f'<path d="M{x} {y0}v5" stroke="black"/>')
        parts.append(f'<text x="{x}" y="{y0 + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<path d="M{x0} {y0 - height}v{height}h{width}" fill="none" stroke="black"/>')
    parts.append(f'<text x="{x0 + width / 2}" y="{y0 + 38}" text-anchor="middle">{x_label}</text>')
    for colour, line in zip(COLOURS, lines.values()):
        places = [at(*point) for point in sorted(line)]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places]
    return "\n".join(parts) + "\n"


def ticks(most: float) -> list[float]:
    """From zero in steps of 1, 2 or 5 times a power of ten, four to ten of them."""
    unit = 10 ** math.floor(math.log10(most / 4))
    step = max(unit * factor for factor in (1, 2, 5) if unit * factor <= most / 4)
    return [step * count for count in range(int(most / step) + 1)]


def main() -> None:
    """Measures the models one after the other, and shows each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument("--streams", nargs="+", type=int, default=STREAMS)
    parser.add_argument("--steps", type=int, default=32, help="measured in a round")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args()
    depths, streams, base = sorted(options.depths), sorted(options.streams), min(options.depths)
    if options.steps < 1 or options.repeat < 1 or streams[0] < 1 or base < options.steps + 2:
        parser.error("--steps, --repeat and --streams are 1 or more, and --depths at least --steps + 2")
    if options.plot and len(options.models) > len(COLOURS):
        parser.error(f"--plot draws at most {len(COLOURS)} models")
    points = list(dict.fromkeys([Point(1, depth) for depth in depths] + [Point(count, base) for count in streams]))
    by_depth: Lines = {}
    by_streams: Lines = {}
    for path in options.models:
        model = Path(path).stem
        times = measure(path, points, options.steps, options.repeat)
        show(model, times, options.json)
        by_depth[model] = [(point.depth, took * 1e3) for point, took in times.items() if point.streams == 1]
        by_streams[model] = [(point.streams, took * 1e3) for point, took in times.items() if point.depth == base]
    if options.plot:
        options.plot.write_text(plot(by_depth, by_streams, base), encoding="utf-8")


if __name__ == "__main__":
    main()
