# SPDX-License-Identifier: MIT
"""Who waits for whom: the GPU's time in a step, and the host's.

`ReplayClock` and `profiled_seconds` say how much of a step the GPU works: the time of replayed CUDA graphs by events,
and of all kernels by the profiler. Both are seconds per step of the GPU at work, to be compared with what a step takes
on the clock without either. The events lie around every `CUDAGraph.replay`, so copies outside the graphs count as idle.
The profiler's kernels and copies are joined where at most `GAP` lies between them, as between the kernels of a graph:
what is left is the time in which the GPU waits for the host. Profiling slows the host, not the kernels.

Run as a program, it measures what the host does in a decoding step, with a device that does nothing in no time: no GPU
is needed, and calls of CUDA (a copy, two replays, an event) are not counted.

    python benchmarks/gpu/idle.py [--batches 1 64 256] [--prompt 512] [--steps 400] [--sampled] [--stops]

One JSON line per batch: the median and the least `ms_step` over `--steps` steps; `--sampled` draws by temperature with
a seed instead of taking the likeliest token, `--stops` gives every request a stop string.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import report

from candle_vllm.core import EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.devices import CPU
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.preparation import DecoderPreparation
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model

GAP = 5.0
"""Microseconds between two kernels that still count as work."""


class ReplayClock:
    """Times the graphs that are replayed while it is asked to; they must be captured while it is `installed`."""

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Has every replay pass by here."""
        replay = torch.cuda.CUDAGraph.replay

        def noted_replay(graph: torch.cuda.CUDAGraph) -> None:
            if self._events is None:
                replay(graph)
                return
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay(graph)
            end.record()
            self._events.append((start, end))

        with mock.patch.object(torch.cuda.CUDAGraph, "replay", noted_replay):
            yield

    def seconds(self, steps: Callable[[], float]) -> float | None:
        """Seconds per step in replayed graphs; `steps` runs and counts them. None where nothing is replayed."""
        self._events = events = []
        count = steps()
        self._events = None
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / count if events else None


def profiled_seconds(steps: Callable[[], float]) -> float | None:
    """Seconds per step in kernels and copies; None where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        count = steps()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return joined(spans) / 1e6 / count if spans else None


def joined(spans: list[tuple[float, float]]) -> float:
    """Microseconds that spans cover, with the gaps between them that are at most `GAP`."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > last:
            total += end - (last if start - last <= GAP else start)
            last = end
    return total


# ---- the host alone --------------------------------------------------------------------------------------------------


class IdleDevice:
    """A `DeviceStream` that does none of its work: every token that comes back is 0."""

    device = torch.device("cpu")

    def run(self, work: Callable[[], None]) -> None:
        """Forgets it."""

    def join(self) -> None:
        """There is nothing to wait for."""

    def new_pool(self) -> None:
        """For captures, which allocate nothing."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """As it is: it will not run."""
        return work

    def between(self, host: Callable[[], None]) -> None:
        """Of work that will not run."""

    def mark(self) -> IdleDevice:
        """Of work that is over."""
        return self

    def wait(self) -> None:
        """Returns at once."""

    def beside(self) -> IdleDevice:
        """Which does as little."""
        return self

    def after(self, mark: object) -> None:
        """Everything is over."""

    def staged(self, size: int) -> torch.Tensor:
        """Memory, all zeros."""
        return torch.zeros(size, dtype=torch.uint8)


BLOCK = 16
"""Tokens of a cache block: as small as may be, so that tables grow often."""


def idle_engine(folder: Path, sequences: int, longest: int) -> Engine:
    """An engine over a toy model that never runs."""
    model = write_toy_model(folder / "toy", toy_config(max_position_embeddings=longest))
    device = IdleDevice()
    loaded = load_model(EngineConfig(model=str(model), op_by_op=True), CPU, lambda *_: None)
    runner = DeviceRunner(loaded.decoder, DeviceLimits(8192, sequences, longest // BLOCK, BLOCK), device, torch.float32)
    blocks = BlockManager(sequences * longest // BLOCK, BLOCK)
    preparation = DecoderPreparation(loaded.tokenizer, (), loaded.config.vocab_size, longest, seed=0)
    return Engine(runner, Scheduler(blocks, sequences, 8192), preparation)


def host_seconds(engine: Engine, batch: int, prompt: int, steps: int, params: SamplingParams) -> list[float]:
    """Seconds of each step in which `batch` sequences decode."""
    for index in range(batch):
        tokens = [65 + (index + at) % 26 for at in range(prompt)]
        engine.add(engine.prepare(GenerationRequest(request_id=str(index), prompt_token_ids=tokens, params=params)))
    seen: set[str] = set()
    while len(seen) < batch:
        seen |= {piece.request_id for piece in engine.step()}
    for _ in range(8):
        engine.step()
    found = []
    gc.collect()
    for _ in range(steps):
        start = time.perf_counter()
        pieces = engine.step()
        found.append(time.perf_counter() - start)
        assert len(pieces) == batch
    for index in range(batch):
        engine.abort(str(index))
    while engine.has_work:
        engine.step()
    return found


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 64, 256])
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--stops", action="store_true")
    options = parser.parse_args()
    longest = -(-(options.prompt + options.steps + 64) // BLOCK) * BLOCK
    drawing: dict[str, Any] = {"temperature": 0.0}
    if options.sampled:
        drawing = {"temperature": 0.8, "top_p": 0.9, "seed": 1}
    stop = ["</never>"] if options.stops else None
    params = SamplingParams(**drawing, stop=stop, max_tokens=longest - options.prompt, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        for batch in options.batches:
            engine = idle_engine(Path(folder), max(options.batches), longest)
            found = host_seconds(engine, batch, options.prompt, options.steps, params)
            figures: dict[str, Any] = {"ms_step": 1e3 * statistics.median(found), "ms_step_least": 1e3 * min(found)}
            report("host", "cpu", batch=batch, sampled=options.sampled, stops=options.stops, **figures)


if __name__ == "__main__":
    main()
