"""How much of a step the GPU works: the time of replayed CUDA graphs by events, and of all kernels by the profiler.

Both are seconds per step of the GPU at work, to be compared with what a step takes on the clock without either. The
events lie around every `CUDAGraph.replay`, so copies outside the graphs count as idle. The profiler's kernels and
copies are joined where at most `GAP` lies between them, as between the kernels of a graph: what is left is the time in
which the GPU waits for the host. Profiling slows the host, not the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

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
