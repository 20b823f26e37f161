# SPDX-License-Identifier: MIT
"""Whether what ran was right, and what to do where it was not: the table of run A."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bars import Line


@dataclass(frozen=True)
class Tests:
    """What a run of pytest came to."""

    passed: int
    skipped: int
    failed: tuple[str, ...]
    died: str = ""

    @property
    def share(self) -> float:
        """Of those that ran, the share that passed."""
        ran = self.passed + len(self.failed)
        return self.passed / ran if ran else 1.0


_RESULT = "(PASSED|FAILED|ERROR|SKIPPED)"


def read_tests(output: str, status: int, allowed: Sequence[int] = (0, 1)) -> Tests:
    """By what pytest prints with -v, by itself or in several processes; of one that was ended, what it came to."""
    alone = re.findall(rf"^(\S+::.+?) {_RESULT}\b", output, re.MULTILINE)
    among = re.findall(rf"^\[gw\d+\] \[ *\d+%\] {_RESULT} (\S+::.+?) *$", output, re.MULTILINE)
    found = dict([*alone, *((name, word) for word, name in among)])
    failed = [name for name, word in found.items() if word in ("FAILED", "ERROR")]
    broken = re.findall(r"^ERROR (\S+)", output, re.MULTILINE)  # files that cannot be collected
    counts = Counter(found.values())
    died = "" if status in allowed else f"pytest ended with status {status}"
    return Tests(counts["PASSED"], counts["SKIPPED"], tuple(dict.fromkeys([*failed, *broken])), died)


RIGHT_ENOUGH = 0.95


def diagnosed(lines: Sequence[Line], tests: Sequence[Tests], again: Mapping[str, Sequence[float]]) -> list[str]:
    """What A shows, and what to do: `again` has the errors of wrong cases in several runs."""
    found = []
    texts = [f"{line.get('kernel', line.get('what', ''))}: {line['failed']}" for line in lines if "failed" in line]
    if any("ModuleNotFoundError" in text or "ImportError" in text for text in texts):
        found.append("import error: bring the wheel (benchmarks/gpu/wheels.txt)")
    if any("ompiler" in text and "not" in text for text in texts):
        found.append("compiler error: set CC, and bring Python.h")
    if any("llegal" in text for text in texts):
        found.append("illegal access: that case alone under compute-sanitizer, at its smallest shape")
    for name, errors in again.items():
        if len(set(errors)) > 1:
            found.append(f"{name}: its error moves between runs {list(errors)}: a race; try num_stages=1, and pin it")
    for line in lines:
        if line.get("row_alone_same_bits") is False and "invariant" in line.get("kernel", ""):
            name = f"{line['kernel']} {line['shape']}"
            found.append(f"{name}: bits differ alone and in company; --deterministic is not kept: split by shape only")
    failed = [name for each in tests for name in each.failed]
    if failed and all("fp8" in name for name in failed):
        found.append("fp8 alone is wrong: compare all 256 codes with torch's conversions")
    wrong = wrong_kernels(lines)
    if wrong:
        found.append(f"wrong, and so not to be trusted in B and C: {', '.join(wrong)}")
    ran = sum(each.passed + len(each.failed) for each in tests)
    if ran:
        share = sum(each.passed for each in tests) / ran
        go = "go on with B" if share >= RIGHT_ENOUGH else "mend that before anything is timed"
        found.append(f"{share:.1%} of {ran} tests are right: {go}")
    return found


def wrong_kernels(lines: Iterable[Line]) -> list[str]:
    """Kernels with a wrong result."""
    return sorted({line["kernel"] for line in lines if line.get("ok") is False})
