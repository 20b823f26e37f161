"""EngineGauges: what a model's engine says of itself when it is asked, and the sums that outlive it.

Step 4 of a request's life, seen from outside. An engine that has failed runs nothing, whatever its last numbers say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from candle_vllm.core.engine.request import EngineStats
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.server.served_engine import ServedEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineCounts:
    """Sums over the engines that a model has had: preemptions, prompt tokens run and found cached, steps."""

    preemptions: int = 0
    queries: int = 0
    hits: int = 0
    steps: int = 0

    def plus(self, stats: EngineStats | None) -> EngineCounts:
        """With those of one more engine."""
        if stats is None:
            return self
        return EngineCounts(
            self.preemptions + stats.preemptions,
            self.queries + stats.prompt_tokens,
            self.hits + stats.cached_prompt_tokens,
            self.steps + stats.steps,
        )


@dataclass(frozen=True)
class EngineReading:
    """A loaded model's engine now: its numbers, those that wait before it, and whether it works."""

    stats: EngineStats | None
    queued: int
    alive: bool


class EngineGauges:
    """One loaded engine.

    Args:
        engine: the engine itself.
        queued: sequences that wait before it.
    """

    def __init__(self, engine: ServedEngine, queued: Callable[[], int]) -> None:
        self._engine = engine
        self._queued = queued
        self._last: EngineStats | None = None

    def read(self) -> EngineReading:
        """The numbers of now; the last ones where the engine gives none any more."""
        try:
            self._last = self._engine.stats()
        except CandleVllmError:
            logger.debug("an engine gives no numbers any more")
        return EngineReading(self._last, self._queued(), self._engine.is_alive)
