# SPDX-License-Identifier: MIT
"""Divide the files of a run among worker processes; run tests again, alone, that failed by time or by a lost process.

A plugin of pytest, loaded by the workspace's `conftest.py`. A run that names more than `FEW` files is divided. Each of
`--workers` processes is a pytest session that requests a file from this process, runs it, and sends its reports. The
default of five is more than two cores need for computing, because tests of servers, of processes and of the web UI
mostly wait; one of the five runs the tests of the web UI. Files that take longest by `tests/file_times.json` come
first, and files without a time before short ones; `--write-file-times` updates this table. `--workers 0`, `--pdb`, `-s`
and `--collect-only` keep a run in one process.

A test whose failure has a cause of `passing` (a timeout, a lost connection, a process that has ended) is run once more
by a process of its own when all others have ended. If it passes then, the run ends with the section FLAKY and exits 0,
and a line is appended to `flaky.txt`. Failures in folders of `NEVER_AGAIN` count at once.

Messages between the processes are JSON objects over a pair of pipes, `multiprocessing.connection` without pickle.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import restless, slowest_tests

ROOT = Path(__file__).parents[1]
TIMES = ROOT / "tests" / "file_times.json"
FLAKY = ROOT / "flaky.txt"
FEW = 8  # files; a run of so few is not divided
UNKNOWN = 30.0  # seconds of a file without a time: it is short, or new and perhaps long, so it is not the last
TOGETHER = (
    ROOT / "packages/core/tests/kernels/triton",
)  # folders whose files share what is started when they are collected
APART = ROOT / "tests" / "web"  # Playwright keeps an event loop in the main thread, so a worker runs nothing else
NEVER_AGAIN = ("kernels", "security")
VARIABLE = "CANDLE_VLLM_TEST_WORKER"  # two file descriptors: what a worker reads from, and writes to
_AT = re.compile(r"^(?!/)(\S+\.py:\d+): ", re.MULTILINE)  # each frame of a failure's traceback, where the file is ours
Message = dict[str, Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("workers")
    group.addoption(
        "--workers", type=int, default=5, help="processes among which a run of many files is divided; 0: none"
    )
    group.addoption(
        "--write-file-times", action="store_true", help="write what each file took to tests/file_times.json"
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if VARIABLE in os.environ:
        config.pluginmanager.register(Worker(config), "worker")
    elif config.option.workers and not (
        config.option.usepdb or config.option.collectonly or config.option.capture == "no"
    ):
        units = find_units(config)
        if len(units) > FEW:
            config.pluginmanager.register(Division(config, units), "division")


def find_units(config: pytest.Config) -> list[str]:
    """Return what the arguments of a run name, as files, node ids and folders of `TOGETHER`, longest first.

    Before them comes the longest of `APART`, so that its worker, which mostly waits, starts with the others.
    """
    times: dict[str, float] = json.loads(TIMES.read_text())
    files: dict[str, None] = {}
    for argument in config.args:
        name, _, test = argument.partition("::")
        path = (config.invocation_params.dir / name).resolve()
        if test or not path.is_dir():
            files[argument] = None
        else:
            for found in sorted(path.rglob("test_*.py")):
                if not {".venv", "node_modules"} & set(found.parts):
                    files[str(found)] = None
    units = {file: times.get(os.path.relpath(file, ROOT), UNKNOWN) for file in files}
    for folder in map(str, TOGETHER):  # given as a folder, so that its conftest.py chooses among its files
        inside = [file for file in files if os.path.dirname(file) == folder]
        if len(inside) > 1:
            units[folder] = sum(units.pop(file) for file in inside)
    longest = sorted(units, key=lambda unit: units[unit], reverse=True)
    begins = next(filter(is_apart, longest), None)
    return sorted(longest, key=lambda unit: unit != begins)


# ---- a worker --------------------------------------------------------------------------------------------------------


def end_at_last(seconds: float = 120) -> None:
    """End a process with status 70 if it has not ended after a while: threads of tests could keep it for ever."""
    time.sleep(seconds)
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    os._exit(70)


class Worker:
    """The session of a worker process: it runs the units that it receives, and sends reports."""

    def __init__(self, config: pytest.Config) -> None:
        given, told = map(int, os.environ.pop(VARIABLE).split(","))
        os.set_inheritable(given, False)
        os.set_inheritable(told, False)
        self._config = config
        self._given, self._told = Connection(given, writable=False), Connection(told, readable=False)
        self._folders: dict[Path, pytest.Collector] = {}

    def _tell(self, **message: Any) -> None:
        self._told.send_bytes(json.dumps(message, default=str).encode())

    @pytest.hookimpl(wrapper=True)
    def pytest_collect_directory(self, path: Path) -> Iterator[None]:
        """A folder is one node for all units: fixtures of a `conftest.py` belong to the node that was collected."""
        found = yield
        return found and self._folders.setdefault(path, found)

    def pytest_collection(self, session: pytest.Session) -> bool:
        self._conftests = dict(session._fixturemanager._pending_conftests)  # of folders that have not been collected
        return True  # each unit is collected when its turn is near

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        self._conftests.pop(collector.path, None)

    def _next(self, session: pytest.Session) -> list[pytest.Item]:
        """Request units until one has tests."""
        while True:
            self._tell(kind="next")
            message = json.loads(self._given.recv_bytes())
            if message["unit"] is None:
                return []
            done = set(message["done"])
            session._fixturemanager._pending_conftests.update(self._conftests)  # pytest drops them after a collection
            try:
                items = [item for item in session.perform_collect([message["unit"]]) if str(item.nodeid) not in done]
            except pytest.UsageError as error:
                self._tell(kind="failure", where=message["unit"], text="\n".join(map(str, error.args)))
                continue
            self._tell(kind="collected", number=len(items))
            if items:
                return items

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = self._next(session)
        while items:
            following = self._next(session)  # known before the last test ends, so that it keeps what the next one needs
            for item, after in zip(items, [*items[1:], following[0] if following else None]):
                self._tell(kind="begin", test=str(item.nodeid))
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                self._tell(kind="end", test=str(item.nodeid))
            items = following
        self._tell(kind="rows", rows=slowest_tests.rows())
        threading.Thread(target=end_at_last, daemon=True).start()
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: Any = yield
        if report.failed and call.excinfo is not None and not set(NEVER_AGAIN) & set(item.path.parts):
            report.passing = passing(call.excinfo.value)
        return report

    def _report(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._tell(kind="report", report=data)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:  # a set-up or tear-down that passed changes no count
            self._report(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._report(report)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self._tell(kind="deselected", number=len(items))


def passing(error: BaseException) -> str:
    """Return the cause of a failure that a busy machine can produce; otherwise an empty text."""
    import httpx

    from candle_vllm.core.errors import EngineDeadError

    kinds: tuple[type[BaseException], ...] = (
        TimeoutError, ConnectionError, EOFError, EngineDeadError, subprocess.TimeoutExpired, httpx.TransportError,
    )  # fmt: skip
    if playwright := sys.modules.get("playwright.sync_api"):
        kinds = (*kinds, playwright.TimeoutError)
    if isinstance(error, BaseExceptionGroup):
        causes = [passing(each) for each in error.exceptions]
        return causes[0] if all(causes) else ""
    ended = isinstance(error, subprocess.CalledProcessError) and error.returncode < 0
    too_long = isinstance(error, pytest.fail.Exception) and str(error).startswith("Timeout (>")  # of pytest-timeout
    if ended or too_long or isinstance(error, kinds):
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return passing(error.__cause__) if error.__cause__ else ""


# ---- the process that divides ----------------------------------------------------------------------------------------


@dataclass
class Process:
    """A worker as the dividing process sees it.

    Attributes:
        units: units that it received and has not finished, oldest first.
        test: the node id of the test that runs, or "".
        output: what the process itself wrote.
        ended: whether it has run all of its units.
        apart: whether its units are those of `APART`; None before the first one.
    """

    popen: subprocess.Popen[bytes]
    given: Connection
    told: Connection
    output: Any
    units: list[str] = field(default_factory=list)
    test: str = ""
    ended: bool = False
    apart: bool | None = None

    def takes(self, unit: str) -> bool:
        return self.apart is None or self.apart == is_apart(unit)


def is_apart(unit: str) -> bool:
    return APART in Path(unit.partition("::")[0]).absolute().parents


class Division:
    """The session of the process that was started: it runs no test itself."""

    def __init__(self, config: pytest.Config, units: list[str]) -> None:
        self._config, self._left = config, units
        self._running: dict[Connection, Process] = {}
        self._done: list[str] = []
        self._again: dict[str, list[pytest.TestReport]] = {}  # by node id, the reports of tests that run once more
        self._flaky: dict[str, list[tuple[str, str]]] = {}  # by line of `flaky.txt`: what was captured
        self._pauses = restless.pauses(config)

    def pytest_collection(self) -> bool:
        return True

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._session = session
        self._terminal: Any = self._config.pluginmanager.getplugin("terminalreporter")
        self._log = self._config.pluginmanager.subset_hook_caller("pytest_runtest_logreport", [self._terminal])
        try:
            for _ in range(min(self._config.option.workers, len(self._left))):
                self._start()
            self._serve()
            for unit in () if session.shouldfail else self._left:
                self._fail(unit, "no worker ran it")
            again, self._again = self._again, {}
            if again and not session.shouldfail:
                self._run_again(again)
        finally:
            if self._pauses:
                self._pauses.end()
            for process in self._running.values():
                kill_group(process.popen)
                process.output.close()
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if self._config.option.write_file_times:
            write_file_times(slowest_tests.rows())
        return True

    # What a worker says

    def _start(self) -> None:
        reads, given = Pipe(duplex=False)
        told, writes = Pipe(duplex=False)
        handles = reads.fileno(), writes.fileno()
        environment = {**os.environ, VARIABLE: ",".join(map(str, handles))}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles every module
        output = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", "pytest", *map(str, self._config.invocation_params.args)]
        popen = subprocess.Popen(
            command, env=environment, cwd=self._config.invocation_params.dir, pass_fds=handles, process_group=0,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        reads.close()
        writes.close()
        self._running[told] = Process(popen, given, told, output)

    def _serve(self) -> None:
        """Answer the workers until all have ended."""
        while self._running and not self._session.shouldfail:
            processes = [one.popen.pid for one in self._running.values()]
            waits = self._pauses.next(processes) if self._pauses else None
            for told in wait(list(self._running), waits):
                process = self._running[told]
                if self._pauses:
                    self._pauses.wake(process.popen.pid)
                try:
                    self._take(process, json.loads(told.recv_bytes()))
                except (EOFError, OSError):
                    del self._running[told]
                    self._has_ended(process)

    def _take(self, process: Process, message: Message) -> None:
        kind = message["kind"]
        if kind == "next":
            if len(process.units) > 1:  # it has begun the second one
                self._finished(process.units.pop(0))
            unit = next((one for one in self._left if process.takes(one)), None)
            if unit:
                self._left.remove(unit)
                process.apart = is_apart(unit)
                process.units.append(unit)
            name = os.path.relpath(unit, ROOT) if unit else ""
            done = [test for test in self._done if test.startswith(name)] if unit else []
            process.given.send_bytes(json.dumps({"unit": unit, "done": done}).encode())
        elif kind == "begin":
            process.test = message["test"]
        elif kind == "end":
            process.test = ""
            self._done.append(message["test"])
        elif kind == "collected":
            self._session.testscollected += message["number"]
        elif kind == "deselected":
            self._config.hook.pytest_deselected(items=[SimpleNamespace()] * message["number"])
        elif kind == "report":
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=message["report"])
            if isinstance(report.longrepr, list):  # file, line and reason of what was skipped; JSON has no tuples
                report.longrepr = tuple(report.longrepr)
            if isinstance(report, pytest.CollectReport):
                self._config.hook.pytest_collectreport(report=report)
            else:
                self._count(report)
        elif kind == "failure":
            self._fail(message["where"], message["text"])
        elif kind == "rows":
            process.ended = True
            slowest_tests.rows().extend(tuple(row) for row in message["rows"])
            for unit in process.units:
                self._finished(unit)
            process.units = []

    def _count(self, report: Any) -> None:
        """Pass a report to all plugins except the terminal's, which would print dots of many files in one line."""
        if report.failed and getattr(report, "passing", ""):
            self._again.setdefault(report.nodeid, []).append(report)
            return
        self._log(report=report)
        category, _, _ = self._config.hook.pytest_report_teststatus(report=report, config=self._config)
        self._terminal.stats.setdefault(category, []).append(report)
        if report.failed:
            self._terminal.write_line(f"FAILED {report.nodeid}", red=True)

    def _fail(self, test: str, text: str) -> None:
        location = test.partition("::")[0], None, test
        self._count(pytest.TestReport(test, location, {}, "failed", text, "call"))

    def _finished(self, unit: str) -> None:
        name = os.path.relpath(unit.partition("::")[0], ROOT)
        counts = {
            category: number
            for category in ("passed", "skipped", "failed", "error", "xfailed")
            if (number := sum(one.nodeid.startswith(name) for one in self._terminal.stats.get(category, ())))
        }
        if counts:
            told = ", ".join(f"{number} {category}" for category, number in counts.items())
            self._terminal.write_line(f"{time.monotonic() - slowest_tests.BEGAN:6.0f} s  {name}: {told}")

    def _has_ended(self, process: Process) -> None:
        """Handle the end of a worker's pipe: the worker has ended normally, or its test has failed."""
        code = process.popen.wait()
        kill_group(process.popen)
        process.given.close()
        process.told.close()
        with process.output as output:
            output.seek(0)
            tail = output.read()[-8000:].decode(errors="replace")
        if process.ended and code in (
            pytest.ExitCode.OK,
            pytest.ExitCode.TESTS_FAILED,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            if self._left:  # this one could not take them
                self._start()
            return
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        test = process.test or (process.units[0] if process.units else "behind the last test")
        text = f"the worker process {how} while it ran this test; it wrote:\n{tail}"
        report: Any = pytest.TestReport(test, (test.partition("::")[0], None, test), {}, "failed", text, "call")
        if process.test and not set(NEVER_AGAIN) & set(Path(test.partition("::")[0]).parts):
            report.passing = f"the worker process {how}"
        self._count(report)
        if process.test:
            self._done.append(process.test)
            self._left[:0] = process.units
        else:  # it died while it collected the first of its units, or between tests
            self._left[:0] = process.units[1:]
        if self._left:
            self._start()

    # Once more

    def _run_again(self, again: dict[str, list[pytest.TestReport]]) -> None:
        self._terminal.write_line(
            f"{len(again)} tests that failed by time, a lost connection or a lost process run again, alone"
        )
        if self._pauses:
            self._pauses.end()
        self._left, self._pauses, self._done = list(again), None, []
        failed = {id(one) for category in ("failed", "error") for one in self._terminal.stats.get(category, ())}
        self._start()
        self._serve()
        twice = self._again
        self._again = {}
        now = {
            one.nodeid
            for category in ("failed", "error")
            for one in self._terminal.stats.get(category, ())
            if id(one) not in failed
        }
        for test, reports in again.items():
            if test in twice or test in now:
                for report in twice.get(test, reports):
                    report.passing = ""
                    self._count(report)
            else:
                where = [at for at in _AT.findall(reports[0].longreprtext) if "site-packages" not in at]
                line = "  ".join([test, reports[0].passing, *where])
                self._flaky[line] = reports[0].sections
        if self._flaky:
            stamp = time.strftime("%Y-%m-%d %H:%M")
            with FLAKY.open("a") as file:
                file.writelines(f"{stamp}  {line}\n" for line in self._flaky)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._flaky:
            terminalreporter.section("FLAKY", red=True, bold=True)
            terminalreporter.write_line(f"passed when run again, alone; {FLAKY.name} keeps them:")
            for line, sections in self._flaky.items():
                terminalreporter.write_line(line)
                for title, content in sections:  # what the test and its processes wrote when it failed
                    terminalreporter.write_line(f"  {title}:\n{content[-4000:]}")


def kill_group(worker: subprocess.Popen[bytes]) -> None:
    """End a worker, and whatever its tests have left running in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def write_file_times(rows: list[slowest_tests.Row]) -> None:
    """Write the seconds of each file that took at least two; files that were not run keep their seconds."""
    times: dict[str, float] = json.loads(TIMES.read_text())
    sums: dict[str, float] = {}
    for name, seconds, _ in rows:
        file = name.partition("::")[0]
        sums[file] = sums.get(file, 0.0) + seconds
    times = {name: seconds for name, seconds in (times | sums).items() if seconds >= 2 and (ROOT / name).exists()}
    TIMES.write_text(json.dumps({name: round(times[name]) for name in sorted(times)}, indent=0) + "\n")
