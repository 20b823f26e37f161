"""The one table of series: what `/metrics` shows, apart from the process's own memory and time.

docs/metrics.md explains each of them. Names that begin with `vllm:` mean what they mean in vLLM; those that only
this server has begin with `candle_vllm:`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MODEL = ("model_name", "engine")
ENGINE = "0"
"""Value of the label `engine`: every model has one."""


@dataclass(frozen=True)
class Series:
    """One family of time series.

    Attributes:
        name: as it is exposed.
        kind: Prometheus's type.
        labels: names of the labels.
        help: what is counted or measured, in which unit.
        buckets: upper bounds of a histogram, without the infinite one; none given are those of `token_buckets`.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


_FIRST_TOKEN = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
_BETWEEN_TOKENS = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)  # fmt: skip
_WHOLE = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)  # fmt: skip
_HTTP = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # fmt: skip
_LOADING = (.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)  # fmt: skip


def _model(name: str, kind: Literal["counter", "gauge", "histogram"], text: str, *more: str) -> Series:
    return Series(name, kind, (*MODEL, *more), text)


def _seconds(name: str, buckets: tuple[float, ...], text: str) -> Series:
    return Series(name, "histogram", MODEL, text, buckets)


GAUGES: tuple[Series, ...] = (
    _model("vllm:num_requests_running", "gauge", "Sequences that the engine is running."),
    _model("vllm:num_requests_waiting", "gauge", "Sequences that wait, before the engine and in it."),
    _model("vllm:kv_cache_usage_perc", "gauge", "Share of the KV cache's blocks that sequences hold, 0 to 1."),
    _model("vllm:cache_config_info", "gauge", "The KV cache: tokens of a block, and blocks; always 1.",
           "block_size", "num_gpu_blocks"),
    _model("candle_vllm:num_requests_queued", "gauge", "Sequences that wait before the engine."),
    _model("candle_vllm:engine_up", "gauge", "1 while the loaded model's engine works, 0 once it has failed."),
)  # fmt: skip
"""Of a loaded model, read when they are asked for."""

ENGINE_COUNTERS: tuple[Series, ...] = (
    _model("vllm:num_preemptions_total", "counter", "Sequences that were stopped for want of cache and run again."),
    _model("vllm:prefix_cache_queries_total", "counter", "Tokens of prompts that the engine has run."),
    _model("vllm:prefix_cache_hits_total", "counter", "Those of them that were in the prefix cache."),
    _model("candle_vllm:engine_steps_total", "counter", "Steps of the engine."),
)
"""What the engine counts itself; the sum goes on when a model is unloaded and loaded again."""

REQUEST_COUNTERS: tuple[Series, ...] = (
    _model("vllm:prompt_tokens_total", "counter", "Tokens of prompts, a request's prompt counted once."),
    _model("vllm:prompt_tokens_cached_total", "counter", "Prompt tokens that answers report as cached."),
    _model("vllm:generation_tokens_total", "counter", "Tokens generated."),
    _model("vllm:request_success_total", "counter", "Sequences and pooled texts that ended, by reason.",
           "finished_reason"),
)  # fmt: skip

HISTOGRAMS: tuple[Series, ...] = (
    _seconds("vllm:time_to_first_token_seconds", _FIRST_TOKEN, "From a request's arrival to its first token, seconds."),
    _seconds("vllm:inter_token_latency_seconds", _BETWEEN_TOKENS, "Between two pieces of a sequence, seconds."),
    _seconds("vllm:time_per_output_token_seconds", _BETWEEN_TOKENS,
             "The same as vllm:inter_token_latency_seconds, under its older name."),
    _seconds("vllm:request_time_per_output_token_seconds", _BETWEEN_TOKENS,
             "Mean time of a sequence's tokens after the first, seconds."),
    _seconds("vllm:e2e_request_latency_seconds", _WHOLE, "From a request's arrival to its end, seconds."),
    _seconds("vllm:request_queue_time_seconds", _WHOLE, "From a request's arrival to its first step, seconds."),
    _seconds("vllm:request_inference_time_seconds", _WHOLE, "From a request's first step to its end, seconds."),
    _seconds("vllm:request_prefill_time_seconds", _WHOLE, "From a request's first step to its first token, seconds."),
    _seconds("vllm:request_decode_time_seconds", _WHOLE, "From a request's first token to its end, seconds."),
    _model("vllm:request_prompt_tokens", "histogram", "Prompt tokens of a request."),
    _model("vllm:request_prefill_kv_computed_tokens", "histogram", "Prompt tokens of a request that were not cached."),
    _model("vllm:request_generation_tokens", "histogram", "Tokens of a sequence."),
    _model("vllm:request_max_num_generation_tokens", "histogram", "Tokens of a request's longest sequence."),
    _model("vllm:request_params_max_tokens", "histogram", "max_tokens of a request, where it was given."),
    Series("vllm:request_params_n", "histogram", MODEL, "Sequences that a request asks for.", (1, 2, 5, 10, 20)),
)  # fmt: skip

SAME_AS: Mapping[str, str] = {"vllm:time_per_output_token_seconds": "vllm:inter_token_latency_seconds"}
"""Histograms that repeat another under a second name."""

EVENTS: tuple[Series, ...] = (
    Series("candle_vllm:admission_rejections_total", "counter", ("model_name", "reason"),
           "Requests refused before they ran, by reason."),
    Series("candle_vllm:model_loads_total", "counter", ("model_name", "outcome"), "Models loaded, by outcome."),
    Series("candle_vllm:model_unloads_total", "counter", ("model_name",), "Models unloaded."),
    Series("candle_vllm:model_load_seconds", "histogram", ("model_name",), "Time to load a model, seconds.", _LOADING),
    Series("candle_vllm:model_wait_seconds", "histogram", ("model_name",),
           "How long a request waited for its model to be loaded, seconds.", _LOADING),
    Series("candle_vllm:mailbox_answers_total", "counter", ("outcome",), "Answers put into the mailbox, by outcome."),
    Series("candle_vllm:webhook_deliveries_total", "counter", ("outcome",), "Webhooks sent, by outcome."),
    Series("candle_vllm:mcp_tool_calls_total", "counter", ("server", "status"),
           "Calls of tools of MCP servers, by how they ended."),
)  # fmt: skip
"""What happens to the server rather than to a request in an engine."""

MCP_SERVERS = Series("candle_vllm:mcp_servers", "gauge", ("state",), "MCP servers of the configuration, by state.")
"""Read when it is asked for; absent where there are none."""

HTTP: tuple[Series, ...] = (
    Series("http_requests_total", "counter", ("method", "handler", "status"), "HTTP requests, by route and status."),
    Series("http_request_duration_seconds", "histogram", ("method", "handler"),
           "From an HTTP request's head to the end of its answer, seconds.", _HTTP),
    Series("http_requests_in_progress", "gauge", ("method",), "HTTP requests that are being answered."),
)  # fmt: skip

MODEL_SERIES = GAUGES + ENGINE_COUNTERS + REQUEST_COUNTERS + HISTOGRAMS
ALL_SERIES = MODEL_SERIES + EVENTS + (MCP_SERVERS,) + HTTP


def token_buckets(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to a number of tokens."""
    bounds: list[float] = []
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step > most:
                return tuple(bounds) or (1,)
            bounds.append(factor * step)
        step *= 10
