"""Engines for the server's tests: `ScriptedEngine` with a pace, a pulse and a `with` block."""

from __future__ import annotations

import asyncio
from typing import Any, Self

import msgspec

from candle_vllm.core.engine.request import EngineStats, TokenOutput
from candle_vllm.core.testing import ScriptedEngine, ScriptedStream


class PacedEngine(ScriptedEngine):
    """Waits `pause` seconds before every piece, `first_pause` before the first; dies on request."""

    def __init__(self, *args: Any, pause: float = 0.0, first_pause: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pause = pause
        self.first_pause = first_pause
        self.num_blocks = 1000
        self.alive = True
        self.closed = False

    @property
    def is_alive(self) -> bool:
        return self.alive

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(super().stats(), num_blocks=self.num_blocks)

    def stream(self, *args: Any, **options: Any) -> Any:
        return PacedStream(super().stream(*args, **options), self.pause, self.first_pause)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PacedStream:
    def __init__(self, inner: ScriptedStream, pause: float, first_pause: float) -> None:
        self.request = inner.request
        self._inner = inner
        self._pauses = [first_pause or pause]
        self._pause = pause

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenOutput:
        pause = self._pauses.pop() if self._pauses else self._pause
        if pause:
            await asyncio.sleep(pause)
        return await self._inner.__anext__()

    async def aclose(self) -> None:
        await self._inner.aclose()
