# SPDX-License-Identifier: MIT
"""Other tiles for some cases of `kernels.py`, one setting after the other; one JSON line per trial.

    python benchmarks/gpu/sweep.py --only gguf --match 'gguf_linear Q4_K 8B gate, up T=1$'
        --try gguf_linear.triton.TILES.32.0.warps=1,2 gguf_linear.triton.CODED_CUT.programs=1024,2048,4096
        [--seconds 120] [--case-seconds 0.1] [--quick --device cpu]

All cases are measured twice as they are; `repeat` is by how much the two differ. Then each `--try` (paths as in
`settings.py`) takes its values in turn, the winners of those before it set: `score` is the mean over the cases of the
time over that without any setting, less than 1 where it is faster, and infinite where a result is wrong. A setting's
values end where neighbours differ by less than the repeat; the best is kept where it is better by more than that. The
last line names the `winners`. A path that does not exist is a line with `absent`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import kernels
import settings
import torch
from cases import Case, Plan
from measure import Deadline, ceilings, report

WRONG = math.inf
"""Score of settings with which a result is wrong, or that cannot be launched."""


def main() -> None:
    """Sweeps what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=kernels.GROUPS, required=True)
    parser.add_argument("--match", nargs="+", default=[""])
    parser.add_argument("--try", nargs="+", dest="tries", required=True, metavar="PATH=NUMBER,NUMBER")
    parser.add_argument("--seconds", type=float, default=600.0, help="no trial begins later than this")
    parser.add_argument("--case-seconds", type=float, default=0.05)
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    options = parser.parse_args()
    deadline = Deadline(options.seconds)
    torch.manual_seed(0)
    say = functools.partial(report, "sweep", options.device, options.commit)
    reached = ceilings(options.device, options.quick)
    say(copy_gbps=reached["copy"] / 1e9, matmul_tflops=reached["matmul"] / 1e12)
    planned = list(kernels.planned_cases(Plan(options.device, options.quick), options.only, options.match))
    cases = {f"{each.kernel} {each.shape}": _without_peers(each.build()) for each in planned}
    if not cases:
        raise SystemExit(f"no case matches {options.match}")

    def times() -> dict[str, float]:
        seconds = options.case_seconds
        return {name: _microseconds(case, reached, seconds, options.device) for name, case in cases.items()}

    sweep(times, options.tries, deadline, say)


def sweep(
    times: Callable[[], dict[str, float]], tries: Sequence[str], deadline: Deadline, say: Callable[..., None]
) -> None:
    """Says every trial and the winners; `times` measures all cases with what is set."""
    first, second = times(), times()
    repeat = abs(score(first, second) - 1.0)
    say(what="as it is", times=first, repeat=repeat)
    winners: dict[str, int] = {}

    def trial(path: str, number: int) -> float:
        if deadline.over:
            raise TimeoutError
        with settings.tried({**winners, path: number}):
            found = times()
        say(what="trial", path=path, number=number, score=score(first, found), times=found)
        return score(first, found)

    best = score(first, second)
    for place, each in enumerate(tries):
        path, _, numbers = each.partition("=")
        try:
            found = swept([int(number) for number in numbers.split(",")], best, repeat, functools.partial(trial, path))
        except settings.NoSuchSettingError as error:
            say(what="trial", path=path, absent=str(error))
        except TimeoutError:
            say(skipped=list(tries[place:]))
            break
        else:
            if found is not None:
                winners[path], best = found
    say(what="winners", winners=winners, score=best)


def swept(
    numbers: Sequence[int], before: float, repeat: float, trial: Callable[[int], float]
) -> tuple[int, float] | None:
    """The number with the least score, and that; None where none is better than `before` by more than the repeat.

    Ends where two neighbours differ by less than the repeat: the next would say no more.
    """
    best, found, last = before - repeat, None, None
    for number in numbers:
        now = trial(number)
        if now < best:
            best, found = now, (number, now)
        if last is not None and math.isfinite(now) and abs(now - last) < repeat:
            break
        last = now
    return found


def score(first: Mapping[str, float], now: Mapping[str, float]) -> float:
    """Mean over the cases of the time now over the first, by their logarithms."""
    if not all(math.isfinite(value) for value in (*first.values(), *now.values())):
        return WRONG
    return math.exp(statistics.fmean(math.log(now[name] / first[name]) for name in first))


def _without_peers(case: Case) -> Case:
    """The case with its reference computed once, and nothing beside it."""
    wanted = None if case.wanted is None else functools.cache(case.wanted)
    return dataclasses.replace(case, wanted=wanted, peers={}, rows_alone=None)


def _microseconds(case: Case, reached: dict[str, float], seconds: float, device: str) -> float:
    """Of a call; infinite where its result is wrong, or it cannot be launched."""
    try:
        found: dict[str, Any] = kernels.measured(case, reached, seconds, device)
    except Exception:  # too much shared memory, a tile that the kernel does not have
        return WRONG
    return found["us"] if found.get("ok", True) else WRONG


if __name__ == "__main__":
    main()
