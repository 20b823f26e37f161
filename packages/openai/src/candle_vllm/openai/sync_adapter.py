# SPDX-License-Identifier: MIT
"""SyncOpenAIAdapter: `OpenAIAdapter` for programs without an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from typing import Any, Generic, Self, TypeVar

from candle_vllm.core.arguments import explained
from candle_vllm.core.errors import EngineDeadError, RequestAbortedError
from candle_vllm.openai.adapter import Fields, OpenAIAdapter
from candle_vllm.openai.answers import ChunkStream
from candle_vllm.openai.protocol.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from candle_vllm.openai.protocol.completions import Completion, CompletionRequest
from candle_vllm.openai.protocol.embeddings import EmbeddingList, EmbeddingRequest
from candle_vllm.openai.protocol.score import Ranking, RerankRequest, ScoreList, ScoreRequest

T = TypeVar("T")


class SyncOpenAIAdapter:
    """Calls an `OpenAIAdapter` from any thread, and waits for it; raises its errors, and EngineDeadError once closed.

    Its event loop runs in a thread that `close`, or the end of a `with` block, stops. The engine stays open.
    """

    def __init__(self, adapter: OpenAIAdapter) -> None:
        self._adapter = adapter
        self._closed = False
        self._lock = threading.Lock()  # guards `_closed`
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-adapter", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<SyncOpenAIAdapter{', closed' if self._closed else ''}: {self._adapter!r}>"

    @property
    def closed(self) -> bool:
        """Whether the adapter is closed."""
        return self._closed

    @explained(**{"the request, as in chat({...})": ChatCompletionRequest.wire_names()})
    def chat(self, request: ChatCompletionRequest | Fields) -> ChatCompletion:
        """Return the whole answer."""
        return self.wait(self._adapter.chat, request)

    @explained(**{"the request, as in chat({...})": ChatCompletionRequest.wire_names()})
    def chat_stream(self, request: ChatCompletionRequest | Fields) -> SyncChunks[ChatCompletionChunk]:
        """Return an iterator over the chunks; close it to abort the request."""
        return SyncChunks(self, self.wait(self._adapter.chat_stream, request))

    @explained(**{"the request, as in complete({...})": CompletionRequest.wire_names()})
    def complete(self, request: CompletionRequest | Fields) -> Completion:
        """Return the whole answer."""
        return self.wait(self._adapter.complete, request)

    @explained(**{"the request, as in complete({...})": CompletionRequest.wire_names()})
    def complete_stream(self, request: CompletionRequest | Fields) -> SyncChunks[Completion]:
        """Return an iterator over the chunks; close it to abort the request."""
        return SyncChunks(self, self.wait(self._adapter.complete_stream, request))

    def embed(self, request: EmbeddingRequest | Fields) -> EmbeddingList:
        """Return the embeddings of texts."""
        return self.wait(self._adapter.embed, request)

    def score(self, request: ScoreRequest | Fields) -> ScoreList:
        """Return the scores of pairs of texts."""
        return self.wait(self._adapter.score, request)

    def rerank(self, request: RerankRequest | Fields) -> Ranking:
        """Return documents ranked by their relevance to a query."""
        return self.wait(self._adapter.rerank, request)

    def close(self) -> None:
        """Abort running requests and stop the thread. Can be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, call: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        """Run a coroutine function in the loop and return its result."""
        with self._lock:
            if self._closed:
                raise EngineDeadError("this SyncOpenAIAdapter is closed")
            future = asyncio.run_coroutine_threadsafe(call(*arguments), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise RequestAbortedError("The adapter was closed before the request finished.") from None
        except BaseException:
            future.cancel()
            raise
        finally:
            del future  # the exception in it refers to this frame


class SyncChunks(Generic[T]):
    """Chunks of one answer, for a `for` loop; the end of a `with` block aborts an unfinished request."""

    def __init__(self, adapter: SyncOpenAIAdapter, chunks: ChunkStream[T]) -> None:
        self._adapter = adapter
        self._chunks = chunks

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        found = self._adapter.wait(self._next)
        if found is None:
            raise StopIteration
        return found

    def close(self) -> None:
        """Abort the request if it is still running; no effect if the adapter is closed."""
        if not self._adapter.closed:
            self._adapter.wait(self._chunks.aclose)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _next(self) -> T | None:
        async for chunk in self._chunks:
            return chunk
        return None


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
