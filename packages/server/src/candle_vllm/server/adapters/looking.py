# SPDX-License-Identifier: MIT
"""Looks up adapters in the sources, in their order; requests for the same name share a lookup.

Before step 1 of a request's life. A lookup only finds out whether a source has a name. Each source limits its own
lookups and fetches, so that local folders and cached adapters never wait for a download. A name that a remote source
does not have, refuses or cannot deliver is remembered for a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from candle_vllm.server.adapters.sources import AdapterName, Found, Refused, Source, Unavailable
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.loop_threads import in_thread

logger = logging.getLogger(__name__)

_MAX_MISSING = 4096  # maximum number of remembered names of each source
_MISSING_SECONDS = 60.0  # also for a refused adapter
_FAULT_SECONDS = 5.0  # pause before an unreachable source is asked again for the same name
_LOOKING = 16  # simultaneous lookups in one source
_FETCHING = 4  # simultaneous fetches from one source
_MAX_LOOKING = 256  # lookups of one source, including waiting ones
_LISTED_SECONDS = 10.0


class _Crowded(Exception):
    """Too many lookups are waiting for a source."""


class _Place:
    """A source, its running lookups, and the names that it recently did not have, refused or could not deliver."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.looks, self.fetches = asyncio.Semaphore(_LOOKING), asyncio.Semaphore(_FETCHING)
        self.inside = 0
        self.missing: OrderedDict[AdapterName, tuple[float, Refused | Unavailable | None]] = OrderedDict()

    async def find(self, read: AdapterName) -> Found | None:
        """Look an adapter up, and fetch it if it is not on this machine."""
        kind = self.source.kind
        if self.inside >= _MAX_LOOKING:
            raise _Crowded
        self.inside += 1
        try:
            async with self.looks:
                found = await in_thread(lambda: self.source.find(read), f"adapter-{kind}")
            if found is None or isinstance(found, Found):
                return found
            async with self.fetches:
                return await in_thread(found, f"adapter-{kind}")
        except OSError as failure:
            raise Unavailable(str(failure)) from None
        finally:
            self.inside -= 1


class Lookout:
    """The sources of one server, searched in their order. Not thread-safe: belongs to one event loop.

    `looked` is called with the source's kind and the outcome after each lookup in a source.
    """

    def __init__(self, sources: Sequence[Source], looked: Callable[[str, str], object]) -> None:
        self.sources = tuple(sources)
        self._places = [_Place(source) for source in sources]
        self._looked = looked
        self._looks: dict[AdapterName, asyncio.Task[tuple[Source, Found] | None]] = {}
        self._listing: asyncio.Task[tuple[str, ...]] | None = None
        self._listed_at = -_LISTED_SECONDS
        self.names: tuple[str, ...] = ()  # names that the sources listed at the last `refresh`

    async def find(self, read: AdapterName) -> tuple[Source, Found] | None:
        """Return the adapter and the first source that has it; a cancelled caller does not cancel the shared search.

        Raises HttpError 400 if the adapter is refused, and 503 if a source is unavailable or has too many lookups.
        """
        look = self._looks.get(read)
        if look is None:
            look = self._looks[read] = asyncio.create_task(self._find(read), name="adapter")
            look.add_done_callback(lambda task: self._ended(read, task))
        return await asyncio.shield(look)

    def _ended(self, read: AdapterName, look: asyncio.Task[tuple[Source, Found] | None]) -> None:
        del self._looks[read]
        if not look.cancelled():
            look.exception()  # the callers have received it; this avoids asyncio's warning

    async def _find(self, read: AdapterName) -> tuple[Source, Found] | None:
        fault, crowded = False, False
        for place in self._places:
            source = place.source
            try:
                found = await self._ask(place, read)
            except Refused as error:
                logger.info("the adapter %s of %s is refused: %s", read, source.kind, error)
                message = f"The adapter {str(read)!r} cannot be used here: {error}."
                raise HttpError(400, message, "adapter_refused", param="model") from None
            except Unavailable:
                fault = True
            except _Crowded:
                crowded = True
            else:
                if found is not None:
                    return source, found
        if crowded:
            raise HttpError(
                503, "Too many searches for adapters are running. Try again later.", "overloaded", {"retry-after": "5"}
            )
        if not fault:
            return None
        message = f"The adapter {str(read)!r} cannot be fetched at the moment; the server's log has the reason."
        raise HttpError(503, message, "adapter_unavailable", {"retry-after": "5"}, param="model")

    async def _ask(self, place: _Place, read: AdapterName) -> Found | None:
        """Look up an adapter in a source, unless a lookup there failed recently; a local folder is always searched."""
        source, now = place.source, time.monotonic()
        until, error = place.missing.get(read, (0.0, None))
        if now < until:
            if error is not None:
                raise type(error)(str(error))
            return None
        outcome, seconds, error = "failed", 0.0, None
        try:
            found = await place.find(read)
        except (Refused, Unavailable) as failure:
            outcome, seconds, error = "refused", _MISSING_SECONDS, failure
            if isinstance(failure, Unavailable):
                outcome, seconds = "failed", _FAULT_SECONDS
                logger.warning("the adapter %s cannot be fetched from %s: %s", read, source.kind, failure)
            raise
        else:
            outcome, seconds = ("missing", _MISSING_SECONDS) if found is None else ("found", 0.0)
            return found
        finally:
            if seconds and source.kind != "local":
                place.missing[read] = (time.monotonic() + seconds, error)
                while len(place.missing) > _MAX_MISSING:
                    place.missing.popitem(last=False)
            self._looked(source.kind, outcome)

    def ask_anew(self) -> None:
        """Forget the remembered names, so that the sources are asked again."""
        for place in self._places:
            place.missing.clear()

    async def refresh(self) -> None:
        """Update `names` if they are older than a few seconds; folders are read in a thread, once for all callers."""
        if not self.sources or time.monotonic() - self._listed_at < _LISTED_SECONDS:
            return
        if self._listing is None:
            self._listing = asyncio.create_task(in_thread(self._names, "adapters"), name="adapters")
            self._listing.add_done_callback(self._listed)
        await asyncio.shield(self._listing)

    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for source in self.sources for name in source.names()))

    def _listed(self, listing: asyncio.Task[tuple[str, ...]]) -> None:
        self._listing, self._listed_at = None, time.monotonic()
        if not listing.cancelled() and listing.exception() is None:
            self.names = listing.result()
