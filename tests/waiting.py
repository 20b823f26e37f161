# SPDX-License-Identifier: MIT
"""Waiting for what must come true, as long as a busy machine may take: a test that fails by time alone is wrong."""

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
    """The same, while the event loop goes on."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            raise TimeoutError("waited in vain")
        await asyncio.sleep(0.005)


class Clock:
    """The time that modules read: it stands still until a test moves it. Their threads still sleep as they did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.now = time.monotonic()
        for module in modules:
            monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: self.now}))

    def skip(self, seconds: float) -> None:
        self.now += seconds


async def skip(seconds: float) -> None:
    """Moves the clock of the running event loop, asyncio's own: what waits for these seconds has waited for them."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, asyncio.BaseEventLoop)
    clock = loop.time
    loop.time = lambda: clock() + seconds  # type: ignore[method-assign]
    await asyncio.sleep(0)
