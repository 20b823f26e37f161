"""Window: the requests of one call on their way through the engine, so many at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from candle_vllm.core.engine.request import PoolingRequest, TokenOutput
from candle_vllm.core.engine.run_all import raise_failure
from candle_vllm.core.engine.stream import Inbox
from candle_vllm.core.engine.thread import Delivery, EngineThread, Sink
from candle_vllm.core.errors import CandleVllmError, EngineOverloadedError

MAX_UNDER_WAY = 256
"""Requests of one call that the engine holds at a time."""

STEPS_UNDER_WAY = 2
"""Steps' worth of tokens that the engine holds of one call: one runs, and the next is full when it ends. What other
callers ask for meanwhile waits for no more than these."""

_PAUSE = 0.01  # seconds, while other callers fill the queue


@dataclasses.dataclass(frozen=True)
class Entry:
    """A request, and what the engine's `prepare` made of it."""

    request: PoolingRequest
    prepared: Sequence[Any]

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self.request.prompt_token_ids)


class _Mailbox:
    """Pieces for a caller that waits in its own thread."""

    loop = None

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.put = self.items.put


class Window:
    """Runs entries to their end; every request has one piece.

    Args:
        thread: the engine.
        entries: in the order of the answers.
        step_tokens: tokens of a full step.
    """

    def __init__(self, thread: EngineThread, entries: Sequence[Entry], step_tokens: int) -> None:
        self._thread = thread
        self._entries = entries
        self._max_tokens = STEPS_UNDER_WAY * step_tokens
        self._tokens = 0  # of the requests under way
        self._next = 0
        self._under_way: dict[str, int] = {}
        self._pieces: list[TokenOutput | None] = [None] * len(entries)

    def run(self, *, use_tqdm: bool) -> list[TokenOutput]:
        """The pieces in order, for a caller that waits.

        Raises:
            RequestAbortedError: the engine was closed meanwhile.
            CandleVllmError: the engine failed on a request.
        """
        mailbox = _Mailbox()
        try:
            with tqdm(total=len(self._entries), disable=not use_tqdm, desc="texts", dynamic_ncols=True) as bar:
                while self._submit(mailbox, patient=True):
                    if self._under_way:
                        self._take(mailbox.items.get())
                        bar.update()
                    else:
                        time.sleep(_PAUSE)
        finally:
            self._abort(mailbox)
        return [piece for piece in self._pieces if piece is not None]

    async def arun(self) -> list[TokenOutput]:
        """The same in an event loop; cancelling it aborts what has not ended.

        Raises:
            EngineOverloadedError: the queue is full at the start.
        """
        inbox = Inbox(asyncio.get_running_loop())
        try:
            while self._submit(inbox, patient=False):
                if self._under_way:
                    self._take(await inbox.take())
                else:
                    await asyncio.sleep(_PAUSE)
        finally:
            self._abort(inbox)
        return [piece for piece in self._pieces if piece is not None]

    def _submit(self, sink: Sink, *, patient: bool) -> bool:
        """Hands over as many requests as the window and the queue take; False when all have ended."""
        while self._next < len(self._entries) and self._has_room(self._entries[self._next]):
            entry = self._entries[self._next]
            try:
                self._thread.submit(entry.prepared, sink)
            except EngineOverloadedError:
                if not (patient or self._next):
                    raise
                break
            self._under_way[entry.request.request_id] = self._next
            self._tokens += entry.length
            self._next += 1
        return bool(self._under_way) or self._next < len(self._entries)

    def _has_room(self, entry: Entry) -> bool:
        """Whether one more request may be under way; one alone always may, however long it is."""
        if not self._under_way:
            return True
        return len(self._under_way) < MAX_UNDER_WAY and self._tokens + entry.length <= self._max_tokens

    def _take(self, item: Delivery) -> None:
        if isinstance(item, CandleVllmError):
            raise item
        place = self._under_way.pop(item.request_id)
        self._tokens -= self._entries[place].length
        raise_failure(item)
        self._pieces[place] = item

    def _abort(self, sink: Sink) -> None:
        for request_id in self._under_way:
            self._thread.abort(request_id, sink)
