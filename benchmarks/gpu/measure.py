# SPDX-License-Identifier: MIT
"""What the GPU benchmarks share: facts of the machine, timing, ceilings, correctness, JSON lines and tables.

Device code is timed by CUDA graphs: all calls of a list in one graph, replayed until the time is up; the result is the
median replay over the number of calls. What must be read from memory, not from the cache, is given in as many copies as
the cache does not hold (`copies_for`), and every call of the list has its own.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

COLD_BYTES = 256 << 20
"""Several times the largest cache of a GPU."""

MOST_COPIES = 64


# ---- the machine -----------------------------------------------------------------------------------------------------


@functools.cache
def facts(device: str, commit: str | None = None) -> dict[str, Any]:
    """What stands in every line: machine, commit, versions, date."""
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found = {"machine": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
    found["commit"] = commit or _commit()
    found["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][name] = importlib.metadata.version(name)
    found["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return found


def _commit() -> str:
    """Of the files that are measured, with "+" where they differ from it; "unknown" without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


@functools.cache
def ceilings(device: str, quick: bool = False) -> dict[str, float]:
    """Bytes per second of a large copy, read and written, and operations per second of a large bf16 product."""
    size, edge = (1 << 22, 256) if quick else (1 << 30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    seconds = 0.0 if quick else 0.2
    copy = timed([lambda: target.copy_(source)], seconds, device)
    a, b = (torch.randn(edge, edge, device=device).bfloat16() for _ in range(2))
    product = timed([lambda: a @ b], seconds, device)
    return {"copy": 2 * size / copy, "matmul": 2 * edge**3 / product}


# ---- time ------------------------------------------------------------------------------------------------------------


def timed(calls: Sequence[Call], seconds: float, device: str) -> float:
    """Median seconds of a call."""
    if device != "cuda":
        return statistics.median(_repeated(lambda: [call() for call in calls], seconds)) / len(calls)
    for call in calls[:2]:  # compiles, and warms up libraries, which a capture does not allow
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(found) < 5:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(found)


def _repeated(call: Call, seconds: float) -> list[float]:
    """Wall-clock seconds of each round, at least one, after one that does not count."""
    call()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while not found or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def copies_for(nbytes: int, device: str) -> int:
    """How many copies of an input of so many bytes the cache does not hold."""
    return 1 if device != "cuda" else max(1, min(MOST_COPIES, -(-COLD_BYTES // max(1, nbytes))))


class Deadline:
    """A number of seconds from now, of which a benchmark asks whether they are over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._end


# ---- correctness -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated within holds NaN (the largest number, where it is of integers) until it is written."""
    # The public function imports torch's compiler, which takes seconds.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    filling: Any = torch.utils.deterministic  # its module has another class, which no checker sees
    before, filling.fill_uninitialized_memory = filling.fill_uninitialized_memory, True
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)
        filling.fill_uninitialized_memory = before


def ratio(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS of the error over the RMS of what is right; infinite where a number is missing, or finite and should not be.

    NaN and infinity are right where they are wanted.
    """
    assert got.shape == wanted.shape, f"{tuple(got.shape)} instead of {tuple(wanted.shape)}"
    got, wanted = got.double(), wanted.double()
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    error = torch.where(same, 0.0, got - wanted).square().mean().sqrt()
    size = torch.where(wanted.isfinite(), wanted, 0.0).square().mean().sqrt()
    found = float(error / size.clamp(min=1e-30))
    return found if math.isfinite(found) else math.inf


# ---- what is shown ---------------------------------------------------------------------------------------------------


def report(benchmark: str, device: str, commit: str | None = None, **figures: Any) -> None:
    """One result as a line of JSON, with the machine's facts behind it."""
    line = {"benchmark": f"gpu/{benchmark}", **rounded(figures), **facts(device, commit)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Four digits of every number; JSON has no infinity, so that becomes a text."""

    def short(value: Any) -> Any:
        if isinstance(value, Mapping):
            return rounded(value)
        if isinstance(value, float):
            return float(f"{value:.4g}") if math.isfinite(value) else str(value)
        return value

    return {name: short(value) for name, value in figures.items()}
