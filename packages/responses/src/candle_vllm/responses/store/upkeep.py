# SPDX-License-Identifier: MIT
"""Upkeep: periodic work while a store is open, such as deleting expired entries and renewing leases."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context

from candle_vllm.core.errors import CandleVllmError

logger = logging.getLogger(__name__)


class Upkeep:
    """Repeats `work` until it is closed; a failure is logged, and the work is tried again next time.

    Args:
        seconds: time from the end of one run to the next.
        failure: log message for a failed run.
        at_once: whether the first run begins at once; otherwise it begins after `seconds`.
    """

    def __init__(
        self, seconds: float, work: Callable[[], Awaitable[object]], failure: str, *, at_once: bool = False
    ) -> None:
        repeated = _repeat(seconds, work, failure, 0.0 if at_once else seconds)
        self._task = asyncio.create_task(repeated, context=Context())  # not in the opening request's context

    async def close(self) -> None:
        """End the work, even during a run."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def _repeat(seconds: float, work: Callable[[], Awaitable[object]], failure: str, wait: float) -> None:
    while True:
        await asyncio.sleep(wait)
        try:
            await work()
        except CandleVllmError as error:
            logger.warning("%s: %s", failure, error.__cause__ or error)
        except Exception:
            logger.exception(failure)
        wait = seconds
