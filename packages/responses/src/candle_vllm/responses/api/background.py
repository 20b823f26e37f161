# SPDX-License-Identifier: MIT
"""Background responses: each runs in a task of this process, and its events are held for clients that reconnect.

The store has a lease of each response, which is renewed while the response runs. If this process dies, the response
fails when its lease expires. If another process cancels or deletes a response, the task here ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from functools import partial

import msgspec

from candle_vllm.core.errors import CandleVllmError, EngineOverloadedError, InvalidParameterError
from candle_vllm.openai import to_error, to_json_bytes
from candle_vllm.responses.api.outliving import Chunks, EncodedEvent, Failure, Work, close
from candle_vllm.responses.api.response_store import ResponseStore
from candle_vllm.responses.api.response_stream import response_code
from candle_vllm.responses.protocol.events import LifecycleEvent, ResponseFailed, StreamEvent
from candle_vllm.responses.protocol.response import Response, ResponseDeleted
from candle_vllm.responses.store import entries as stored
from candle_vllm.responses.store.backend import Upkeep

MAX_RUNNING = 32  # responses at a time
MAX_ENDED = 128  # ended responses whose events are still held
MAX_ENDED_BYTES = 64 << 20  # bytes of the events of ended responses
MAX_BYTES = 8 << 20  # bytes of the held events of one response; older events are dropped
RENEW_SECONDS = 15.0
TOO_LONG = "The response took longer than this server allows."

Name = tuple[str, str]  # owner and id

logger = logging.getLogger(__name__)


class _Run:
    """One running response; `entry` is its stored entry at the beginning."""

    def __init__(self, entry: stored.Entry) -> None:
        self.entry = entry
        self.name: Name = (entry.owner, entry.id)
        self.events = Chunks[EncodedEvent](MAX_BYTES)
        self.latest = entry.body  # the response object, as JSON
        self.ended_elsewhere = False
        self.ending = False  # its end is written to the store, which ends its lease
        self.work: Work[StreamEvent] | None = None  # None until the entry is stored

    async def cancel(self) -> None:
        if self.work is not None:
            await self.work.cancel()


class Background:
    """All responses that run in the background of this process; one owner may have half of `max_running`."""

    def __init__(self, store: ResponseStore, max_running: int = MAX_RUNNING) -> None:
        self._store = store
        self._max_running = max_running
        self._running: dict[Name, _Run] = {}
        self._ended: OrderedDict[Name, Chunks[EncodedEvent]] = OrderedDict()
        self._renewing: Upkeep | None = None
        self._closed = False

    @property
    def busy(self) -> bool:
        return bool(self._running)

    async def begin(
        self, entry: stored.Entry, events: AsyncIterator[StreamEvent], seconds: float
    ) -> AsyncIterator[EncodedEvent]:
        """Store a response as queued, begin to work on it, and return an iterator of its events.

        `entry` is queued and has `background`. A task reads and closes `events`, which are numbered from 0, for
        at most `seconds`. Raises EngineOverloadedError if too many responses are running, or the server is stopping,
        and StoreLimitError or StoreUnavailableError if the response cannot be stored.
        """
        run = _Run(entry)
        try:
            self._check_room(entry.owner)
            self._running[run.name] = run  # reserves its slot while the store is awaited
            await self._store.put(entry)
        except BaseException:
            self._running.pop(run.name, None)
            await close(events)
            raise
        run.work = Work(events, seconds, partial(self._take, run), partial(self._end, run))
        if self._closed:  # since the check above
            await run.cancel()
        elif self._renewing is None:
            self._renewing = Upkeep(RENEW_SECONDS, self._renew, "leases of background responses were not renewed")
        return run.events.read()

    async def stream(self, owner: str, response_id: str, after: int = -1) -> AsyncIterator[EncodedEvent]:
        """Return the events of a background response after number `after`, including future events.

        Raises InvalidParameterError if it is no background response, has no events here, or `Chunks.check` refuses
        `after`. Raises NotStoredError, as `cancel` and `delete` do, if there is no such response.
        """
        entry = await self._store.get(owner, response_id)
        if not entry.about["background"]:
            raise InvalidParameterError(
                "stream is only for responses that were created with background: true", "stream"
            )
        events = self.events(owner, response_id)
        if events is None:
            raise InvalidParameterError(
                f"stream: the events of this response are no longer stored; its status is {entry.status}: retrieve it "
                "without stream",
                "stream",
            )
        events.check(after)
        return events.read(after)

    async def cancel(self, owner: str, response_id: str) -> bytes:
        """End a background response, and return its response object as JSON; an ended response does not change.

        Raises InvalidParameterError if it is no background response.
        """
        if not (await self._store.get(owner, response_id)).about["background"]:
            raise InvalidParameterError(
                "Only responses that were created with background: true can be cancelled; close the connection to "
                "cancel others.",
                "response_id",
            )
        cancelled = await self._store.cancel(owner, response_id)
        if cancelled.status == "cancelled":
            await self.stop(owner, response_id)
        return cancelled.body

    async def delete(self, owner: str, response_id: str) -> ResponseDeleted:
        """Delete a response, in the background or not, and end the task that generates it."""
        await self._store.delete(owner, response_id)
        await self.stop(owner, response_id, forget=True)
        return ResponseDeleted(id=response_id)

    def events(self, owner: str, response_id: str) -> Chunks[EncodedEvent] | None:
        """Return the events of a response that runs here, or that ended here if they are still held; otherwise None."""
        run = self._running.get((owner, response_id))
        return run.events if run is not None else self._ended.get((owner, response_id))

    async def stop(self, owner: str, response_id: str, *, forget: bool = False) -> None:
        """End the task of a response that ended in the store, if the task runs here; `forget` also drops its events."""
        run = self._running.get((owner, response_id))
        if run is not None:
            run.ended_elsewhere = True
            await run.cancel()
        if forget:
            self._ended.pop((owner, response_id), None)

    async def close(self) -> None:
        """End all tasks; the responses that were running fail."""
        self._closed = True
        if self._renewing is not None:
            await self._renewing.close()
        await asyncio.gather(*(run.cancel() for run in list(self._running.values())))
        self._ended.clear()

    def _check_room(self, owner: str) -> None:
        own = sum(1 for name in self._running if name[0] == owner)
        if self._closed:
            raise EngineOverloadedError("The server is stopping.")
        if len(self._running) >= self._max_running or own >= max(1, self._max_running // 2):
            raise EngineOverloadedError(
                f"{own} background responses of this key are running, and {len(self._running)} in all; at most "
                f"{max(1, self._max_running // 2)} of one key and {self._max_running} in all are allowed. Try again "
                "later."
            )

    async def _take(self, run: _Run, event: StreamEvent) -> None:
        """Store the response object of a lifecycle event, and then publish the event."""
        finished = False
        if isinstance(event, LifecycleEvent):
            finished = event.response.status not in stored.ACTIVE
            await self._note(run, event.response, finished)
        data = to_json_bytes(event)
        assert event.sequence_number == run.events.next_number, "events have gap-free numbers"
        run.events.add(EncodedEvent(event.event_name, event.sequence_number, data), len(data), last=finished)

    async def _note(self, run: _Run, response: Response, finished: bool) -> None:
        body = to_json_bytes(response)
        run.ending = finished
        try:
            if await self._store.change(*run.name, response.status, body):
                run.latest = body
                if finished and response.status != "failed":  # a partial answer would spoil the conversation
                    made = {"status": response.status, "body": body}
                    await self._store.add_to_conversation(msgspec.structs.replace(run.entry, **made))
            else:  # cancelled or deleted, maybe by another server
                run.ended_elsewhere = True
                raise asyncio.CancelledError
        except stored.StoreUnavailableError as error:
            if finished:
                raise
            logger.warning("the progress of a response could not be stored: %s", error.__cause__ or error)

    async def _end(self, run: _Run, failure: Failure | None) -> None:
        try:
            if isinstance(failure, asyncio.CancelledError):
                if not run.ended_elsewhere:
                    await self._fail(run, stored.STOPPED)
            elif isinstance(failure, TimeoutError):
                await self._fail(run, TOO_LONG)
            elif failure is not None:
                code = response_code(failure)
                if code == "server_error":
                    logger.error(
                        "the background response %s failed: %s", run.entry.id, failure, exc_info=stored.traced(failure)
                    )
                await self._fail(run, to_error(failure).body.error.message, code)
            elif not run.events.finished:
                await self._fail(run, "The response ended without a result.")
        finally:
            self._leave(run)

    async def _fail(self, run: _Run, message: str, code: str = "server_error") -> None:
        run.ending = True
        body = stored.settled(run.latest, "failed", (code, message))
        try:
            await self._store.change(*run.name, "failed", body)
        except CandleVllmError as error:  # the response fails when its lease expires
            logger.error("the end of a response could not be stored: %s", error.__cause__ or error)
        if not run.events.finished:
            name = str(ResponseFailed.__struct_config__.tag)
            number = run.events.next_number
            data = b'{"type":"%b","sequence_number":%d,"response":%b}' % (name.encode(), number, body)
            run.events.add(EncodedEvent(name, number, data), len(data), last=True)

    def _leave(self, run: _Run) -> None:
        run.events.finish()
        self._running.pop(run.name, None)
        if self._closed or run.ended_elsewhere:
            return
        self._ended[run.name] = run.events
        while len(self._ended) > MAX_ENDED or sum(each.size for each in self._ended.values()) > MAX_ENDED_BYTES:
            self._ended.popitem(last=False)

    async def _renew(self) -> None:
        runs = {name: run for name, run in self._running.items() if run.work is not None and not run.ending}
        if runs:
            ended = await self._store.renew(list(runs))
            await asyncio.gather(*(self.stop(*name) for name in ended if not runs[name].ending))
