"""Stopping without cutting answers: uvicorn's server with a drain that has an end.

The last thing that happens to a request that is still running at shutdown: it gets `--shutdown-timeout` seconds,
then an answer that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from candle_vllm.server.errors import HttpError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LAST_WORDS_SECONDS = 1.0  # for the answers of requests that were cut off


class DrainingServer(uvicorn.Server):
    """uvicorn's server, except that a second signal of any kind ends the drain at once, and a drain is a success."""

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
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drained = asyncio.create_task(super().shutdown(sockets))
        forced = asyncio.create_task(self._forced())
        await asyncio.wait({drained, forced}, return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()
        running = list(self.server_state.tasks)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=_LAST_WORDS_SECONDS)
        drained.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drained

    async def _forced(self) -> None:
        while not self.force_exit:
            await asyncio.sleep(0.05)


class CutOffMiddleware:
    """The outermost layer: a request that the end of the drain cancels is answered, and the cancellation ends here.

    A stream that has begun says it itself (`EventStream`); anything else that has not begun gets a 503.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def note_begin(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, note_begin)
        except asyncio.CancelledError:
            if scope["type"] == "http" and not begun:
                error = HttpError(503, "The server was stopped before the answer was complete.", "shutting_down")
                await error.response(scope, receive, send)
