# SPDX-License-Identifier: MIT
"""All GPU benchmarks within a time: kernels, the engine, its start, and transformers beside it.

    python benchmarks/gpu/run.py --minutes 8 --out FOLDER [--only kernels|engine|start|peer] [--quick] [--device cpu]

Needs torch, triton, transformers and what the packages import, with packages/*/src on PYTHONPATH; no network. Each part
is a process with a limit of its own, so that one that fails does not take the others with it; the most important come
first, and what the time did not suffice for is named. FOLDER gets `results.jsonl`, a line per result with machine,
commit, versions and date, and `log.txt`, what the parts said besides; the lines of a part that is under way are in
`part-NAME.jsonl`. A table of each part is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
LEAST = 15.0
"""Seconds below which no part is begun."""

GRACE = 10.0
"""Seconds between what a part is told to keep to and its end by force, for the case that it is in."""

FACTS = ("benchmark", "machine", "capability", "commit", "versions", "date", "config", "model", "compile_s")
"""What every line has; it is left out of the tables."""


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        group: by which `--only` chooses it.
        name: for tables and messages.
        command: script and arguments.
        seconds: most that it may take.
    """

    group: str
    name: str
    command: tuple[str, ...]
    seconds: float


def _engine(name: str, seconds: float, *arguments: str) -> Part:
    return Part("engine", name, ("engine.py", *arguments), seconds)


_8B, _06B = ("--model", "llama-3.1-8b"), ("--model", "qwen3-0.6b")
_PAGES = ("--set", "EngineConfig.block_size=256")  # which FlashAttention 2 wants
_SHORT = ("--batches", "1", "64", "--prompts", "8192", "--serve")

PARTS = (
    Part("kernels", "attention and GGUF matrices", ("kernels.py", "--only", "attention", "gguf"), 110),
    _engine("8B bf16", 70, *_8B),
    _engine("8B Q4_K_M", 70, *_8B, "--gguf"),
    _engine("0.6B bf16", 50, *_06B),
    Part("start", "start of the 8B", ("start.py", *_8B), 70),
    Part("peer", "transformers 8B", ("transformers_peer.py", *_8B), 60),
    _engine("8B bf16, deterministic", 40, *_8B, "--deterministic", *_SHORT),
    _engine("8B bf16, no CUDA graphs", 40, *_8B, "--no-cuda-graphs", *_SHORT),
    Part("kernels", "linear, norms, gates, cache", ("kernels.py", "--only", "linear", "small"), 60),
    _engine("8B bf16, torch_flash", 40, *_8B, "--attention-backend", "torch_flash", *_PAGES, *_SHORT),
    _engine("8B bf16, flash_attn", 40, *_8B, "--attention-backend", "flash_attn", *_PAGES, *_SHORT),
    Part("kernels", "sampling, experts, groups", ("kernels.py", "--only", "sampling", "moe", "group"), 60),
    Part("start", "start of the 8B Q4_K_M", ("start.py", *_8B, "--gguf", "--starts", "1"), 40),
    Part("peer", "transformers 0.6B", ("transformers_peer.py", *_06B), 45),
)

QUICK = (
    Part("kernels", "kernels", ("kernels.py", "--quick", "--case-seconds", "0"), 60),
    _engine("engine", 60, "--quick"),
    _engine("engine, GGUF", 60, "--quick", "--gguf"),
    Part("start", "start", ("start.py", "--quick", "--starts", "1"), 60),
    Part("peer", "transformers", ("transformers_peer.py", "--quick"), 60),
)


def main() -> None:
    """Runs the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=sorted({part.group for part in PARTS}))
    parser.add_argument("--quick", action="store_true", help="toy sizes, to check the benchmarks")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in (QUICK if options.quick else PARTS) if part.group in (options.only or [part.group])]
    faults = run_all(parts, time.monotonic() + 60 * options.minutes, options)[1]
    with (options.out / "results.jsonl").open("a") as results:
        results.write(json.dumps({"benchmark": "gpu/run", "faults": faults}) + "\n")
    print("\n".join(["", *faults]) if faults else "\nnothing failed, nothing was skipped")


def run_all(parts: Sequence[Part], until: float, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """All results of parts that are begun before `until`, of the monotonic clock, and what went wrong."""
    found: list[dict[str, Any]] = []
    faults: list[str] = []
    for part in parts:
        left = until - time.monotonic()
        if left < LEAST:
            faults.append(f"{part.name}: skipped, no time left")
            continue
        lines, fault = run(part, min(part.seconds, left), options)
        show(part.name, lines)
        found += lines
        faults += [f"{part.name}: {text}" for text in ([fault] if fault else []) + unfinished(lines)]
    return found, faults


def run(part: Part, limit: float, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """The part's results, and what went wrong, which is nothing as a rule."""
    script, *arguments = part.command
    soft = max(limit - GRACE, limit / 2)
    command = [sys.executable, str(HERE / script), *arguments, "--seconds", f"{soft:.0f}", "--device", options.device]
    if options.commit:
        command += ["--commit", options.commit]
    if options.device == "cpu" and script in ("engine.py", "start.py", "step_profile.py"):
        command.append("--eager")
    partial = options.out / f"part-{re.sub('[^A-Za-z0-9]+', '-', part.name)}.jsonl"
    with (options.out / "log.txt").open("a") as log, partial.open("w+") as output:
        log.write(f"\n==== {part.name}: {' '.join(part.command)}\n")
        log.flush()
        process = subprocess.Popen(command, stdout=output, stderr=log, text=True, start_new_session=True)
        try:
            process.wait(limit)
            fault = f"exit status {process.returncode}, see log.txt" if process.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
            fault = f"ended after {limit:.0f} s"
        output.seek(0)
        lines = _kept(part, output, options.out, log)
    partial.unlink()
    return lines, fault


_WRITING = threading.Lock()


def _kept(part: Part, output: Iterable[str], folder: Path, log: IO[str]) -> list[dict[str, Any]]:
    """The lines that are results, which are written to the folder's; all others go to the log."""
    lines: list[dict[str, Any]] = []
    with _WRITING, (folder / "results.jsonl").open("a") as results:
        for text in output:
            try:
                lines.append(json.loads(text))
            except ValueError:
                log.write(text)
            else:
                results.write(json.dumps({"part": part.name, **lines[-1]}) + "\n")
    return lines


def unfinished(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What failed, was wrong, or was left out, by the part's own words."""
    found = []
    for line in lines:
        name = " ".join(str(line[key]) for key in ("kernel", "shape", "what", "batch") if key in line)
        if "failed" in line:
            found.append(f"{name} failed: {line['failed']}")
        if line.get("ok") is False:
            found.append(f"{name} is wrong: error {line['error']}")
        if "skipped" in line:
            found.append(f"no time for {len(line['skipped'])}: {', '.join(line['skipped'])}")
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------


def show(title: str, lines: Sequence[dict[str, Any]]) -> None:
    """A table for each kind of line, that is, for neighbours with the same columns."""
    print(f"\n{title}", flush=True)
    for columns, rows in _kinds(lines):
        cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
        widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
        for line in cells:
            print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip(), flush=True)


def _kinds(lines: Sequence[dict[str, Any]]) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Lines by what they say: columns, and those lines, in order of the first of each."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "skipped" in line or "failed" in line:
            continue
        kinds.setdefault("kernel" if "kernel" in line else line.get("what", ""), []).append(line)
    for rows in kinds.values():
        yield [key for key in dict.fromkeys(key for row in rows for key in row) if key not in FACTS], rows


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {_cell(number)}" for name, number in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)[:60]


if __name__ == "__main__":
    main()
