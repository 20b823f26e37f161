# SPDX-License-Identifier: MIT
"""Downloads of models: their resumable transfer, and the list of downloads that clients follow and stop.

Runs before step 1 of a request's life. Partial files are stored under the checksum of the file, so that an interrupted
or stopped download can be resumed, also by another process. huggingface_hub itself would start the file again.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any, Self

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.errors import CandleVllmError, InvalidFileError, ModelNotFoundError, UnsupportedModelError
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.progress import Progress, heard_by, tell
from candle_vllm.server.loop_threads import call_in, in_thread
from candle_vllm.server.models import downloads
from candle_vllm.server.settings.derived import cache_folder
from candle_vllm.server.settings.model_names import PullError
from candle_vllm.server.settings.table import HubOptions, ModelOptions

logger = logging.getLogger(__name__)

_PIECE = 1 << 20  # bytes that are verified at a time
_PAUSE = 0.2  # seconds between two reports
_MAX_RUNNING = 8  # maximum number of running and waiting downloads
_MAX_ENDED = 16  # maximum number of listed unsuccessful downloads when another begins


# ---- one model, in a thread ------------------------------------------------------------------------------------------


def fetch(settings: ModelOptions, plan: downloads.Plan) -> downloads.Local:
    """Download the missing files, resume partial ones, and verify the weights with the hub's checksums.

    Progress is reported to `candle_vllm.core.progress`.

    Raises:
        PullError: the disk is too small, the download did not finish, or the hub cache's folder is damaged.
        InvalidFileError: a file does not match its checksum; the file is removed.
    """
    here = sum(local.size for local in downloads.downloaded(settings) if local.name == plan.name)
    missing = plan.total - here - sum(_partial_size(path) for path in _partials(settings, plan))
    disk = downloads.room_of(settings, 0).disk
    if missing > disk:
        raise PullError(
            f"{plan.name} takes {missing // downloads.MIB:,} MiB more on the disk, and {disk // downloads.MIB:,} MiB "
            f"are free in {cache_folder(settings)} (--download-dir)",
            "disk_full",
        )
    _fetch_weights(settings, plan)
    try:
        config = EngineConfig(
            model=plan.named.repo,
            weight_file=plan.weight_file,
            revision=settings.revision,
            hf_token=settings.hf_token,
            download_dir=settings.download_dir,
        )
        files = model_files(config)
    except ModelNotFoundError as error:
        raise PullError(str(error), "interrupted") from error
    _verify(plan, files.folder)
    for local in downloads.downloaded(settings):
        if local.name == plan.name:
            return local
    folder = _blobs(settings, plan).parent
    why = downloads.damage(settings, folder) or "the model is not in it"
    raise PullError(f"{plan.name} is here, but its folder is damaged ({why}): remove {folder}", "damaged")


def discard(settings: HubOptions, plan: downloads.Plan) -> None:
    """Remove the partial files of a download."""
    for path in _partials(settings, plan):
        path.unlink(missing_ok=True)


def _fetch_weights(settings: HubOptions, plan: downloads.Plan) -> None:
    """Download the large files into the hub cache, under the names that huggingface_hub expects."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    blobs = _blobs(settings, plan)
    locks = cache_folder(settings) / ".locks" / blobs.parent.name
    summed = [file for file in plan.files if file.sha256 is not None]
    wanted = [file for file in summed if file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE]  # `fetch` gets the rest
    before = 0
    for file in wanted:
        whole, partial = blobs / f"{file.sha256}", _partial(blobs, file)
        for folder in (blobs, locks):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{file.sha256}.lock"):
            if not whole.exists():
                if _partial_size(partial) > file.size:
                    partial.unlink()
                bar = _bar(f"downloading {plan.named.repo}", before, plan.weight_bytes)
                try:
                    with partial.open("ab") as stream:
                        http_get(
                            hf_hub_url(plan.named.repo, file.name, revision=plan.commit or settings.revision),
                            stream,
                            resume_size=stream.tell(),
                            headers=build_hf_headers(token=settings.hf_token),
                            expected_size=file.size,
                            tqdm_class=bar,
                        )
                except (HTTPError, OSError, RuntimeError) as error:
                    raise downloads.refused_by_hub(settings, plan.named.repo, error) or PullError(
                        f"the download of {plan.name} did not finish: {error}; pull it again to resume it",
                        "interrupted",
                    ) from error
                partial.replace(whole)
        before += file.size


def _bar(what: str, before: int, total: int) -> Any:
    """Return a progress bar class that reports all files' progress to `tell`; `before`: bytes of earlier files."""

    class Bar:
        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            self.done = before + initial

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int | float | None = 1) -> None:
            self.done += int(count or 0)
            tell(what, min(self.done, total), total)

    return Bar


def _blobs(settings: HubOptions, plan: downloads.Plan) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache_folder(settings) / repo_folder_name(repo_id=plan.named.repo, repo_type="model") / "blobs"


def _partial(blobs: Path, file: downloads.HubFile) -> Path:
    return blobs / f"{file.sha256}.incomplete"


def _partials(settings: HubOptions, plan: downloads.Plan) -> Iterator[Path]:
    blobs = _blobs(settings, plan)
    return (_partial(blobs, file) for file in plan.files if file.sha256 is not None)


def _partial_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _verify(plan: downloads.Plan, folder: Path) -> None:
    summed = [file for file in plan.files if file.sha256 is not None]
    done, total = 0, sum(file.size for file in summed)
    for file in summed:
        path, found = folder / file.name, hashlib.sha256()
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE):
                found.update(piece)
                done += len(piece)
                tell("verifying sha256 digest", done, total)
        if found.hexdigest() != file.sha256:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise InvalidFileError(
                f"{file.name} of {plan.name} does not match Hugging Face's checksum and was removed: pull it again"
            )


# ---- the pulls of a server -------------------------------------------------------------------------------------------


class PullState(enum.StrEnum):
    """State of a download; a successful download leaves the list."""

    WAITING = "waiting"  # another download is running
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    STOPPING = "stopping"  # stops when the next bytes arrive
    STOPPED = "stopped"
    FAILED = "failed"


ENDED = (PullState.STOPPED, PullState.FAILED)


def failure_code(error: Exception) -> str:
    """Return a code for a failure: `PullError.code`, damaged, unsupported or pull_failed."""
    if isinstance(error, PullError):
        return error.code
    kinds = {InvalidFileError: "damaged", UnsupportedModelError: "unsupported", ModelNotFoundError: "unsupported"}
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), "pull_failed")


class Pull:
    """A running, waiting or unsuccessful download of a model, which the request named as `asked`.

    `room` has the needs of the model and the resources of this machine. `stopped` is whether the task that downloads
    was asked to stop, `has_ended` whether it has ended.
    """

    def __init__(self, plan: downloads.Plan, asked: str, room: downloads.Room) -> None:
        self.plan, self.asked, self.room = plan, asked, room
        self.state = PullState.WAITING
        self.progress: Progress | None = None
        self.error: Exception | None = None
        self.task: asyncio.Task[None] | None = None
        self.stopped = Event()
        self.has_ended = False
        self._followers = set[asyncio.Queue[Progress | None]]()

    async def follow(self) -> AsyncIterator[Progress]:
        """Yield the progress until the download ends; the download continues if nobody follows it.

        Raises the download's error if it failed, and PullError if it was stopped.
        """
        told = asyncio.Queue[Progress | None]()
        self._followers.add(told)
        try:
            if self.progress is not None:
                yield self.progress
            if not self.has_ended:
                while (progress := await told.get()) is not None:
                    yield progress
        finally:
            self._followers.discard(told)
        if self.error is not None:
            raise self.error
        if self.state in ENDED:
            raise PullError(f"{self.plan.name} was not downloaded completely: the download was stopped", "stopped")

    def tell(self, progress: Progress | None) -> None:
        """Report progress to all followers, or None at the end; progress after a stop or a failure is ignored."""
        if progress is not None and self.state in ENDED:
            return
        if progress is not None:
            self.progress = progress
            if self.state is not PullState.STOPPING:
                verifies = progress.what.startswith("verifying")
                self.state = PullState.VERIFYING if verifies else PullState.DOWNLOADING
        else:
            self.has_ended = True
        for told in self._followers:
            told.put_nowait(progress)


class _Stopped(Exception):
    """Raised in the progress callback of a download to stop it."""


class Pulls:
    """The downloads of one server, which run one at a time. Not thread-safe: it belongs to one event loop.

    `settings` say how models are downloaded, and name the device for which `Room` compares sizes. `fetched` is called
    with a successful download and its model.
    """

    def __init__(self, settings: ModelOptions, fetched: Callable[[Pull, downloads.Local], object]) -> None:
        self._settings = settings
        self._fetched = fetched
        self._pulls: dict[str, Pull] = {}
        self._turn = asyncio.Lock()
        self.removing = asyncio.Lock()  # held while models are removed: they may be files of one repository
        self._planned = 0  # number of downloads whose files are being looked up

    @property
    def all(self) -> list[Pull]:
        """Running, waiting and unsuccessful downloads."""
        return list(self._pulls.values())

    @property
    def is_full(self) -> bool:
        return self._planned + sum(pull.state not in ENDED for pull in self._pulls.values()) >= _MAX_RUNNING

    async def begin(self, name: str) -> Pull:
        """Start or resume a download, or return the running download of the same model; raises as `plan_pull`."""
        settings = self._settings

        def look() -> tuple[downloads.Plan, downloads.Room]:
            plan = downloads.plan_pull(settings, name)
            return plan, downloads.room_of(settings, plan.weight_bytes)

        self._planned += 1
        try:
            plan, room = await in_thread(look, "plan-pull")
        finally:
            self._planned -= 1
        running = self._pulls.get(plan.name)
        if running is not None and running.state not in (*ENDED, PullState.STOPPING):
            return running
        pull = Pull(plan, name, room)
        pull.progress = None if running is None else running.progress
        self._pulls.pop(plan.name, None)
        self._pulls[plan.name] = pull
        for old in [each for each in self._pulls.values() if each.state in ENDED][:-_MAX_ENDED]:
            del self._pulls[old.plan.name]
        pull.task = asyncio.create_task(self._work(pull), name="pull")
        pull.task.add_done_callback(lambda _: pull.tell(None))
        return pull

    def find(self, name: str) -> Pull | None:
        """Return the download of a model by the model's name, or by the name in the request."""
        return self._pulls.get(name) or next((pull for pull in self._pulls.values() if pull.asked == name), None)

    async def stop(self, pull: Pull, *, remove: bool) -> None:
        """Stop a download; with `remove`, wait for its end, delete its partial files and drop it from the list."""
        assert pull.task is not None
        if pull.state is PullState.WAITING:
            pull.state = PullState.STOPPED
            pull.task.cancel()
        elif pull.state not in ENDED:
            pull.stopped.set()
            pull.state = PullState.STOPPING
        if not remove:
            return
        await asyncio.wait([pull.task])
        if self._pulls.get(pull.plan.name) is pull and pull.state in ENDED:
            del self._pulls[pull.plan.name]
            await in_thread(lambda: discard(self._settings, pull.plan), "discard")

    async def _work(self, pull: Pull) -> None:
        loop, last, what = asyncio.get_running_loop(), 0.0, ""

        def hear(progress: Progress) -> None:
            nonlocal last, what
            if pull.stopped.is_set():
                raise _Stopped
            now = time.monotonic()
            if now - last >= _PAUSE or progress.done >= progress.total or progress.what != what:
                last, what = now, progress.what
                call_in(loop, pull.tell, progress)

        def work() -> downloads.Local:
            with heard_by(hear):
                return fetch(self._settings, pull.plan)

        try:
            async with self._turn:
                pull.state = PullState.DOWNLOADING
                local = await in_thread(work, "pull")
            self._fetched(pull, local)
        except (_Stopped, asyncio.CancelledError):
            pull.state = PullState.STOPPED
        except Exception as error:
            pull.state, pull.error = PullState.FAILED, error
            if not isinstance(error, CandleVllmError):
                logger.exception("%s could not be fetched", pull.plan.name)
        else:
            if self._pulls.get(pull.plan.name) is pull:
                del self._pulls[pull.plan.name]
