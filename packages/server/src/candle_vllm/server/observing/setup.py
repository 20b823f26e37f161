"""From settings to what is observed: the counts of one application, its request log and its traces."""

from __future__ import annotations

from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.observing.model_metrics import Observer
from candle_vllm.server.observing.request_log import RequestLog
from candle_vllm.server.observing.tracing import Tracing, otlp_tracing
from candle_vllm.server.settings import Settings


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
