# SPDX-License-Identifier: MIT
"""Render the metrics for a scrape: Prometheus's text format, or OpenMetrics if the client accepts it.

This runs in a worker thread, because it takes a few milliseconds with many models, and streams should not wait for it.
"""

from __future__ import annotations

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
from candle_vllm.server.observing.series import ENGINE, Series


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
        """Return every family, without samples."""
        return [_family(series) for series in self._table]

    def collect(self) -> list[Metric]:
        """Return every family that has a sample."""
        families = {series.name: _family(series) for series in self._table}
        for series, labels, value in self._read():
            _add(families[series.name], labels, value)
        return [family for family in families.values() if family.samples]


def model_samples(table: Sequence[Series], models: Iterable[ModelMetrics]) -> Iterator[Sample]:
    """Read the series of all models."""
    for reading in [model.read() for model in models]:
        for series in table:
            assert series.read is not None
            yield from ((series, (reading.name, ENGINE, *more), value) for more, value in series.read(reading))


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


def _family(series: Series) -> Metric:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[series.kind](series.name, series.help, labels=series.labels)


def _add(family: Metric, labels: Sequence[str], value: float | Histogram) -> None:
    if isinstance(value, Histogram):
        assert isinstance(family, HistogramMetricFamily)
        bounds, counts = map(floatToGoString, (*value.bounds, INF)), map(float, accumulate(value.counts))
        family.add_metric(labels, list(zip(bounds, counts, strict=True)), value.total)
    else:
        assert isinstance(family, (CounterMetricFamily, GaugeMetricFamily))
        family.add_metric(labels, value)
