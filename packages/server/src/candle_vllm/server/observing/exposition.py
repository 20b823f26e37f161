# SPDX-License-Identifier: MIT
"""Render the metrics for a scrape: Prometheus's text format, or OpenMetrics if the client accepts it.

This runs in a worker thread, because it takes a few milliseconds with many models, and streams should not wait for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString

from candle_vllm.core.engine.stats import Histogram
from candle_vllm.server.observing.model_metrics import ModelMetrics
from candle_vllm.server.observing.series import ENGINE, MCP_SERVERS, MODEL_SERIES, ModelReading, Series


def render(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """Return the body of the response to a scrape, and its content type.

    `registry` is the registry of `Metrics`, and `accept` is the request's Accept header.
    """
    if "openmetrics" not in choose_encoder(accept)[1]:
        return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
    # The names need no escaping. But the encoder that `choose_encoder` selects for Prometheus 2 writes `vllm_x` for
    # `vllm:x` in every sample, though not in the `# TYPE` line; the encoder below does not change the names.
    return openmetrics.generate_latest(registry, escaping=openmetrics.ALLOWUTF8), openmetrics.CONTENT_TYPE_LATEST


class ModelCollector(Collector):
    """The metrics of all models, read at each scrape."""

    def __init__(self, models: Callable[[], list[ModelMetrics]]) -> None:
        self._models = models

    def describe(self) -> list[Metric]:
        """Return every family, without samples."""
        return [_family(series) for series in MODEL_SERIES]

    def collect(self) -> Iterator[Metric]:
        """Yield every family that has a sample."""
        readings = [model.read() for model in self._models()]
        for series in MODEL_SERIES:
            family = _family(series)
            for reading in readings:
                _add(family, series, reading)
            if family.samples:
                yield family


class EventCollector(Collector):
    """prometheus-client's metrics without the `_created` samples, which would double the number of lines."""

    def __init__(self, metrics: Sequence[MetricWrapperBase]) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        """Return every family, without samples."""
        return [family for metric in self._metrics for family in metric.describe()]

    def collect(self) -> Iterator[Metric]:
        """Yield every family that has a sample."""
        for metric in self._metrics:
            for family in metric.collect():
                family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
                if family.samples:
                    yield family


class McpServersCollector(Collector):
    """The number of MCP servers in each state, counted at each scrape."""

    def __init__(self, states: Callable[[], Iterable[str]]) -> None:
        self._states = states

    def describe(self) -> list[Metric]:
        """Return the family, without samples."""
        return [_family(MCP_SERVERS)]

    def collect(self) -> Iterator[Metric]:
        """Yield the family, with a sample for each state that occurs."""
        family = _family(MCP_SERVERS)
        assert isinstance(family, GaugeMetricFamily)
        for state, count in sorted(Counter(self._states()).items()):
            family.add_metric((state,), count)
        yield family


def _family(series: Series) -> Metric:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[series.kind](series.name, series.help, labels=series.labels)


def _add(family: Metric, series: Series, reading: ModelReading) -> None:
    assert series.read is not None
    for more, value in series.read(reading):
        labels = (reading.name, ENGINE, *more)
        if isinstance(value, Histogram):
            assert isinstance(family, HistogramMetricFamily)
            bounds, counts = map(floatToGoString, (*value.bounds, INF)), map(float, accumulate(value.counts))
            family.add_metric(labels, list(zip(bounds, counts, strict=True)), value.total)
        else:
            assert isinstance(family, (CounterMetricFamily, GaugeMetricFamily))
            family.add_metric(labels, value)
