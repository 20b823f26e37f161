"""Answers that outlive their clients: a request that asked for it goes on when its client has gone.

Between steps 2 and 10 of a request's life. Its chunks are read by a task of their own, which nobody's disconnect
cancels; they are handed on while somebody reads, and the whole answer goes to the mailbox. Whoever asked for nothing
is aborted with its connection, as always.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.types import Scope

from candle_vllm.core.errors import RequestAbortedError
from candle_vllm.openai.protocol.generation import StreamOptions
from candle_vllm.server.kept_answer import KeptAnswer, Wish
from candle_vllm.server.mailbox.policy import refuse_headers
from candle_vllm.server.observing.metrics import Metrics, Outcome
from candle_vllm.server.turns import Turn

if TYPE_CHECKING:
    from candle_vllm.server.mailbox.service import Mailbox

NOT_HERE = "is for chat and text completions: answers of this route are not kept"


@dataclass(frozen=True)
class KeptForm:
    """How answers of one API are kept.

    Attributes:
        prefix: of their ids.
        join: the whole answer of its chunks.
    """

    prefix: str
    join: Callable[[Sequence[Any]], msgspec.Struct]


class Keeper:
    """Reads answers to their end for the mailbox.

    Args:
        mailbox: where answers are kept; None refuses every request that asks for one.
        metrics: counts what was kept.
    """

    def __init__(self, mailbox: Mailbox | None, metrics: Metrics) -> None:
        self._mailbox = mailbox
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def wish(self, scope: Scope, wire: Any, *, possible: bool = True) -> tuple[Wish | None, Any]:
        """What a request asks for, and the request as it has to run for that: streamed, with its token counts.

        Args:
            scope: with the request's headers.
            wire: the request.
            possible: False for an API whose answers are not kept.

        Raises:
            HttpError: 400 that names the header.
        """
        if self._mailbox is None or not possible:
            refuse_headers(scope["headers"], NOT_HERE if self._mailbox is not None else None)
            return None, wire
        policy = self._mailbox.policy(scope["headers"])
        if policy is None:
            return None, wire
        hidden = wire.stream_options is None or not wire.stream_options.include_usage
        changes: dict[str, Any] = {"request_id": wire.request_id or uuid.uuid4().hex, "stream": True}
        if hidden:
            changes["stream_options"] = StreamOptions(include_usage=True)
        owner = self._mailbox.owner(scope.get("state", {}).get("api_key", ""))
        return Wish(policy, owner, changes["request_id"], hidden), wire.model_copy(update=changes)

    def keep(
        self,
        wish: Wish,
        chunks: AsyncIterator[Any],
        form: KeptForm,
        turn: Turn,
        deadline: float,
    ) -> KeptAnswer:
        """Begins to read an answer; what is returned may be read, or closed, by its client.

        Args:
            wish: of the request.
            chunks: of the answer, its usage in the last one.
            form: of the answer.
            turn: released once nothing more is generated.
            deadline: `time.monotonic()` at which reading ends.
        """
        assert self._mailbox is not None
        model = turn.model.entry.names[0]
        answer = KeptAnswer(self._mailbox, wish, chunks, form.prefix + wish.request_id, model, deadline)
        self._start(self._read(answer, form.join, turn))
        return answer

    @property
    def busy(self) -> bool:
        """Whether an answer is still being read, or about to be kept."""
        return bool(self._tasks)

    async def close(self) -> None:
        """Ends what is still read; the mailbox hears of it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, answer: KeptAnswer, join: Callable[[Sequence[Any]], msgspec.Struct], turn: Turn) -> None:
        made: msgspec.Struct | Exception
        try:
            read = await answer.read()
            made = join(read)
        except asyncio.CancelledError:
            made = RequestAbortedError("The server was stopped before the answer was complete.")
            await answer.aclose()  # nobody is waited for any more
        except Exception as failure:
            made = failure
        finally:
            turn.release()
        kept = await answer.finish(made)
        if kept is not None:
            self._metrics.answer_kept(Outcome.OK if kept else Outcome.FAILED)
