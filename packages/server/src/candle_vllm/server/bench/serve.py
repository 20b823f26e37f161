# SPDX-License-Identifier: MIT
"""`candle-vllm bench serve`: measures a server with OpenAI's API over HTTP, as `vllm bench serve` does.

All prompts are made before the first request is sent. Requests are sent at once, or at random times: the gaps follow a
gamma distribution, and with burstiness 1 the arrivals are a Poisson process; `--max-concurrency` may delay them more.
Token counts come from the server's `usage`, or from a tokenizer if the server does not report it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import random
import re
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from candle_vllm.core import CandleVllmError
from candle_vllm.core.shown import without_secrets
from candle_vllm.server.bench.client import EventClient, Target, WholeClient
from candle_vllm.server.bench.datasets import DataOptions, LocalWords, Sample, ServerWords, Words, make_samples
from candle_vllm.server.bench.figures import Seen, detail, read_goals, read_metrics, read_percentiles, summary, table
from candle_vllm.server.settings.options import UsageError

ENDPOINTS = {
    "openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions",
    "openai-embeddings": "/v1/embeddings",
}  # fmt: skip
DEFAULT_PORT = 2000
_HEADER = re.compile(r"[A-Za-z0-9-]{1,128}=[ -~]{0,4096}")


@dataclass(frozen=True)
class Ramp:
    """A request rate that increases from the first request to the last, linearly or exponentially."""

    strategy: str
    start: int
    end: int

    def rate(self, progress: float) -> float:
        """Return the requests per second after this share (0 to 1) of the requests was sent."""
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * progress
        return self.start * (self.end / self.start) ** progress


@dataclass(frozen=True)
class Load:
    """What the requests of a run share, their arrival rate, and the maximum number of concurrent requests (`most`)."""

    target: Target
    endpoint: str
    backend: str
    model: str
    extra: Mapping[str, Any]
    rate: float = math.inf
    burstiness: float = 1.0
    most: int | None = None
    seed: int = 0
    ramp: Ramp | None = None

    @property
    def streamed(self) -> bool:
        """Whether answers are streamed."""
        return self.backend != "openai-embeddings"

    def body(self, sample: Sample) -> dict[str, Any]:
        """Build the body of a request."""
        if not self.streamed:
            return {"model": self.model, "input": sample.prompt, **self.extra}
        length = {} if sample.output_len is None else {"max_tokens": sample.output_len}
        body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **length, **self.extra}
        if self.backend == "openai-chat":
            return {**body, "messages": [{"role": "user", "content": sample.prompt}]}
        return {**body, "prompt": sample.prompt}


def bench_serve(
    settings: object,  # noqa: ARG001 - every command receives settings, but a remote server has its own
    *,
    base_url: str | None = None,
    host: str | None = None,
    port: int | None = None,
    endpoint: str | None = None,
    backend: str = "openai",
    model: str | None = None,
    served_model_name: str | None = None,
    tokenizer: Path | None = None,
    api_key: str | None = None,
    header: tuple[str, ...] = (),
    insecure: bool = False,
    request_rate: str = "inf",
    burstiness: float = 1.0,
    ramp_up_strategy: str | None = None,
    ramp_up_start_rps: int | None = None,
    ramp_up_end_rps: int | None = None,
    max_concurrency: int | None = None,
    num_warmups: int = 0,
    ignore_eos: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    extra_body: str | None = None,
    percentile_metrics: str | None = None,
    metric_percentiles: str = "99",
    goodput: tuple[str, ...] = (),
    save_result: bool = False,
    save_detailed: bool = False,
    append_result: bool = False,
    result_dir: Path | None = None,
    result_filename: str | None = None,
    metadata: tuple[str, ...] = (),
    **data: Any,
) -> int:
    """Measure, and print a table; return the exit status, which is 1 if no request succeeded.

    `data` are `DataOptions`.
    """
    options = DataOptions(**data)
    if base_url is not None and (host is not None or port is not None):
        raise UsageError("--base-url has a host and a port of its own: leave --host and --port out")
    address = f"[{host}]" if host and ":" in host else host or "127.0.0.1"  # IPv6 addresses need brackets
    base_url = base_url or f"http://{address}:{port or DEFAULT_PORT}"
    rate, ramp = read_rate(request_rate), read_ramp(ramp_up_strategy, ramp_up_start_rps, ramp_up_end_rps)
    if ramp is not None and math.isfinite(rate):
        raise UsageError("--request-rate sets one rate and --ramp-up-strategy several: leave one of them out")
    metrics = read_metrics(percentile_metrics or ("e2el" if backend == "openai-embeddings" else "ttft,tpot,itl"))
    percentiles, goals = read_percentiles(metric_percentiles), read_goals(goodput)
    if backend == "openai-embeddings" and goals and set(goals) != {"e2el"}:
        raise UsageError(f"--goodput can only limit e2el with --backend {backend}, whose answers are not streamed")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    headers |= {name.lower(): value for name, value in _pairs("--header", header).items()}
    target = Target(base_url, headers, insecure)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    extra = _extra(extra_body, ignore_eos, options.dataset_name, backend, **sampling)
    kept = _pairs("--metadata", metadata)
    with httpx.Client(
        base_url=target.base_url, headers=headers, timeout=60, verify=target.tls or True, trust_env=False
    ) as http:
        name = served_model_name or model or _first_model(http)
        words = functools.cache(lambda: ServerWords(http, name) if tokenizer is None else LocalWords(tokenizer))
        samples = make_samples(options, words)
        load = Load(
            target, endpoint or ENDPOINTS[backend], backend, name, extra, rate, burstiness, max_concurrency,
            options.seed, ramp,
        )  # fmt: skip
        sys.stderr.write(
            f"bench serve: {len(samples)} requests to {without_secrets(target.base_url)}{load.endpoint} for {name}\n"
        )
        seen, duration = asyncio.run(_run(load, samples, num_warmups))
        seen = [_counted(each, words()) for each in seen]
    result = summary(seen, duration, metrics, percentiles, goals, streamed=load.streamed)
    sys.stdout.write(table(result))
    errors = [each.error for each in seen if each.error]
    if errors:
        sys.stderr.write(f"bench serve: {len(errors)} of {len(seen)} requests failed; the first: {errors[0]:.300}\n")
    if save_result or save_detailed or append_result:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        told = rate if math.isfinite(rate) else "inf"
        about = {
            "date": now, "endpoint_type": backend, "backend": backend, "label": None, "model_id": name,
            "tokenizer_id": None if tokenizer is None else str(tokenizer), "num_prompts": options.num_prompts, **kept,
            "request_rate": told, "burstiness": burstiness, "max_concurrency": max_concurrency,
        }  # fmt: skip
        paced = f"{told}qps"
        if ramp is not None:
            about |= {
                "ramp_up_strategy": ramp.strategy, "ramp_up_start_rps": ramp.start, "ramp_up_end_rps": ramp.end,
            }  # fmt: skip
            paced = f"ramp-up-{ramp.strategy}-{ramp.start}qps-{ramp.end}qps"
        most = "" if max_concurrency is None else f"-concurrency{max_concurrency}"
        file = result_filename or f"{backend}-{paced}{most}-{name.split('/')[-1]}-{now}.json"
        figures = {**about, **result, **(detail(seen) if save_detailed else {})}
        path = (result_dir or Path()) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append_result else "w", encoding="utf-8") as stream:
            stream.write(json.dumps(figures) + "\n")
        sys.stderr.write(f"bench serve: saved as {path}\n")
    return 0 if result["completed"] else 1


def read_rate(text: str) -> float:
    """Parse the requests per second; `inf` sends all requests at once."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise UsageError(f"--request-rate must be a number above 0, or inf, not {text!r:.60}")
    return rate


def read_ramp(strategy: str | None, start: int | None, end: int | None) -> Ramp | None:
    """Return the ramp of the request rate, or None without one."""
    if strategy is None and start is None and end is None:
        return None
    if strategy is None or start is None or end is None:
        raise UsageError("--ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps belong together")
    if start > end:
        raise UsageError(f"--ramp-up-start-rps ({start}) must not be above --ramp-up-end-rps ({end})")
    return Ramp(strategy, start, end)


async def _run(load: Load, samples: Sequence[Sample], warmups: int) -> tuple[list[Seen], float]:
    """Send warm-up requests, then all samples; return the results of the samples, and their duration in seconds."""
    places = asyncio.Semaphore(load.most) if load.most else contextlib.nullcontext()

    async def one(sample: Sample, began: float) -> Seen:
        async with places:
            return await _ask(load, sample, began)

    for _ in range(warmups):
        await one(samples[0], time.monotonic())
    began = time.monotonic()
    asked = [asyncio.create_task(one(sample, began)) async for sample in _arriving(load, samples)]
    return await asyncio.gather(*asked), time.monotonic() - began


async def _arriving(load: Load, samples: Sequence[Sample]) -> AsyncIterator[Sample]:
    """Yield the requests at their arrival times, which are computed from the run's start: delays do not add up."""
    chance = random.Random(load.seed)  # noqa: S311
    at = time.monotonic()
    for sent, sample in enumerate(samples):
        rate = load.rate if load.ramp is None else load.ramp.rate(sent / max(len(samples) - 1, 1))
        if sent and math.isfinite(rate):
            at += chance.gammavariate(load.burstiness, 1 / (rate * load.burstiness))
            await asyncio.sleep(at - time.monotonic())
        yield sample


async def _ask(load: Load, sample: Sample, began: float) -> Seen:
    request = load.target.post(load.endpoint, load.body(sample))
    client = EventClient(request) if load.streamed else WholeClient(request)
    await load.target.send(client)
    latency = await client.done
    whole = client.whole()
    usage = client.usage
    return Seen(
        start=(client.sent or time.monotonic()) - began,
        input_len=_number(usage.get("prompt_tokens")) or sample.prompt_len,
        output_len=_number(usage.get("completion_tokens")) or 0,
        latency=latency if whole else 0.0,
        times=tuple(client.times),
        text="".join(client.text),
        error="" if whole else client.failure or "failed",
    )


def _counted(each: Seen, words: Words) -> Seen:
    """Count the tokens of an answer if its server did not report them."""
    if each.output_len or not each.text or each.error:
        return each
    return dataclasses.replace(each, output_len=len(words.encode(each.text)))


def _number(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    wrong = next((text for text in texts if not _HEADER.fullmatch(text.replace("_", "-"))), None)
    if wrong is not None:
        raise UsageError(f"{flag} must be NAME=VALUE, not {wrong.partition('=')[0]!r:.60}")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def _extra(
    text: str | None, ignore_eos: bool | None, dataset: str, backend: str, **sampling: float | None
) -> dict[str, Any]:
    extra = {name: value for name, value in sampling.items() if value is not None}
    if ignore_eos or (ignore_eos is None and dataset == "random" and backend != "openai-embeddings"):
        extra["ignore_eos"] = True  # answers to random prompts have no natural end
    try:
        more = json.loads(text or "{}")
    except (ValueError, RecursionError):
        more = None
    if not isinstance(more, dict):
        raise UsageError("--extra-body must be a JSON object")
    return extra | more


def _first_model(http: httpx.Client) -> str:
    try:
        return str(http.get("/v1/models").raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        where = without_secrets(str(http.base_url)).rstrip("/")
        why = str(error).partition("\n")[0]  # httpx adds a line with an address to errors about a status
        text = f"{where}/v1/models names no model ({why}): name one with --model"
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 401:
            text = f"{where} refuses the request ({why}): give its key with --api-key"
        if isinstance(error, httpx.TransportError):
            text = f"{where} was not reached ({error}): start the server, or name it with --base-url"
        raise CandleVllmError(text) from None
