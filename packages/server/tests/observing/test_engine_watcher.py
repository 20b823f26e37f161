# SPDX-License-Identifier: MIT
"""EngineWatcher: what is counted is what clients were told, and every request is counted once."""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import time
from collections import Counter
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from candle_vllm.core.engine.outputs import FinishReason, RequestMetrics, TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest, LoRARequest
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.engine.step.request_watchers import RequestInfo, watched_submit
from candle_vllm.core.engine.step.stream import Receiver, RequestSink, TokenStream
from candle_vllm.core.errors import (
    CandleVllmError,
    EngineDeadError,
    EngineOverloadedError,
    InvalidParameterError,
    PromptTooLongError,
)
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai.answers import TokenCounts
from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.observing.model_metrics import EngineWatcher
from candle_vllm.server.observing.request_record import UsageCounts
from packages.server.tests.server_fakes import PacedEngine, watched, whole_answer
from tests.waiting import until

FIVE = SamplingParams(max_tokens=5)


async def _read(stream: Any) -> list[TokenOutput]:
    return [piece async for piece in stream]


def _usages(body: str) -> dict[str, Any]:
    """The usage of a whole answer or of the last chunk of a streamed one."""
    if not body.startswith("data:"):
        return json.loads(body)["usage"]
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: {")]
    return next(usage for event in reversed(events) if (usage := json.loads(event).get("usage")))


@pytest.mark.parametrize("stream", [False, True])
async def test_the_counters_are_the_sums_of_what_clients_were_told(noted: Any, stream: bool) -> None:
    setup = noted(PacedEngine(lambda prompt: prompt[-7:], num_cached_tokens=3))
    options = {"stream": stream, **({"stream_options": {"include_usage": True}} if stream else {})}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "A longer text"}], "n": 3}),
        ("/v1/completions", {"prompt": ["one prompt", "and a second"], "n": 2, "max_tokens": 4}),
        ("/v1/completions", {"prompt": "scored only", "max_tokens": 0, "echo": True, "logprobs": 1}),
    ]
    usages: Counter[str] = Counter()
    async with setup.client() as client:
        for path, body in bodies:
            answer = await client.post(path, json=body | options, headers={"x-key-number": "7"})
            assert answer.status_code == 200, answer.text
            usage = _usages(answer.text)
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            usages.update(prompt=usage["prompt_tokens"], completion=usage["completion_tokens"], cached=cached)
        if not stream:
            answer = await client.post("/v1/embeddings", json={"input": ["a text", "b"]})
            usages.update(prompt=answer.json()["usage"]["prompt_tokens"])
    samples = setup.samples()
    assert samples.sum("vllm:prompt_tokens_total") == usages["prompt"]
    assert samples.sum("vllm:generation_tokens_total") == usages["completion"] > 0
    assert samples.sum("vllm:prompt_tokens_cached_total") == usages["cached"] > 0
    assert samples.sum("vllm:request_success_total") == 1 + 3 + 4 + 1 + (0 if stream else 2)
    assert samples.sum("vllm:request_prompt_tokens_sum") == usages["prompt"]
    assert samples.sum("vllm:request_generation_tokens_sum") == usages["completion"]
    rows = {row.key: row.counts for row in setup.metrics.usage()}
    assert rows["7"].requests == len(bodies)  # two prompts are one request to the client
    assert sum(row.prompt_tokens for row in rows.values()) == usages["prompt"]
    assert rows["7"].completion_tokens == usages["completion"]
    assert rows["7"].cached_tokens == usages["cached"]
    assert set(rows) == ({"7"} if stream else {"7", "none"})


async def test_times_go_into_vllms_histograms(noted: Any) -> None:
    setup = noted(PacedEngine("abcdef", pause=0.02))
    await _read(setup.stream("prompt", SamplingParams(max_tokens=4, n=2)))
    samples = setup.samples()
    assert samples.sum("vllm:time_to_first_token_seconds_count") == 1
    assert 0.02 <= samples.sum("vllm:time_to_first_token_seconds_sum") < 1
    assert samples.sum("vllm:inter_token_latency_seconds_count") == 6  # between the four tokens of each sequence
    assert samples.sum("vllm:inter_token_latency_seconds_bucket", le="0.01") == 0
    for suffix in ("count", "sum"):
        same = samples.sum(f"vllm:inter_token_latency_seconds_{suffix}")
        assert samples.sum(f"vllm:time_per_output_token_seconds_{suffix}") == same
    # The scripted engine says: scheduled at once, the first token after 0.25 s, the end after 1 s.
    assert samples.sum("vllm:request_prefill_time_seconds_sum") == pytest.approx(0.25)
    assert samples.sum("vllm:request_decode_time_seconds_sum") == pytest.approx(0.75)
    assert samples.sum("vllm:request_inference_time_seconds_sum") == pytest.approx(1.0)
    assert samples.sum("vllm:request_queue_time_seconds_sum") < 0.1
    assert samples.sum("vllm:request_time_per_output_token_seconds_sum") == pytest.approx(2 * 0.75 / 3)
    assert samples.sum("vllm:e2e_request_latency_seconds_count") == 1
    assert samples.sum("vllm:request_params_n_sum") == 2
    assert samples.sum("vllm:request_params_max_tokens_sum") == 4
    assert samples.sum("vllm:request_max_num_generation_tokens_sum") == 4
    assert samples.sum("vllm:request_generation_tokens_count") == 2


async def test_tokens_of_a_running_request_are_seen_at_once(noted: Any) -> None:
    setup = noted(PacedEngine("abcdef"))
    stream = setup.stream("prompt", FIVE)
    for count in (1, 2, 3):
        await anext(stream)
        samples = setup.samples()
        assert samples.sum("vllm:generation_tokens_total") == count
        assert samples.sum("vllm:inter_token_latency_seconds_count") == count - 1
        assert samples.sum("vllm:num_requests_running") == 1
        assert samples.sum("vllm:request_success_total") == 0
    await stream.aclose()
    assert setup.samples().sum("vllm:generation_tokens_total") == 3


@pytest.mark.parametrize("way", ["closed", "closed twice", "never read", "dropped", "dropped early", "cancelled"])
async def test_a_stream_that_is_given_up_is_an_abort_once(noted: Any, way: str) -> None:
    setup = noted(PacedEngine("abcdef", first_pause=5.0 if way == "cancelled" else 0.0))
    stream = setup.stream("prompt", SamplingParams(max_tokens=5, n=2))
    read = 0
    if way in ("closed", "closed twice", "dropped"):
        await anext(stream)
        read = 1
    if way == "cancelled":
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await anext(stream)
        assert setup.samples().sum("vllm:request_success_total", finished_reason="abort") == 2
        await stream.aclose()
    elif way.startswith("dropped"):
        del stream
        gc.collect()
    else:
        for _ in range(2 if way == "closed twice" else 1):
            await stream.aclose()
    samples = setup.samples()
    assert samples.sum("vllm:request_success_total", finished_reason="abort") == 2
    assert samples.sum("vllm:request_success_total") == 2
    assert samples.sum("vllm:generation_tokens_total") == read
    assert samples.sum("vllm:e2e_request_latency_seconds_count") == 0
    assert [request.status for request in setup.requests] == ["aborted"]
    assert samples.sum("vllm:num_requests_running") == 0
    assert setup.samples().sum("vllm:request_success_total") == 2


async def test_a_sequence_that_had_finished_is_no_abort(noted: Any) -> None:
    answers = iter(["a", "long answer"])
    setup = noted(PacedEngine(lambda _: next(answers)))
    stream = setup.stream("prompt", SamplingParams(max_tokens=9, n=2))
    while not (await anext(stream)).finished:
        pass
    await stream.aclose()
    samples = setup.samples()
    assert samples.sum("vllm:request_success_total", finished_reason="stop") == 1
    assert samples.sum("vllm:request_success_total", finished_reason="abort") == 1


@pytest.mark.parametrize("failure", ["out of luck", EngineDeadError("gone"), CandleVllmError("broken")])
async def test_failures_are_errors_and_leave_nothing_running(noted: Any, failure: Any) -> None:
    setup = noted(PacedEngine("abcdef", fail_after=2, failure=failure))
    stream = setup.stream("prompt", SamplingParams(max_tokens=5))
    if isinstance(failure, str):
        assert (await _read(stream))[-1].error == failure
    else:
        with pytest.raises(type(failure)):
            await _read(stream)
    await stream.aclose()
    samples = setup.samples()
    assert samples.sum("vllm:request_success_total", finished_reason="error") == 1
    assert samples.sum("vllm:request_success_total") == 1
    assert samples.sum("vllm:generation_tokens_total") == 2
    assert samples.sum("vllm:num_requests_running") == 0
    assert setup.requests[0].status == "failed"
    assert setup.requests[0].failure == str(failure)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EngineOverloadedError("full"), "queue_full"),
        (PromptTooLongError("long", "prompt"), "invalid_request"),
        (EngineDeadError("dead"), "engine_dead"),
    ],
)
async def test_refused_requests_are_rejections_and_nothing_else(noted: Any, error: Exception, reason: str) -> None:
    setup = noted(PacedEngine(submit_error=error))
    with pytest.raises(type(error)):
        setup.stream("prompt", FIVE)
    samples = setup.samples()
    assert samples.sum("candle_vllm:admission_rejections_total", reason=reason, model_name="scripted") == 1
    assert samples.sum("candle_vllm:admission_rejections_total") == 1
    assert samples.sum("vllm:request_success_total") == 0
    assert setup.requests == []


async def test_an_engine_of_another_process_may_refuse_with_the_first_piece(noted: Any) -> None:
    setup = noted(PacedEngine(fail_after=0, failure=InvalidParameterError("wrong", "top_k")))
    with pytest.raises(InvalidParameterError):
        await _read(setup.stream("prompt", FIVE))
    samples = setup.samples()
    assert samples.sum("candle_vllm:admission_rejections_total", reason="invalid_request") == 1
    assert samples.sum("vllm:request_success_total") == 0


async def test_pieces_add_up_to_the_engines_answer(noted: Any) -> None:
    setup = noted(PacedEngine("abc"))
    output = await whole_answer(setup.engine, "prompt", SamplingParams(max_tokens=9, n=2), watcher=setup.watcher)
    plain = await ScriptedEngine("abc").agenerate("prompt", SamplingParams(max_tokens=9, n=2))
    assert [each.text for each in output.outputs] == [each.text for each in plain.outputs] == ["abc", "abc"]
    assert setup.samples().sum("vllm:generation_tokens_total") == sum(len(each.token_ids) for each in output.outputs)
    failing = noted(PacedEngine(fail_after=1, failure="no"))
    assert "no" in str((await _read(failing.stream("prompt", FIVE)))[-1].error)
    assert failing.samples().sum("vllm:request_success_total", finished_reason="error") == 1


async def test_vectors_and_scores(noted: Any) -> None:
    setup = noted()
    vectors = await setup.aembed(["one", "two", "three"])
    scores = await setup.ascore([("a", "b")])
    assert len(await setup.aembed("alone")) == len(await setup.aembed([1, 2, 3])) == 1
    tokens = sum(len(each.prompt_token_ids) for each in vectors) + scores[0].num_tokens + 6 + 3
    samples = setup.samples()
    assert samples.sum("vllm:prompt_tokens_total") == tokens
    assert samples.sum("vllm:request_success_total", finished_reason="stop") == 3 + 1 + 1 + 1
    assert samples.sum("vllm:generation_tokens_total") == 0
    assert samples.sum("vllm:request_generation_tokens_count") == 0
    assert [each.info.operation for each in setup.requests] == ["embed", "score", "embed", "embed"]
    for wrong in ([[]], 5):
        with pytest.raises(InvalidParameterError):
            await setup.aembed(wrong)
    failing = noted(PacedEngine(fail_after=0))
    with pytest.raises(CandleVllmError):
        await failing.aembed(["one", "two"])
    assert failing.samples().sum("vllm:request_success_total", finished_reason="error") == 2
    assert setup.samples().sum("candle_vllm:admission_rejections_total", reason="invalid_request") == 2


class _WithStats(PacedEngine):
    """An engine whose numbers are set."""

    numbers: EngineStats | None = None

    def stats(self) -> EngineStats:
        if self.closed:
            raise EngineDeadError("the engine is closed")
        return self.numbers or super().stats()


def _stats(**numbers: Any) -> EngineStats:
    return msgspec.structs.replace(ScriptedEngine().stats(), **numbers)


def test_gauges_are_the_engines_and_go_with_it(noted: Any) -> None:
    engine = _WithStats()
    engine.numbers = _stats(
        num_running=3, num_waiting=2, num_blocks=10, num_free_blocks=4, preemptions=5, steps=9,
        accepted_per_position=(4, 0),
    )  # fmt: skip
    setup = noted(engine, name="m", queued=lambda: 4)
    samples = setup.samples()
    labels = {"model_name": "m", "engine": "0"}
    assert samples.sum("vllm:num_requests_running", **labels) == 3
    assert samples.sum("vllm:num_requests_waiting", **labels) == 6
    assert samples.sum("candle_vllm:num_requests_queued", **labels) == 4
    assert samples.sum("vllm:kv_cache_usage_perc", **labels) == pytest.approx(0.6)
    assert samples.sum("vllm:cache_config_info", num_gpu_blocks="10", block_size="16", **labels) == 1
    assert samples.sum("candle_vllm:engine_up", **labels) == 1
    engine.alive = False  # its last numbers do not change any more
    samples = setup.samples()
    assert samples.has("vllm:num_requests_running")
    assert samples.sum("vllm:num_requests_running") == samples.sum("vllm:kv_cache_usage_perc") == 0
    assert samples.sum("vllm:num_requests_waiting") == 4
    assert samples.sum("candle_vllm:engine_up") == 0
    setup.watcher.close()
    setup.watcher.close()
    samples = setup.samples()
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info")
    assert not any(samples.has(f"vllm:{name}") for name in gauges)
    assert not samples.has("candle_vllm:engine_up")
    assert samples.sum("vllm:num_preemptions_total", **labels) == 5
    assert samples.sum("candle_vllm:engine_steps_total", **labels) == 9
    accepted = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [samples.sum(accepted, position=place, **labels) for place in "01"] == [4, 0]
    assert samples.has(accepted, position="1")


async def test_counters_go_on_when_a_model_is_loaded_again() -> None:
    metrics = Metrics()
    for load in (1, 2):
        engine = _WithStats("abc")
        counts = {"preemptions": 2, "prompt_tokens": 10, "cached_prompt_tokens": 4}
        engine.numbers = _stats(**counts, accepted_per_position=(3, 1, 0)[load - 1 :])
        watcher = watched(engine, metrics)
        await _read(engine.stream("prompt", FIVE, watcher=watcher))
        reading = metrics.models()[0].read()
        assert reading.engine is not None
        assert reading.tokens.completion_tokens == 4 * load
        assert (reading.engine_sums.preemptions, reading.engine_sums.cached_prompt_tokens) == (2 * load, 4 * load)
        watcher.close()
    reading = metrics.models()[0].read()
    assert reading.engine is None
    assert reading.engine_sums.prompt_tokens == 20
    assert reading.engine_sums.accepted_per_position == (4, 1, 0)


async def test_a_new_engine_takes_the_place_of_one_that_was_not_closed() -> None:
    metrics = Metrics()
    first, second = _WithStats(), _WithStats()
    first.numbers, second.numbers = _stats(num_running=5, preemptions=1), _stats(num_running=2, preemptions=1)
    old = watched(first, metrics)
    watched(second, metrics)
    old.close()
    reading = metrics.models()[0].read()
    assert reading.engine is not None
    assert reading.engine.stats is not None
    assert reading.engine.stats.num_running == 2
    assert reading.engine_sums.preemptions == 2


def test_encoders_have_no_cache_to_show(noted: Any) -> None:
    samples = noted(ScriptedEngine(tasks=("embed",))).samples()
    assert not samples.has("vllm:kv_cache_usage_perc")
    assert samples.has("vllm:num_requests_running")


async def test_an_observer_that_fails_hurts_nobody(noted: Any, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Any) -> None:
        raise OSError("disk full")

    setup = noted(None, broken)
    assert len(await _read(setup.stream("prompt", FIVE))) == 5
    assert "could not be reported" in caplog.text
    assert setup.samples().sum("vllm:request_success_total", finished_reason="length") == 1


async def test_many_requests_at_once_come_to_exact_sums(noted: Any) -> None:
    setup = noted(PacedEngine("abcdefgh", pause=0.001))

    async def one(number: int) -> int:
        stream = setup.stream("p" * (number + 1), SamplingParams(max_tokens=8))
        read = 0
        async for piece in stream:
            read += len(piece.token_ids)
            if number % 3 == 0 and read == 3:
                break
        await stream.aclose()
        return read

    scrapes = []

    async def scrape() -> None:
        while True:
            reading = await asyncio.to_thread(setup.metrics.models()[0].read)
            scrapes.append(reading.tokens.completion_tokens)
            await asyncio.sleep(0)

    scraping = asyncio.create_task(scrape())
    read = sum(await asyncio.gather(*[one(number) for number in range(60)]))
    scraping.cancel()
    samples = setup.samples()
    assert scrapes == sorted(scrapes)
    assert samples.sum("vllm:generation_tokens_total") == read == 20 * 3 + 40 * 8
    assert samples.sum("vllm:prompt_tokens_total") == sum(number + 2 for number in range(60))
    assert samples.sum("vllm:request_success_total", finished_reason="abort") == 20
    assert samples.sum("vllm:request_success_total", finished_reason="length") == 40
    assert samples.sum("vllm:num_requests_running") == 0
    assert len(setup.requests) == 60


@st.composite
def _interleaved(draw: st.DrawFn) -> list[TokenOutput]:
    """Pieces of a request with several sequences, as an engine may order them."""
    left = [draw(st.integers(1, 5)) for _ in range(draw(st.integers(1, 4)))]
    cached = [draw(st.integers(0, 9)) for _ in left]
    pieces = []
    while any(left):
        index = draw(st.sampled_from([place for place, count in enumerate(left) if count]))
        left[index] -= 1
        pieces.append(
            TokenOutput(
                request_id="r",
                index=index,
                token_ids=(1,) * draw(st.integers(1, 3)),
                num_prompt_tokens=9,
                num_cached_tokens=cached[index],
                finish_reason=None if left[index] else draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH])),
            )
        )
    return pieces


@given(_interleaved())
async def test_whatever_the_order_the_counters_are_the_usage(pieces: list[TokenOutput]) -> None:
    metrics, counts = Metrics(), TokenCounts()
    n = 1 + max(piece.index for piece in pieces)
    for piece in await _read(_stream(pieces, watched(ScriptedEngine(), metrics), SamplingParams(n=n))):
        counts.add(0, piece, len(piece.token_ids))
    usage, reading = counts.usage(final=True), metrics.models()[0].read()
    assert reading.tokens == UsageCounts(0, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
    assert reading.finished.total() == n
    assert sum(reading.histograms["vllm:inter_token_latency_seconds"].counts) == len(pieces) - n
    assert sum(reading.histograms["vllm:e2e_request_latency_seconds"].counts) == 1


async def test_a_client_that_goes_away_is_an_abort(noted: Any, serve_app: Any) -> None:
    setup = noted(PacedEngine(["a"] * 500, pause=0.01))
    served = serve_app(setup.app())
    async with (
        httpx.AsyncClient(base_url=served.url, trust_env=False) as client,
        client.stream("POST", "/v1/completions", json={"prompt": "p", "max_tokens": 400, "stream": True}) as answer,
    ):
        async for _ in answer.aiter_lines():
            break
    await until(lambda: setup.samples().sum("vllm:request_success_total", finished_reason="abort"))
    samples = setup.samples()
    assert 0 < samples.sum("vllm:generation_tokens_total") < 400
    assert samples.sum("vllm:num_requests_running") == 0


def _stream(pieces: list[TokenOutput], watcher: EngineWatcher | None, params: SamplingParams) -> TokenStream:
    """A stream of pieces that were made before, which costs next to nothing."""
    request = GenerationRequest(request_id="r", prompt=None, prompt_token_ids=[1], params=params)

    class Made(RequestSink):
        def start(self, receiver: Receiver[TokenOutput]) -> None:
            super().start(receiver)
            for piece in pieces:
                self.put(piece)

    with watched_submit(watcher, RequestInfo("r", "generate", [1], params, lambda ids, skip: "")) as watch:
        return TokenStream(request, Made(None, params.n, lambda _: None, watch))


async def test_counting_a_token_costs_little() -> None:
    count = 5000
    pieces = [TokenOutput(request_id="r", text="a", token_ids=(5,), num_prompt_tokens=3)] * count
    times = RequestMetrics(0.0, 0.0, 1.0, 2.0)
    pieces.append(TokenOutput(request_id="r", token_ids=(6,), finish_reason=FinishReason.STOP, metrics=times))
    watcher = watched(ScriptedEngine(), Metrics())

    async def seconds(watcher: EngineWatcher | None) -> float:
        start = time.thread_time()
        async for _ in _stream(pieces, watcher, FIVE):
            pass
        return time.thread_time() - start

    rounds = [(await seconds(None), await seconds(watcher)) for _ in range(15)]
    cost = statistics.median(with_it - without for without, with_it in rounds) / count
    assert cost < 4.5e-6  # measured 0.5 us on an idle core; three times the promise, for busy machines


def _mix(*names: str) -> list[tuple[LoRARequest, float]]:
    return [(LoRARequest(name), 1.0) for name in names]


@pytest.mark.parametrize(("most", "apart"), [(0, 0), (2, 2), (64, 4)])
async def test_requests_are_counted_by_adapter_and_names_are_bounded(noted: Any, most: int, apart: int) -> None:
    engine = _WithStats("abc")
    engine.numbers = _stats(max_adapters=most)
    setup = noted(engine)
    asked = [["tone"], ["poems"], [], ["tone", "poems"], ["late"], ["later"], ["tone"]]
    for names in asked:
        await _read(setup.stream("prompt", FIVE, lora_request=_mix(*names)))
    samples = setup.samples()
    expected = Counter(name for names in asked for name in names)
    shown = ["tone", "poems", "late", "later"][:apart]
    counts = {name: expected.pop(name) for name in shown} | ({"other": sum(expected.values())} if expected else {})
    assert samples.values("adapter") == counts.keys()
    for name, count in counts.items():
        labels = {"adapter": name, "model_name": "scripted", "engine": "0"}
        assert samples.sum("candle_vllm:lora_requests_total", **labels) == count
        assert samples.sum("candle_vllm:lora_prompt_tokens_total", **labels) == count * (1 + len("prompt"))
        assert samples.sum("candle_vllm:lora_generation_tokens_total", **labels) == count * 4
    setup.watcher.close()
    assert setup.samples().values("adapter") == counts.keys()  # counters stay when the model is unloaded


async def test_vectors_are_counted_by_adapter(noted: Any) -> None:
    engine = ScriptedEngine(tasks=("embed",))
    setup = noted(engine)
    await setup.aembed(["one", "three"], lora_request=_mix("tone"))
    await setup.aembed(["two"])
    samples = setup.samples()
    assert [each.info.adapters for each in setup.requests] == [("tone",), ()]
    assert samples.sum("candle_vllm:lora_requests_total") == 1
    assert samples.sum("candle_vllm:lora_prompt_tokens_total") == len("<one<three")


def test_adapters_are_told_while_they_are_on_and_labels_are_bounded() -> None:
    numbers: dict[str, Any] = {
        "num_running": 3, "num_waiting": 2, "num_blocks": 4, "num_free_blocks": 4, "block_size": 16,
        "prompt_tokens": 0, "cached_prompt_tokens": 0, "generation_tokens": 0, "finished": {}, "preemptions": 0,
        "steps": 1,
    }  # fmt: skip
    engine = ScriptedEngine("a")
    metrics = Metrics()
    watcher = EngineWatcher(engine, metrics.model("m", 100))

    def text() -> str:
        return generate_latest(metrics.registry).decode()

    engine.stats = lambda: EngineStats(**numbers)  # type: ignore[method-assign]
    assert "vllm:lora_requests_info{" not in text()
    many = {f"a{place:02d}": 40 - place for place in range(40)}
    numbers |= {
        "adapters": 50, "adapters_in_memory": 40, "adapter_bytes": 4096, "adapter_loads": 60, "adapter_evictions": 20,
        "adapter_load_failures": 1, "adapter_load_seconds": 2.5, "max_adapters": 64,
        "running_adapters": {"b": 2, "a": 1}, "waiting_adapters": many,
        "images_encoded": 7, "images_reused": 3, "image_failures": 2, "image_seconds": 1.5,
    }  # fmt: skip
    shown = text()
    waiting = ",".join(sorted(many)[:16]) + ",..."
    labels = f'engine="0",max_lora="64",model_name="m",running_lora_adapters="a,b",waiting_lora_adapters="{waiting}"'
    assert f"vllm:lora_requests_info{{{labels}}}" in shown
    counted = {
        "lora_adapters": 50, "lora_adapters_in_memory": 40, "lora_memory_bytes": 4096, "lora_loads_total": 60,
        "lora_load_failures_total": 1, "lora_load_seconds_total": 2.5, "lora_evictions_total": 20,
        "images_encoded_total": 7, "images_reused_total": 3, "image_failures_total": 2,
        "image_encoding_seconds_total": 1.5,
    }  # fmt: skip
    for name, value in counted.items():
        assert f'candle_vllm:{name}{{engine="0",model_name="m"}} {float(value)}' in shown
    watcher.close()
    assert 'candle_vllm:lora_loads_total{engine="0",model_name="m"} 60.0' in text()
    assert "vllm:lora_requests_info{" not in text()
