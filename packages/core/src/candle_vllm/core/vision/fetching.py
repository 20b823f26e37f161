# SPDX-License-Identifier: MIT
"""Load images that a request names by URL, file path or file id (before step 3).

Server and library fetch images from listed hosts, or read them from a folder or from stored files. Each connection
goes to the IP address that was checked, see `targets`; redirects are checked like the first URL. Bytes, time and number
of images are limited before any is parsed. The format of a file is determined from its bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import stat
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.errors import (
    ConfigError,
    EngineOverloadedError,
    InvalidParameterError,
    RequestError,
    UnsupportedParameterError,
)
from candle_vllm.core.targets import ForbiddenTarget, Target, allowed_target, check_pattern, ip_address, resolve
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.core.vision.pictures import LIMITS, from_data_url

if TYPE_CHECKING:
    import ssl

    import httpx

SECONDS = 10.0  # for one image: DNS, every redirect and all bytes
AT_ONCE = 8  # concurrent connections
MAX_REDIRECTS = 3
MAX_REQUEST_BYTES = 64 << 20  # limit of a request's images that are fetched or read
MAX_HELD_BYTES = 512 << 20  # limit of undecoded files of all requests; a single request may exceed it
MAX_PREPARED_BYTES = 1 << 30  # limit of preprocessed images of all requests in the engine; one request may exceed it

_RESOLVING = 4  # concurrent DNS lookups
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "candle-vllm"}


class ImageAddress(NamedTuple):
    """Location of an image.

    Attributes:
        source: its URL, which may be a data URL, or the id of a stored file.
        path: the image's position in the request, for error messages.
        stored: `source` is the id of a stored file.
    """

    source: str
    path: str = "image"
    stored: bool = False


class ImageSources:
    """Sources from which images of requests may be loaded; by default only data URLs are allowed.

    Args:
        domains: hosts from which images are fetched, in the patterns of `targets.check_pattern`: `name` or `*.name` for
            ports 80 and 443, or with a port. A listed IP address may be private or loopback.
        folder: `file://` URLs below this folder are read.
        stored: returns the contents of a stored file by its id and the image's path, for the caller of the current
            request; raises `RequestError` if there is no such file.
        count: called for each web URL if there are `domains`, with "fetched", "failed" or "refused" (not allowed).
        who: returns the client of the current request, who may use half of each limit of all requests (see `_add`);
            empty if clients are not distinguished.

    Raises:
        ConfigError: a domain pattern is invalid, or the folder does not exist.
    """

    def __init__(
        self,
        domains: Sequence[str] = (),
        folder: Path | str | None = None,
        stored: Callable[[str, str], Awaitable[bytes]] | None = None,
        count: Callable[[str], None] = lambda _: None,
        who: Callable[[], str] = lambda: "",
    ) -> None:
        for domain in domains:
            try:
                check_pattern(domain)
            except ValueError as error:
                raise ConfigError(f"allowed_media_domains {error}", "allowed_media_domains") from None
        self._domains = tuple(domains)
        self._folder = None if folder is None else Path(folder).expanduser().resolve()
        if self._folder is not None and not self._folder.is_dir():
            raise ConfigError(f"allowed_local_media_path is no folder: {folder}", "allowed_local_media_path")
        self._stored = stored
        self._count = count
        self._threads = ThreadPoolExecutor(_RESOLVING, "candle-vllm-fetch")
        self._tls: ssl.SSLContext | None = None
        self._who = who
        self._turns = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns]()
        self._held, self._prepared = Counter[str](), Counter[str]()
        self._counting = threading.RLock()  # a finalizer may run at any point

    @classmethod
    def of(cls, config: EngineConfig) -> Self:
        """Return the sources that an engine's settings allow."""
        return cls(config.allowed_media_domains, config.allowed_local_media_path)

    def begin(self, image: ImageAddress) -> bytes | ImageAddress:
        """Return the bytes of a data URL, or the unchanged address of an image that may be loaded.

        Raises InvalidParameterError if the URL is invalid, or may not be loaded.
        """
        if image.stored:
            if self._stored is None:
                said = f"{image.path}: this server stores no files: send the image as a data URL"
                raise UnsupportedParameterError(said, image.path)
            return image
        scheme = image.source[:8].partition(":")[0].lower()
        if scheme == "data":
            return from_data_url(image.source, name=image.path)
        if scheme == "file" and self._folder is not None:
            self._path(image)
            return image
        if scheme in ("http", "https") and self._domains:
            try:
                self._target(image.source, image.path)
            except InvalidParameterError:
                self._count("refused")
                raise
            return image
        setting = "allowed-local-media-path" if scheme == "file" else "allowed-media-domains"
        said = f"{image.path}: images are not fetched from this URL: send the image as a data URL"
        if scheme in ("http", "https", "file"):
            said += f" (the operator can allow it with --{setting}, in the library with {setting.replace('-', '_')})"
        raise UnsupportedParameterError(said, image.path)

    @contextlib.asynccontextmanager
    async def had(self, images: Sequence[bytes | ImageAddress]) -> AsyncIterator[list[bytes]]:
        """Load the bytes of all images of a request, each URL once; count them as held until the context ends.

        The end of the context clears the list, so that an abandoned worker thread keeps no files in memory.

        Raises:
            InvalidParameterError: an image could not be loaded; the message says why.
            EngineOverloadedError: images of other requests exhaust the memory limit.
        """
        wanted = {(image.source, image.stored): image for image in images if isinstance(image, ImageAddress)}
        room, files = _Room(self, self._who()), list[bytes]()
        room.hold(sum(len(image) for image in images if isinstance(image, bytes)))
        jobs = {key: asyncio.ensure_future(self._one(image, room)) for key, image in wanted.items()}
        try:
            await asyncio.gather(*jobs.values())
            files += (
                image if isinstance(image, bytes) else jobs[image.source, image.stored].result() for image in images
            )
            yield files
        finally:
            files.clear()
            for job in jobs.values():
                job.cancel()
            await asyncio.gather(*jobs.values(), return_exceptions=True)
            jobs.clear()  # errors refer to this frame, and would keep the files in memory
            room.leave()

    async def files(self, images: Sequence[ImageAddress]) -> list[bytes]:
        """Return the bytes of images, which are counted only while they load. Errors as `begin` and `had`."""
        async with self.had([self.begin(image) for image in images]) as files:
            return list(files)

    def files_now(self, images: Sequence[ImageAddress]) -> list[bytes]:
        """Run `files` for synchronous callers; this also works within a running event loop."""
        return _waited(self.files(images))

    def count(self, size: int, who: str = "") -> None:
        """Add to the bytes that are held for a client; a negative size releases bytes.

        Raises EngineOverloadedError if the limit would be exceeded.
        """
        with self._counting:
            _add(self._held, who, size, MAX_HELD_BYTES, "image files of requests")

    def keep(self, images: Sequence[ImageInput]) -> None:
        """Count preprocessed images until they are garbage-collected, after their requests end.

        Raises EngineOverloadedError if the preprocessed images in memory exhaust the limit.
        """
        sizes = {id(image): (image, len(image.tiles)) for image in images}
        total = sum(size for _, size in sizes.values())
        with self._counting:
            _add(self._prepared, who := self._who(), total, MAX_PREPARED_BYTES, "the images of other requests")
        for image, size in sizes.values():
            weakref.finalize(image, self._let_go, size, who)

    def _let_go(self, size: int, who: str) -> None:
        with self._counting:
            _add(self._prepared, who, -size, MAX_PREPARED_BYTES, "")

    async def _one(self, image: ImageAddress, room: _Room) -> bytes:
        if image.stored:
            assert self._stored is not None
            data = await self._stored(image.source, image.path)
            room.take(len(data), image.path)
            return data
        if image.source[:5].lower() == "file:":
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, image, room)
        async with self._turns.setdefault(asyncio.get_running_loop(), _Turns()).of(room.who):
            try:
                data = await self._fetch(image, room)
            except RequestError:
                self._count("failed")
                raise
            self._count("fetched")
            return data

    # ---- files -------------------------------------------------------------------------------------------------------

    def _path(self, image: ImageAddress) -> Path:
        """Return the path of a `file://` URL, unresolved."""
        try:
            parts = urlsplit(image.source)
            path = unquote(parts.path, errors="strict")
        except ValueError:
            path, parts = "", urlsplit("")
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not re.match("/(?!/)", path):
            raise InvalidParameterError(
                f"{image.path}: must be file:// followed by the absolute path of a file", image.path
            )
        if "\0" in path or len(path) > 4096:
            raise InvalidParameterError(f"{image.path}: is not a valid path", image.path)
        return Path(path)

    def _read(self, image: ImageAddress, room: _Room) -> bytes:
        """Read a file below the folder, following links; a file elsewhere gives the same error as a missing file."""
        assert self._folder is not None
        try:
            path = self._path(image).resolve(strict=True)
            if not path.is_relative_to(self._folder):
                raise FileNotFoundError
            below = _opened_below(self._folder, path)  # by descriptor, not by path
            with open(path, "rb", opener=lambda *_: below) as file:  # which closes a folder's descriptor too
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode):
                    raise FileNotFoundError
                if about.st_size > LIMITS.max_image_bytes:
                    raise _too_large(image.path, "the file")
                room.take(about.st_size, image.path)
                return file.read(about.st_size)
        except (OSError, RuntimeError):
            said = f"{image.path}: there is no file of this name below the folder whose files this server reads"
            raise InvalidParameterError(said, image.path) from None

    # ---- addresses ---------------------------------------------------------------------------------------------------

    def _target(self, url: str, path: str) -> Target:
        try:
            return self._allowed(url)
        except ForbiddenTarget as error:
            raise InvalidParameterError(f"{path}: the address {error}", path) from None

    def _allowed(self, url: str) -> Target:
        """Check a URL. A private host must be listed by IP address, because a name could later resolve differently."""
        target = allowed_target(url, self._domains, True)
        return dataclasses.replace(target, private=target.private and ip_address(target.host) is not None)

    async def _fetch(self, image: ImageAddress, room: _Room) -> bytes:
        """Fetch an image by URL. Errors name only the URL's host: a query may contain a secret."""
        import httpx

        target, path = self._target(image.source, image.path), image.path
        try:
            async with asyncio.timeout(SECONDS):
                for _ in range(MAX_REDIRECTS + 1):
                    answer = await self._ask(target, path, room)
                    if isinstance(answer, bytes):
                        return answer
                    target = self._next(target, answer, path)
                raise _failed(path, target, f"it was redirected more than {MAX_REDIRECTS} times")
        except TimeoutError:
            raise _failed(path, target, f"it did not arrive within {SECONDS:g} seconds") from None
        except ForbiddenTarget as error:
            raise _failed(path, target, f"it {error}") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise _failed(path, target, f"it could not be reached ({type(error).__name__})") from None

    def _next(self, target: Target, location: str, path: str) -> Target:
        """Return the target of a redirect, checked like the first URL."""
        import httpx

        try:
            url = target.url.join(location)
            if target.url.scheme == "https" and url.scheme != "https":
                raise ForbiddenTarget("was redirected from https to another scheme")
            return self._allowed(str(url))
        except httpx.InvalidURL:
            raise _failed(path, target, "it was redirected to an invalid URL") from None
        except ForbiddenTarget as error:
            raise _failed(path, target, f"it was redirected, and the new address {error}") from None

    async def _ask(self, target: Target, path: str, room: _Room) -> bytes | str:
        """Request a URL; return the body, or the location of a redirect."""
        import httpx

        *others, last = await resolve(target, self._threads)
        for address in others:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await self._ask_at(address, target, path, room)
        return await self._ask_at(last, target, path, room)

    async def _ask_at(self, address: str, target: Target, path: str, room: _Room) -> bytes | str:
        """Request a URL from the IP address that was checked; the host's name is used for `Host` and for TLS."""
        import httpx

        if target.url.scheme == "https" and self._tls is None:
            self._tls = await asyncio.get_running_loop().run_in_executor(self._threads, httpx.create_ssl_context)
        client = httpx.AsyncClient(
            verify=self._tls if self._tls is not None else False,  # HTTP needs no TLS context, which is slow to load
            trust_env=False,  # a proxy would resolve the name again
            follow_redirects=False,
            timeout=httpx.Timeout(SECONDS, connect=SECONDS / 2),  # leaves time for a second address
        )
        headers = {**_HEADERS, "Host": target.url.netloc.decode("ascii")}
        url, extensions = target.url.copy_with(host=address), {"sni_hostname": target.host}
        async with client, client.stream("GET", url, headers=headers, extensions=extensions) as answer:
            if answer.status_code in _REDIRECTS and "location" in answer.headers:
                return answer.headers["location"]
            if answer.status_code != 200:
                raise _failed(path, target, f"it answered {answer.status_code}")
            return await _body(answer, target, path, room)


def _add(counted: Counter[str], who: str, size: int, most: int, what: str) -> None:
    """Count bytes: any number while the sum is 0, else up to `most`, and half of it for a client that has bytes."""
    total = counted.total()
    if size > 0 and total and (total + size > most or (who and counted[who] and counted[who] + size > most // 2)):
        raise EngineOverloadedError(f"{what} take {total >> 20} MB: try again later")
    counted[who] += size
    if not counted[who]:
        del counted[who]


class _Turns:
    """Connection limit of an event loop; one client may use half of the connections."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(AT_ONCE)
        self._by_asker = weakref.WeakValueDictionary[str, asyncio.Semaphore]()

    @contextlib.asynccontextmanager
    async def of(self, who: str) -> AsyncIterator[None]:
        """Wait for a free connection of client `who`."""
        mine = self._by_asker.get(who)
        if mine is None:
            mine = self._by_asker[who] = asyncio.Semaphore(AT_ONCE // 2 if who else AT_ONCE)
        async with mine, self._all:
            yield


class _Room:
    """Bytes of the image files of one request."""

    def __init__(self, sources: ImageSources, who: str) -> None:
        self._sources = sources
        self.who = who
        self._size = self._given = 0
        self._over = False
        self._counting = threading.Lock()

    def take(self, size: int, path: str) -> None:
        with self._counting:
            if self._over:  # a thread was still reading a file when the request ended
                raise InvalidParameterError(f"{path}: the request is over", path)
            if self._size + size > MAX_REQUEST_BYTES:
                said = f"{path}: the images of a request that are fetched may have {MAX_REQUEST_BYTES >> 20} MB in all"
                raise InvalidParameterError(said, path)
            self._sources.count(size, self.who)
            self._size += size

    def hold(self, size: int) -> None:
        """Count files in the request's body, which has a size limit of its own."""
        self._sources.count(size, self.who)
        self._given = size

    def leave(self) -> None:
        with self._counting:
            self._sources.count(-self._size - self._given, self.who)
            self._size, self._given, self._over = 0, 0, True


def _waited(work: Coroutine[Any, Any, list[bytes]]) -> list[bytes]:
    """Run a coroutine in an event loop of another thread, because this thread may run one already.

    KeyboardInterrupt cancels the coroutine.
    """
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def noted() -> list[bytes]:
        task = asyncio.current_task()
        assert task is not None
        loops.append((asyncio.get_running_loop(), task))
        return await work

    with ThreadPoolExecutor(1, "candle-vllm-fetch") as thread:
        done = thread.submit(asyncio.run, noted())
        try:
            return done.result()
        except KeyboardInterrupt:
            for loop, task in loops:
                with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                    loop.call_soon_threadsafe(task.cancel)
            raise


def _opened_below(folder: Path, path: Path) -> int:
    """Open a resolved path folder by folder; raises OSError for a link, which was made after the path was resolved.

    Systems without `dir_fd` open the path at once. O_NONBLOCK: opening a pipe would otherwise wait for a writer.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    if os.open not in os.supports_dir_fd:
        return os.open(path, flags)
    number = os.open(folder, os.O_RDONLY)
    for part in path.relative_to(folder).parts:
        above = number
        try:
            number = os.open(part, flags, dir_fd=above)
        finally:
            os.close(above)
    return number


async def _body(answer: httpx.Response, target: Target, path: str, room: _Room) -> bytes:
    told = answer.headers.get("content-length", "")
    if told.isascii() and told.isdigit() and (len(told) > 15 or int(told) > LIMITS.max_image_bytes):
        raise _too_large(path, target.host)
    if answer.headers.get("content-encoding", "identity").lower() != "identity":
        raise _failed(path, target, "the response is compressed, which was not requested")
    pieces, size = list[bytes](), 0
    async for piece in answer.aiter_raw():
        size += len(piece)
        if size > LIMITS.max_image_bytes:
            raise _too_large(path, target.host)
        room.take(len(piece), path)
        pieces.append(piece)
    return b"".join(pieces)


def _failed(path: str, target: Target, why: str) -> InvalidParameterError:
    return InvalidParameterError(f"{path}: the image could not be fetched from {target.host}: {why}", path)


def _too_large(path: str, where: str) -> InvalidParameterError:
    return InvalidParameterError(
        f"{path}: {where} has more than {LIMITS.max_image_bytes >> 20} MB, the most that an image may have", path
    )
