# SPDX-License-Identifier: MIT
"""Figures of `bench`: percentiles of latencies, throughput and goodput, with the names in vLLM's results.

    ttft    time from sending the request to the first event with content
    tpot    time from the first event to the end of the answer / number of tokens after the first
    itl     time between two consecutive events with content of one answer
    e2el    time from sending the request to the end of its answer

Failed requests are only counted: tokens, rates and latencies are those of successful requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from candle_vllm.server.settings.options import UsageError

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
GOODPUT = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Seen:
    """Result of one request. Times are in seconds.

    Attributes:
        start: time at which it was sent, relative to the start of the run.
        latency: time from sending to the end of the answer; 0 if the request failed.
        times: times from sending to each event with content.
        error: reason of the failure; empty if it succeeded.
    """

    start: float
    input_len: int
    output_len: int
    latency: float
    times: Sequence[float] = field(default_factory=tuple)
    text: str = ""
    error: str = ""

    @property
    def ttft(self) -> float:
        """Time to the first event with content; 0 without one."""
        return self.times[0] if self.times else 0.0

    @property
    def itls(self) -> list[float]:
        """Times between consecutive events with content."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for an answer with fewer than two tokens."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 and self.times else None


def summary(
    seen: Sequence[Seen],
    duration: float,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    goals: Mapping[str, float] | None = None,
    *,
    streamed: bool = True,
) -> dict[str, Any]:
    """Return the figures of a run of `duration` seconds, with these percentiles of these `METRICS`.

    `goals` are the upper limits in milliseconds for a good request, by names of `GOODPUT`; None omits goodput. If
    answers were not `streamed`, only e2el is reported.
    """
    good = [each for each in seen if not each.error]
    output = sum(each.output_len for each in good)
    prompt = sum(each.input_len for each in good)
    duration = max(duration, 1e-9)
    edges = sorted([(each.start, 1) for each in good] + [(each.start + each.latency, -1) for each in good])
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(seen) - len(good),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(good) / duration,
        "request_goodput": None if goals is None else sum(_within(each, goals) for each in good) / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        "max_concurrent_requests": max(itertools.accumulate(change for _, change in edges), default=0),
    }
    values: dict[str, list[float]] = {"e2el": [each.latency for each in good]}
    if streamed:
        values |= {
            "ttft": [each.ttft for each in good if each.times],
            "tpot": [each.tpot for each in good if each.tpot is not None],
            "itl": [gap for each in good for gap in each.itls],
        }
    ways: dict[str, Callable[[Any], Any]] = {"mean": np.mean, "median": np.median, "std": np.std}
    ways |= {f"p{each:g}": partial(np.percentile, q=each) for each in percentiles}
    for name in metrics:
        if name in values:  # it may be empty, as for the tpot of answers with one token
            found = np.asarray(values[name]) * 1e3
            result |= {f"{way}_{name}_ms": float(of(found)) if len(found) else None for way, of in ways.items()}
    return result


def detail(seen: Sequence[Seen]) -> dict[str, Any]:
    """Return lists with the results of every request, for --save-detailed."""
    return {
        "input_lens": [each.input_len for each in seen],
        "output_lens": [each.output_len for each in seen],
        "start_times": [each.start for each in seen],
        "ttfts": [each.ttft for each in seen],
        "itls": [each.itls for each in seen],
        "generated_texts": [each.text for each in seen],
        "errors": [each.error for each in seen],
    }


def _within(each: Seen, goals: Mapping[str, float]) -> bool:
    known = {"ttft": each.ttft, "tpot": each.tpot or 0.0, "e2el": each.latency}
    return all(1e3 * known[name] <= most for name, most in goals.items())


def table(result: Mapping[str, Any]) -> str:
    """Format the figures of a run as a table."""
    rows: list[tuple[str, Any]] = [
        ("Successful requests:", result["completed"]), ("Failed requests:", result["failed"]),
        ("Benchmark duration (s):", result["duration"]), ("Total input tokens:", result["total_input_tokens"]),
        ("Total generated tokens:", result["total_output_tokens"]),
        ("Request throughput (req/s):", result["request_throughput"]),
        ("Output token throughput (tok/s):", result["output_throughput"]),
        ("Total token throughput (tok/s):", result["total_token_throughput"]),
        ("Peak concurrent requests:", result["max_concurrent_requests"]),
    ]  # fmt: skip
    if result["request_goodput"] is not None:
        rows.insert(6, ("Request goodput (req/s):", result["request_goodput"]))
    lines = [f"{' Serving Benchmark Result ':=^50}", *(_row(name, value) for name, value in rows)]
    for name, title in METRICS.items():
        own = [(key, value) for key, value in result.items() if key.endswith(f"_{name}_ms")]
        if own:
            lines.append(f"{title:-^50}")
            lines += [_row(f"{_said(key)} {name.upper()} (ms):", value) for key, value in own]
    return "\n".join([*lines, "=" * 50]) + "\n"


def _said(key: str) -> str:
    word = key.split("_")[0]
    return word.upper() if word[0] == "p" and word[1:2].isdigit() else word.capitalize()


def _row(name: str, value: float | None) -> str:
    if value is None:
        return f"{name:<40} {'-':<10}"
    return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"


def read_percentiles(text: str) -> list[float]:
    """Parse percentiles: `25,50,99`."""
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= each <= 100 for each in found):
        raise UsageError(f"--metric-percentiles must be numbers from 0 to 100 with commas between, not {text!r:.60}")
    return found


def read_metrics(text: str) -> list[str]:
    """Parse names of metrics: `ttft,tpot`."""
    found = [each.strip() for each in text.split(",")]
    unknown = next((each for each in found if each not in METRICS), None)
    if unknown is not None:
        raise UsageError(f"--percentile-metrics must be of {', '.join(METRICS)}, not {unknown!r:.60}")
    return found


def read_goals(texts: Sequence[str]) -> dict[str, float] | None:
    """Parse goodput limits, such as `ttft:200`; None without limits."""
    goals: dict[str, float] = {}
    for text in (each for given in texts for each in given.split()):
        name, _, value = text.partition(":")
        try:
            goals[name] = float(value)
        except ValueError:
            goals[name] = -1.0
        if name not in GOODPUT or not 0 <= goals[name] < float("inf"):
            raise UsageError(
                f"--goodput must be NAME:MILLISECONDS with a name of {', '.join(GOODPUT)}, not {text!r:.60}"
            )
    return goals or None
