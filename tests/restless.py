# SPDX-License-Identifier: MIT
"""A run as on an overloaded machine: `pytest -m restless` stops processes at random and changes thread switching.

Once a second on average, one of the workers or of the processes that their tests have started is stopped for 0.2 to
1.5 s. `--switch-interval` is the time for which a Python thread keeps the interpreter, in all of these processes: 0.1 s
shows code that depends on a slow thread, 1e-6 races between the steps of two threads. A failure of such a run is a
fault of the product or of the test: no test may depend on speed.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import psutil

MARKER = "restless"
EACH = 1.0  # seconds between two pauses, on the average
SHORTEST, LONGEST = 0.2, 1.5  # seconds of a pause
_SITE = Path(__file__).with_name("restless_site")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("workers")
    group.addoption(
        "--switch-interval", type=float, default=1e-6, help="seconds, for -m restless: 0.1 and 1e-6 are of use"
    )
    group.addoption("--restless-seed", type=int, default=0, help="of the pauses of -m restless")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != MARKER:
        return
    config.option.markexpr = config.getini("addopts")[-1]  # the tests of the common run
    os.environ["CANDLE_VLLM_TEST_SWITCH_INTERVAL"] = str(config.option.switch_interval)
    path = os.environ.get("PYTHONPATH", "")
    if str(_SITE) not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(_SITE), path] if path else [str(_SITE)])
    config.stash[_PAUSES] = Pauses(config.option.restless_seed)


class Pauses:
    """The stopped processes, and the end of each pause."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._due = time.monotonic()
        self._stopped: dict[psutil.Process, float] = {}

    def next(self, parents: Sequence[int]) -> float:
        """Stop and wake the processes whose time has come, among the `parents` and their descendants.

        Returns:
            seconds until it should be called again.
        """
        import psutil  # not for tests on a GPU

        now = time.monotonic()
        for process, end in list(self._stopped.items()):
            if end <= now:
                self._wake(process)
        if self._due <= now:
            self._due = now + self._random.expovariate(1 / EACH)
            with contextlib.suppress(psutil.Error):
                parent = psutil.Process(self._random.choice(parents))
                process = self._random.choice([parent, *parent.children(recursive=True)])
                if process not in self._stopped and process.status() != psutil.STATUS_STOPPED:
                    process.suspend()
                    self._stopped[process] = now + self._random.uniform(SHORTEST, LONGEST)
        return max(0.0, min([self._due, *self._stopped.values()]) - now)

    def wake(self, pid: int) -> None:
        """Wake a process that may be stopped, because writing to it, or reading its incomplete output, would wait."""
        for process in [each for each in self._stopped if each.pid == pid]:
            self._wake(process)

    def _wake(self, process: psutil.Process) -> None:
        import psutil

        del self._stopped[process]
        with contextlib.suppress(psutil.Error):
            process.resume()

    def end(self) -> None:
        """Wake all stopped processes."""
        for process in list(self._stopped):
            self._wake(process)


_PAUSES = pytest.StashKey[Pauses]()


def pauses(config: pytest.Config) -> Pauses | None:
    """Return the pauses of a restless run; None in other runs."""
    return config.stash.get(_PAUSES, None)
