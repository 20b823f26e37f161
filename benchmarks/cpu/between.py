# SPDX-License-Identifier: MIT
"""What Python does between two steps of the compiled CPU engine: everything outside of the recorded plan.

    python benchmarks/cpu/between.py [MODEL.gguf] [--batches 1 32] [--prompt 64] [--spread 0] [--steps 200]
        [--kinds greedy sampled]

One JSON line per batch and kind of draw, medians over the steps: `step_ms`, `outside_ms` on the clock outside of the
plan, `outside_cpu_ms` of this thread's own time (what another program takes is not in it), and of that the draw's and
the settling's share. Where nothing else is asked of them the plan draws the tokens; what it takes for that is not in
the figures. With `--spread` each prompt is so many tokens longer than the one before, so that blocks begin in most
steps. Without a model the demo's is used. The engine is stepped by this thread, so what the server and its event loop
add is not in it (`benchmarks/serve/run.py library`).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.server.settings.derived import demo_model

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 1},
    "stops": {"temperature": 0.0, "stop": ["</never>"]},
}


class Clock:
    """Adds up the time that is spent in calls: on the clock, and of this thread."""

    def __init__(self) -> None:
        self.wall = self.own = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, its time noted."""

        def timed(*args: Any) -> Any:
            wall, own = time.perf_counter(), time.thread_time()
            try:
                return call(*args)
            finally:
                self.own += time.thread_time() - own
                self.wall += time.perf_counter() - wall

        return timed

    def take(self) -> tuple[float, float]:
        """What has come together since the last time."""
        found, self.wall, self.own = (self.wall, self.own), 0.0, 0.0
        return found


def clocks_of(engine: Engine) -> dict[str, Clock]:
    """Clocks around the parts of a step."""
    clocks = {name: Clock() for name in ("plan", "draw", "settle")}
    runner: Any = engine.runner
    runner.team.run = clocks["plan"].around(runner.team.run)
    runner.draw = clocks["draw"].around(runner.draw)
    engine._commit = clocks["settle"].around(engine._commit)
    return clocks


def measure(
    engine: Engine, clocks: dict[str, Clock], batch: int, prompts: list[int], steps: int, kind: str
) -> dict[str, Any]:
    """Medians in milliseconds over steps in which `batch` sequences decode, behind prompts of these lengths."""
    rng = np.random.default_rng(batch)
    params = SamplingParams(max_tokens=steps + 128, ignore_eos=True, **KINDS[kind])
    for index, length in enumerate(prompts):
        tokens = rng.integers(1000, 40000, length).tolist()
        engine.add(engine.prepare(GenerationRequest(request_id=str(index), prompt_token_ids=tokens, params=params)))
    seen: set[str] = set()
    while len(seen) < batch:
        seen |= {piece.request_id for piece in engine.step()}
    for _ in range(4):
        engine.step()
    found: dict[str, list[float]] = {name: [] for name in ("step", "outside", "outside_cpu", "draw", "settle")}
    gc.collect()
    for _ in range(steps):
        for clock in clocks.values():
            clock.take()
        wall, own = time.perf_counter(), time.thread_time()
        pieces = engine.step()
        own, wall = time.thread_time() - own, time.perf_counter() - wall
        assert len(pieces) == batch
        plan, draw, settle = (clocks[name].take() for name in ("plan", "draw", "settle"))
        for name, value in zip(found, (wall, wall - plan[0], own - plan[1], draw[1], settle[1])):
            found[name].append(value)
    for index in range(batch):
        engine.abort(str(index))
    return {f"{name}_ms": round(1e3 * statistics.median(values), 4) for name, values in found.items()}


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--spread", type=int, default=0, help="tokens")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kinds", nargs="*", choices=sorted(KINDS), default=["greedy", "sampled"])
    options = parser.parse_args()
    model = str(options.model or demo_model())
    with InferenceEngine(
        model,
        enable_prefix_caching=False,
        max_num_seqs=max(64, *options.batches),
        speculative_config={"method": "none"},
    ) as front:
        engine: Any = front._engine
        clocks = clocks_of(engine)
        for batch in options.batches:
            for kind in options.kinds:
                prompts = [options.prompt + options.spread * index for index in range(batch)]
                figures = measure(engine, clocks, batch, prompts, options.steps, kind)
                print(json.dumps({"batch": batch, "kind": kind, **figures}), flush=True)


if __name__ == "__main__":
    main()
