"""ObservedStream: the pieces of one request, counted on their way to its reader (between steps 9 and 10)."""

from __future__ import annotations

import asyncio

from candle_vllm.core.engine.request import TokenOutput
from candle_vllm.openai.engine import TokenStream
from candle_vllm.server.observing.request_record import RequestRecord


class ObservedStream:
    """A stream with the contract of the one that it wraps.

    However it ends - read to its end, closed, cancelled, failed or dropped - its request is counted once.
    """

    __slots__ = ("_inner", "_record")

    def __init__(self, inner: TokenStream, record: RequestRecord) -> None:
        self._inner = inner
        self._record = record

    def __aiter__(self) -> ObservedStream:
        return self

    async def __anext__(self) -> TokenOutput:
        try:
            piece = await self._inner.__anext__()
        except (StopAsyncIteration, asyncio.CancelledError):
            self._record.close()
            raise
        except Exception as error:
            self._record.fail(error)
            raise
        self._record.take(piece)
        return piece

    async def aclose(self) -> None:
        """Aborts the request unless it has finished."""
        self._record.close()
        await self._inner.aclose()

    def __del__(self) -> None:
        self._record.drop()
