"""BackgroundRun: one response at work without its client."""

from __future__ import annotations

import asyncio

from candle_vllm.responses.api.event_buffer import EventBuffer
from candle_vllm.responses.store.entries import Entry

Name = tuple[str, str]  # owner and id


class BackgroundRun:
    """One response at work.

    Attributes:
        entry: as it was when it began.
        events: those that there have been.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.events = EventBuffer()
        self.latest = entry.body  # the response object, as JSON
        self.ended_elsewhere = False
        self.task: asyncio.Task[None] | None = None
        self.started = asyncio.Event()  # a task that is cancelled before it has begun would clean nothing up

    @property
    def name(self) -> Name:
        """By which it is found."""
        return self.entry.owner, self.entry.id

    async def stop(self) -> None:
        """Ends the work for what was cancelled or deleted; returns when it has ended."""
        self.ended_elsewhere = True
        await self.cancel()

    async def cancel(self) -> None:
        """Ends the work; returns when it has ended."""
        if self.task is not None:
            await self.started.wait()
            self.task.cancel()
            await asyncio.wait({self.task})
