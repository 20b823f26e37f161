# SPDX-License-Identifier: MIT
"""BatchStore: files and batches in a store; each belongs to one API key.

A file is an entry whose parts are its content: chunks for an upload, lines for the results of a batch. Its kind is its
state: an `upload` is incomplete, and is deleted if its server dies; `results` of a batch are hidden until the batch has
ended; a `file` is complete and visible.

A batch is an entry whose lease names the server that works on it; any server may take over a batch whose lease has
expired. A cancellation is a part of the entry, so that it overwrites no state that the working server wrote. The lease
of an input file belongs to all batches that read it: each of their servers renews it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from candle_vllm.responses.api.response_store import LazyStore
from candle_vllm.responses.store import entries
from candle_vllm.responses.store.backend import SETTING, Bounds, Held, Order, Place, open_backend
from candle_vllm.server.batches.records import BATCH, BATCH_OUTPUT, Batch, BatchRecord, FileObject

if TYPE_CHECKING:
    from candle_vllm.responses.store.sql import SqlBackend

FILE, UPLOAD, RESULTS, BATCHES = "file", "upload", "results", "batch"  # kinds of entry
ACTIVE = "in_progress"  # status of an entry that a server works on
PIECE = 256 << 10  # bytes of a part of an upload
AT_ONCE = 16  # small parts that are read at once
MANY = 1000  # files that are read at once to find the files of one purpose
UPLOAD_MS = 15 * 60_000  # time limit of an upload
MAX_LINES = 50_000
_CANCEL = "cancel"  # id of the part that cancels a batch
_BATCH_BYTES = 2048  # enough for a batch as JSON without its metadata, and with one error


@dataclass(frozen=True)
class FileOptions:
    """Options of the store of files and batches.

    Attributes:
        url: URL of the store, as in `StoreOptions`.
        max_bytes: maximum bytes of all files; beyond it, the least recently used ones are dropped (see `Bounds`).
        retention_seconds: how long ended batches are stored, and files at most.
    """

    url: str
    max_bytes: int = 256 << 20
    max_file_bytes: int = 100 << 20
    retention_seconds: int = 30 * 86400
    max_entries: int = 10_000


class BatchStore(LazyStore):
    """The store of files and batches; raises the errors of `SqlBackend`. A store in memory is opened on first use.

    `several` returns whether the server has several keys; if so, each may use half of the store.
    """

    def __init__(self, options: FileOptions, several: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.options = options
        self._several = several

    @property
    def share(self) -> int:
        """Maximum bytes of the files of one key."""
        return self.options.max_bytes // 2 if self._several() else self.options.max_bytes

    @property
    def is_open(self) -> bool:
        """Whether the store was opened; before that it is empty."""
        return self._backend is not None

    # ---- files -------------------------------------------------------------------------------------------------------

    async def upload(
        self, owner: str, name: str, pieces: AsyncIterator[bytes], seconds: int | None, purpose: str = BATCH
    ) -> FileObject:
        """Store a file; StoreLimitError if it is too large for the store. `pieces` enforce `max_file_bytes`.

        Args:
            pieces: content, in chunks of at most `PIECE` bytes.
            seconds: how long the file is stored; None, or more than the operator allows, means `retention_seconds`.
        """
        backend, file_id = await self.backend(), new_file_id()
        now = backend.now
        entry = entries.Entry(
            kind=UPLOAD, owner=owner, id=file_id, created=now, status=ACTIVE, lease=now + UPLOAD_MS, holder=file_id
        )
        await backend.put(entry)
        size = 0
        try:
            async for piece in pieces:
                await backend.append(UPLOAD, owner, file_id, [entries.EntryItem(id=str(size), body=piece)])
                size += len(piece)
            life = min(seconds or self.options.retention_seconds, self.options.retention_seconds)
            return await self._show(owner, file_id, now, purpose, name, size, life)
        except BaseException:
            await asyncio.shield(backend.delete(UPLOAD, owner, file_id))
            raise

    async def file(self, owner: str, file_id: str, param: str = "file_id") -> FileObject:
        """Return a file; here and below, NotStoredError is raised if this owner has no such file."""
        found = await (await self.backend()).get(FILE, owner, file_id) if entries.is_id(file_id) else None
        if found is None:
            raise entries.NotStoredError("File", file_id, param)
        return _file(found)

    async def files(
        self, owner: str, limit: int, after: str | None, purpose: str | None, order: Order
    ) -> list[FileObject]:
        """Return at most `limit` files of a purpose (None: of all), following the id `after`."""
        backend = await self.backend()
        made: list[FileObject] = []
        most = limit if purpose is None else MANY
        while True:
            page = await backend.page(FILE, owner, most, after, order)
            if page is None:
                raise entries.NotStoredError("File", after or "", "after")
            made += [_file(entry) for entry in page if purpose is None or entry.about["purpose"] == purpose]
            if len(page) < most or len(made) >= limit:
                return made[:limit]
            after = page[-1].id

    async def contents(self, owner: str, file_id: str, kind: str = FILE) -> AsyncGenerator[entries.EntryItem]:
        """Yield the parts of a file, in their order."""
        backend, after = await self.backend(), None
        count = 1  # a slow reader must hold no more than one large part
        while page := await backend.parts(kind, owner, file_id, count, "asc", after):
            count = min(AT_ONCE, 2 * count) if sum(len(part.body) for part in page) <= PIECE // 2 else 1
            after = page[-1].id
            while page:
                yield page.pop(0)

    async def whole(self, owner: str, file_id: str, most: int, param: str) -> bytes:
        """Return the whole content of a file; StoreLimitError if it has more than `most` bytes."""
        file = await self.file(owner, file_id, param)
        if file.bytes > most:
            raise entries.StoreLimitError(f"{param}: the file has {file.bytes} bytes, and may have {most}", param)
        return b"".join([part.body async for part in self.contents(owner, file_id)])

    async def delete_file(self, owner: str, file_id: str) -> None:
        if not entries.is_id(file_id) or not await (await self.backend()).delete(FILE, owner, file_id):
            raise entries.NotStoredError("File", file_id, "file_id")

    async def _show(
        self, owner: str, file_id: str, created: int, purpose: str, name: str, size: int, seconds: int
    ) -> FileObject:
        """Turn the entry with this id into a visible file; its parts remain."""
        entry = entries.Entry(
            kind=FILE, owner=owner, id=file_id, created=created, status="processed",
            expires=created + 1000 * seconds, about={"purpose": purpose, "filename": name, "bytes": size},
        )  # fmt: skip
        await (await self.backend()).put(entry)
        return _file(entry)

    # ---- results of a batch ------------------------------------------------------------------------------------------

    async def gather(self, owner: str, file_id: str) -> set[int]:
        """Begin or continue a file of results; return the numbers of the lines that have a result there."""
        backend = await self.backend()
        if await backend.get(RESULTS, owner, file_id) is None:
            await backend.put(entries.Entry(kind=RESULTS, owner=owner, id=file_id, created=backend.now, status=ACTIVE))
            return set()
        return {int(part.id) async for part in self.contents(owner, file_id, RESULTS)}

    async def add_results(self, owner: str, file_id: str, results: Sequence[tuple[int, bytes]]) -> None:
        """Add results by their line numbers; lines that already have a result keep it."""
        parts = [entries.EntryItem(id=str(number), body=line) for number, line in results]
        await (await self.backend()).append(RESULTS, owner, file_id, parts, skip_known=True)

    async def show_results(self, owner: str, file_id: str, name: str, seconds: int) -> str | None:
        """Make the file of results visible; return its id, or None without results."""
        backend, size = await self.backend(), 0
        if await backend.get(RESULTS, owner, file_id) is None:  # visible already, or deleted as empty
            return file_id if await backend.get(FILE, owner, file_id) is not None else None
        async for part in self.contents(owner, file_id, RESULTS):
            size += len(part.body)
        if not size:
            await backend.delete(RESULTS, owner, file_id)
            return None
        await self._show(owner, file_id, backend.now, BATCH_OUTPUT, name, size, seconds)
        return file_id

    # ---- batches -----------------------------------------------------------------------------------------------------

    async def add_batch(self, owner: str, record: BatchRecord) -> None:
        """Store a batch; any server may work on it from now on."""
        backend = await self.backend()
        entry = entries.Entry(
            kind=BATCHES, owner=owner, id=record.batch.id, created=backend.now, status=ACTIVE, lease=backend.now,
            body=_body(record),
        )  # fmt: skip
        await backend.put(entry)

    async def batch(self, owner: str, batch_id: str) -> BatchRecord:
        """Return a batch, including a cancellation that its server has not noticed yet."""
        backend = await self.backend()
        found = await backend.get(BATCHES, owner, batch_id) if entries.is_id(batch_id) else None
        if found is None:
            raise entries.NotStoredError("Batch", batch_id, "batch_id")
        record = msgspec.json.decode(found.body, type=BatchRecord)
        if record.batch.status in ("validating", "in_progress"):
            cancelled = await backend.part(BATCHES, owner, batch_id, _CANCEL)
            if cancelled is not None:
                batch = msgspec.structs.replace(record.batch, status="cancelling", cancelling_at=int(cancelled.body))
                return msgspec.structs.replace(record, batch=batch)
        return record

    async def batches(self, owner: str, limit: int, after: str | None) -> list[Batch]:
        """Return at most `limit` batches, newest first, following the id `after`."""
        page = await (await self.backend()).page(BATCHES, owner, limit, after)
        if page is None:
            raise entries.NotStoredError("Batch", after or "", "after")
        found = []
        for entry in page:
            with suppress(entries.NotStoredError):  # it has expired since
                found.append((await self.batch(owner, entry.id)).batch)
        return found

    async def cancel(self, owner: str, batch_id: str) -> None:
        """Mark a batch as cancelled."""
        backend = await self.backend()
        wish = entries.EntryItem(id=_CANCEL, body=b"%d" % (backend.now // 1000))
        await backend.append(BATCHES, owner, batch_id, [wish], skip_known=True)

    async def write(self, owner: str, record: BatchRecord, lease: int | None) -> bool:
        """Write the state of a batch, which has ended if `lease` is None; return False if the batch was deleted."""
        backend, batch = await self.backend(), record.batch
        status, expires = (batch.status, backend.now + 1000 * self.options.retention_seconds) if lease is None else (
            ACTIVE, None)  # fmt: skip
        body = _body(record)
        return await backend.change(BATCHES, owner, batch.id, body, status=status, lease=lease, expires=expires)

    async def protect(self, owner: str, file_id: str, until: int) -> None:
        """Until a time, keep an input file from expiry and eviction, for all batches that read it."""
        await (await self.backend()).claim(FILE, Held(owner, file_id, BATCHES), until)

    async def renew(self, held: Held, until: int) -> bool:
        """Renew the lease of a batch; return False if another server has the batch."""
        return not await (await self.backend()).move([held], until)

    async def lapsed(self, busy_owners: Collection[str]) -> list[entries.Entry]:
        """Return batches that no server works on, skipping owners at their limit; delete uploads whose server died."""
        backend, found = await self.backend(), []
        for entry in await backend.lapsed(busy_owners):
            if entry.kind == BATCHES:
                found.append(entry)
            else:
                await backend.delete(entry.kind, entry.owner, entry.id)
        return sorted(found, key=lambda entry: entry.created)

    async def _open(self) -> SqlBackend:
        if self._closed:
            raise entries.StoreUnavailableError("The store of files is closed: the server is stopping.", SETTING)
        options = self.options
        bounds = Bounds(
            options.max_entries, size=options.max_bytes, entry_size=1 << 20, parts=MAX_LINES + 1,
            parts_size=options.max_bytes, spares_leased=True,
            advice="Delete files, or let the operator raise --files-max-mb.", several=self._several,
        )  # fmt: skip
        return await open_backend(Place(options.url, "batches", "store of files", SETTING), bounds, time.time)


def new_file_id() -> str:
    """Return a random id in the form of OpenAI's file ids."""
    return f"file-{secrets.token_hex(16)}"


def too_large(most: int) -> entries.StoreLimitError:
    """Return the error for a file that is too large."""
    return entries.StoreLimitError(f"The file is larger than {most >> 20} MB (--file-max-mb, --files-max-mb).", "file")


def _body(record: BatchRecord) -> bytes:
    """Return a record as JSON, padded to its size at the end, so that a batch can end although the store is full."""
    return msgspec.json.encode(record).ljust(_BATCH_BYTES + len(msgspec.json.encode(record.batch.metadata)))


def _file(entry: entries.Entry) -> FileObject:
    about = entry.about
    return FileObject(
        id=entry.id, bytes=about["bytes"], created_at=entry.created // 1000, expires_at=(entry.expires or 0) // 1000,
        filename=about["filename"], purpose=about["purpose"],
    )  # fmt: skip
