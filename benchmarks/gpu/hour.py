# SPDX-License-Identifier: MIT
"""One run of the first hour under way: its parts, within its time; what it has found; the tests as processes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import right
from run import Part, run, show, unfinished

ROOT = Path(__file__).resolve().parents[2]

LEAST = 8.0
"""Seconds below which nothing is begun."""

PYTEST = (
    *("-m", "pytest", "-c", os.devnull, "--rootdir", ".", "--import-mode=importlib", "-p", "no:cacheprovider"),
    *("-W", "ignore::pytest.PytestUnknownMarkWarning", "-v", "-rE", "-m", "gpu", "-k", "not in_situ"),
)
"""Independent of the project's settings, and of plugins that a machine happens to have."""

KERNEL_TESTS = "packages/core/tests/kernels/triton"
ENGINE_TESTS = "packages/core/tests/test_gpu_engine.py"


class StopError(Exception):
    """What makes the rest of a run pointless."""


@dataclass
class Hour:
    """A run under way.

    Attributes:
        options: the command line.
        until: when the last part has to have ended, on the monotonic clock.
        before: result lines of earlier runs.
        lines: those of this one.
        faults: what failed, was wrong, or was left out.
        findings: what was decided, and by what.
        text: what is printed, for `report.txt`.
    """

    options: argparse.Namespace
    until: float
    before: list[dict[str, Any]]
    lines: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    text: io.StringIO = field(default_factory=io.StringIO)
    _toys: dict[Any, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def part(self, name: str, seconds: float, script: str, *arguments: str) -> list[dict[str, Any]]:
        """A script's results, with toy sizes where those are asked for; nothing where no time is left."""
        limit = min(seconds, self.left)
        if limit < LEAST:
            self.faults.append(f"{name}: skipped, no time left")
            return []
        if self.options.quick:
            lines, fault = self._toy(name, limit, script, *arguments)
        else:
            lines, fault = run(Part("first hour", name, (script, *arguments), seconds), limit, self.options)
        self.lines += lines
        self.faults += [f"{name}: {text}" for text in ([fault] if fault else []) + unfinished(lines)]
        return lines

    def _toy(self, name: str, limit: float, script: str, *arguments: str) -> tuple[list[dict[str, Any]], str]:
        """A part with toy sizes, where all models are the same toy: what has run is not run again."""
        changed = arguments[arguments.index("--set") :] if "--set" in arguments else ()
        groups = arguments if script in ("kernels.py", "sweep.py") else ()
        key = (script, "--gguf" in arguments, "--no-cuda-graphs" in arguments, changed, groups)
        if key not in self._toys:
            part = Part(
                "first hour", name, (script, *arguments, *(() if "--quick" in arguments else ("--quick",))), limit
            )
            self._toys[key] = run(part, limit, self.options)
        lines, fault = self._toys[key]
        named = {"model": arguments[arguments.index("--model") + 1]} if "--model" in arguments else {}
        return [{**line, **named} for line in lines], fault

    def together(self, *parts: Callable[[], Any]) -> list[Any]:
        """Results of parts that run beside each other; one after the other on the CPU, which has no cores to spare."""
        with ThreadPoolExecutor(1 if self.options.device == "cpu" else len(parts)) as pool:
            return list(pool.map(lambda part: part(), parts))

    def say(self, *texts: str) -> None:
        """Prints lines, and keeps them for the report."""
        for text in texts:
            print(text, flush=True)
            self.text.write(text + "\n")

    def find(self, *texts: str) -> None:
        """Notes what was decided, once."""
        new = [text for text in texts if text not in self.findings]
        self.findings += new
        self.say(*(f"-> {text}" for text in new))

    def show(self, title: str, lines: Sequence[dict[str, Any]]) -> None:
        """A table of results."""
        with printed_too(self.text):
            show(title, lines)


class _Both(io.TextIOBase):
    """Writes to two streams."""

    def __init__(self, *streams: Any) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        self._streams[0].flush()


@contextlib.contextmanager
def printed_too(stream: io.StringIO) -> Iterator[None]:
    """Has what is printed within written there too."""
    with contextlib.redirect_stdout(_Both(sys.stdout, stream)):
        yield


# ---- the tests -------------------------------------------------------------------------------------------------------


def pytest(hour: Hour, path: str, workers: int, seconds: float) -> right.Tests:
    """The GPU tests below a path. Without a GPU all of them are left out, which is no failure then."""
    more: list[str] = []
    for plugin, options in (("xdist", ("-n", str(workers))), ("pytest_timeout", ("--timeout", "150"))):
        if importlib.util.find_spec(plugin) is not None:
            more += ["-p", "xdist.plugin" if plugin == "xdist" else plugin, *options]
    if importlib.util.find_spec("transformers") is None and path == KERNEL_TESTS:
        more += ["--ignore", f"{KERNEL_TESTS}/test_families_triton.py"]
        hour.find("no transformers: the tests of model families are left out")
    if hour.left < LEAST:
        hour.faults.append(f"{path}: skipped, no time left")
        return right.Tests(0, 0, ())
    output, status = run_logged(hour, [sys.executable, *PYTEST, *more, path], seconds)
    none = (5,) if hour.options.device == "cpu" else ()
    found = right.read_tests(output, status, (0, 1, *none))
    hour.lines.append(
        {"benchmark": "gpu/tests", "path": path, "passed": found.passed, "failed_tests": list(found.failed)}
    )
    hour.say(
        f"{path}: {found.passed} passed, {len(found.failed)} failed, {found.skipped} skipped {found.died}".rstrip()
    )
    hour.faults += [f"{path}: {text}" for text in ([found.died] if found.died else []) + list(found.failed)]
    return found


def run_logged(hour: Hour, command: Sequence[str], seconds: float) -> tuple[str, int]:
    """What a program printed, which goes into the log too, and its exit status; 124 where its time was over."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, status = process.communicate(timeout=max(1.0, min(seconds, hour.left)))[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            output, status = process.communicate()[0], 124
    with (hour.options.out / "log.txt").open("a") as log:
        log.write(f"\n==== {' '.join(command)}\n{output}\n")
    return output, status
