"""Metrics: everything that one application counts, and the registry that `/metrics` is made from.

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

from candle_vllm.server.observing.exposition import EventCollector, McpServersCollector, ModelCollector
from candle_vllm.server.observing.model_metrics import ModelMetrics, Observer
from candle_vllm.server.observing.series import EVENTS
from candle_vllm.server.observing.usage import UsageRow, UsageTable


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
        self._events: dict[str, MetricWrapperBase] = {
            each.name: Counter(each.name, each.help, each.labels, registry=None)
            if each.kind == "counter"
            else EventHistogram(each.name, each.help, each.labels, registry=None, buckets=each.buckets)
            for each in EVENTS
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
        self._count("candle_vllm:admission_rejections_total", model, Rejection(reason))

    def model_loaded(self, model: str, seconds: float) -> None:
        """A model has been loaded."""
        self._count("candle_vllm:model_loads_total", model, Outcome.OK)
        self._observe("candle_vllm:model_load_seconds", seconds, model)

    def model_failed(self, model: str) -> None:
        """A model could not be loaded."""
        self._count("candle_vllm:model_loads_total", model, Outcome.FAILED)

    def model_unloaded(self, model: str) -> None:
        """A model has been unloaded."""
        self._count("candle_vllm:model_unloads_total", model)

    def model_waited_for(self, model: str, seconds: float) -> None:
        """A request got its model, which had to be loaded or switched to first."""
        self._observe("candle_vllm:model_wait_seconds", seconds, model)

    def answer_kept(self, outcome: Outcome) -> None:
        """An answer was put into the mailbox, or could not be."""
        self._count("candle_vllm:mailbox_answers_total", outcome)

    def webhook_sent(self, outcome: Outcome) -> None:
        """A webhook was delivered, or given up."""
        self._count("candle_vllm:webhook_deliveries_total", outcome)

    def tool_called(self, server: str, status: str) -> None:
        """A tool of an MCP server was called; `status` says how that ended."""
        self._count("candle_vllm:mcp_tool_calls_total", server, status)

    def watch_mcp_servers(self, states: Callable[[], Iterable[str]]) -> None:
        """Shows how many MCP servers are in which state; `states` is called by scrapes, in other threads."""
        self.registry.register(McpServersCollector(states))

    def _count(self, name: str, *labels: str) -> None:
        counter = self._events[name]
        assert isinstance(counter, Counter)
        counter.labels(*labels).inc()

    def _observe(self, name: str, value: float, *labels: str) -> None:
        histogram = self._events[name]
        assert isinstance(histogram, EventHistogram)
        histogram.labels(*labels).observe(value)
