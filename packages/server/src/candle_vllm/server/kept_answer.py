"""One answer that may outlive its client: its chunks for whoever reads them, the whole of it for the mailbox.

Between steps 5 and 10 of a request's life. A task of the `Keeper` reads it to its end; the client reads along, or the
whole at the end, or leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from candle_vllm.core.errors import RequestAbortedError
from candle_vllm.server.body import disconnected
from candle_vllm.server.mailbox.policy import DeliveryPolicy, Mode

if TYPE_CHECKING:
    from candle_vllm.server.mailbox.service import Mailbox


@dataclass(frozen=True)
class Wish:
    """What one request asked of the mailbox.

    Attributes:
        policy: what becomes of its answer.
        owner: who may fetch it.
        request_id: what its answer will be called, without the prefix.
        usage_hidden: the client did not ask for token counts in its stream; the whole answer has them.
    """

    policy: DeliveryPolicy
    owner: str
    request_id: str
    usage_hidden: bool = False

    def begins_kept(self) -> bool:
        """Whether the answer is kept whatever its client does."""
        return Mode.ALWAYS in (self.policy.mailbox, self.policy.webhook)

    def asks_for_client(self) -> bool:
        """Whether it depends on its client what becomes of the answer."""
        return Mode.ON_DISCONNECT in (self.policy.mailbox, self.policy.webhook)


class KeptAnswer:
    """The chunks of one answer for its client, which may leave.

    Args:
        mailbox: where it goes.
        wish: of its request.
        chunks: of the engine; read once, by `read`.
        answer_id: what it is called.
        model: whose answer it is.
        deadline: `time.monotonic()` at which reading ends, here and at the client.
    """

    def __init__(
        self, mailbox: Mailbox, wish: Wish, chunks: AsyncIterator[Any], answer_id: str, model: str, deadline: float
    ) -> None:
        self._mailbox = mailbox
        self._wish = wish
        self._chunks = chunks
        self._id = answer_id
        self._model = model
        self._deadline = deadline
        self._read: list[Any] = []
        self._shown = 0  # of these, to the client
        self._news = asyncio.Event()  # for the client: a chunk, or the end
        self._made: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._delivered = False
        self._gone = asyncio.Event()  # the client, before it had everything
        self._over = asyncio.Event()  # it has everything, or has gone

    # ---- for the client ----------------------------------------------------------------------------------------------

    def __aiter__(self) -> KeptAnswer:
        return self

    async def __anext__(self) -> Any:
        while True:
            while self._shown < len(self._read):
                chunk = self._as_asked(self._read[self._shown])
                self._shown += 1
                if chunk is not None:
                    return chunk
            if self._made.done():
                made = self._made.result()
                raise made if isinstance(made, Exception) else StopAsyncIteration
            self._news.clear()
            await self._news.wait()

    async def response(self, encode: Callable[[Any], bytes]) -> Response:
        """The whole answer as JSON, for a client that wants no stream.

        Cancelling it means that the client has gone; what the answer failed with is raised.
        """
        return _WholeResponse(encode(await self._whole()), self)

    def delivered(self) -> None:
        """The client was handed the last byte."""
        self._delivered = not self._gone.is_set()
        self._over.set()

    async def aclose(self) -> None:
        """The client reads no more; the answer is read on."""
        if not self._delivered:
            self._gone.set()
        self._over.set()

    # ---- for the keeper ----------------------------------------------------------------------------------------------

    async def read(self) -> list[Any]:
        """Every chunk; the client sees them meanwhile."""
        noting = asyncio.create_task(self._note())
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                async for chunk in self._chunks:
                    self._read.append(chunk)
                    self._news.set()
            return self._read
        except TimeoutError:
            raise RequestAbortedError("The request took too long.") from None
        finally:
            noting.cancel()
            close = getattr(self._chunks, "aclose", None)
            if close is not None:
                await close()

    async def finish(self, made: msgspec.Struct | Exception) -> bool | None:
        """Tells the client and the mailbox; whether the answer was kept, None where it need not be.

        Where it depends on the client, what it does is waited for: to its deadline, or until this task is cancelled.
        """
        if not self._made.done():
            self._made.set_result(made)
        self._news.set()
        wish = self._wish
        if wish.asks_for_client():
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                    await self._over.wait()
        gone = not self._delivered
        kept = await self._mailbox.keep(wish.policy, wish.owner, self._id, self._model, made, disconnected=gone)
        wanted = wish.policy.mailbox.applies(gone) or wish.policy.webhook.applies(gone)
        return kept if wanted else None

    async def _whole(self) -> Any:
        try:
            made = await asyncio.shield(self._made)
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(made, Exception):
            self.delivered()
            raise made
        return made

    def _as_asked(self, chunk: Any) -> Any:
        """The chunk as its client asked for it: without token counts where it did not."""
        if not self._wish.usage_hidden:
            return chunk
        return msgspec.structs.replace(chunk, usage=UNSET) if chunk.choices else None

    async def _note(self) -> None:
        """Shows in the mailbox that the answer is on its way, once it is certain to be kept."""
        if not self._wish.begins_kept():
            await self._gone.wait()
        limit = max(1.0, self._deadline - time.monotonic())
        await self._mailbox.begin(self._wish.policy, self._wish.owner, self._id, self._model, limit)


class _WholeResponse(Response):
    """Says whether the client took it all."""

    media_type = "application/json"

    def __init__(self, content: bytes, answer: KeptAnswer) -> None:
        super().__init__(content)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        watcher = asyncio.create_task(disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})  # waits for a slow client
            if not watcher.done():
                self._answer.delivered()
        finally:
            watcher.cancel()
            await self._answer.aclose()
