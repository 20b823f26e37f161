# SPDX-License-Identifier: MIT
"""Where the time of a step goes, by torch's profiler: one JSON line per kernel, per kind of work, and per step.

    python benchmarks/gpu/step_profile.py --model llama-3.1-8b [--gguf] [--batches 1 64] [--prompts 2048] [--most 12]
        [--set linear.OWN_ROWS=16 ...] [--quick --device cpu --eager]

`--batches` profiles 20 decoding steps of so many streams, `--prompts` one prompt of so many tokens after one that does
not count. All other options are those of `engine.py`. In every line `batch` or `tokens` says which.

kernel  `name`, `kind`, `launches` and `us` of a step; the `--most` that take longest.
kind    the same of all kernels of a kind: products (with weights), attention, merges (of what several programs have
        computed), norms and other small work, sampling, copies. `gbps` where the bytes are known, as they are when a
        step decodes: products read every weight once, attention reads the caches; `copy_share` is that over the
        measured copy.
step    `ms_step` on the clock while the profiler watches, `busy_ms` in which a kernel runs, `gaps_ms` between the first
        kernel and the last in which none does, `kernels` launched.

On the CPU the innermost operations of torch stand for kernels, to check this script.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import engine as engine_benchmark
import torch
from engine import Bench, Result
from measure import Deadline, report

from candle_vllm.core import SamplingParams

STEPS = 20

KINDS = (  # of kernels: the first of which a name contains a part
    ("merges", ("merge_kernel", "splitkreduce", "reduce_kernel")),
    ("attention", ("decode_kernel", "prefill_kernel", "flash", "fmha", "attention")),
    ("sampling", ("survey_kernel", "plan_kernel", "weigh_kernel", "gather_kernel", "finish_kernel", "bias_kernel")),
    ("sampling", ("mask_and_penalise", "note_kernel", "edge_kernel", "measure_kernel", "gather_top", "name_kernel")),
    ("products", ("gemm", "gemv", "nvjet", "cutlass", "linear")),
    ("products", ("few_kernel", "many_kernel", "aten::mm", "aten::addmm", "aten::bmm", "matmul")),
    ("copies", ("memcpy", "memset", "copy", "fill")),
)


@dataclass(frozen=True)
class Span:
    """A kernel's run, in microseconds of the profiler's clock."""

    name: str
    start: float
    end: float


def main() -> None:
    """Profiles what the command line asks for."""
    parser = engine_benchmark.arguments(__doc__)
    parser.set_defaults(batches=[1, 64], prompts=[], serve=[], mixed=[], steps=STEPS)
    parser.add_argument("--most", type=int, default=12, help="kernels that get a line of their own")
    options = engine_benchmark.finished_options(parser)
    deadline = Deadline(options.seconds)
    facts = engine_benchmark.what_is_measured(options)
    say = functools.partial(report, "step_profile", options.device, options.commit, **facts)
    with engine_benchmark.started(options, say) as bench:
        if bench is not None:
            engine_benchmark.measure_all(_results(bench, options, say), deadline, say)


def _results(bench: Bench, options: argparse.Namespace, say: Callable[..., None]) -> list[Result]:
    decode = functools.partial(profiled_decoding, bench, options.depth, options.steps, options.most, say)
    prompt = functools.partial(profiled_prompt, bench, options.most, say)
    found: list[Result] = [(f"decode {batch}", functools.partial(decode, batch)) for batch in options.batches]
    return found + [(f"prompt {length}", functools.partial(prompt, length)) for length in options.prompts]


# ---- what is profiled ------------------------------------------------------------------------------------------------


def profiled_decoding(
    bench: Bench, depth: int, steps: int, most: int, say: Callable[..., None], batch: int
) -> dict[str, Any]:
    """Says the kernels and kinds of a decoding step; returns the step's own line."""
    with engine_benchmark.streams(bench, depth, 2 * steps, 0.0, batch):
        engine_benchmark.advance(bench.engine, 2)  # the profiler's own start falls on no step that counts
        spans, seconds = watched(bench.device, lambda: engine_benchmark.advance(bench.engine, steps))
    context = depth + engine_benchmark.WARM + steps / 2
    known = {"products": bench.read_bytes, "attention": round(batch * context * bench.shape.kv_bytes())}
    return _said(functools.partial(say, batch=batch), bench, spans, steps, seconds, most, known) | {"batch": batch}


def profiled_prompt(bench: Bench, most: int, say: Callable[..., None], length: int) -> dict[str, Any]:
    """Says the kernels and kinds of a prompt; returns its own line."""

    def answer() -> None:
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        bench.engine.add_request(bench.prompt(length), params)
        while bench.engine.has_unfinished_requests:
            bench.engine.step()

    answer()
    spans, seconds = watched(bench.device, answer)
    return _said(functools.partial(say, tokens=length), bench, spans, 1, seconds, most, {}) | {"tokens": length}


def watched(device: str, work: Callable[[], Any]) -> tuple[list[Span], float]:
    """The kernels that ran, and seconds on the clock."""
    from torch.profiler import ProfilerActivity, profile

    gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return list(_spans(profiler.events() or (), gpu)), seconds


def _spans(events: Any, gpu: bool) -> Iterator[Span]:
    for event in events:
        if gpu:
            wanted = event.device_type == torch.autograd.DeviceType.CUDA
            wanted = wanted and not getattr(event, "is_user_annotation", False)
        else:
            wanted = not event.cpu_children
        if wanted:
            yield Span(event.name, event.time_range.start, event.time_range.end)


# ---- what is said ----------------------------------------------------------------------------------------------------


def _said(
    say: Callable[..., None],
    bench: Bench,
    spans: list[Span],
    steps: int,
    seconds: float,
    most: int,
    known: dict[str, int],
) -> dict[str, Any]:
    by_name = summed(spans, lambda span: span.name)
    for name in list(by_name)[:most]:
        say(what="kernel", name=name[:160], kind=kind_of(name), **_per_step(by_name[name], steps))
    for kind, total in summed(spans, lambda span: kind_of(span.name)).items():
        figures = _per_step(total, steps)
        if kind in known and figures["us"]:
            rate = known[kind] / (1e-6 * figures["us"])
            figures |= {"gbps": rate / 1e9, "copy_share": rate / bench.reached["copy"]}
        say(what="kind", kind=kind, **figures)
    busy, gaps = busy_and_gaps(spans)
    return {
        "what": "step",
        "ms_step": 1e3 * seconds / steps,
        "busy_ms": 1e-3 * busy / steps,
        "gaps_ms": 1e-3 * gaps / steps,
        "kernels": len(spans) / steps,
    }


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, parts in KINDS if any(part in name.lower() for part in parts)), "small work")


def summed(spans: list[Span], key: Callable[[Span], str]) -> dict[str, tuple[int, float]]:
    """How many spans and microseconds have each key; the longest first."""
    found: dict[str, tuple[int, float]] = {}
    for span in spans:
        count, total = found.get(key(span), (0, 0.0))
        found[key(span)] = count + 1, total + span.end - span.start
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _per_step(total: tuple[int, float], steps: int) -> dict[str, float]:
    return {"launches": total[0] / steps, "us": total[1] / steps}


def busy_and_gaps(spans: list[Span]) -> tuple[float, float]:
    """Microseconds in which a kernel runs, and those in between in which none does."""
    busy = gaps = 0.0
    last = min((span.start for span in spans), default=0.0)
    for span in sorted(spans, key=lambda span: span.start):
        gaps += max(0.0, span.start - last)
        busy += max(0.0, span.end - max(span.start, last))
        last = max(last, span.end)
    return busy, gaps


if __name__ == "__main__":
    main()
