# SPDX-License-Identifier: MIT
"""Answers that outlive their clients: a request with mailbox headers continues after its client has disconnected.

Between steps 2 and 10 of a request's life. A task reads the chunks of the answer and stores the whole answer in the
mailbox. The client reads the chunks from the task, or gets the whole answer at the end, or disconnects. Other requests
are aborted when their client disconnects, except background responses.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from candle_vllm.core.errors import RequestAbortedError
from candle_vllm.openai.json_body import to_json_bytes
from candle_vllm.openai.protocol.generation import StreamOptions
from candle_vllm.responses.api.outliving import Chunks, Failure, Work
from candle_vllm.server.http.body import disconnected
from candle_vllm.server.http.routing import caller_of
from candle_vllm.server.mailbox.policy import DeliveryPolicy, Mode, read_policy
from candle_vllm.server.models.manager import Turn
from candle_vllm.server.observing.metrics import Metrics, Outcome
from candle_vllm.server.observing.series import ANSWERS_KEPT

if TYPE_CHECKING:
    from candle_vllm.server.mailbox.service import Mailbox

NOT_HERE = "is for chat and text completions: answers of this route are not stored"


@dataclass(frozen=True)
class StoredForm:
    """How answers of one API are stored: the prefix of their ids, and a function that joins chunks to an answer."""

    prefix: str
    join: Callable[[Sequence[Any]], msgspec.Struct]


@dataclass(frozen=True)
class Wish:
    """The mailbox headers of one request, as a policy for its answer, which `owner` may fetch.

    `request_id` has no prefix. `usage_hidden` is whether the client's stream has no token counts; the stored answer has
    them.
    """

    policy: DeliveryPolicy
    owner: str
    request_id: str
    usage_hidden: bool = False


class MailboxWriter:
    """Reads answers to their end for the mailbox."""

    def __init__(self, mailbox: Mailbox, metrics: Metrics) -> None:
        self._mailbox = mailbox
        self._metrics = metrics
        self._works: dict[Work[Any], OutlivingAnswer] = {}

    def wish(self, scope: Scope, wire: Any) -> tuple[Wish | None, Any]:
        """Return what a request asks of the mailbox, and the request changed accordingly: streamed, with token counts.

        HttpError 400, which names the header, if one is invalid.
        """
        policy = read_policy(scope["headers"], self._mailbox.options)
        if policy is None:
            return None, wire
        hidden = wire.stream_options is None or not wire.stream_options.include_usage
        changes: dict[str, Any] = {"request_id": wire.request_id or uuid.uuid4().hex, "stream": True}
        if hidden:
            changes["stream_options"] = StreamOptions(include_usage=True)
        owner = self._mailbox.owner(caller_of(scope).key)
        return Wish(policy, owner, changes["request_id"], hidden), wire.model_copy(update=changes)

    def keep(
        self, wish: Wish, chunks: AsyncIterator[Any], form: StoredForm, turn: Turn, deadline: float
    ) -> OutlivingAnswer:
        """Begin to read an answer; the client may read or close the returned object.

        Args:
            chunks: chunks of the answer; the last one has its usage.
            turn: released when the model generates nothing more.
            deadline: `time.monotonic()` at which reading ends.
        """
        answer = OutlivingAnswer(self._mailbox, wish, form, turn.model.entry.names[0], deadline)

        async def end(failure: Failure | None) -> None:
            turn.release()
            stored = await answer.finish(failure)
            if stored is not None:
                self._metrics.count(ANSWERS_KEPT, Outcome.OK if stored else Outcome.FAILED)

        work = Work(chunks, max(0.0, deadline - time.monotonic()), answer.take, end)
        self._works[work] = answer
        work.task.add_done_callback(lambda _: self._works.pop(work))
        return answer

    @property
    def busy(self) -> bool:
        """Whether an answer is being read or stored."""
        return bool(self._works)

    async def close(self) -> None:
        """Stop reading; the mailbox gets an error in place of each incomplete answer."""
        for answer in self._works.values():
            answer.over.set()  # the end of a work is not cancelled
        await asyncio.gather(*(work.cancel() for work in self._works))


class OutlivingAnswer:
    """The chunks of one answer for its client, which may disconnect; at the end the mailbox gets the whole answer.

    `deadline` is the `time.monotonic()` until which `finish` waits for the client.
    """

    def __init__(self, mailbox: Mailbox, wish: Wish, form: StoredForm, model: str, deadline: float) -> None:
        self._mailbox = mailbox
        self._wish = wish
        self._join = form.join
        self._id = form.prefix + wish.request_id
        self._model = model
        self._deadline = deadline
        self._chunks = Chunks[Any]()
        self._reader = self._chunks.read()
        self._made: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._delivered = False
        self._gone = asyncio.Event()  # set when the client disconnects before it has the whole answer
        self.over = asyncio.Event()  # set when the client has all or has disconnected, or is not waited for any more
        self._noting = asyncio.create_task(self._note())

    # ---- for the client ----------------------------------------------------------------------------------------------

    def __aiter__(self) -> OutlivingAnswer:
        return self

    async def __anext__(self) -> Any:
        while True:
            chunk = await anext(self._reader)
            if not self._wish.usage_hidden:
                return chunk
            if chunk.choices:  # else it has only the token counts, which the client did not ask for
                return msgspec.structs.replace(chunk, usage=UNSET)

    async def response(self) -> Response:
        """Return the whole answer as JSON, for a client that wants no stream; raises the exception of a failed answer.

        Cancel the coroutine when the client disconnects.
        """
        return _WholeResponse(to_json_bytes(await self._whole()), self)

    def delivered(self) -> None:
        """Record that the client was sent the last byte."""
        self._delivered = not self._gone.is_set()
        self.over.set()

    async def aclose(self) -> None:
        """Record that the client reads no more; the answer is still read to its end."""
        if not self._delivered:
            self._gone.set()
        self.over.set()
        with contextlib.suppress(RuntimeError):  # it is being read now
            await self._reader.aclose()

    # ---- for the mailbox ---------------------------------------------------------------------------------------------

    async def take(self, chunk: Any) -> None:
        """Add a chunk, which the client can read at once."""
        self._chunks.add(chunk)

    async def finish(self, failure: Failure | None) -> bool | None:
        """End the answer for client and mailbox; return whether it was stored, or None if it need not be.

        If that depends on whether the client got the answer, wait for `over` until the deadline.
        `failure` is the exception that ended the answer; None if the answer is complete.
        """
        self._noting.cancel()
        made = await self._result(failure)
        self._made.set_result(made)
        self._chunks.finish(made if isinstance(made, Exception) else None)
        wish = self._wish
        if Mode.ON_DISCONNECT in (wish.policy.mailbox, wish.policy.webhook):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                    await self.over.wait()
        gone = not self._delivered
        stored = await self._mailbox.keep(wish.policy, wish.owner, self._id, self._model, made, disconnected=gone)
        wanted = wish.policy.mailbox.applies(gone) or wish.policy.webhook.applies(gone)
        return stored if wanted else None

    async def _result(self, failure: Failure | None) -> msgspec.Struct | Exception:
        if isinstance(failure, asyncio.CancelledError):
            await self.aclose()  # the client is not waited for any more
            return RequestAbortedError("The server was stopped before the answer was complete.")
        if isinstance(failure, TimeoutError):
            return RequestAbortedError("The request took too long.")
        if failure is not None:
            return failure
        try:
            return self._join(list(self._chunks))
        except Exception as broken:
            return broken

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

    async def _note(self) -> None:
        """List the answer in the mailbox as being generated, as soon as it is certain that it will be stored."""
        if self._wish.policy.mailbox is not Mode.ALWAYS:
            await self._gone.wait()
        limit = max(1.0, self._deadline - time.monotonic())
        await self._mailbox.begin(self._wish.policy, self._wish.owner, self._id, self._model, limit)


class _WholeResponse(Response):
    """A response that notifies its `OutlivingAnswer` when all of it was sent."""

    media_type = "application/json"

    def __init__(self, content: bytes, answer: OutlivingAnswer) -> None:
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
