"""Ending a task for good: cancelled, and waited for, also when the one who waits is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import logging

logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds


async def end_task(task: asyncio.Task[object], patience: float = PATIENCE) -> None:
    """Cancels a task and returns when it has ended; its error, if any, is left in it.

    A task that does not end within `patience` seconds is left behind, with a line in the log.
    """
    task.cancel()
    deadline = asyncio.get_running_loop().time() + patience
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            logger.error("%s did not end within %g seconds after it was cancelled", task.get_name(), patience)
            break
        try:
            await asyncio.wait([task], timeout=left)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
