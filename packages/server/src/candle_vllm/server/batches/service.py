# SPDX-License-Identifier: MIT
"""Batches: answer the lines of batches beside other requests, with a lower priority, in half of a model's sequences.

Several servers may share a store: the server that has the lease of a batch works on it. A server that stops writes the
results so far and releases the lease; the next server continues after them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial

from starlette.types import ASGIApp

from candle_vllm.core.errors import CandleVllmError, InvalidParameterError
from candle_vllm.core.vision.pictures import LIMITS
from candle_vllm.openai.fair_threads import asker
from candle_vllm.responses.store.backend import MEMORY, Held, Upkeep
from candle_vllm.responses.store.entries import NotStoredError, StoreLimitError, new_id
from candle_vllm.server.batches import records
from candle_vllm.server.batches.lines import Application, asked_here
from candle_vllm.server.batches.run import LEASE_MS, BatchRun
from candle_vllm.server.batches.store import BATCHES, BatchStore, FileOptions, new_file_id
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.failures import RETRY_SECONDS
from candle_vllm.server.http.keys import are_several
from candle_vllm.server.http.routing import Caller, caller_of, current_request

RENEW_SECONDS = 5.0  # pause between renewals of leases, and between searches for lapsed batches and cancellations
AT_ONCE = 4  # batches on which one server works at a time
UPLOADS_OF_A_KEY = 8  # at the same time
FORM_OVERHEAD = 64 << 10  # bytes of a form besides its file

logger = logging.getLogger(__name__)


class Batches:
    """The batches of one application.

    Args:
        callers: returns the callers of all valid API keys; only `NOBODY` if clients need no key.
        longest: maximum bytes of a line.
        places: returns a model's maximum number of running sequences, half of which lines of batches may use; 0 while
            no model can answer.
    """

    def __init__(
        self,
        options: FileOptions,
        callers: Callable[[], Iterable[Caller]],
        longest: int,
        places: Callable[[], int],
        app: ASGIApp,
    ) -> None:
        self.store = BatchStore(options, self._several)
        self._callers = callers
        self._longest = longest
        self._count_places = places
        self._places: asyncio.Semaphore | None = None  # slots for the lines of all batches
        self._places_of = dict[str, asyncio.Semaphore]()  # slots by owner, used if there are several keys
        self._app = app
        self._name = secrets.token_hex(8)
        self._width = 1
        self._running: dict[str, BatchRun] = {}
        self._looking = asyncio.Lock()
        self._uploads: dict[str, dict[object, int]] = {}  # received bytes, by owner and upload
        self._uploaded = 0  # their sum
        self._upkeep: Upkeep | None = None
        self._closing = contextlib.AsyncExitStack()
        self._application: Application | None = None

    async def start(self) -> None:
        """Open a store that is not in memory, and continue the batches of an earlier server."""
        if self.store.options.url != MEMORY:
            await self.store.backend()
        self._upkeep = Upkeep(RENEW_SECONDS, self._look, "waiting batches could not be read", at_once=True)

    async def close(self) -> None:
        """Release the running batches, and close the store."""
        if self._upkeep is not None:
            await self._upkeep.close()
        runs = [run.task for run in self._running.values() if run.task is not None]
        for task in runs:
            task.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        await self._closing.aclose()
        await self.store.close()

    async def create(self, owner: str, wire: records.BatchRequest) -> records.Batch:
        """Create a batch; NotStoredError without its input file, InvalidParameterError for a file of images."""
        given = await self.store.file(owner, wire.input_file_id, "input_file_id")
        if given.purpose in records.SEEN:
            said = f"input_file_id: the file was stored for {given.purpose}; a batch needs one for {records.BATCH}"
            raise InvalidParameterError(said, "input_file_id")
        now = (await self.store.backend()).now // 1000
        batch = records.Batch(
            id=new_id("batch"), endpoint=wire.endpoint, input_file_id=wire.input_file_id, created_at=now,
            expires_at=now + records.COMPLETION_SECONDS, metadata=wire.metadata,
        )  # fmt: skip
        after, most = wire.output_expires_after, self.store.options.retention_seconds
        seconds = min(after.seconds, most) if after is not None else most
        record = records.BatchRecord(
            batch=batch, output_id=new_file_id(), error_id=new_file_id(), result_seconds=seconds
        )
        await self.store.add_batch(owner, record)
        with contextlib.suppress(CandleVllmError):  # a client that got an error would create the batch again
            await self._look()
        return batch

    async def cancel(self, owner: str, batch_id: str) -> records.Batch:
        """Cancel a batch, which ends soon and keeps its results so far; HttpError 409 if it has ended already."""
        batch = (await self.store.batch(owner, batch_id)).batch
        if batch.status not in records.WORKING:
            raise HttpError(409, f"The batch has ended already: it is {batch.status}.", "batch_ended", param="batch_id")
        await self.store.cancel(owner, batch_id)
        if (run := self._running.get(batch_id)) is not None:
            run.cancelled.set()
        return (await self.store.batch(owner, batch_id)).batch

    @contextlib.contextmanager
    def upload(self, owner: str) -> Iterator[Callable[[int], None]]:
        """Register an upload until it is stored; yields a function that counts its received bytes.

        Raises HttpError, also when counting: 429 if a key's uploads are too many or too large, 503 if all together are.
        """
        own, upload = self._uploads.setdefault(owner, {}), object()
        if len(own) >= UPLOADS_OF_A_KEY:
            raise _too_much(429, f"{UPLOADS_OF_A_KEY} uploads of one key may be under way at a time")
        own[upload] = 0

        def count(size: int) -> None:
            if sum(own.values()) + size > (share := self.store.share) + FORM_OVERHEAD:
                raise _too_much(429, f"the unfinished uploads of one key may have {share >> 20} MB in total")
            if self._uploaded + size > (most := self.store.options.max_bytes) + FORM_OVERHEAD:
                raise _too_much(503, f"all unfinished uploads may have {most >> 20} MB in total (--files-max-mb)")
            own[upload] += size
            self._uploaded += size

        try:
            yield count
        finally:
            self._uploaded -= own.pop(upload)
            if not own:
                del self._uploads[owner]

    def _several(self) -> bool:
        return are_several(self._callers())

    async def _look(self) -> None:
        """Start batches that no server works on; with several keys, one owner has at most half of `AT_ONCE`."""
        if not self.store.is_open or not self._count_places():
            return
        most = AT_ONCE // 2 if self._several() else AT_ONCE
        backend = await self.store.backend()
        await backend.expire()
        busy, known = set[str](), -1
        async with self._looking:
            while known < len(busy):  # look again without owners that have enough, to find further owners
                known = len(busy)
                for entry in await self.store.lapsed(busy):
                    if len(self._running) >= AT_ONCE:
                        return
                    if sum(run.held.owner == entry.owner for run in self._running.values()) >= most:
                        busy.add(entry.owner)
                    elif entry.id not in self._running:
                        held = Held(entry.owner, entry.id, self._name)
                        with contextlib.suppress(NotStoredError):
                            if await backend.claim(BATCHES, held, backend.now + LEASE_MS):
                                self._begin(held)

    @contextlib.asynccontextmanager
    async def _place(self, owner: str) -> AsyncIterator[None]:
        """Occupy a slot for a line; with several keys, one owner has at most half of the slots."""
        assert self._places is not None
        half = self._places_of.setdefault(owner, asyncio.Semaphore(max(1, self._width // 2)))
        async with half if self._several() else contextlib.nullcontext(), self._places:
            yield

    def _begin(self, held: Held) -> None:
        run = BatchRun(self.store, held, self._longest, RENEW_SECONDS, lambda: self._count_places() > 0)
        self._running[held.id] = run
        run.task = asyncio.create_task(self._work(run))

    async def _work(self, run: BatchRun) -> None:
        again = False
        try:
            backend = await self.store.backend()
            caller = next((each for each in self._callers() if backend.owner(each.key) == run.held.owner), None)
            asker.set("" if caller is None else caller.label)  # the task may have been started by another key's request
            if self._application is None:
                self._application = await self._closing.enter_async_context(asked_here(self._app))
            if self._places is None or len(self._running) == 1:  # no line has a slot: other models may be loaded now
                self._places_of.clear()
                self._width = max(1, self._count_places() // 2)
                self._places = asyncio.Semaphore(self._width)
            await run.work(self._application, caller, partial(self._place, run.held.owner), self._width)
            again = True
        except asyncio.CancelledError:
            await run.give_back()
            raise
        except CandleVllmError as error:
            logger.warning("the batch %s stopped, and is continued later: %s", run.held.id, error.__cause__ or error)
            await run.give_back()
        except Exception:
            logger.exception("the batch %s failed", run.held.id)
            await run.fail_for_good()
        finally:
            del self._running[run.held.id]
        if again:
            with contextlib.suppress(CandleVllmError):
                await self._look()


def _too_much(status: int, said: str) -> HttpError:
    headers = {"retry-after": RETRY_SECONDS, "connection": "close"}  # the rest of the body is not read
    return HttpError(status, f"Too much at once: {said}. Try again later.", "uploads_limit", headers)


async def stored_image(file_id: str, path: str) -> bytes:
    """Return the content of a file of the current request's caller; `path` is the request field that names it.

    Raises InvalidParameterError if the file does not exist or is too large, or the server stores no files.
    """
    context = current_request.get()
    app = None if context is None else context.scope.get("app")
    batches: Batches | None = None if app is None else app.state.batches
    if context is None or batches is None:
        said = f"{path}: this server stores no files: it was started with --responses-store off"
        raise InvalidParameterError(said, path)
    try:
        owner = await batches.store.owner(caller_of(context.scope).key)
        return await batches.store.whole(owner, file_id, LIMITS.max_image_bytes, path)
    except (NotStoredError, StoreLimitError) as error:
        raise InvalidParameterError(f"{path}: {error}", path) from None
