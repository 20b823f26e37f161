# SPDX-License-Identifier: MIT
"""Metrics: everything that one application counts, the registry that `/metrics` is made from, and who is told.

No globals: a process may hold several applications, each with its own. The parts that change with every token are
plain numbers (`ModelMetrics`); for what happens once per request or more rarely, prometheus-client's own are used.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client import Histogram as EventHistogram
from prometheus_client.metrics import MetricWrapperBase

from candle_vllm.server.http.request_context import NO_KEY
from candle_vllm.server.observing import series
from candle_vllm.server.observing.exposition import EventCollector, McpServersCollector, ModelCollector
from candle_vllm.server.observing.model_metrics import ModelMetrics, Observer
from candle_vllm.server.observing.request_log import RequestLog
from candle_vllm.server.observing.series import Series
from candle_vllm.server.observing.tally import MAX_KEYS, OTHER_KEYS, UsageRow, UsageTable
from candle_vllm.server.observing.tracing import Tracing, otlp_tracing
from candle_vllm.server.settings import Settings


class Rejection(enum.StrEnum):
    """Why a request was refused before it ran."""

    QUEUE_FULL = "queue_full"
    KEY_LIMIT = "key_limit"
    ENGINE_DEAD = "engine_dead"
    MODEL_NOT_READY = "model_not_ready"
    INVALID_REQUEST = "invalid_request"


class Outcome(enum.StrEnum):
    """How something ended that can fail."""

    OK = "ok"
    FAILED = "failed"


class Metrics:
    """The counts of one application.

    Args:
        observers: told of every request to an engine that has ended; what they raise is logged and goes no further.

    Attributes:
        registry: for `render`.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._lock = threading.Lock()
        self._models: dict[str, ModelMetrics] = {}
        self._usage = UsageTable()
        self._limited: set[str] = set()  # labels of keys
        self._events: dict[str, MetricWrapperBase] = {
            each.name: Counter(each.name, each.help, each.labels, registry=None)
            if each.kind == "counter"
            else EventHistogram(each.name, each.help, each.labels, registry=None, buckets=each.buckets)
            for each in series.EVENTS
        }
        self.registry = CollectorRegistry()
        self.registry.register(ModelCollector(self.models))
        self.registry.register(EventCollector(tuple(self._events.values())))
        ProcessCollector(registry=self.registry)

    def model(self, name: str, max_model_len: int) -> ModelMetrics:
        """The counts under a model's name; the same object for the same name."""
        with self._lock:
            if name not in self._models:
                self._models[name] = ModelMetrics(name, max_model_len, self._usage, self.refused, self._observers)
            return self._models[name]

    def models(self) -> list[ModelMetrics]:
        """Of every model that has been loaded, in order of their names."""
        with self._lock:
            return [self._models[name] for name in sorted(self._models)]

    def usage(self) -> list[UsageRow]:
        """Requests that have ended and their tokens, by model and key."""
        for model in self.models():
            model.settle()
        return self._usage.rows()

    # ---- events ------------------------------------------------------------------------------------------------------

    def refused(self, model: str, reason: str) -> None:
        """A request was refused before it ran: a value of `Rejection`."""
        self._count(series.REJECTIONS, model, Rejection(reason))

    def rate_limited(self, key: str, limit: str) -> None:
        """A key has used up what a minute allows: `limit` is "requests" or "tokens"."""
        with self._lock:
            if len(self._limited) < MAX_KEYS:
                self._limited.add(key)
            elif key not in self._limited:
                key = OTHER_KEYS
        self._count(series.RATE_LIMITED, key or NO_KEY, limit)

    def model_loaded(self, model: str, seconds: float) -> None:
        """A model has been loaded."""
        self._count(series.LOADS, model, Outcome.OK)
        self._observe(series.LOAD_SECONDS, seconds, model)

    def model_failed(self, model: str) -> None:
        """A model could not be loaded."""
        self._count(series.LOADS, model, Outcome.FAILED)

    def model_unloaded(self, model: str) -> None:
        """A model has been unloaded."""
        self._count(series.UNLOADS, model)

    def model_waited_for(self, model: str, seconds: float) -> None:
        """A request got its model, which had to be loaded or switched to first."""
        self._observe(series.WAIT_SECONDS, seconds, model)

    def answer_kept(self, outcome: Outcome) -> None:
        """An answer was put into the mailbox, or could not be."""
        self._count(series.ANSWERS_KEPT, outcome)

    def webhook_sent(self, outcome: Outcome) -> None:
        """A webhook was delivered, or given up."""
        self._count(series.WEBHOOKS, outcome)

    def adapter_looked_for(self, source: str, outcome: str) -> None:
        """A source of adapters was asked for one; `outcome` says how that ended."""
        self._count(series.ADAPTER_LOOKS, source, outcome)

    def image_fetched(self, outcome: str) -> None:
        """A request named an image by its address; `outcome` says how that ended."""
        self._count(series.IMAGE_FETCHES, outcome)

    def tool_called(self, server: str, status: str) -> None:
        """A tool of an MCP server was called; `status` says how that ended."""
        self._count(series.TOOL_CALLS, server, status)

    def watch_mcp_servers(self, states: Callable[[], Iterable[str]]) -> None:
        """Shows how many MCP servers are in which state; `states` is called by scrapes, in other threads."""
        self.registry.register(McpServersCollector(states))

    def _count(self, event: Series, *labels: str) -> None:
        counter = self._events[event.name]
        assert isinstance(counter, Counter)
        counter.labels(*labels).inc()

    def _observe(self, event: Series, value: float, *labels: str) -> None:
        histogram = self._events[event.name]
        assert isinstance(histogram, EventHistogram)
        histogram.labels(*labels).observe(value)


class Observation:
    """The observers of one application.

    Attributes:
        metrics: its counts.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises UsageError where traces are wanted and OpenTelemetry is not installed."""
        self._tracing: Tracing | None = otlp_tracing(settings.otlp_endpoint) if settings.otlp_endpoint else None
        observers: list[Observer] = []
        if settings.log_requests:
            observers.append(RequestLog(log_prompts=settings.log_prompts))
        if self._tracing is not None:
            observers.append(self._tracing)
        self.metrics = Metrics(observers)

    def close(self) -> None:
        """Sends what traces are left; takes two seconds at most."""
        if self._tracing is not None:
            self._tracing.close()
