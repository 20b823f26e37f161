# SPDX-License-Identifier: MIT
"""The table of all metrics at `/metrics`, except the process's own memory and time.

docs/metrics.md explains each of them. Names that begin with `vllm:` have the same meaning in vLLM; metrics that only
this server has begin with `candle_vllm:`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.core.engine.stats import STATS, EngineStats, Histogram, ReplicaStats, Stat
from candle_vllm.server.observing.request_record import RequestRecord, UsageCounts, UsageRow

FINISH_REASONS = tuple(reason.value for reason in FinishReason if reason is not FinishReason.TOOL_CALLS)
MODEL = ("model_name", "engine")
ENGINE = "0"
"""Value of the label `engine`: every model has one engine."""

MOST_NAMED = 16
"""Maximum number of LoRA adapters in a label."""

Row = tuple[tuple[str, ...], float | Histogram]  # values of further labels, and the value of the sample


@dataclass(frozen=True)
class EngineReading:
    """State of an engine: its statistics if known, the number of sequences that wait before it, whether it is alive."""

    stats: EngineStats | None
    queued: int
    alive: bool

    @property
    def runs(self) -> EngineStats | None:
        """The statistics of a live engine; None for a failed engine, which runs no sequences."""
        return self.stats if self.alive else None


@dataclass(frozen=True)
class ModelReading:
    """The metrics of one model at one moment, including its running requests.

    Attributes:
        engine_sums: sums of the counters of all its engines, including the current one.
        engine: the loaded engine; None while the model is not loaded.
        adapters: ended requests and their tokens, by LoRA adapter.
    """

    name: str
    tokens: UsageCounts
    finished: Counter[str]
    histograms: Mapping[str, Histogram]
    engine_sums: EngineStats
    engine: EngineReading | None
    adapters: Sequence[UsageRow] = ()


@dataclass(frozen=True)
class Series:
    """One family of time series.

    Attributes:
        buckets: upper bounds of a histogram, without the infinite one; empty for `token_buckets` or the engine's own.
        read: returns the samples of a model's series; None for metrics of the server.
        values: returns the values that a successful request adds to a histogram; None adds no value.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()
    read: Callable[[ModelReading], Iterable[Row]] | None = None
    values: Callable[[RequestRecord], Iterable[float | None]] = lambda _: ()


_FIRST_TOKEN = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
_BETWEEN_TOKENS = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)  # fmt: skip
_WHOLE = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)  # fmt: skip
_HTTP = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # fmt: skip
_LOADING = (.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)  # fmt: skip


# ---- kinds of metrics ------------------------------------------------------------------------------------------------


def _gauge(name: str, text: str, value: Callable[[EngineReading], float]) -> Series:
    """A gauge of a loaded model's engine."""
    return Series(
        name, "gauge", MODEL, text, read=lambda model: () if model.engine is None else [((), value(model.engine))]
    )


def _engine(name: str, text: str, when: str, row: Callable[[EngineStats, EngineReading], Row], *labels: str) -> Series:
    """A gauge of a loaded model's engine, if the statistic that `when` names is not 0.

    `num_blocks` is 0 for an encoder, `max_adapters` if adapters are not enabled.
    """

    def read(model: ModelReading) -> Iterable[Row]:
        stats = None if model.engine is None else model.engine.stats
        return [row(stats, model.engine)] if model.engine is not None and stats and getattr(stats, when) else ()

    return Series(name, "gauge", (*MODEL, *labels), text, read=read)


def _replicas(name: str, text: str, value: Callable[[ReplicaStats], float]) -> Series:
    """A gauge of each replica of a loaded model, if there are several."""

    def read(model: ModelReading) -> Iterable[Row]:
        stats = None if model.engine is None else model.engine.stats
        return [((str(number),), value(each)) for number, each in enumerate(stats.replicas)] if stats else ()

    return Series(name, "gauge", (*MODEL, "replica"), text, read=read)


def _named(counts: Mapping[str, int]) -> str:
    """Return a label with the names of at most `MOST_NAMED` adapters, the ones with most sequences."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    return ",".join([*sorted(names[:MOST_NAMED]), *(["..."] if len(names) > MOST_NAMED else [])])


def engine_series(forms: Mapping[str, Stat], *, gauges: bool) -> tuple[Series, ...]:
    """Return the series that fields of `EngineStats` declare: the gauges, or the counters and histograms.

    The sums of counters and histograms survive unloading.
    """

    def read(name: str, stat: Stat, model: ModelReading) -> Iterable[Row]:
        stats = (model.engine and model.engine.stats) if gauges else model.engine_sums
        if stats is None or (stat.when and not getattr(stats, stat.when)):
            return ()
        value = getattr(stats, name)
        return [((str(index),), each) for index, each in enumerate(value)] if stat.label else [((), value)]

    return tuple(
        Series(stat.series, stat.kind, (*MODEL, *filter(None, [stat.label])), stat.help, read=partial(read, name, stat))
        for name, stat in forms.items()
        if stat.series and (stat.kind == "gauge") == gauges
    )


def _tokens(name: str, text: str, field: str) -> Series:
    """A counter of the tokens in this field of `UsageCounts`."""
    return Series(name, "counter", MODEL, text, read=lambda model: [((), getattr(model.tokens, field))])


def _by_adapter(name: str, text: str, field: str) -> Series:
    """As `_tokens`, for each adapter."""
    return Series(
        name, "counter", (*MODEL, "adapter"), text,
        read=lambda model: [((row.key,), getattr(row.counts, field)) for row in model.adapters],
    )  # fmt: skip


def _histogram(
    name: str,
    text: str,
    buckets: tuple[float, ...] = (),
    values: Callable[[RequestRecord], Iterable[float | None]] = lambda _: (),
    of: tuple[str, ...] = ("generate",),
) -> Series:
    """A histogram to which `ModelMetrics` adds `values` of successful requests of the operations `of`."""
    return Series(
        name, "histogram", MODEL, text, buckets, read=lambda model: [((), model.histograms[name])],
        values=lambda request: values(request) if request.info.operation in of else (),
    )  # fmt: skip


def _span(name: str, text: str, begin: str, end: str) -> Series:
    """A histogram of the seconds between two times of a request, which are fields of `RequestMetrics`."""
    return _histogram(
        name, text, _WHOLE,
        lambda request: [_between(getattr(request.times, begin), getattr(request.times, end))],
    )  # fmt: skip


def _between(start: float | None, end: float | None, parts: int = 1) -> float | None:
    return None if start is None or end is None else (end - start) / parts


def _per_token(request: RequestRecord) -> Iterable[float | None]:
    for tokens, times in zip(request.tokens, request.sequence_times, strict=True):
        if times is not None and tokens > 1:
            yield _between(times.first_token_time, times.finished_time, tokens - 1)


# ---- of models -------------------------------------------------------------------------------------------------------

SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")

GAUGES: tuple[Series, ...] = (
    _gauge("vllm:num_requests_running", "Sequences that the engine is running.",
           lambda engine: engine.runs.num_running if engine.runs else 0),
    _gauge("vllm:num_requests_waiting", "Sequences that wait, before the engine and in it.",
           lambda engine: engine.queued + (engine.runs.num_waiting if engine.runs else 0)),
    _engine("vllm:kv_cache_usage_perc", "Share of the KV cache's blocks that sequences hold, 0 to 1.", "num_blocks",
            lambda stats, engine: ((), (stats.num_blocks - stats.num_free_blocks if engine.runs else 0)
                                   / stats.num_blocks)),
    _engine("vllm:cache_config_info", "The KV cache's tokens per block, and blocks, as labels; always 1.", "num_blocks",
            lambda stats, _: ((str(stats.block_size), str(stats.num_blocks)), 1), "block_size", "num_gpu_blocks"),
    _gauge("candle_vllm:num_requests_queued", "Sequences that wait before the engine.", lambda engine: engine.queued),
    _gauge("candle_vllm:engine_up", "1 while the loaded model's engine is alive, 0 after it failed.",
           lambda engine: int(engine.alive)),
    Series("vllm:engine_sleep_state", "gauge", (*MODEL, "sleep_state"),
           "Whether the engine is awake, sleeps at level 1 (weights_offloaded) or at level 2 (discard_all): 1 or 0.",
           read=lambda model: () if model.engine is None or model.engine.stats is None else [
               ((state,), int(model.engine.stats.sleep_level == level)) for level, state in enumerate(SLEEP_STATES)]),
    _engine("vllm:lora_requests_info", "Adapters with running and with waiting sequences; the time of the scrape.",
            "max_adapters", lambda stats, _: (
                (str(stats.max_adapters), _named(stats.running_adapters), _named(stats.waiting_adapters)), time.time()),
            "max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    *engine_series(STATS, gauges=True),
    _replicas("candle_vllm:replica_up", "1 while a replica accepts requests, 0 while it restarts.",
              lambda replica: int(replica.alive)),
    _replicas("candle_vllm:replica_restarts", "Restarts of a replica since the model was loaded.",
              lambda replica: replica.restarts),
    _replicas("candle_vllm:replica_requests_running", "Sequences that a replica is running.",
              lambda replica: replica.num_running),
    _replicas("candle_vllm:replica_requests_waiting", "Sequences that wait in a replica.",
              lambda replica: replica.num_waiting),
    _replicas("candle_vllm:replica_kv_cache_usage_perc", "Share of its KV cache's blocks that sequences hold, 0 to 1.",
              lambda replica: 1 - replica.num_free_blocks / replica.num_blocks if replica.num_blocks else 0),
)  # fmt: skip
"""Gauges of a loaded model, read at each scrape."""

ENGINE_COUNTS = engine_series(STATS, gauges=False)
"""Counters and histograms of the engine itself."""

REQUEST_COUNTERS: tuple[Series, ...] = (
    _tokens("vllm:prompt_tokens_total", "Prompt tokens; each prompt of a request counts once.", "prompt_tokens"),
    _tokens("vllm:prompt_tokens_cached_total", "Prompt tokens that answers report as cached.", "cached_tokens"),
    _tokens("vllm:generation_tokens_total", "Tokens generated.", "completion_tokens"),
    Series("vllm:request_success_total", "counter", (*MODEL, "finished_reason"),
           "Sequences and pooled texts that ended, by reason.",
           read=lambda model: [((reason,), model.finished[reason]) for reason in FINISH_REASONS]),
    _by_adapter("candle_vllm:lora_requests_total", "Ended requests to a LoRA adapter.", "requests"),
    _by_adapter("candle_vllm:lora_prompt_tokens_total", "Prompt tokens of requests to a LoRA adapter.",
                "prompt_tokens"),
    _by_adapter("candle_vllm:lora_generation_tokens_total", "Tokens generated by a LoRA adapter.",
                "completion_tokens"),
)  # fmt: skip

TO_FIRST_TOKEN = _histogram(
    "vllm:time_to_first_token_seconds", "From a request's arrival to its first token, seconds.", _FIRST_TOKEN
)
INTER_TOKEN_LATENCY = _histogram(
    "vllm:inter_token_latency_seconds", "Between two outputs of a sequence, seconds.", _BETWEEN_TOKENS
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "vllm:time_per_output_token_seconds", "The same as vllm:inter_token_latency_seconds, under its older name.",
    _BETWEEN_TOKENS,
)  # fmt: skip
ALL_OPERATIONS = ("generate", "embed", "score", "classify")
HISTOGRAMS: tuple[Series, ...] = (
    TO_FIRST_TOKEN,  # observed at the first token
    INTER_TOKEN_LATENCY,  # of all requests, also unsuccessful ones
    TIME_PER_OUTPUT_TOKEN,
    _histogram("vllm:request_time_per_output_token_seconds",
               "Mean time of a sequence's tokens after the first, seconds.", _BETWEEN_TOKENS, _per_token),
    _histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its end, seconds.", _WHOLE,
               lambda request: [request.ended - request.arrived], ALL_OPERATIONS),
    _span("vllm:request_queue_time_seconds", "From a request's arrival to its first step, seconds.",
          "arrival_time", "first_scheduled_time"),
    _span("vllm:request_inference_time_seconds", "From a request's first step to its end, seconds.",
          "first_scheduled_time", "finished_time"),
    _span("vllm:request_prefill_time_seconds", "From a request's first step to its first token, seconds.",
          "first_scheduled_time", "first_token_time"),
    _span("vllm:request_decode_time_seconds", "From a request's first token to its end, seconds.",
          "first_token_time", "finished_time"),
    _histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.",
               values=lambda request: [request.prompt_tokens], of=ALL_OPERATIONS),
    _histogram("vllm:request_prefill_kv_computed_tokens", "Prompt tokens of a request that were not cached.",
               values=lambda request: [request.prompt_tokens - request.cached_tokens]),
    _histogram("vllm:request_generation_tokens", "Tokens of a sequence.", values=lambda request: request.tokens),
    _histogram("vllm:request_max_num_generation_tokens", "Tokens of a request's longest sequence.",
               values=lambda request: [max(request.tokens)]),
    _histogram("vllm:request_params_max_tokens", "max_tokens of a request, its own or the API's default.",
               values=lambda request: [request.info.params.max_tokens if request.info.params else None]),
    _histogram("vllm:request_params_n", "Sequences of a request (n).", (1, 2, 5, 10, 20),
               lambda request: [request.info.count]),
)  # fmt: skip

# ---- of the server ---------------------------------------------------------------------------------------------------

_NAME, _OUTCOME = ("model_name",), ("outcome",)
REJECTIONS = Series(
    "candle_vllm:admission_rejections_total", "counter", (*_NAME, "reason"),
    "Requests refused before they ran, by reason.")  # fmt: skip
RATE_LIMITED = Series(
    "candle_vllm:rate_limited_requests_total", "counter", ("key", "limit"),
    "Requests refused because a key reached its limit per minute.")  # fmt: skip
LOADS = Series("candle_vllm:model_loads_total", "counter", _NAME + _OUTCOME, "Models loaded, by outcome.")
UNLOADS = Series("candle_vllm:model_unloads_total", "counter", _NAME, "Models unloaded.")
LOAD_SECONDS = Series(
    "candle_vllm:model_load_seconds", "histogram", _NAME, "Time to load a model, seconds.", _LOADING)  # fmt: skip
WAIT_SECONDS = Series(
    "candle_vllm:model_wait_seconds", "histogram", _NAME,
    "Wait of a request for its model to load, seconds.", _LOADING)  # fmt: skip
ANSWERS_KEPT = Series(
    "candle_vllm:mailbox_answers_total", "counter", _OUTCOME, "Answers put into the mailbox, by outcome.")  # fmt: skip
ADAPTER_LOOKS = Series(
    "candle_vllm:lora_resolutions_total", "counter", ("source", "outcome"),
    "Searches for LoRA adapters that requests name, by source and outcome.",
)  # fmt: skip
IMAGE_FETCHES = Series(
    "candle_vllm:image_fetches_total", "counter", _OUTCOME, "Images that requests name by URL, by outcome."
)  # fmt: skip
WEBHOOKS = Series("candle_vllm:webhook_deliveries_total", "counter", _OUTCOME, "Webhooks sent, by outcome.")
TOOL_CALLS = Series(
    "candle_vllm:mcp_tool_calls_total", "counter", ("server", "status"),
    "Calls of tools of MCP servers, by server and status.")  # fmt: skip
EVENTS = (
    REJECTIONS, RATE_LIMITED, LOADS, UNLOADS, LOAD_SECONDS, WAIT_SECONDS, ADAPTER_LOOKS, IMAGE_FETCHES, ANSWERS_KEPT,
    WEBHOOKS, TOOL_CALLS,
)  # fmt: skip
"""Metrics of the server, not of requests in an engine."""

MCP_SERVERS = Series("candle_vllm:mcp_servers", "gauge", ("state",), "MCP servers of the configuration, by state.")
"""Read at each scrape; absent without MCP servers."""

HTTP: tuple[Series, ...] = (
    Series("http_requests_total", "counter", ("method", "handler", "status"), "HTTP requests, by route and status."),
    Series("http_request_duration_seconds", "histogram", ("method", "handler"),
           "From the headers of an HTTP request to the end of its response, seconds.", _HTTP),
    Series("http_requests_in_progress", "gauge", ("method",), "HTTP requests that are being answered."),
)  # fmt: skip

MODEL_SERIES = GAUGES + ENGINE_COUNTS + REQUEST_COUNTERS + HISTOGRAMS
ALL_SERIES = MODEL_SERIES + EVENTS + (MCP_SERVERS,) + HTTP
