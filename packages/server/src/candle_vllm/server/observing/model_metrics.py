# SPDX-License-Identifier: MIT
"""ModelMetrics: everything counted under one model's name, while it is loaded and after.

Beside steps 4 to 9 of a request's life. Its counters belong to the name: they go on when the model is unloaded and
loaded again, while the gauges are there only as long as the engine is.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from candle_vllm.core.engine.model_info import AdapterInfo
from candle_vllm.core.engine.requests import LoRARequest
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.engine.step.watching import RequestInfo
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai import EngineLike
from candle_vllm.server.http.request_context import NO_KEY, current_request
from candle_vllm.server.observing.request_record import FinishedRequest, RequestRecord
from candle_vllm.server.observing.series import (
    BETWEEN_PIECES,
    BETWEEN_PIECES_TOO,
    ENGINE_COUNTERS,
    HISTOGRAMS,
    TO_FIRST_TOKEN,
    EngineReading,
    ModelReading,
)  # fmt: skip
from candle_vllm.server.observing.tally import Histogram, UsageCounts, UsageTable, token_buckets

Observer = Callable[[FinishedRequest], None]

logger = logging.getLogger(__name__)


class ServedEngine(EngineLike, Protocol):
    """What the server needs of an engine, beyond what the adapter does."""

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
    """One loaded engine: what it is asked is counted under its model's name, and its gauges are shown until `close`.

    Args:
        engine: the engine itself.
        model: where it is counted.
        queued: sequences that wait before it, read when the gauges are.
    """

    def __init__(self, engine: ServedEngine, model: ModelMetrics, queued: Callable[[], int] = lambda: 0) -> None:
        self._engine = engine
        self._model = model
        self._queued = queued
        self._last: EngineStats | None = None
        model.attach(self)

    def begin(self, info: RequestInfo) -> RequestRecord:
        """A request that is being given to the engine."""
        return self._model.begin(info)

    def close(self) -> None:
        """The engine is about to be closed: its gauges go, what it counted stays. Closing twice is fine."""
        self._model.detach(self)

    def read(self) -> EngineReading:
        """The numbers of now; the last ones where the engine gives none any more."""
        try:
            self._last = self._engine.stats()
        except CandleVllmError:
            logger.debug("an engine gives no numbers any more")
        return EngineReading(self._last, max(self._queued(), 0), self._engine.is_alive)


class ModelMetrics:
    """The counts of one model.

    Args:
        name: the label `model_name`.
        max_model_len: tokens; bound of the buckets of token counts.
        usage: where tokens are added up by key.
        refuse: called with the reason when a request is refused.
        observers: told of every request that has ended, in the thread in which it did.
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
        self.ended: deque[RequestRecord] = deque()  # to be added to the sums; appended to without the lock
        self._usage = usage
        self._refuse = refuse
        self._lock = threading.Lock()  # guards everything below
        self._live: set[RequestRecord] = set()
        self._tokens = UsageCounts()
        self._adapters = UsageTable(0)
        self._finished: Counter[str] = Counter()
        buckets = token_buckets(max_model_len)
        self._histograms = {each.name: Histogram(each.buckets or buckets) for each in HISTOGRAMS}
        self._engine: EngineWatcher | None = None
        self._past: Counter[str] = Counter()
        self.gap_bounds = self._histograms[BETWEEN_PIECES.name].bounds

    # ---- the engine --------------------------------------------------------------------------------------------------

    def attach(self, engine: EngineWatcher) -> None:
        """The model is loaded: its gauges are shown from now on, in place of those of an engine before."""
        stats = engine.read().stats
        with self._lock:
            self._adapters.max_keys = max(self._adapters.max_keys, 0 if stats is None else stats.max_adapters)
            before, self._engine = self._engine, engine
            if before is not None:
                self._past += _sums(before.read())

    def detach(self, engine: EngineWatcher) -> None:
        """The model is about to be unloaded: its gauges go, what its engine counted stays."""
        with self._lock:
            if self._engine is engine:
                self._engine = None
                self._past += _sums(engine.read())

    # ---- requests ----------------------------------------------------------------------------------------------------

    def begin(self, info: RequestInfo) -> RequestRecord:
        """A request that is being given to the engine."""
        record = RequestRecord(self, info, current_request.get())
        with self._lock:
            self._live.add(record)
        return record

    def refused(self, reason: str, record: RequestRecord) -> None:
        """The engine did not take a request."""
        with self._lock:
            self._live.discard(record)
        self._refuse(self.name, reason)

    def first_token(self, seconds: float) -> None:
        """A request's first token has come."""
        with self._lock:
            self._histograms[TO_FIRST_TOKEN.name].observe(max(seconds, 0.0))

    def settle(self) -> None:
        """Adds what has ended to the sums, and tells the observers."""
        while self.ended:
            try:
                record = self.ended.popleft()
            except IndexError:  # another thread took it
                return
            summary = record.summary()
            with self._lock:
                self._live.discard(record)
                self._add(record, summary)
            context = record.context
            first = context is None or context.first_of_request()
            counts = UsageCounts(int(first), summary.prompt_tokens, summary.cached_tokens, summary.completion_tokens)
            self._usage.add(self.name, NO_KEY if context is None else context.key_label, counts)
            for adapter in summary.info.adapters:
                self._adapters.add(self.name, adapter, counts)
            self._tell(summary)

    def read(self) -> ModelReading:
        """The numbers of now; may be called in any thread."""
        self.settle()
        with self._lock:
            engine = None if self._engine is None else self._engine.read()
            tokens, histograms = self._tokens, {name: each.copy() for name, each in self._histograms.items()}
            for record in self._live:
                tokens = tokens.plus(UsageCounts(0, record.prompt_tokens, record.cached_tokens, sum(record.tokens)))
                histograms[BETWEEN_PIECES.name].merge(record.gaps)
            histograms[BETWEEN_PIECES_TOO.name] = histograms[BETWEEN_PIECES.name]
            return ModelReading(
                self.name, tokens, Counter(self._finished), histograms, self._past + _sums(engine), engine,
                self._adapters.rows(),
            )  # fmt: skip

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _add(self, record: RequestRecord, summary: FinishedRequest) -> None:
        self._tokens = self._tokens.plus(
            UsageCounts(0, summary.prompt_tokens, summary.cached_tokens, summary.completion_tokens)
        )
        self._finished.update(summary.finish_reasons)
        self._histograms[BETWEEN_PIECES.name].merge(record.gaps)
        if summary.status == "ok":
            for series in HISTOGRAMS:
                for value in series.values(summary):
                    if value is not None:
                        self._histograms[series.name].observe(max(value, 0.0))

    def _tell(self, summary: FinishedRequest) -> None:
        for observer in self.observers:
            try:
                observer(summary)
            except Exception:  # a log or a trace that fails is no reason for an answer to fail
                logger.warning("a request could not be reported", exc_info=True)


def _sums(engine: EngineReading | None) -> Counter[str]:
    """What an engine has counted itself."""
    stats = None if engine is None else engine.stats
    return Counter() if stats is None else Counter({each.stat: getattr(stats, each.stat) for each in ENGINE_COUNTERS})
