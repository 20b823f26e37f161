# SPDX-License-Identifier: MIT
"""BatchRun: the work on one batch, from the check of its input to the files of its results."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import msgspec

from candle_vllm.core.errors import CandleVllmError, EngineDeadError
from candle_vllm.openai.fair_threads import apart
from candle_vllm.responses.store.backend import Held
from candle_vllm.responses.store.entries import NotStoredError, StoreFullError, StoreLimitError, StoreUnavailableError
from candle_vllm.server.batches.lines import Application, InvalidKeyError, LineError, Result, failed, read_line
from candle_vllm.server.batches.records import WORKING, BatchError, BatchErrors, BatchRecord
from candle_vllm.server.batches.store import MAX_LINES, BatchStore
from candle_vllm.server.http.routing import Caller

LEASE_MS = 30_000  # milliseconds
FLUSH_SECONDS = 1.0  # minimum seconds between two writes of results
FULL_PAUSES = (1, 2, 4, 8, 16, 32, 64)  # seconds before each further attempt at a full or unavailable store
MAX_ERRORS = 20  # maximum number of errors of an input file that are reported
CANCELLED = ("batch_cancelled", "This request was not answered: the batch was cancelled.")
EXPIRED = ("batch_expired", "This request was not answered before the batch expired.")

T = TypeVar("T")
Places = Callable[[], contextlib.AbstractAsyncContextManager[None]]

logger = logging.getLogger(__name__)


class BatchRun:
    """The work on one batch.

    Args:
        held: the batch, whose lease this server has.
        longest: maximum bytes of a line.
        pause: seconds between renewals of the lease, and between checks whether the batch was cancelled.
        able: returns whether the server can answer lines.

    Attributes:
        cancelled: set when somebody cancels the batch.
        lost: whether another server has taken over the batch.
    """

    def __init__(self, store: BatchStore, held: Held, longest: int, pause: float, able: Callable[[], bool]) -> None:
        self.held = held
        self.cancelled = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.lost = False
        self._store = store
        self._longest = longest
        self._pause = pause
        self._able = able
        self._unwritten: list[tuple[int, Result]] = []
        self._record: BatchRecord | None = None

    @property
    def record(self) -> BatchRecord:
        """The batch in its current state."""
        assert self._record is not None
        return self._record

    async def work(self, application: Application, caller: Caller | None, places: Places, width: int) -> None:
        """Check the input, answer its lines and create the files of results.

        Args:
            caller: who created the batch; None if this caller has no valid key any more.
            places: context manager that waits for a free slot for a line, and occupies it.
            width: maximum number of lines in progress at a time.
        """
        owner, backend = self.held.owner, await self._store.backend()
        self._record = await self._store.batch(owner, self.held.id)
        batch = self.record.batch
        if batch.cancelling_at is not None:
            self.cancelled.set()
        renewing = asyncio.create_task(self._renew_lease())
        try:
            if batch.errors is not None or batch.finalizing_at is not None:  # a server was stopped in `_end`
                await self._end()
                return
            try:
                if caller is None:
                    raise InvalidKeyError
                await self._store.protect(owner, batch.input_file_id, backend.now + LEASE_MS)
                if batch.status == "validating" and not await self._validate():
                    return
                await self._answer(application, caller, places, width)
                await self._end()
            except InvalidKeyError:
                message = "The batch's API key is not valid any more."
                await self._fail([BatchError(code="invalid_api_key", message=message)])
            except NotStoredError:
                if (await self._store.batch(owner, self.held.id)).batch.cancelling_at is not None:
                    self.cancelled.set()  # another server may have cancelled it just now
                message = "The input file no longer exists."
                gone = BatchError(code="input_file_gone", message=message, param="input_file_id")
                await self._fail([] if self.cancelled.is_set() else [gone])
            except (LineError, StoreLimitError) as error:  # an earlier server allowed longer lines
                code = error.code if isinstance(error, LineError) else "store_limit"
                await self._fail([BatchError(code=code, message=str(error))])
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    async def give_back(self) -> None:
        """Write the results so far, and release the lease, so that another server can continue."""
        if self.lost:
            return
        try:
            await self._flush()
            await self._store.renew(self.held, (await self._store.backend()).now)
        except (CandleVllmError, AssertionError) as error:
            logger.warning("the batch %s could not be released: %s", self.held.id, error)

    async def fail_for_good(self) -> None:
        """End the batch as failed after an unexpected exception, because another attempt would raise it again."""
        with contextlib.suppress(CandleVllmError, AssertionError):
            await self._fail([BatchError(code="server_error", message="The server failed; its log has the reason.")])

    async def _renew_lease(self) -> None:
        """Renew the lease, and watch for a cancellation; cancel the work if another server has taken over the batch."""
        while True:
            await asyncio.sleep(self._pause)
            with contextlib.suppress(StoreUnavailableError):
                until = (await self._store.backend()).now + LEASE_MS
                with contextlib.suppress(NotStoredError):  # if the input is gone, reading it fails
                    await self._store.protect(self.held.owner, self.record.batch.input_file_id, until)
                if not await self._store.renew(self.held, until) and self.task is not None:
                    self.lost = True
                    self.task.cancel()
                if (await self._store.batch(self.held.owner, self.held.id)).batch.cancelling_at is not None:
                    self.cancelled.set()

    # ---- the input ---------------------------------------------------------------------------------------------------

    async def _lines(self) -> AsyncGenerator[list[tuple[int, bytes]]]:
        """Yield lists of the input's lines with their numbers, from 1, without empty lines.

        Raises NotStoredError if the input file does not exist any more, and LineError for a line that is too long.
        """
        owner, number, rest = self.held.owner, 0, b""
        file = await self._store.file(owner, self.record.batch.input_file_id)
        async for part in self._store.contents(owner, file.id):
            # In a thread that API keys share in turns: a part of nothing but newlines takes long to split.
            size = len(rest) + len(part.body)
            *lines, rest = await apart((rest + part.body).split, b"\n", size=size)
            if len(rest) > self._longest:
                raise LineError(
                    f"Line {number + len(lines) + 1} has more than {self._longest >> 20} MB.", "line_too_long"
                )
            yield [(number + at, line) for at, line in enumerate(lines, 1) if line.strip()]
            number += len(lines)
        if rest.strip():
            yield [(number + 1, rest)]

    async def _validate(self) -> bool:
        """Return whether the input is valid; a batch with invalid input fails."""
        errors: list[BatchError] = []
        names: set[str] = set()
        total = 0
        try:
            async for lines in self._lines():
                total += len(lines)
                await apart(self._check, lines, names, errors, size=sum(len(line) for _, line in lines))
                if len(errors) >= MAX_ERRORS or total > MAX_LINES:
                    break
        except LineError as error:
            errors.append(BatchError(code=error.code, message=str(error)))
        if total > MAX_LINES:
            errors = [BatchError(code="too_many_requests", message=f"A batch has at most {MAX_LINES} lines.")]
        elif not total and not errors:
            errors = [BatchError(code="empty_file", message="The input file has no lines.", param="input_file_id")]
        if errors:
            await self._fail(errors[:MAX_ERRORS])
            return False
        await self._change(status="in_progress", in_progress_at=await self._now(), total=total)
        return True

    def _check(self, lines: list[tuple[int, bytes]], names: set[str], errors: list[BatchError]) -> None:
        for number, data in lines:
            try:
                name = read_line(data, self.record.batch.endpoint).custom_id
            except LineError as error:
                errors.append(BatchError(code=error.code, message=str(error), line=number))
                continue
            if name in names:
                message = f"The custom_id {name!r:.80} appears on an earlier line as well."
                errors.append(BatchError(code="duplicate_custom_id", message=message, line=number, param="custom_id"))
            names.add(name)

    # ---- the answers -------------------------------------------------------------------------------------------------

    async def _answer(self, application: Application, caller: Caller, places: Places, width: int) -> None:
        owner, record = self.held.owner, self.record
        done = await self._patiently(partial(self._store.gather, owner, record.output_id))
        wrong = await self._patiently(partial(self._store.gather, owner, record.error_id))
        await self._change(completed=len(done), failed=len(wrong))
        done |= wrong
        working: dict[asyncio.Task[Result], int] = {}
        loop = asyncio.get_running_loop()
        flushed = loop.time()
        stopped: tuple[str, str] | None = None

        async def take(timeout: float | None) -> None:
            nonlocal flushed
            ready, _ = await asyncio.wait(working, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            self._unwritten += [(working.pop(task), task.result()) for task in ready]
            if loop.time() - flushed >= FLUSH_SECONDS:
                await self._patiently(self._flush)
                flushed = loop.time()

        try:
            async for lines in self._lines():
                for number, data in lines:
                    if number in done:
                        continue
                    stopped = stopped or await self._stopped()
                    if stopped is not None:
                        if working:  # a cancelled line fails at once, an expired one before it would be sent again
                            await asyncio.wait(working)
                        self._unwritten += [(number, task.result()) for task, number in working.items()]
                        working.clear()
                        line = await application.read(data)
                        self._unwritten.append((number, failed(line.custom_id, *stopped)))
                        continue
                    working[loop.create_task(self._one(application, places, caller, data))] = number
                    while len(working) >= width:
                        await take(FLUSH_SECONDS)
                if stopped is not None:
                    await self._patiently(self._flush)
            while working:
                await take(FLUSH_SECONDS)
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
        await self._patiently(self._flush)

    async def _one(self, application: Application, places: Places, caller: Caller, data: bytes) -> Result:
        """Return the result of a line, or a failure if the batch is cancelled first."""

        async def placed() -> Result:
            async with places():
                endpoint = self.record.batch.endpoint
                return await application.answer(data, caller=caller, endpoint=endpoint, stopped=self._stopped)

        answer = asyncio.ensure_future(placed())
        wish = asyncio.ensure_future(self.cancelled.wait())
        try:
            await asyncio.wait({answer, wish}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            return failed((await application.read(data)).custom_id, *CANCELLED)
        finally:
            wish.cancel()
            answer.cancel()
            await asyncio.gather(wish, answer, return_exceptions=True)

    async def _stopped(self) -> tuple[str, str] | None:
        """Return why no further line is answered, as code and message; EngineDeadError if no model can answer here."""
        if self.cancelled.is_set():
            return CANCELLED
        if not self._able():
            raise EngineDeadError("no model of this server can answer")
        return EXPIRED if await self._now() >= self.record.batch.expires_at else None

    async def _flush(self) -> None:
        """Write the results that are not written yet, and their counts; after a failure it may be called again."""
        if not self._unwritten:
            return
        results = self._unwritten.copy()
        good = [(number, result.line) for number, result in results if result.error is None]
        wrong = [(number, result.line) for number, result in results if result.error is not None]
        owner, record, counts = self.held.owner, self.record, self.record.batch.request_counts
        for file_id, some in ((record.output_id, good), (record.error_id, wrong)):
            if some:
                await self._store.add_results(owner, file_id, some)
        await self._change(completed=counts.completed + len(good), failed=counts.failed + len(wrong))
        del self._unwritten[: len(results)]

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Repeat `work` after each of `FULL_PAUSES` while the store is full (entries may expire) or unavailable."""
        for pause in FULL_PAUSES:
            with contextlib.suppress(StoreFullError, StoreUnavailableError):
                return await work()
            await asyncio.sleep(pause)
        return await work()

    # ---- the state of the batch --------------------------------------------------------------------------------------

    async def _end(self) -> None:
        """Create the files of results, and write the final status; repeated if the server stops in between."""
        owner, record, cancelled = self.held.owner, self.record, self.cancelled.is_set()
        failed = record.batch.errors is not None
        if not failed and record.batch.finalizing_at is None:  # before the results are visible
            status: dict[str, Any] = {} if cancelled else {"status": "finalizing"}
            await self._change(finalizing_at=await self._now(), **status)
        shown = []
        for file_id, name in ((record.output_id, "output"), (record.error_id, "error")):
            file = f"{record.batch.id}_{name}.jsonl"
            shown.append(await self._store.show_results(owner, file_id, file, record.result_seconds))
        now = await self._now()
        how: dict[str, Any] = {"status": "completed", "completed_at": now}
        if failed:
            how = {"status": "failed", "failed_at": now}
        elif cancelled:
            how = {"status": "cancelled", "cancelled_at": now}
            how["cancelling_at"] = (await self._store.batch(owner, record.batch.id)).batch.cancelling_at or now
        elif (self.record.batch.finalizing_at or now) >= record.batch.expires_at:
            how = {"status": "expired", "expired_at": now}
        await self._change(output_file_id=shown[0], error_file_id=shown[1], **how)

    async def _fail(self, errors: list[BatchError]) -> None:
        """End the batch, with its results so far; as failed, if there are errors."""
        with contextlib.suppress(CandleVllmError):  # a store without space may be why it fails
            await self._flush()
        await self._change(errors=BatchErrors(data=errors) if errors else None)  # so no server answers more lines
        await self._end()

    async def _change(
        self, total: int | None = None, completed: int | None = None, failed: int | None = None, **fields: Any
    ) -> None:
        """Write the batch with changed fields; a batch that has ended releases its lease."""
        batch, now = self.record.batch, (await self._store.backend()).now
        given = {"total": total, "completed": completed, "failed": failed}
        counts = {name: value for name, value in given.items() if value is not None}
        fields["request_counts"] = msgspec.structs.replace(batch.request_counts, **counts)
        record = msgspec.structs.replace(self.record, batch=msgspec.structs.replace(batch, **fields))
        lease = now + LEASE_MS if record.batch.status in WORKING else None
        await self._store.write(self.held.owner, record, lease)
        self._record = record

    async def _now(self) -> int:
        return (await self._store.backend()).now // 1000
