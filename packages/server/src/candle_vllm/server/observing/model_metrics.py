# SPDX-License-Identifier: MIT
"""ModelMetrics: all metrics under one model's name, updated during steps 3 to 10 of a request's life.

The counters belong to the name and survive unloading; the gauges exist only while the engine exists.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from candle_vllm.core.engine.model_info import AdapterInfo
from candle_vllm.core.engine.requests import LoRARequest
from candle_vllm.core.engine.stats import EngineStats, Histogram, combined
from candle_vllm.core.engine.step.request_watchers import RequestInfo
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai import EngineLike
from candle_vllm.server.http.routing import NO_KEY, current_request
from candle_vllm.server.observing import series
from candle_vllm.server.observing.request_record import RequestRecord, UsageCounts, UsageTable, token_buckets

Observer = Callable[[RequestRecord], None]

logger = logging.getLogger(__name__)


class ServedEngine(EngineLike, Protocol):
    """Interface of an engine for the server: `EngineLike`, which the API adapters need, and the methods below."""

    @property
    def is_alive(self) -> bool: ...

    def add_death_callback(self, callback: Callable[[], None]) -> None: ...

    def reset_prefix_cache(self) -> None: ...

    @property
    def is_sleeping(self) -> bool: ...

    def sleep(self, level: int = 1, mode: str = "abort") -> None: ...

    def wake_up(self, tags: Sequence[str] | None = None) -> None: ...

    def add_lora(self, lora_request: LoRARequest) -> AdapterInfo: ...

    def remove_lora(self, lora_name: str) -> bool: ...

    def pin_lora(self, lora_name: str) -> AdapterInfo: ...

    def close(self) -> None: ...


class EngineWatcher:
    """Observes one loaded engine: counts its requests under its model's name, and exports its gauges until `close`.

    `queued` returns how many sequences wait before the engine; it is called when the gauges are read.
    """

    def __init__(self, engine: ServedEngine, model: ModelMetrics, queued: Callable[[], int] = lambda: 0) -> None:
        self._engine = engine
        self._model = model
        self._queued = queued
        self._last: EngineStats | None = None
        model.attach(self)

    def begin(self, info: RequestInfo) -> RequestRecord:
        """Return the record of a request that goes to the engine."""
        return self._model.begin(info)

    def close(self) -> None:
        """Remove the engine's gauges before it closes; its counts stay. Idempotent."""
        self._model.detach(self)

    def read(self) -> series.EngineReading:
        """Return the engine's state, with the last known statistics (or None) if it cannot return the current ones."""
        try:
            self._last = self._engine.stats()
        except CandleVllmError:
            logger.debug("an engine no longer returns statistics")
        return series.EngineReading(self._last, max(self._queued(), 0), self._engine.is_alive)


class ModelMetrics:
    """The counts of one model.

    Args:
        max_model_len: maximum tokens of a request; limits the buckets of token counts.
        refuse: called with the model and the reason when a request is refused.
        observers: called with every request that has ended, except refused ones, in the thread that calls `settle`.
    """

    def __init__(
        self,
        name: str,
        max_model_len: int,
        usage: UsageTable,
        refuse: Callable[[str, str], None],
        observers: Sequence[Observer] = (),
    ) -> None:
        self.name = name
        self.observers = tuple(observers)
        self.ended: deque[RequestRecord] = deque()  # not yet in the sums; appended to without the lock
        self._usage = usage
        self._refuse = refuse
        self._lock = threading.Lock()  # guards everything below; `_adapters` has its own lock for its rows
        self._live: set[RequestRecord] = set()
        self._tokens = UsageCounts()
        self._adapters = UsageTable(0)
        self._finished: Counter[str] = Counter()
        buckets = token_buckets(max_model_len)
        self._histograms = {each.name: Histogram(each.buckets or buckets) for each in series.HISTOGRAMS}
        self._engine: EngineWatcher | None = None
        self._past: list[EngineStats] = []  # the sum over past engines as one entry, empty before there are any
        self.gap_bounds = self._histograms[series.INTER_TOKEN_LATENCY.name].bounds

    # ---- the engine --------------------------------------------------------------------------------------------------

    def attach(self, engine: EngineWatcher) -> None:
        """Export the gauges of a new engine instead of an earlier engine's."""
        stats = engine.read().stats
        with self._lock:
            self._adapters.max_keys = max(self._adapters.max_keys, 0 if stats is None else stats.max_adapters)
            before, self._engine = self._engine, engine
            if before is not None:
                self._past = [self._sum(before.read())]

    def detach(self, engine: EngineWatcher) -> None:
        """Remove the gauges of an engine before it closes; its counts stay."""
        with self._lock:
            if self._engine is engine:
                self._engine = None
                self._past = [self._sum(engine.read())]

    # ---- requests ----------------------------------------------------------------------------------------------------

    def begin(self, info: RequestInfo) -> RequestRecord:
        """Return the record of a request that goes to the engine."""
        record = RequestRecord(self, info, current_request.get())
        with self._lock:
            self._live.add(record)
        return record

    def refused(self, reason: str, record: RequestRecord) -> None:
        """Count a request that the engine did not accept."""
        with self._lock:
            self._live.discard(record)
        self._refuse(self.name, reason)

    def first_token(self, seconds: float) -> None:
        """Record the time to a request's first token."""
        with self._lock:
            self._histograms[series.TO_FIRST_TOKEN.name].observe(max(seconds, 0.0))

    def settle(self) -> None:
        """Add ended requests to the sums, and call the observers."""
        while self.ended:
            try:
                record = self.ended.popleft()
            except IndexError:  # another thread took it
                return
            with self._lock:
                self._live.discard(record)
                tokens = UsageCounts(0, record.prompt_tokens, record.cached_tokens, record.completion_tokens)
                self._tokens = self._tokens.plus(tokens)
                self._finished.update(record.finish_reasons)
                self._histograms[series.INTER_TOKEN_LATENCY.name].merge(record.gaps)
                for each in series.HISTOGRAMS if record.status == "ok" else ():
                    for value in each.values(record):
                        if value is not None:
                            self._histograms[each.name].observe(max(value, 0.0))
            context = record.context
            first = context is None or context.first_of_request()
            counts = UsageCounts(int(first), record.prompt_tokens, record.cached_tokens, record.completion_tokens)
            self._usage.add(self.name, NO_KEY if context is None else context.key_label, counts)
            for adapter in record.info.adapters:
                self._adapters.add(self.name, adapter, counts)
            for observer in self.observers:
                try:
                    observer(record)
                except Exception:  # a failed log or trace must not fail the answer
                    logger.warning("a request could not be reported", exc_info=True)

    def read(self) -> series.ModelReading:
        """Read the current metrics; may be called in any thread."""
        self.settle()
        with self._lock:
            engine = None if self._engine is None else self._engine.read()
            tokens, histograms = self._tokens, {name: each.copy() for name, each in self._histograms.items()}
            for record in self._live:
                tokens = tokens.plus(UsageCounts(0, record.prompt_tokens, record.cached_tokens, sum(record.tokens)))
                histograms[series.INTER_TOKEN_LATENCY.name].merge(record.gaps)
            histograms[series.TIME_PER_OUTPUT_TOKEN.name] = histograms[series.INTER_TOKEN_LATENCY.name]
            return series.ModelReading(
                self.name, tokens, Counter(self._finished), histograms, self._sum(engine), engine,
                self._adapters.rows(),
            )  # fmt: skip

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _sum(self, engine: series.EngineReading | None) -> EngineStats:
        """Return the sums over past engines and this one; callers use only the counters and histograms."""
        return combined(self._past if engine is None or engine.stats is None else [*self._past, engine.stats])
