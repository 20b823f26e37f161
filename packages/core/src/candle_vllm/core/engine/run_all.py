"""Running many requests to their end for a caller that waits: what `generate` does (steps 2 to 10 of a request)."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from candle_vllm.core.engine.request import (
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    OutputCollector,
    TokenOutput,
)
from candle_vllm.core.engine.thread import Delivery, EngineThread
from candle_vllm.core.errors import (
    CandleVllmError,
    EngineOverloadedError,
    RequestAbortedError,
    RequestError,
)


def run_all(
    thread: EngineThread, todo: Sequence[tuple[GenerationRequest, Sequence[Any]]], use_tqdm: bool
) -> Iterator[tuple[int, GenerationOutput]]:
    """Runs requests with no more in the engine at a time than its queue takes; yields each with its number, as it ends.

    Raises:
        RequestAbortedError: the engine was closed meanwhile.
        CandleVllmError: the engine failed on a request.
    """
    sink = _QueueSink()
    collectors: dict[str, tuple[int, OutputCollector]] = {}
    ahead = iter(enumerate(todo))
    try:
        with tqdm(total=len(todo), disable=not use_tqdm, desc="prompts", dynamic_ncols=True) as bar:
            waiting = next(ahead, None)
            while waiting or collectors:
                if waiting is not None and _try_submit(thread, waiting, sink, collectors):
                    waiting = next(ahead, None)
                elif collectors:
                    yield sink.next_finished(collectors)
                    bar.update()
                else:
                    time.sleep(0.01)  # other callers fill the queue
    finally:
        for request_id in collectors:
            thread.abort(request_id)


def _try_submit(
    thread: EngineThread,
    entry: tuple[int, tuple[GenerationRequest, Sequence[Any]]],
    sink: _QueueSink,
    collectors: dict[str, tuple[int, OutputCollector]],
) -> bool:
    position, (request, prepared) = entry
    try:
        thread.submit(prepared, sink)
    except EngineOverloadedError:
        return False
    collectors[request.request_id] = position, OutputCollector(request)
    return True


class _QueueSink:
    """Pieces for a caller that waits in its own thread."""

    loop = None

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.put = self._items.put

    def next_finished(self, collectors: dict[str, tuple[int, OutputCollector]]) -> tuple[int, GenerationOutput]:
        """Waits until one request is complete, and takes it out of `collectors`."""
        while True:
            item = self._items.get()
            if isinstance(item, CandleVllmError):
                raise item
            raise_failure(item)
            position, collector = collectors[item.request_id]
            if collector.add(item):
                del collectors[item.request_id]
                return position, collector.result()


def raise_failure(piece: TokenOutput) -> None:
    """Raises the error that a piece carries, if it does."""
    if piece.error is not None:
        raise RequestError(piece.error) if piece.error_kind == "request" else CandleVllmError(piece.error)
    if piece.finish_reason == FinishReason.ABORT:
        raise RequestAbortedError(f"request {piece.request_id} was aborted")
