# SPDX-License-Identifier: MIT
"""`candle-vllm bench`: measures the speed of a model on this machine, without HTTP.

Calls the engine at step 3 of a request's life. After one short request (start-up) and one unmeasured round, every round
submits `concurrency` requests at once; the median of each figure over the rounds is reported. Prompts are random valid
token ids, never repeated, and the prefix cache is off, so that no result is reused.

    ttft_s          from submission to the first token; median over the streams
    prefill_tok_s   prompt tokens of all streams / time until every stream has its first token
    decode_tok_s    tokens of one stream after its first output / time they took; median over the streams
    output_tok_s    output tokens of all streams / whole time of the round, prompts included
    load_s          creation of the engine: reading, repacking, compiling
    start_s         from the start of this process to the first token of the short request; null if unknown
    peak_rss_mb     largest resident memory of this process so far, in MB of 2^20 bytes
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from candle_vllm.core import CandleVllmError, EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.threads import usable_cpus
from candle_vllm.server.settings.derived import load_engine
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import ModelOptions

_PROBE_TOKENS = 8  # prompt length of the request for start_s


@dataclass(frozen=True)
class _Times:
    """Times of one request, in seconds since the start of its round, and its numbers of tokens."""

    first: float
    last: float
    tokens: int
    first_tokens: int  # tokens in the first output


def bench(
    settings: ModelOptions,
    prompt_tokens: int = 1024,
    output_tokens: int = 128,
    concurrency: int = 1,
    repeat: int = 3,
    as_json: bool = False,
) -> int:
    """Measure, and print one JSON object or a table."""
    began = time.perf_counter()
    # All requests run at once, so that no time in a queue is measured.
    room: dict[str, Any] = {"max_queued_requests": max(concurrency, EngineConfig.max_queued_requests)}
    if concurrency > min(settings.max_num_seqs or 64, 64):
        room["max_num_seqs"] = max(concurrency, settings.max_num_seqs or 64)
    with load_engine(settings, enable_prefix_caching=False, **room) as engine:
        load_s = time.perf_counter() - began
        _check_room(engine, prompt_tokens + output_tokens, concurrency)
        shape = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "concurrency": concurrency}
        start_s, rounds = asyncio.run(_measure(engine, repeat, **shape))
        report = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        report |= {"load_s": load_s, "start_s": start_s, "peak_rss_mb": peak_rss_mb()}
        result = {name: round_figure(value) for name, value in report.items()} | _description(engine, shape, repeat)
    rows = "".join(f"{name:16} {value}\n" for name, value in result.items() if name != "versions")
    sys.stdout.write(json.dumps(result) + "\n" if as_json else rows)
    return 0


def _check_room(engine: InferenceEngine, length: int, concurrency: int) -> None:
    """Raise UsageError if a request exceeds the context, or if the KV cache cannot hold all requests at once."""
    longest, stats = engine.model_info.max_model_len, engine.stats()
    if length > longest:
        raise UsageError(
            f"{length} tokens, prompt and output together, exceed the longest request of {longest}:"
            " lower --prompt-tokens or --output-tokens"
        )
    needed = concurrency * -(-length // stats.block_size)
    if needed > stats.num_blocks > 0:  # an encoder has no blocks, and refuses the request
        raise UsageError(
            f"{concurrency} requests of {length} tokens need {needed} KV blocks at once, and there are"
            f" {stats.num_blocks}: lower --concurrency, --prompt-tokens or --output-tokens, or set --mem"
        )


async def _measure(
    engine: InferenceEngine, repeat: int, prompt_tokens: int, output_tokens: int, concurrency: int
) -> tuple[float | None, list[dict[str, float]]]:
    numbers = random.Random(0)  # noqa: S311 - the same prompts in every run, for comparison
    await _request(engine, _prompt(engine, numbers, _PROBE_TOKENS), 1, time.perf_counter())
    start_s = process_age()
    rounds = []
    for _ in range(1 + repeat):
        prompts = [_prompt(engine, numbers, prompt_tokens) for _ in range(concurrency)]
        began = time.perf_counter()
        times = await asyncio.gather(*(_request(engine, prompt, output_tokens, began) for prompt in prompts))
        rounds.append(figures(times, prompt_tokens))
    return start_s, rounds[1:]


def _prompt(engine: InferenceEngine, numbers: random.Random, length: int) -> list[int]:
    info = engine.model_info
    drawn = iter(lambda: numbers.randrange(info.vocab_size), None)
    return list(itertools.islice((token for token in drawn if token not in info.eos_token_ids), length))


async def _request(engine: InferenceEngine, prompt: list[int], output_tokens: int, began: float) -> _Times:
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    first, first_tokens, tokens = 0.0, 0, 0
    async for piece in engine.stream(prompt, params):
        if piece.error is not None:
            raise CandleVllmError(f"the engine failed: {piece.error}")
        if not tokens and piece.token_ids:
            first, first_tokens = time.perf_counter() - began, len(piece.token_ids)
        tokens += len(piece.token_ids)
    if tokens != output_tokens:
        raise CandleVllmError(f"the engine stopped after {tokens} of {output_tokens} tokens: nothing to compare")
    return _Times(first, time.perf_counter() - began, tokens, first_tokens)


def figures(times: list[_Times], prompt_tokens: int) -> dict[str, float]:
    """Return the figures of one round. The decode rate needs two tokens; for one token it is 0."""
    rates = [(each.tokens - each.first_tokens) / max(each.last - each.first, 1e-9) for each in times]
    return {
        "prefill_tok_s": prompt_tokens * len(times) / max(each.first for each in times),
        "decode_tok_s": statistics.median(rates),
        "output_tok_s": sum(each.tokens for each in times) / max(each.last for each in times),
        "ttft_s": statistics.median(each.first for each in times),
    }


def process_age() -> float | None:
    """Return the seconds since the start of this process (resolution 10 ms on Linux), or None if they are unknown."""
    if sys.platform != "linux":
        return time.time() - psutil.Process().create_time()
    try:
        # The name in field 2 may hold spaces and parentheses; field 22 is the start in ticks since boot.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def peak_rss_mb() -> float:
    """Return the peak resident memory of this process in MB of 2^20 bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / (1 << 20)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20)


def round_figure(value: float | None) -> float | None:
    """Round to four significant digits, because further digits would be noise."""
    return None if value is None else float(f"{value:.4g}")


def _description(engine: InferenceEngine, shape: dict[str, int], repeat: int) -> dict[str, Any]:
    info, versions = engine.model_info, {"python": platform.python_version()}
    for name in ("candle-vllm-core", "numba", "torch"):
        with contextlib.suppress(PackageNotFoundError):  # it is not installed
            versions[name] = version(name)
    return {
        **shape,
        "repeat": repeat,
        "model": info.name,
        "architecture": info.architecture,
        "quantization": info.quantization,
        "dtype": info.dtype,
        "device": info.device,
        "weight_mb": round_figure(info.weight_bytes / (1 << 20)),
        "cpus": len(usable_cpus()),
        "machine": platform.machine(),
        "versions": versions,
    }
