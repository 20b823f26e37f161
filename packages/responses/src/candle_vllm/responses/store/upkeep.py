# SPDX-License-Identifier: MIT
"""Upkeep: what is done again and again while a store is open, its purging and the renewing of leases."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context

from candle_vllm.core.errors import CandleVllmError

logger = logging.getLogger(__name__)


class Upkeep:
    """Work that is done every so often, whatever becomes of it once: the next time may be better.

    Args:
        seconds: from the end of one time to the next.
        work: what is done.
        failure: what the log says where it failed.
        at_once: it begins with the first time, and not with a wait.
    """

    def __init__(
        self, seconds: float, work: Callable[[], Awaitable[object]], failure: str, *, at_once: bool = False
    ) -> None:
        repeated = _repeat(seconds, work, failure, 0.0 if at_once else seconds)
        self._task = asyncio.create_task(repeated, context=Context())  # it is not the request's that opened the store

    async def close(self) -> None:
        """Ends it, also in the middle."""
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
