"""ModelMetrics: everything counted under one model's name, while it is loaded and after.

Beside steps 4 to 9 of a request's life. Its counters belong to the name: they go on when the model is unloaded and
loaded again, while the gauges are there only as long as the engine is.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from candle_vllm.server.observing.engine_gauges import EngineCounts, EngineGauges, EngineReading
from candle_vllm.server.observing.request_context import NO_KEY, current_request
from candle_vllm.server.observing.request_record import FinishedRequest, RequestInfo, RequestRecord
from candle_vllm.server.observing.series import HISTOGRAMS, SAME_AS, token_buckets
from candle_vllm.server.observing.tally import Histogram
from candle_vllm.server.observing.usage import UsageCounts, UsageTable

Observer = Callable[[FinishedRequest], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelReading:
    """The numbers of one model at one moment, those of running requests included.

    Attributes:
        name: of the model.
        tokens: prompt, cached and completion tokens.
        finished: sequences and pooled texts by finish reason.
        histograms: by name of the series.
        engine_counts: of its engines, the present one included.
        engine: the loaded engine; None while the model is not loaded.
    """

    name: str
    tokens: UsageCounts
    finished: Counter[str]
    histograms: dict[str, Histogram]
    engine_counts: EngineCounts
    engine: EngineReading | None


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
        self._finished: Counter[str] = Counter()
        buckets = token_buckets(max_model_len)
        self._histograms = {
            each.name: Histogram(each.buckets or buckets) for each in HISTOGRAMS if each.name not in SAME_AS
        }
        self._gauges: EngineGauges | None = None
        self._past = EngineCounts()
        self.gap_bounds = self._histograms["vllm:inter_token_latency_seconds"].bounds

    # ---- the engine --------------------------------------------------------------------------------------------------

    def attach(self, gauges: EngineGauges) -> None:
        """The model is loaded: its gauges are shown from now on, in place of those of an engine before."""
        with self._lock:
            before, self._gauges = self._gauges, gauges
            if before is not None:
                self._past = self._past.plus(before.read().stats)

    def detach(self, gauges: EngineGauges) -> None:
        """The model is about to be unloaded: its gauges go, what its engine counted stays."""
        with self._lock:
            if self._gauges is gauges:
                self._gauges = None
                self._past = self._past.plus(gauges.read().stats)

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
            self._histograms["vllm:time_to_first_token_seconds"].observe(max(seconds, 0.0))

    def pooled(self, record: RequestRecord, prompt_tokens: int, reasons: Sequence[str]) -> None:
        """A request for vectors or scores has ended, with a reason for each text or pair."""
        record.prompt_tokens = prompt_tokens
        record.reasons = list(reasons)
        record.close()

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
            self._tell(summary)

    def read(self) -> ModelReading:
        """The numbers of now; may be called in any thread."""
        self.settle()
        with self._lock:
            engine = None if self._gauges is None else self._gauges.read()
            tokens, histograms = self._tokens, {name: each.copy() for name, each in self._histograms.items()}
            for record in self._live:
                tokens = tokens.plus(UsageCounts(0, record.prompt_tokens, record.cached_tokens, sum(record.tokens)))
                histograms["vllm:inter_token_latency_seconds"].merge(record.gaps)
            histograms |= {name: histograms[other] for name, other in SAME_AS.items()}
            counts = self._past.plus(None if engine is None else engine.stats)
            return ModelReading(self.name, tokens, Counter(self._finished), histograms, counts, engine)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _add(self, record: RequestRecord, summary: FinishedRequest) -> None:
        self._tokens = self._tokens.plus(
            UsageCounts(0, summary.prompt_tokens, summary.cached_tokens, summary.completion_tokens)
        )
        self._finished.update(summary.finish_reasons)
        self._histograms["vllm:inter_token_latency_seconds"].merge(record.gaps)
        if summary.status != "ok":
            return
        self._observe("vllm:e2e_request_latency_seconds", summary.ended - summary.arrived)
        self._observe("vllm:request_prompt_tokens", summary.prompt_tokens)
        if summary.info.operation == "generate":
            self._add_generation(record, summary)

    def _add_generation(self, record: RequestRecord, summary: FinishedRequest) -> None:
        self._observe("vllm:request_prefill_kv_computed_tokens", summary.prompt_tokens - summary.cached_tokens)
        self._observe("vllm:request_params_n", summary.info.count)
        self._observe("vllm:request_max_num_generation_tokens", max(record.tokens))
        params = summary.info.params
        if params is not None and params.max_tokens is not None:
            self._observe("vllm:request_params_max_tokens", params.max_tokens)
        for tokens, times in zip(record.tokens, record.metrics, strict=True):
            self._observe("vllm:request_generation_tokens", tokens)
            if times is not None and tokens > 1:
                self._between(
                    "vllm:request_time_per_output_token_seconds",
                    times.first_token_time, times.finished_time, tokens - 1,
                )  # fmt: skip
        times = summary.times
        if times is not None:
            scheduled, first, end = times.first_scheduled_time, times.first_token_time, times.finished_time
            self._between("vllm:request_queue_time_seconds", summary.arrived, scheduled)
            self._between("vllm:request_prefill_time_seconds", scheduled, first)
            self._between("vllm:request_decode_time_seconds", first, end)
            self._between("vllm:request_inference_time_seconds", scheduled, end)

    def _between(self, name: str, start: float | None, end: float | None, parts: int = 1) -> None:
        if start is not None and end is not None:
            self._observe(name, (end - start) / parts)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(max(value, 0.0))

    def _tell(self, summary: FinishedRequest) -> None:
        for observer in self.observers:
            try:
                observer(summary)
            except Exception:  # a log or a trace that fails is no reason for an answer to fail
                logger.warning("a request could not be reported", exc_info=True)
