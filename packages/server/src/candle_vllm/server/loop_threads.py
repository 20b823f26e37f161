# SPDX-License-Identifier: MIT
"""Run long work in a thread, while an event loop waits for the work, abandons it or stops it (before step 1)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from candle_vllm.core.progress import Progress, heard_by

logger = logging.getLogger(__name__)

_STOPPING = 30.0  # maximum seconds of the wait for stopped work to end

T = TypeVar("T")


async def in_thread(function: Callable[[], T], name: str, discard: Callable[[T], object] | None = None) -> T:
    """Run work in a daemon thread, so that the program can end before the work.

    `discard` is called with the result, in a thread, if nobody waits for it any more.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            value = function()
        except BaseException as error:  # raised in the waiting task
            call_in(loop, _fail, result, error)
            return
        if result.cancelled() or not call_in(loop, _succeed, result, value, discard):
            _discard(value, discard)

    threading.Thread(target=run, name=f"candle-vllm-{name}", daemon=True).start()
    return await result


def run_stoppable(runner: asyncio.Runner, function: Callable[[], T], name: str, discard: Callable[[T], object]) -> T:
    """Run work that reports its progress in a thread, and wait for it in `runner`; other arguments as in `in_thread`.

    Raises KeyboardInterrupt on Ctrl+C, after waiting for the work, which ends at its next report (`_STOPPING`).
    """
    stopped, ended = threading.Event(), threading.Event()

    def hear(_: Progress) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt

    def run() -> T:
        try:
            with heard_by(hear):
                return function()
        finally:
            ended.set()

    try:
        return runner.run(in_thread(run, name, discard))
    except KeyboardInterrupt:
        stopped.set()
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl+C ends the wait
            ended.wait(_STOPPING)
        raise


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> bool:
    """Call a function in an event loop; return False if the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        logger.debug("an event loop was closed before a thread was done")
        return False
    return True


def _succeed(result: asyncio.Future[T], value: T, discard: Callable[[T], object] | None) -> None:
    if not result.done():
        result.set_result(value)
    elif discard is not None:
        threading.Thread(target=_discard, args=(value, discard), daemon=True).start()


def _fail(result: asyncio.Future[T], error: BaseException) -> None:
    if not result.done():
        if isinstance(error, StopIteration):  # a future refuses it
            wrapped = RuntimeError("the work raised StopIteration")
            wrapped.__cause__, error = error, wrapped
        result.set_exception(error)


def _discard(value: T, discard: Callable[[T], object] | None) -> None:
    if discard is not None:
        discard(value)
