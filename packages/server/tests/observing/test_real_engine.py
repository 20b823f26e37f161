# SPDX-License-Identifier: MIT
"""The gauges and counters of a real engine: exact when it is idle, and nothing left after aborts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from candle_vllm.core import InferenceEngine, LoRARequest, SamplingParams
from candle_vllm.core.engine.step.request_watchers import RequestInfo
from candle_vllm.core.errors import RequestError
from candle_vllm.core.testing.toy_model import write_toy_model
from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.observing.model_metrics import EngineWatcher
from packages.server.tests.server_fakes import whole_answer
from tests.waiting import until


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceEngine]:
    folder = write_toy_model(tmp_path_factory.mktemp("toy"))
    with InferenceEngine(str(folder), device="cpu", max_model_len=256, kv_cache_memory=1 << 22) as engine:
        yield engine


def _slowly(_: Any, row: Any) -> Any:
    """A logits processor that leaves everybody else time before the answer is whole."""
    time.sleep(0.02)
    return row


async def test_gauges_return_to_zero_and_counters_conserve(engine: InferenceEngine) -> None:
    metrics = Metrics()
    before = engine.stats()
    watcher = EngineWatcher(engine, metrics.model("toy", 256))

    def reading() -> Any:
        return metrics.models()[0].read()

    params = SamplingParams(max_tokens=40, ignore_eos=True, n=2, temperature=0)
    prompt = list(range(10, 90))
    first = await whole_answer(engine, prompt, params, watcher=watcher)
    again = await whole_answer(engine, prompt, params, watcher=watcher)
    assert again.num_cached_tokens > 0
    assert reading().tokens.prompt_tokens == 160
    assert reading().tokens.completion_tokens == 160
    assert reading().tokens.cached_tokens == first.num_cached_tokens + again.num_cached_tokens
    slow = SamplingParams(max_tokens=150, ignore_eos=True, logits_processors=[_slowly])
    streams = [engine.stream(prompt, slow, watcher=watcher) for _ in range(4)]
    read = [len((await anext(stream)).token_ids) for stream in streams]
    await until(lambda: reading().engine.stats.num_running > 0)
    assert reading().engine.stats.num_free_blocks < reading().engine.stats.num_blocks
    for stream in streams:
        await stream.aclose()
    await until(lambda: reading().engine.stats.num_running == 0)
    idle = reading()
    assert idle.engine.stats.num_waiting == 0
    assert idle.engine.stats.num_free_blocks == idle.engine.stats.num_blocks
    made = engine.stats().generation_tokens - before.generation_tokens
    assert 160 + sum(read) <= idle.tokens.completion_tokens <= made  # what was delivered, whether it was taken or not
    assert (idle.finished["length"], idle.finished["abort"]) == (4, 4)
    assert idle.engine_sums.prompt_tokens - before.prompt_tokens == idle.tokens.prompt_tokens
    assert idle.engine_sums.cached_prompt_tokens - before.cached_prompt_tokens == idle.tokens.cached_tokens
    scheduled = idle.histograms["vllm:request_queue_time_seconds"]
    assert sum(scheduled.counts) == 2
    assert idle.histograms["vllm:request_inference_time_seconds"].total == pytest.approx(
        idle.histograms["vllm:request_prefill_time_seconds"].total
        + idle.histograms["vllm:request_decode_time_seconds"].total
    )
    whole = scheduled.total + idle.histograms["vllm:request_inference_time_seconds"].total
    assert whole <= idle.histograms["vllm:e2e_request_latency_seconds"].total < whole + 0.5


@pytest.mark.parametrize("operation", ["stream", "aembed", "ascore", "aclassify"])
@pytest.mark.parametrize("several", [False, True])
async def test_a_watcher_is_given_the_names_of_the_adapters(
    engine: InferenceEngine, operation: str, several: bool
) -> None:
    """Also of a request that the engine refuses: this engine has no adapters."""
    noted: list[RequestInfo] = []

    class Watcher(EngineWatcher):
        def begin(self, info: RequestInfo) -> Any:
            noted.append(info)
            return super().begin(info)

    watcher = Watcher(engine, Metrics().model("toy", 256))
    mix = [(LoRARequest("tone", 1, "tone"), 1.0), (LoRARequest("poems", 2, "poems"), 0.5)]
    lora: Any = mix if several else mix[0][0]
    inputs: Any = [("a", "b")] if operation == "ascore" else "a"
    with pytest.raises(RequestError):
        await getattr(engine, operation)(inputs, watcher=watcher, lora_request=lora)
    assert [info.adapters for info in noted] == [("tone", "poems") if several else ("tone",)]


async def test_vectors_of_a_model_that_generates_count_as_prompts(engine: InferenceEngine) -> None:
    metrics = Metrics()
    before = engine.stats().prompt_tokens
    watcher = EngineWatcher(engine, metrics.model("toy", 256))
    outputs = await engine.aembed([[1, 2, 3], [4, 5]], watcher=watcher)
    assert len(outputs) == 2
    reading = metrics.models()[0].read()
    assert reading.tokens.prompt_tokens == reading.engine_sums.prompt_tokens - before == 5
    assert reading.finished == {"stop": 2}


async def test_closing_an_engine_aborts_and_leaves_its_counters(tmp_path: Any) -> None:
    metrics = Metrics()
    inner = InferenceEngine(str(write_toy_model(tmp_path)), device="cpu", max_model_len=256, kv_cache_memory=1 << 22)
    watcher = EngineWatcher(inner, metrics.model("toy", 256))
    slow = SamplingParams(max_tokens=200, ignore_eos=True, logits_processors=[_slowly])
    stream = inner.stream([1, 2, 3], slow, watcher=watcher)
    await anext(stream)
    watcher.close()
    await asyncio.to_thread(inner.close)
    pieces = [piece async for piece in stream]
    assert pieces[-1].finish_reason == "abort"
    reading = metrics.models()[0].read()
    assert reading.engine is None
    assert reading.engine_sums.steps > 0
    assert dict(reading.finished) == {"abort": 1}
    assert reading.tokens.completion_tokens == 1 + sum(len(piece.token_ids) for piece in pieces)
