# SPDX-License-Identifier: MIT
"""The library's front door on a tiny random model: same tokens however a request is batched, cached or cut."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from candle_vllm.core import (
    CandleVllmError,
    ConfigError,
    EngineDeadError,
    EngineOverloadedError,
    FinishReason,
    InferenceEngine,
    InvalidParameterError,
    PromptTooLongError,
    RequestAbortedError,
    RequestError,
    SamplingParams,
)
from candle_vllm.core import progress as progress_module
from candle_vllm.core.engine.outputs import GenerationOutput, TokenOutput
from candle_vllm.core.remote import RemoteEngine
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.exact_sums import exact_sums
from tests.waiting import until, wait_for

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def _slowly(_: Any, row: Any) -> Any:
    """A logits processor that keeps an answer from being whole before a test is done with it."""
    time.sleep(0.02)
    return row


LONG = SamplingParams(max_tokens=400, ignore_eos=True, logits_processors=[_slowly])


def make(folder: Path, **settings: Any) -> InferenceEngine:
    return InferenceEngine(str(folder), threads=1, **settings)


def make_in_torch(folder: Path, **settings: Any) -> InferenceEngine:
    """Op by op: blocks of every size, and a runner whose steps a test can replace."""
    return make(folder, op_by_op=True, **settings)


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    """Tokens are compared between steps of different sizes."""
    with exact_sums():
        yield


@pytest.fixture(scope="module")
def engine(toy_model: Path) -> Iterator[InferenceEngine]:
    with make(toy_model, block_size=16) as made:
        yield made


def prompts() -> list[list[int]]:
    """16 prompts of different lengths; some share a beginning."""
    shared = [(7 * i) % 256 for i in range(40)]
    return [shared[: 10 + i] + [(i * 31 + j) % 256 for j in range(i)] for i in range(0, 32, 2)]


def params(index: int) -> SamplingParams:
    """A mix of greedy and seeded requests with all kinds of settings."""
    if index % 3 == 0:
        return GREEDY
    return SamplingParams(
        temperature=0.5 + index / 20,
        top_p=0.9 if index % 2 else 1.0,
        top_k=30 if index % 5 == 1 else 0,
        repetition_penalty=1.2 if index % 4 == 1 else 1.0,
        seed=index,
        max_tokens=20 + index % 5,
        ignore_eos=True,
    )


def tokens(outputs: list[GenerationOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(toy_model: Path) -> list[tuple[int, ...]]:
    """Every prompt by itself, without a prefix cache."""
    with make(toy_model, enable_prefix_caching=False) as engine:
        return [engine.generate([prompt], params(i), use_tqdm=False)[0].token_ids for i, prompt in enumerate(prompts())]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_prefix_caching": False, "block_size": 32},
        {"max_num_batched_tokens": 8, "max_num_seqs": 8},
        {"max_num_batched_tokens": 33, "max_num_seqs": 32, "block_size": 16},
        {"max_num_seqs": 1, "max_num_batched_tokens": 1, "block_size": 16},
    ],
    ids=str,
)
def test_batching_caching_and_chunking_change_no_token(
    toy_model: Path, alone: list[tuple[int, ...]], settings: dict[str, Any]
) -> None:
    count = 8 if settings.get("max_num_batched_tokens") == 1 else len(prompts())  # a step for each token takes long
    texts, every = prompts()[:count], [params(i) for i in range(count)]
    with make(toy_model, **settings) as engine:
        cold = engine.generate(texts, every, use_tqdm=False)
        warm = engine.generate(texts, every, use_tqdm=False)
        stats = engine.stats()
    assert tokens(cold) == alone[:count]
    assert tokens(warm) == alone[:count]
    assert stats.num_free_blocks == stats.num_blocks
    if settings.get("enable_prefix_caching", True):
        assert stats.cached_prompt_tokens > 0
        size = settings.get("block_size", 64)
    if settings.get("enable_prefix_caching", True) and stats.num_blocks >= 64:  # room to keep every prompt
        assert all(o.num_cached_tokens == (len(o.prompt_token_ids) - 1) // size * size for o in warm)


def test_the_tokens_of_each_step_are_counted(toy_model: Path) -> None:
    """A prompt of 20 tokens in chunks of 8, then one token at a time; two texts decode together."""
    with make(toy_model, max_num_batched_tokens=8, max_num_seqs=8, enable_prefix_caching=False) as engine:
        engine.generate([list(range(1, 21))], params_of(4), use_tqdm=False)
        counted = engine.stats().step_tokens
        assert (counted.counts[:2], sum(counted.counts), counted.total) == ([3, 3], engine.stats().steps, 23)
        engine.generate([[1, 2], [3, 4, 5]], params_of(3), use_tqdm=False)
        assert engine.stats().step_tokens.total == 23 + 5 + 4


def params_of(most: int) -> SamplingParams:
    return SamplingParams(max_tokens=most, temperature=0, ignore_eos=True)


def test_preemption_changes_no_token(toy_model: Path, alone: list[tuple[int, ...]]) -> None:
    config = toy_config()
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2  # bf16
    memory = per_token * 128
    with make(toy_model, block_size=16, kv_cache_memory=memory, max_model_len=120) as engine:
        outputs = engine.generate(prompts(), [params(i) for i in range(len(alone))], use_tqdm=False)
        assert engine.stats().preemptions > 0
    assert tokens(outputs) == alone


def test_streamed_pieces_add_up_to_the_whole(engine: InferenceEngine) -> None:
    asked = SamplingParams(temperature=0.9, seed=3, max_tokens=40, n=3, logprobs=2, ignore_eos=True)
    whole = engine.generate(["hello"], asked, use_tqdm=False)[0]

    async def pieces() -> dict[int, list[Any]]:
        found: dict[int, list[Any]] = {0: [], 1: [], 2: []}
        async for piece in engine.stream("hello", asked):
            found[piece.index].append(piece)
        return found

    for index, parts in asyncio.run(pieces()).items():
        output = whole.outputs[index]
        assert "".join(part.text for part in parts) == output.text
        assert tuple(token for part in parts for token in part.token_ids) == output.token_ids
        assert tuple(entry for part in parts for entry in part.logprobs or ()) == output.logprobs
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == output.finish_reason == FinishReason.LENGTH
    assert len({output.token_ids for output in whole.outputs}) == 3


@pytest.mark.parametrize(("least", "asked", "size"), [(1, 4, 4), (7, None, 7), (7, 4, 7), (2, 1000, 1000)])
@pytest.mark.parametrize("kind", [InferenceEngine, RemoteEngine])
def test_pieces_of_several_tokens(
    toy_model: Path, kind: type[InferenceEngine] | type[RemoteEngine], least: int, asked: int | None, size: int
) -> None:
    """The first token comes at once, the last tokens with the end; together they are the whole."""
    wanted = SamplingParams(
        temperature=0.9, seed=3, max_tokens=40, n=2, logprobs=2, ignore_eos=True, num_speculative_tokens=0
    )
    with kind(str(toy_model), threads=1, stream_interval=least) as engine:
        whole = engine.generate(["hello"], wanted, use_tqdm=False)[0].outputs

        async def pieces() -> list[TokenOutput]:
            given = replace(wanted, stream_interval=asked)
            return [piece async for piece in engine.stream("hello", given)]

        found = asyncio.run(pieces())
    for output in whole:
        parts = [piece for piece in found if piece.index == output.index]
        assert [len(part.token_ids) for part in parts] == [1, *[size] * (38 // size), 39 - 38 // size * size]
        assert "".join(part.text for part in parts) == output.text
        assert tuple(token for part in parts for token in part.token_ids) == output.token_ids
        assert tuple(entry for part in parts for entry in part.logprobs or ()) == output.logprobs
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [FinishReason.LENGTH]


@pytest.mark.parametrize("eager", [False, True])
def test_progress_with_a_prompt_is_reported_if_it_is_asked_for(toy_model: Path, eager: bool) -> None:
    """Once before any part has run, then after each part; the second prompt finds blocks of the first."""
    prompt = [5 + place % 40 for place in range(150)]
    with make(toy_model, block_size=16, max_num_batched_tokens=64, op_by_op=eager) as engine:
        for cached, parts in ((0, [0, 64, 128, 150]), (144, [144, 150])):
            asked = replace(GREEDY, prompt_progress=True, n=2)
            outputs = list(engine.generate_stream(prompt, asked))
            reports = [each for each in outputs if each.progress is not None]
            assert [each.progress.tokens for each in reports] == parts
            assert outputs[: len(reports)] == reports, "a token came before the end of the prompt"
            seconds = [each.progress.seconds for each in reports]
            assert seconds[0] == 0 < seconds[1]
            assert seconds == sorted(seconds)
            assert {(each.index, each.num_prompt_tokens, each.num_cached_tokens) for each in reports} == {
                (0, 150, cached)
            }
            assert not any(each.token_ids or each.text or each.finished for each in reports)
        assert all(each.progress is None for each in engine.generate_stream(prompt, GREEDY))


def test_progress_of_a_prompt_that_makes_way_is_not_taken_back(toy_model: Path) -> None:
    prompt = [5 + place % 40 for place in range(150)]
    with make(toy_model, max_num_batched_tokens=64, max_num_seqs=1, enable_prefix_caching=False) as engine:
        engine.add_request(prompt, replace(GREEDY, prompt_progress=True), priority=1)
        outputs = engine.step()
        engine.add_request([1, 2, 3], GREEDY)
        while engine.has_unfinished_requests:
            outputs += engine.step()
        assert engine.stats().preemptions == 1
    assert [each.progress.tokens for each in outputs if each.progress] == [0, 64, 128, 150]


def test_agenerate_equals_generate(engine: InferenceEngine) -> None:
    async def both() -> list[GenerationOutput]:
        return await asyncio.gather(*(engine.agenerate(prompt, params(i)) for i, prompt in enumerate(prompts()[:6])))

    wanted = engine.generate(prompts()[:6], [params(i) for i in range(6)], use_tqdm=False)
    assert tokens(asyncio.run(both())) == tokens(wanted)


def test_a_loop_of_your_own(toy_model: Path) -> None:
    with make(toy_model) as engine:
        wanted = engine.add_request([1, 2, 3], GREEDY)
        gone = engine.add_request([4, 5], GREEDY, priority=1)
        seen: list[int] = []
        while engine.has_unfinished_requests:
            for piece in engine.step():
                if piece.request_id == wanted:
                    seen += piece.token_ids
                else:
                    engine.abort(gone)
        engine.add_request([1], GREEDY, request_id="same")
        with pytest.raises(InvalidParameterError, match="'same' is in use"):
            engine.add_request([1], GREEDY, request_id="same")
        engine.abort("same")
        with pytest.raises(EngineDeadError, match="add_request and step"):
            engine.generate([[1]], use_tqdm=False)
    with make(toy_model) as engine:
        assert engine.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0].token_ids == tuple(seen)
        with pytest.raises(EngineDeadError, match="own thread"):
            engine.step()


def test_stop_strings_and_stop_tokens(engine: InferenceEngine) -> None:
    plain = engine.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]
    assert plain.finish_reason == FinishReason.LENGTH
    middle = plain.token_ids[9]
    first = plain.token_ids.index(middle)
    asked = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop_token_ids=[middle])
    stopped = engine.generate([[1, 2, 3]], asked, use_tqdm=False)[0]
    assert stopped.token_ids == plain.token_ids[: first + 1]
    assert stopped.outputs[0].stop_reason == middle
    assert stopped.finish_reason == FinishReason.STOP
    text = plain.text
    stop = text[3:6]
    asked = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=stop)
    cut = engine.generate([[1, 2, 3]], asked, use_tqdm=False)[0]
    assert cut.text == text[: text.index(stop)]
    assert cut.outputs[0].stop_reason == stop
    asked = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert engine.generate([[1, 2, 3]], asked, use_tqdm=False)[0].text == text[: text.index(stop) + len(stop)]


def test_prompt_logprobs_cover_the_prompt_whatever_the_cache_holds(toy_model: Path) -> None:
    prompt = list(range(100, 140))
    asked = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=3, logprobs=1, ignore_eos=True)
    with make(toy_model, block_size=4, max_num_batched_tokens=64) as engine:
        whole = engine.generate([prompt], asked, use_tqdm=False)[0]
        again = engine.generate([prompt], asked, use_tqdm=False)[0]
    with make(toy_model, block_size=4, max_num_batched_tokens=7, max_num_seqs=1) as engine:
        cut = engine.generate([prompt], asked, use_tqdm=False)[0]
    for output in (whole, again, cut):
        scores = output.prompt_logprobs
        assert scores is not None
        assert scores[0] is None
        assert len(scores) == len(prompt)
        assert [entry.chosen.token_id for entry in scores[1:] if entry] == prompt[1:]
        assert all(len(entry.top) == 3 for entry in scores[1:] if entry)
    last = [[round(e.chosen.logprob, 4) for e in (o.prompt_logprobs or ())[1:] if e] for o in (whole, again, cut)]
    assert last[0] == last[1] == last[2]


def test_a_prompt_that_is_not_to_be_cut_is_one_step(tmp_path: Path) -> None:
    long = write_toy_model(tmp_path, toy_config(max_position_embeddings=1024))
    asked = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    prompt, steps = [number % 200 for number in range(700)], {}
    for chunk in (None, 0):
        with make(long, max_num_batched_tokens=chunk, max_num_seqs=1, max_model_len=800) as engine:
            engine.generate([prompt], asked, use_tqdm=False)
            steps[chunk] = engine.stats().steps
    assert steps == {None: 3, 0: 2}


def test_dropping_a_stream_frees_its_blocks(engine: InferenceEngine) -> None:
    async def run() -> None:
        async for _ in (closed := engine.stream([1, 2, 3], LONG)):
            break
        await closed.aclose()
        never = engine.stream([1, 2, 3], LONG)
        del never
        await until(lambda: not engine.stats().num_running and not engine.stats().num_waiting)
        task = asyncio.create_task(engine.agenerate([5, 6], LONG))
        await until(lambda: engine.stats().num_running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    wait_for(lambda: not engine.stats().num_running and engine.stats().finished["abort"] >= 3)
    stats = engine.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks == stats.num_blocks


@pytest.mark.parametrize(
    ("prompt", "asked", "error", "message"),
    [
        ([], GREEDY, InvalidParameterError, "empty"),
        ([272], GREEDY, InvalidParameterError, "out of vocabulary: the model.s ids are 0 to 271"),
        ([-1], GREEDY, InvalidParameterError, "out of vocabulary"),
        ([1] * 512, GREEDY, PromptTooLongError, "512 tokens and this model's maximum context length is 512 tokens"),
        ([1] * 500, GREEDY, PromptTooLongError, "ask for at most 12"),
        ([1] * 8, SamplingParams(max_tokens=None, min_tokens=505), InvalidParameterError, "leaves 504 after"),
        ("x" * 100_000, GREEDY, PromptTooLongError, "100000 characters; this model's maximum context length is"),
        ([1], SamplingParams(allowed_token_ids=[999]), InvalidParameterError, "allowed_token_ids"),
        ([1.5], GREEDY, InvalidParameterError, "list of token ids"),
    ],
)
def test_wrong_requests_are_refused_and_the_neighbours_live_on(
    engine: InferenceEngine, prompt: Any, asked: SamplingParams, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.generate([[1], prompt], asked, use_tqdm=False)
    assert engine.is_alive
    assert len(engine.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0].token_ids) == 24


def test_a_full_queue_refuses_and_generate_feeds_it_slowly(toy_model: Path) -> None:
    with make(toy_model, max_queued_requests=2) as engine:
        assert len(engine.generate([[i] for i in range(7)], GREEDY, use_tqdm=False)) == 7

        async def crowd() -> None:
            streams = [engine.stream([1], LONG) for _ in range(2)]
            with pytest.raises(EngineOverloadedError, match="max_queued_requests"):
                engine.stream([1], GREEDY)
            for stream in streams:
                await stream.aclose()

        asyncio.run(crowd())


def test_a_request_id_in_use_is_refused(engine: InferenceEngine) -> None:
    async def run() -> None:
        first = engine.stream([1], LONG, request_id="same")
        with pytest.raises(InvalidParameterError, match="'same' is in use"):
            engine.stream([1], GREEDY, request_id="same")
        await first.aclose()

    asyncio.run(run())


def test_a_failing_step_ends_its_requests_only(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from candle_vllm.core import CandleVllmError
    from candle_vllm.core.engine.runners.eager_runner import EagerRunner

    with make_in_torch(toy_model) as engine:
        real = EagerRunner.run

        def fail(*_: Any) -> Any:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(EagerRunner, "run", fail)
        with pytest.raises(CandleVllmError, match="out of luck"):
            engine.generate([[1]], GREEDY, use_tqdm=False)
        monkeypatch.setattr(EagerRunner, "run", real)
        assert len(engine.generate([[1]], GREEDY, use_tqdm=False)[0].token_ids) == 24
        stats = engine.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert stats.finished["error"] == 1


@pytest.fixture
def nan_model(tmp_path: Path) -> Path:
    """A model whose token 270 turns everything to NaN."""
    folder = write_toy_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][270] = float("inf")
    save_file(weights, folder / "model.safetensors")
    return folder


def test_one_broken_request_ends_alone(nan_model: Path) -> None:
    """NaN in one request's prompt scores or logits, and a failure while its token is added, leave others alone."""

    async def run(engine: InferenceEngine) -> None:
        good = asyncio.create_task(engine.agenerate([1, 2, 3], GREEDY))
        scored = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=0)
        for params in (scored, GREEDY):
            with pytest.raises(CandleVllmError, match=r"NaN|finite|logits"):
                await engine.agenerate([270, 2, 3], params)
        assert len((await good).token_ids) == 24

    with make(nan_model) as engine:
        asyncio.run(run(engine))
        stats = engine.stats()
        assert stats.num_free_blocks == stats.num_blocks


def test_a_failure_while_settling_loses_no_piece(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from candle_vllm.core.engine.step.live import LiveSequence

    accept = LiveSequence.accept

    def fail_one(self: LiveSequence, sampled: Any) -> Any:
        if self.request.request_id == "bad" and self.num_output_tokens == 2:
            raise RuntimeError("boom")
        return accept(self, sampled)

    monkeypatch.setattr(LiveSequence, "accept", fail_one)
    with make(toy_model) as engine:
        engine.add_request([1], SamplingParams(max_tokens=3, ignore_eos=True), request_id="ends")
        engine.add_request([2], SamplingParams(max_tokens=9, ignore_eos=True), request_id="bad")
        engine.add_request([3], SamplingParams(max_tokens=9, ignore_eos=True), request_id="goes on")
        last = {}
        while engine.has_unfinished_requests:
            last |= {piece.request_id: piece for piece in engine.step() if piece.finished}
    assert {name: piece.finish_reason for name, piece in last.items()} == {
        "ends": FinishReason.LENGTH,
        "bad": FinishReason.ERROR,
        "goes on": FinishReason.LENGTH,
    }
    assert last["bad"].error_kind == "engine"


def test_who_loads_hears_how_far_it_is(toy_model: Path) -> None:
    heard: list[tuple[int, int]] = []
    with make(toy_model, on_progress=lambda done, total: heard.append((done, total))):
        done, totals = zip(*heard, strict=True)
        assert list(done) == sorted(done)
        assert set(totals) == {done[-1]}


def test_many_threads_may_make_the_first_call(toy_model: Path) -> None:
    asked = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    for _ in range(3):
        with make(toy_model) as engine, ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(engine.generate, [[i, 2, 3]], asked, use_tqdm=False) for i in range(8)]
            assert all(len(job.result()[0].token_ids) == 12 for job in jobs)


def test_threads_share_a_short_queue(toy_model: Path) -> None:
    asked = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with make(toy_model, max_queued_requests=2) as engine, ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(engine.generate, [[i]] * 5, asked, use_tqdm=False) for i in range(3)]
        assert [len(job.result()) for job in jobs] == [5, 5, 5]


def test_nobody_is_told_of_kernels_once_an_engine_is_there(engine: InferenceEngine) -> None:
    """Else one that is compiled later would draw a bar that nothing ends."""
    assert engine.is_alive
    assert progress_module._LISTENERS.get() == ()


def test_a_reused_request_id_is_not_aborted_by_its_former_owner(engine: InferenceEngine) -> None:
    async def run() -> None:
        ended = sum(engine.stats().finished.values())
        old = engine.stream([1], SamplingParams(max_tokens=1), request_id="x")
        await until(lambda: sum(engine.stats().finished.values()) > ended)
        assert engine._thread is not None
        await until(lambda: "x" not in engine._thread._clients)
        new = asyncio.create_task(engine.agenerate([2], GREEDY, request_id="x"))
        await asyncio.sleep(0)
        await old.aclose()
        assert len((await new).token_ids) == 24

    asyncio.run(run())


@pytest.mark.parametrize("wrong", [{"priority": "high"}, {"priority": 10**12}, {"request_id": ""}, {"request_id": 7}])
def test_a_wrong_priority_or_id_is_refused(engine: InferenceEngine, wrong: dict[str, Any]) -> None:
    async def run() -> None:
        with pytest.raises(InvalidParameterError):
            engine.stream([1], GREEDY, **wrong)

    asyncio.run(run())
    assert engine.is_alive


def test_parameters_that_allow_no_token_are_the_requests_fault(engine: InferenceEngine) -> None:
    asked = SamplingParams(max_tokens=4, allowed_token_ids=[65], bad_words=["A"])
    with pytest.raises(RequestError, match="no token may be chosen"):
        engine.generate("a", asked, use_tqdm=False)


def test_times_are_in_order(engine: InferenceEngine) -> None:
    times = engine.generate([list(range(200))], GREEDY, use_tqdm=False)[0].metrics
    assert times is not None
    assert times.first_scheduled_time is not None
    assert times.first_token_time is not None
    assert times.finished_time is not None
    assert times.arrival_time <= times.first_scheduled_time < times.first_token_time < times.finished_time


def test_the_first_step_is_part_of_the_prompts_time(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from candle_vllm.core.engine.runners.eager_runner import EagerRunner

    real = EagerRunner.run

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return real(*arguments)

    with make_in_torch(toy_model) as engine:
        monkeypatch.setattr(EagerRunner, "run", slow)
        times = engine.generate([[1]], GREEDY, use_tqdm=False)[0].metrics
    assert times is not None
    assert times.first_scheduled_time is not None
    assert times.first_token_time is not None
    assert times.first_token_time - times.first_scheduled_time >= 0.05


def test_an_aborted_generate_says_so(toy_model: Path) -> None:
    engine = make(toy_model)

    async def run() -> None:
        task = asyncio.create_task(engine.agenerate([1], LONG))
        await until(lambda: engine.stats().num_running)
        await asyncio.to_thread(engine.close)
        with pytest.raises((RequestAbortedError, EngineDeadError)):
            await task

    asyncio.run(run())


def test_a_forgotten_engine_is_cleaned_up(toy_model: Path) -> None:
    before = threading.active_count()
    engine = make(toy_model)
    engine.generate([[1]], GREEDY, use_tqdm=False)
    del engine
    gc.collect()
    wait_for(lambda: threading.active_count() <= before)


def test_numpy_prompts_are_welcome_and_nonsense_is_not(engine: InferenceEngine) -> None:
    wanted = engine.generate([[1, 2]], GREEDY, use_tqdm=False)[0].token_ids
    assert engine.generate([np.array([1, 2])], GREEDY, use_tqdm=False)[0].token_ids == wanted
    for wrong in (None, 3.5, {"a": 1}, [b"ab"], [{"a": 1}], [[True]]):
        with pytest.raises(InvalidParameterError):
            engine.generate(wrong, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match="sampling_params"):
        engine.generate([[1]], [{"temperature": 0}], use_tqdm=False)  # type: ignore[list-item]


def test_closing_leaves_no_thread_and_no_model(toy_model: Path) -> None:
    before = threading.active_count()
    engine = make(toy_model)
    engine.generate([[1]], GREEDY, use_tqdm=False)
    decoder = weakref.ref(engine._require()[1].decoder)
    engine.close()
    engine.close()
    gc.collect()
    assert threading.active_count() <= before
    assert decoder() is None
    assert not engine.is_alive
    with pytest.raises(EngineDeadError):
        engine.generate([[1]], use_tqdm=False)


def test_closing_ends_running_streams(toy_model: Path) -> None:
    async def run() -> FinishReason | None:
        engine = make(toy_model)
        stream = engine.stream([1], LONG)
        await anext(stream)
        await asyncio.to_thread(engine.close)
        last = None
        async for piece in stream:
            last = piece
        return last.finish_reason if last else None

    assert asyncio.run(run()) == FinishReason.ABORT


def test_a_seed_makes_unseeded_requests_reproducible(toy_model: Path) -> None:
    asked = SamplingParams(max_tokens=12, ignore_eos=True)
    runs = []
    for seed in (1, 1, 2):
        with make(toy_model, seed=seed) as engine:
            runs.append(tokens(engine.generate([[1], [1]], asked, use_tqdm=False)))
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_a_salt_keeps_caches_apart(toy_model: Path) -> None:
    prompt = list(range(64))
    with make(toy_model, block_size=8) as engine:

        def cached(salt: str | None) -> int:
            asked = SamplingParams(temperature=0.0, max_tokens=1, cache_salt=salt)
            return engine.generate([prompt], asked, use_tqdm=False)[0].num_cached_tokens

        assert [cached(None), cached("a"), cached("b"), cached("a"), cached(None)] == [0, 0, 0, 56, 56]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 513}, "max_model_len=512"),
        ({"kv_cache_memory": 1 << 45}, r"set kv_cache_memory=\d+ \(bytes\) or less"),
        (
            {"kv_cache_memory": 65536, "max_model_len": 512, "op_by_op": True},
            r"max_model_len=128 or kv_cache_memory=1048576 \(bytes\)",
        ),
        ({"max_num_batched_tokens": 4, "max_num_seqs": 8}, "max_num_batched_tokens=8 or max_num_seqs=4"),
        ({"block_size": 24}, "power of two"),
        ({"device": "cuda"}, "device='cpu'"),
        ({"attention_backend": "flash_attn"}, "attention_backend='flash_attn' needs a GPU"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' needs a GPU: on the CPU set 'q8_0'"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "'int8_per_token_head' needs a GPU: on the CPU set 'q8_0'"),
        ({"value_cache_dtype": "fp8"}, "value_cache_dtype='fp8' needs a GPU"),
        (
            {"kv_cache_dtype": "q8_0", "op_by_op": True},
            "'q8_0' needs the compiled kernels, .*: leave out op_by_op, or key and value types",
        ),
        ({"max_cudagraph_capture_size": 64}, "`max_cudagraph_capture_size` needs a GPU"),
        ({"kv_fraction": 1.5}, "between 0 and 1"),
        ({"dtype": "f64"}, "auto, f32, bf16, f16"),
        ({"max_num_seqs": 0}, "between 1 and 4096"),
    ],
)
def test_settings_that_cannot_work_name_a_value_that_does(
    toy_model: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(toy_model, **settings)


def test_little_memory_shortens_an_open_context(toy_model: Path) -> None:
    with make_in_torch(toy_model, kv_cache_memory=64 << 10, block_size=8) as engine:
        assert engine.model_info.max_model_len == 128
        with pytest.raises(PromptTooLongError, match="context length is 128"):
            engine.generate([[1] * 128], use_tqdm=False)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_half_precision_runs(toy_model: Path, dtype: str) -> None:
    with make(toy_model, dtype=dtype) as engine:
        assert engine.model_info.dtype == dtype
        assert len(engine.generate([[1, 2]], GREEDY, use_tqdm=False)[0].token_ids) == 24


def test_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "top_k": 7, "eos_token_id": [258, 256]}')
    with make(folder) as engine:
        defaults = {"temperature": 0.3, "top_k": 7, "top_p": 0.95, "min_p": 0.05}
        assert dict(engine.model_info.default_sampling) == defaults
        assert engine.default_sampling_params.top_k == 7
        assert set(engine.model_info.eos_token_ids) >= {256, 258}


def sampled(engine: InferenceEngine, params: SamplingParams | None) -> SamplingParams:
    """The parameters that a prompt runs with."""
    (request, _) = next(iter(engine._requests("prompts", [[1]], params, True)))
    return request.params


def test_what_nobody_says_is_llama_cpps_and_what_is_said_counts(engine: InferenceEngine) -> None:
    ours = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
    assert dict(engine.model_info.default_sampling) == ours
    for params in (None, SamplingParams(), SamplingParams(seed=3, max_tokens=16), engine.default_sampling_params):
        used = sampled(engine, params)
        assert {name: getattr(used, name) for name in ours} == ours
        assert used.max_tokens == 16
    given = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
    said = SamplingParams(max_tokens=16, **given)
    assert said != SamplingParams()  # the values of the class, but given
    assert sampled(engine, said) == said
    assert sampled(engine, replace(SamplingParams(top_k=0), n=2)).top_k == 0
    used = sampled(engine, SamplingParams(temperature=1.0))
    assert (used.temperature, used.top_k, used.repetition_penalty) == (1.0, 40, 1.0)
    assert {type(getattr(used, name)) for name in ("temperature", "top_p", "min_p", "repetition_penalty")} == {float}
    assert type(used.top_k) is type(used.max_tokens) is int


def test_chat_goes_on_to_the_end_and_generate_for_sixteen_tokens(engine: InferenceEngine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    endless = SamplingParams(temperature=0, ignore_eos=True)
    prompt = len(engine.chat(messages, GREEDY).prompt_token_ids)
    assert len(engine.chat(messages, endless).token_ids) == engine.model_info.max_model_len - prompt
    assert len(engine.chat(messages, replace(endless, max_tokens=16)).token_ids) == 16
    assert len(engine.generate([[1]], endless, use_tqdm=False)[0].token_ids) == 16


def test_chat_renders_the_models_template(engine: InferenceEngine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = engine.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    output = engine.chat(messages, GREEDY)
    assert output.prompt_token_ids[0] == 257
    assert engine.detokenize(engine.tokenize(text), skip_special_tokens=False) == text


def test_processors_of_the_users_own(engine: InferenceEngine) -> None:
    """They see the tokens so far and the model's own logits; forms and masks hold whatever they do."""
    seen: list[tuple[int, ...]] = []

    def only(token: int) -> Any:
        def process(tokens: tuple[int, ...], row: np.ndarray) -> np.ndarray:
            seen.append(tokens)
            assert row.dtype == np.float32
            assert np.isfinite(row).all()
            row[:] = -np.inf
            row[[token, 71]] = [5.0, 1.0]
            return row

        return process

    prompt = [1, 2, 3]
    (output,) = engine.generate([prompt], replace(GREEDY, max_tokens=3, logits_processors=[only(70)]))
    assert output.outputs[0].token_ids == (70, 70, 70)
    assert seen == [(1, 2, 3), (1, 2, 3, 70), (1, 2, 3, 70, 70)]
    masked = replace(GREEDY, max_tokens=2, logits_processors=[only(70)], allowed_token_ids=[71, 72])
    assert engine.generate([prompt], masked)[0].outputs[0].token_ids == (71, 71)


@pytest.mark.parametrize(
    ("process", "says"),
    [
        (lambda tokens, row: 1 / 0, "ZeroDivisionError"),
        (lambda tokens, row: row[:5], "float32 array of"),
        (lambda tokens, row: row.astype(np.float64), "float32 array of"),
        (lambda tokens, row: None, "float32 array of"),
        (lambda tokens, row: row * np.float32("nan"), "without NaN and infinity"),
        (lambda tokens, row: row + np.float32("inf"), "without NaN and infinity"),
        (lambda tokens, row: row - np.float32("inf"), "no token may be chosen"),
    ],
)
def test_a_processor_that_fails_fails_its_own_request(engine: InferenceEngine, process: Any, says: str) -> None:
    async def both() -> list[Any]:
        wrong = replace(GREEDY, logits_processors=[process])
        calls = [engine.agenerate([1, 2, 3], params) for params in (GREEDY, wrong, GREEDY)]
        return await asyncio.gather(*calls, return_exceptions=True)

    before, failed, after = asyncio.run(both())
    assert isinstance(failed, RequestError)
    assert says in str(failed)
    assert str(failed).startswith("logits_processors: ")
    assert before.outputs[0].token_ids == after.outputs[0].token_ids
    assert engine.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids == before.outputs[0].token_ids


def test_a_reset_prefix_cache_gives_nothing_to_later_prompts(toy_model: Path) -> None:
    with make(toy_model, block_size=4) as engine:
        prompt = prompts()[0]
        first, second = (engine.generate([prompt], params(0), use_tqdm=False)[0] for _ in range(2))
        engine.reset_prefix_cache()
        third = engine.generate([prompt], params(0), use_tqdm=False)[0]
        stats = engine.stats()
    assert first.num_cached_tokens == third.num_cached_tokens == 0
    assert second.num_cached_tokens > 0
    assert tokens([first]) == tokens([second]) == tokens([third])
    assert stats.num_free_blocks == stats.num_blocks


def test_a_share_of_a_gpu_is_said_to_count_for_nothing_on_the_cpu(
    toy_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make(toy_model, gpu_memory_utilization=0.5):
        pass
    (said,) = [record for record in caplog.records if "gpu_memory_utilization" in record.message]
    assert said.levelname == "WARNING"
    assert "on the CPU set `kv_fraction`" in said.message
