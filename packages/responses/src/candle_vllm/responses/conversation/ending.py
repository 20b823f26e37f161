"""Ending a task for good: cancelled, and waited for, also when the one who waits is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import logging

logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds
AGAIN = 2.0  # seconds after which a task that swallowed its cancelling is cancelled again


async def end_task(task: asyncio.Task[object], patience: float = PATIENCE, again: float = AGAIN) -> None:
    """Cancels a task and returns when it has ended; its error, if any, is left in it.

    One that goes on is cancelled every `again` seconds. A task that does not end within `patience` seconds is left
    behind, with a line in the log.
    """
    now = asyncio.get_running_loop().time
    deadline = now() + patience
    next_time = now()
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        if now() >= deadline:
            logger.error("%s did not end within %g seconds after it was cancelled", task.get_name(), patience)
            break
        if now() >= next_time:
            task.cancel()
            next_time = now() + again
        try:
            await asyncio.wait([task], timeout=min(deadline, next_time) - now())
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
