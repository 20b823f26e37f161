# SPDX-License-Identifier: MIT
"""Wait for a condition, for as long as a busy machine may take: no test may fail only because of time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

PATIENCE = 60.0  # seconds; an idle machine needs a few hundredths


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Poll until `condition` holds.

    Raises:
        TimeoutError: it does not hold after `seconds`.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            raise TimeoutError("waited in vain")
        time.sleep(0.005)


async def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Poll until a condition holds, while the event loop runs."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            raise TimeoutError("waited in vain")
        await asyncio.sleep(0.005)


class Clock:
    """The time that modules read: it only advances when a test moves it. Sleeps of threads do not change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.now = time.monotonic()
        for module in modules:
            monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: self.now}))

    def skip(self, seconds: float) -> None:
        self.now += seconds


async def skip(seconds: float) -> None:
    """Move the clock of the running event loop, which must be asyncio's, so that waits for these seconds end."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, asyncio.BaseEventLoop)
    clock = loop.time
    loop.time = lambda: clock() + seconds  # type: ignore[method-assign]
    await asyncio.sleep(0)
