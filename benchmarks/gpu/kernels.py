# SPDX-License-Identifier: MIT
"""Every Triton kernel: correctness, time, and its share of what the GPU was measured to reach; one JSON line each.

    python benchmarks/gpu/kernels.py [--only attention|small|linear|gguf|sampling|moe|group|adapters ...]
        [--match TEXT ...] [--seconds 120] [--case-seconds 0.1] [--quick] [--device cpu]
        [--set gguf_linear.triton.TILES.32.0.warps=2 ...]

First the ceilings: the bytes per second of a large copy (read and written) and the rate of a large bf16 product. Then,
for every case: `error`, RMS(error) / RMS(reference) on random data with outputs that hold NaN before, and `ok`, whether
it is within the contract's tolerance; `us`, the median over replays of a CUDA graph, in which inputs rotate so that
large ones come from memory and not from the cache; `gbps` and `copy_share`, `tflops` and `matmul_share`, of the bytes
that must be moved and the operations that must be done over the ceilings. Short inputs stay in the cache, as they do in
a step; their `copy_share` says little. `peers` is the time of others at the same work, in microseconds. `compile_s` is
the first call, compiling included.

`row_alone_same_bits` says of linear layers whether a row in the middle has the same bits when it is computed alone.
`--set` tries other tiles; see `settings.py`.

A case that fails is a line with `failed`. What the time did not suffice for is named in a last line, `skipped`. With
`--device cpu` the references are measured against themselves, to check this script.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import adapter_cases
import attention_cases
import cases
import matrix_cases
import sampling_cases
import settings
import torch
from cases import Case, Plan, Planned
from measure import Call, Deadline, ceilings, poisoned, ratio, report, timed

GROUPS: dict[str, Callable[[Plan], Iterator[Planned]]] = {
    "attention": attention_cases.attention_cases,
    "gguf": matrix_cases.gguf_cases,
    "linear": matrix_cases.linear_cases,
    "small": cases.small_cases,
    "sampling": sampling_cases.sampling_cases,
    "moe": matrix_cases.moe_cases,
    "group": matrix_cases.group_cases,
    "adapters": adapter_cases.adapter_cases,
}
_MODULES = {"moe": "moe", "group": "group_linear"}  # groups whose kernels may not be there


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of kernels")
    parser.add_argument(
        "--match", nargs="+", default=[""], help="only cases whose kernel and shape contain one of these"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="no case begins later than this")
    parser.add_argument("--case-seconds", type=float, default=0.05, help="spent on timing each case, and each peer")
    parser.add_argument("--set", nargs="*", default=[], metavar="PATH=NUMBER", help="other tiles: see settings.py")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    deadline = Deadline(options.seconds)
    settings.apply_or_exit(options.set)
    config = {"config": {"set": options.set}} if options.set else {}
    say = functools.partial(report, "kernels", options.device, options.commit, **config)
    reached = ceilings(options.device, options.quick)
    say(copy_gbps=reached["copy"] / 1e9, matmul_tflops=reached["matmul"] / 1e12)
    plan = Plan(options.device, options.quick)
    skipped: list[str] = []
    for planned in planned_cases(plan, options.only, options.match):
        name = {"kernel": planned.kernel, "shape": planned.shape}
        if deadline.over:
            skipped.append(f"{planned.kernel} {planned.shape}")
            continue
        try:
            say(**name, **measured(planned.build(), reached, options.case_seconds, options.device))
        except Exception as error:
            say(**name, failed=f"{type(error).__name__}: {error}"[:500])
        gc.collect()
        if options.device == "cuda":
            torch.cuda.synchronize()  # an error that no later case would survive ends the program here
            torch.cuda.empty_cache()
    if skipped:
        say(skipped=skipped)


def planned_cases(plan: Plan, groups: Sequence[str], match: Sequence[str]) -> Iterator[Planned]:
    """Those of the groups whose kernel and shape contain one of the texts, or end with one that ends with "$"."""
    for group in groups:
        if group in _MODULES and not matrix_cases.kernel_exists(_MODULES[group]):
            continue
        for planned in GROUPS[group](plan):
            name = f"{planned.kernel} {planned.shape}"
            if any(name.endswith(text[:-1]) if text.endswith("$") else text in name for text in match):
                yield planned


def measured(case: Case, reached: dict[str, float], seconds: float, device: str) -> dict[str, Any]:
    """Correctness and speed of a case."""
    with torch.inference_mode():
        case.before()
        start = time.perf_counter()
        with poisoned():
            got = case.calls[0]()
        if device == "cuda":
            torch.cuda.synchronize()
        figures: dict[str, Any] = {"compile_s": time.perf_counter() - start}
        if case.wanted is not None:
            error = max(ratio(x, y) for x, y in zip(_tensors(got), _tensors(case.wanted()), strict=True))
            figures |= {"error": error, "ok": error <= case.tolerance}
        if case.rows_alone is not None:
            figures["row_alone_same_bits"] = case.rows_alone()
        spent = timed(case.calls, seconds, device)
        figures |= {"us": 1e6 * spent, "gbps": case.nbytes / spent / 1e9}
        figures["copy_share"] = case.nbytes / spent / reached["copy"]
        if case.flops:
            figures["tflops"] = case.flops / spent / 1e12
            figures["matmul_share"] = case.flops / spent / reached["matmul"]
        if case.peers:
            figures["peers"] = {name: _peer(calls, seconds, device) for name, calls in case.peers.items()}
    return figures


def _peer(calls: Sequence[Call], seconds: float, device: str) -> float | str:
    """Microseconds, or why not."""
    try:
        return 1e6 * timed(calls, seconds, device)
    except RuntimeError as error:  # what torch raises where a backend cannot serve
        return f"{type(error).__name__}: {error}"[:120]


def _tensors(result: Any) -> Sequence[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


if __name__ == "__main__":
    main()
