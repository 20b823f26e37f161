# SPDX-License-Identifier: MIT
"""Metrics: the counts of one application, their registry and its text for a scrape, and the observers of requests.

There are no globals: a process may have several applications, each with its own metrics. Counts that change with every
token are plain numbers (`ModelMetrics`); rarer events, such as refusals, are prometheus-client's metrics.
"""

from __future__ import annotations

import collections
import enum
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client import Histogram as EventHistogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString

from candle_vllm.core.engine.stats import Histogram
from candle_vllm.server.http.routing import NO_KEY
from candle_vllm.server.observing import series
from candle_vllm.server.observing.model_metrics import ModelMetrics, Observer
from candle_vllm.server.observing.request_log import RequestLog
from candle_vllm.server.observing.request_record import MAX_KEYS, OTHER_KEYS, UsageRow, UsageTable
from candle_vllm.server.observing.series import ENGINE, Series
from candle_vllm.server.observing.tracing import Tracing, otlp_tracing
from candle_vllm.server.settings.table import LoggingOptions


class Rejection(enum.StrEnum):
    """Why a request was refused before it ran."""

    QUEUE_FULL = "queue_full"
    KEY_LIMIT = "key_limit"
    ENGINE_DEAD = "engine_dead"
    MODEL_NOT_READY = "model_not_ready"
    INVALID_REQUEST = "invalid_request"


class Outcome(enum.StrEnum):
    """The outcome of an operation that can fail."""

    OK = "ok"
    FAILED = "failed"


class Metrics:
    """The counts of one application, in a `registry` for `render`.

    `observers` are called with every engine request that has ended, except refused ones; their exceptions are logged.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._lock = threading.Lock()
        self._models: dict[str, ModelMetrics] = {}
        self._usage = UsageTable()
        self._limited: set[str] = set()  # labels of keys that reached a rate limit
        self._events: dict[str, MetricWrapperBase] = {
            each.name: Counter(each.name, each.help, each.labels, registry=None)
            if each.kind == "counter"
            else EventHistogram(each.name, each.help, each.labels, registry=None, buckets=each.buckets)
            for each in series.EVENTS
        }
        self.registry = CollectorRegistry()
        self.registry.register(SeriesCollector(series.MODEL_SERIES, self._model_samples))
        self.registry.register(EventCollector(tuple(self._events.values())))
        ProcessCollector(registry=self.registry)

    def model(self, name: str, max_model_len: int) -> ModelMetrics:
        """Return the counts of a model; the same object for the same name."""
        with self._lock:
            if name not in self._models:
                self._models[name] = ModelMetrics(name, max_model_len, self._usage, self.refused, self._observers)
            return self._models[name]

    def models(self) -> list[ModelMetrics]:
        """Return the counts of every model that has been loaded, sorted by name."""
        with self._lock:
            return [self._models[name] for name in sorted(self._models)]

    def usage(self) -> list[UsageRow]:
        """Return the requests that have ended, and their tokens, by model and key."""
        for model in self.models():
            model.settle()
        return self._usage.rows()

    def _model_samples(self) -> Iterator[Sample]:
        for reading in [model.read() for model in self.models()]:
            for each in series.MODEL_SERIES:
                assert each.read is not None
                yield from ((each, (reading.name, ENGINE, *more), value) for more, value in each.read(reading))

    # ---- events ------------------------------------------------------------------------------------------------------

    def count(self, event: Series, *labels: str) -> None:
        """Count an event of `series.EVENTS`, with the values of its labels."""
        counter = self._events[event.name]
        assert isinstance(counter, Counter)
        counter.labels(*labels).inc()

    def observe(self, event: Series, value: float, *labels: str) -> None:
        """Add a value to a histogram of `series.EVENTS`, with the values of its labels."""
        histogram = self._events[event.name]
        assert isinstance(histogram, EventHistogram)
        histogram.labels(*labels).observe(value)

    def refused(self, model: str, reason: str) -> None:
        """Count a request that was refused before it ran; `reason` is a value of `Rejection`."""
        self.count(series.REJECTIONS, model, Rejection(reason))

    def rate_limited(self, key: str, limit: str) -> None:
        """Count a request whose key has used up a limit: `limit` is the limit's label."""
        with self._lock:
            if len(self._limited) < MAX_KEYS:
                self._limited.add(key)
            elif key not in self._limited:
                key = OTHER_KEYS
        self.count(series.RATE_LIMITED, key or NO_KEY, limit)

    def watch_mcp_servers(self, states: Callable[[], Iterable[str]]) -> None:
        """Show the number of MCP servers in each state; scrapes call `states` in other threads."""

        def read() -> list[Sample]:
            counts = collections.Counter(states())
            return [(series.MCP_SERVERS, (state,), count) for state, count in sorted(counts.items())]

        self.registry.register(SeriesCollector((series.MCP_SERVERS,), read))


class Observation:
    """The observers of one application, with its metrics."""

    def __init__(self, settings: LoggingOptions) -> None:
        """Raises UsageError if traces are configured, but the endpoint is no URL or OpenTelemetry is not installed."""
        self._tracing: Tracing | None = otlp_tracing(settings.otlp_endpoint) if settings.otlp_endpoint else None
        observers: list[Observer] = []
        if settings.log_requests:
            observers.append(RequestLog(log_prompts=settings.log_prompts))
        if self._tracing is not None:
            observers.append(self._tracing)
        self.metrics = Metrics(observers)

    def close(self) -> None:
        """Send the remaining traces, for at most two seconds."""
        if self._tracing is not None:
            self._tracing.close()


# ---- for a scrape ----------------------------------------------------------------------------------------------------


def render(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """Return the body of the response to a scrape, and its content type.

    `registry` is the registry of `Metrics`, and `accept` is the request's Accept header.
    """
    if "openmetrics" not in choose_encoder(accept)[1]:
        return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
    # The names need no escaping. But the encoder that `choose_encoder` selects for Prometheus 2 writes `vllm_x` for
    # `vllm:x` in every sample, though not in the `# TYPE` line; the encoder below does not change the names.
    return openmetrics.generate_latest(registry, escaping=openmetrics.ALLOWUTF8), openmetrics.CONTENT_TYPE_LATEST


Sample = tuple[Series, tuple[str, ...], float | Histogram]  # with the values of the series' labels


class SeriesCollector(Collector):
    """Series of the table; `read` returns their samples at each scrape."""

    def __init__(self, table: Sequence[Series], read: Callable[[], Iterable[Sample]]) -> None:
        self._table, self._read = table, read

    def describe(self) -> list[Metric]:
        return [_family(each) for each in self._table]

    def collect(self) -> list[Metric]:
        """Return every family that has a sample."""
        families = {each.name: _family(each) for each in self._table}
        for each, labels, value in self._read():
            family = families[each.name]
            if isinstance(value, Histogram):
                assert isinstance(family, HistogramMetricFamily)
                bounds, counts = map(floatToGoString, (*value.bounds, INF)), map(float, accumulate(value.counts))
                family.add_metric(labels, list(zip(bounds, counts, strict=True)), value.total)
            else:
                assert isinstance(family, (CounterMetricFamily, GaugeMetricFamily))
                family.add_metric(labels, value)
        return [family for family in families.values() if family.samples]


def _family(each: Series) -> Metric:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[each.kind](each.name, each.help, labels=each.labels)


class EventCollector(Collector):
    """prometheus-client's metrics without the `_created` samples, which would double the number of lines."""

    def __init__(self, metrics: Sequence[MetricWrapperBase]) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        return [family for metric in self._metrics for family in metric.describe()]

    def collect(self) -> Iterator[Metric]:
        """Yield every family that has a sample."""
        for metric in self._metrics:
            for family in metric.collect():
                family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
                if family.samples:
                    yield family
