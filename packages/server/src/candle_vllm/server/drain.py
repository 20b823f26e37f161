# SPDX-License-Identifier: MIT
"""uvicorn's server with a drain that has a time limit.

A request that is running at shutdown gets `--shutdown-timeout` seconds; then it is cancelled, and its answer reports
the shutdown.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any

import uvicorn

logger = logging.getLogger(__name__)

_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if sys.platform == "win32":
    _SIGNALS.append(signal.SIGBREAK)  # the signal that one process can send to another on Windows
_LAST_WORDS_SECONDS = 1.0  # for the error responses of cancelled requests
_POLL_SECONDS = 0.05


def _is_logged(record: logging.LogRecord) -> bool:
    """Whether to log a record of uvicorn: not if this server logs the same event itself.

    The command logs a failed start, the drain logs cancellations, and `FailureMiddleware` logs incomplete answers.
    """
    if str(record.msg).startswith(("Cancel %s running task(s)", "ASGI callable returned without completing")):
        return False
    failed_start = record.module == "on" and record.levelno == logging.ERROR  # uvicorn.lifespan.on
    message = record.getMessage().rstrip()
    return not failed_start or ("\n" in message and not message.endswith("CancelledError"))  # a traceback of a failure


class DrainingServer(uvicorn.Server):
    """uvicorn's server, with its own shutdown and its own handling of a failed start.

    A second signal ends the drain at once. The drain also waits for work whose client has disconnected. `run` returns
    normally after a drain, and after a failed start, whose reason is `app.state.failure`.
    """

    begin: Callable[[], Coroutine[Any, Any, None]] | None = None
    """Coroutine function that is started once the server listens."""
    beside: Callable[[], Coroutine[Any, Any, None]] | None = None
    """Coroutine function that runs while the server runs, and is cancelled when it ends."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._signal = 0
        logging.getLogger("uvicorn.error").addFilter(_is_logged)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            self.should_exit = True
            return
        if self.begin is not None:
            self._beginning = asyncio.create_task(self.begin())
        if self.beside is not None:
            self._companion = asyncio.create_task(self.beside())

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._signal = sig
        self.force_exit = self.should_exit
        self.should_exit = True

    def _announce(self) -> bool:
        """Log what the drain waits for and how to stop it; return whether it waits for anything."""
        busy: Callable[[], bool] | None = self.lifespan.state.get("busy")
        if count := len(self.server_state.tasks):
            what = f"{count} request{'s' if count > 1 else ''}"
        elif busy is not None and busy():
            what = "answers for clients that disconnected"
        else:
            return False
        seconds = self.config.timeout_graceful_shutdown
        again = "Ctrl+C again to stop now" if self._signal == signal.SIGINT else "a second signal stops at once"
        logger.warning("finishing %s, up to %s s; %s", what, seconds, again)
        return True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        announced = not self.force_exit and self._announce()
        # uvicorn waits for these tasks as it waits for requests.
        outlived = asyncio.create_task(self._outlived())
        self.server_state.tasks.add(outlived)
        outlived.add_done_callback(self.server_state.tasks.discard)
        ended = asyncio.create_task(self._end_of_time(outlived))
        drained = asyncio.create_task(super().shutdown(sockets))
        forced = asyncio.create_task(self._forced())
        await asyncio.wait({drained, forced}, return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()
        ended.cancel()
        if self.force_exit and self.server_state.tasks - {outlived}:
            logger.warning("stopping now: running requests are cancelled")
        running = list(self.server_state.tasks)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=_LAST_WORDS_SECONDS)
        drained.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drained
        if self.force_exit:  # uvicorn skips the shutdown of the lifespan then
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), _LAST_WORDS_SECONDS)
        await self._end_connections()
        if announced:
            logger.info("stopped")

    async def _end_connections(self) -> None:
        """Wait a while for clients that still read, then abort: no connection may outlive the event loop."""
        connections = self.server_state.connections
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                while connections and not self.force_exit:
                    await asyncio.sleep(_POLL_SECONDS)
        for connection in list(connections):
            connection.transport.abort()
        await asyncio.sleep(_POLL_SECONDS if connections else 0)  # for their `connection_lost`

    async def _forced(self) -> None:
        while not self.force_exit:
            await asyncio.sleep(_POLL_SECONDS)

    async def _end_of_time(self, outlived: asyncio.Task[None]) -> None:
        """Log how many requests the end of the drain cancels, just before uvicorn cancels them."""
        await asyncio.sleep(self.config.timeout_graceful_shutdown or 0)
        if count := len(self.server_state.tasks - {outlived}):
            logger.warning("the time limit is reached: %d request%s cancelled", count, "s are" if count > 1 else " is")

    async def _outlived(self) -> None:
        """Wait until no request runs, and no work runs for a client that has disconnected."""
        busy: Callable[[], bool] | None = self.lifespan.state.get("busy")
        while busy is not None and (busy() or len(self.server_state.tasks) > 1):
            await asyncio.sleep(_POLL_SECONDS)
