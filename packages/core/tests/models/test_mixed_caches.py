# SPDX-License-Identifier: MIT
"""Layers that differ in heads, head sizes and windows, and layers that read the keys and values of others."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, SamplingParams, memory
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.assembly.stages import stage_of
from candle_vllm.core.config import SpeculativeConfig
from candle_vllm.core.devices import CPU
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.window_pages import WindowedBlocks
from candle_vllm.core.engine.drafts.drafting import Drafter
from candle_vllm.core.engine.outputs import OutputCollector
from candle_vllm.core.engine.ranks.ranks import RankedRunner
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.runners.eager_runner import EagerRunner, StageRunner
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.engine.step.sequence import block_hashes
from candle_vllm.core.kernels.attention.rows import WindowedCache
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.loading.cache_specs import NO_STATES, WindowRoom, windows_of
from candle_vllm.core.memory import Room, plan_cache
from candle_vllm.core.models import registry
from packages.core.tests.engine.drafted import FreeTimes, same_times
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.models import mixed_caches
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.mixed_caches import plain_logits, write_mixed
from packages.core.tests.models.test_state_layers import guess
from packages.core.tests.models.tiny import (
    cuts,
    device_logits,
    eager_logits,
    load,
    recorded_logits,
    some_tokens,
    spread,
    write_tiny,
)
from packages.core.tests.thread_ranks import Meetings, MeetingStages, ThreadRanks, ToldRanks, in_threads
from tests.common_run import few

ELEMENTS = 2 * (2 * 32 + 64 + 2 * 16)  # of a token: the two layers that read others' keep none


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{registry.__package__}.mixed", mixed_caches)
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, "mixed"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed(tmp_path_factory.mktemp("models") / "mixed")


@pytest.mark.parametrize("chunks", cuts(), ids=["whole", "in chunks"])
def test_logits_are_those_of_the_definition(mixed: Path, chunks: list[int]) -> None:
    tokens = some_tokens()
    expected = plain_logits(mixed, tokens)
    assert spread(eager_logits(mixed, tokens, chunks), expected) < 1e-5
    assert spread(device_logits(mixed, tokens, chunks), expected) < 1e-5
    assert spread(recorded_logits(mixed, tokens, chunks), expected) < 2e-2  # its cache is bfloat16


def test_rows_of_a_prompt_end_where_keys_and_values_do(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last layer that writes any, a prompt has the rows alone whose logits are wanted, of the same bits."""
    given, counted = long_prompts(), dict[int | None, set[StepNumber]]()
    forward = mixed_caches.Block.__call__

    def noted(block: Any, x: Any, residual: Any, step: Any) -> Any:
        counted.setdefault(block.attention.shape.reads, set()).add(x.rows_from)
        return forward(block, x, residual, step)

    monkeypatch.setattr(mixed_caches.Block, "__call__", noted)
    found = []
    for narrows in (True, False):
        monkeypatch.setattr(mixed_caches.Mixed, "narrows", narrows)
        counted.clear()
        with windowed(mixed, max_num_batched_tokens=100, enable_prefix_caching=False) as engine:
            found.append(ask(engine, given))
        readers = {StepNumber.TOKENS, *[StepNumber.LOGIT_ROWS] * narrows}
        assert counted == {None: {StepNumber.TOKENS}, 0: readers, 1: readers}
    assert found[0] == found[1]


def test_memory_is_planned_for_what_each_layer_keeps(mixed: Path) -> None:
    plan = plan_cache(EngineConfig(model=str(mixed)), load(mixed).config, lambda _: 2, 4, Room(1 << 30, 0.5))
    assert plan.block_bytes == 64 * 2 * ELEMENTS
    shapes = "2 x 1 layers x 2 heads x 32 x 2 B + 2 x 1 layers x 1 heads x 64 x 2 B + 2 x 1 layers x 2 heads x 16 x 2 B"
    assert f"one token takes {shapes} = {2 * ELEMENTS} B" in plan.message


def answers(source: Path, prompts: list[list[int]], **settings: Any) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with InferenceEngine(EngineConfig(model=str(source), block_size=16, **settings)) as engine:
        return [tuple(each.outputs[0].token_ids) for each in engine.generate(prompts, params)]


@pytest.mark.parametrize("settings", [{}, {"op_by_op": True}], ids=["compiled", "eager"])
def test_cache_chunks_and_disk_change_no_answer(mixed: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    prompts = [some_tokens(64), [*some_tokens(48), 7, 8, 9], some_tokens(64)]
    alone = [answers(mixed, [prompt], enable_prefix_caching=False, **settings)[0] for prompt in prompts]
    kept = settings | {"prompt_cache_path": tmp_path}
    for more in ({}, {"max_num_batched_tokens": 20, "max_num_seqs": 4}):
        assert answers(mixed, prompts, **kept, **more) == alone


def test_each_layer_must_fit_the_type_of_the_cache(mixed: Path) -> None:
    with pytest.raises(ConfigError, match="the head size of this model, 16,"):
        answers(mixed, [[1]], kv_cache_dtype="q8_0")


def test_a_stage_cannot_read_what_another_keeps(mixed: Path) -> None:
    line, checkpoint = mock.Mock(size=2, rank=0), mock.Mock(tensors={})
    with pytest.raises(ConfigError, match="read keys, values or chosen positions of other layers"):
        stage_of("mixed", mixed_caches.FAMILY, load(mixed).config, checkpoint, line)


# ---- pages behind the window ----------------------------------------------------------------------------------------


def wipe(runner: Any, pool: int, page: int) -> None:
    """Fills a page of the layers of a pool with NaN, behind the steps that a device was given."""
    if isinstance(runner, DeviceRunner):
        runner._stream.run(lambda: wipe_now(runner.caches, pool, page))
    else:
        wipe_now(runner._own if isinstance(runner, RecordedRunner) else runner.caches, pool, page)


def wipe_now(caches: Any, pool: int, page: int) -> None:
    for cache in caches:
        if not isinstance(cache, WindowedCache) or cache.pool != pool:
            continue
        for part in cache:
            if isinstance(part, torch.Tensor):
                part[page : page + 1] = float("nan")
            else:
                stretch, place = divmod(page, part.shape[2])
                part.view(np.uint16)[stretch, :, place] = 0x7FC0


def wipe_free(blocks: Any, *runners: Any) -> None:
    """Has free pages hold NaN from now on; on a device page 0 is zeros, for tiles that begin before a window."""
    for number, pool in enumerate(blocks.pools):

        def wiped(block: int, number: int = number, pool: Any = pool, take_back: Any = pool._take_back) -> None:
            page = int(pool.page_of[block])
            take_back(block)
            for runner in runners:
                wipe(runner, number, page)

        pool._take_back = wiped
        for runner in runners:
            for page in (*[0] * (not isinstance(runner, DeviceRunner)), *pool.free_pages):
                wipe(runner, number, page)


def windowed(source: Path, **settings: Any) -> InferenceEngine:
    """An engine whose free pages hold NaN."""
    engine = InferenceEngine(EngineConfig(**{"model": str(source), "block_size": 16, "max_num_seqs": 4} | settings))
    inner: Any = engine._engine
    wipe_free(inner.scheduler.windows, inner.runner)
    return engine


def long_prompts() -> list[list[int]]:
    """Texts of many windows, with beginnings in common, that end with a block, within one and a token behind one."""
    text = [*some_tokens(70), *some_tokens(65)[::-1], *some_tokens(70)]
    return [text, [*text[:150], 7, 8, 9], text[:160], text[:161], text[:5], [*text[:40], *[1, 2, 3] * 20], text]


def ask(engine: InferenceEngine, given: list[list[int]], **params: Any) -> list[list[Any]]:
    """Tokens and log-probabilities of each answer, of each prompt."""
    every = SamplingParams(**{"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, "logprobs": 2} | params)
    return [
        [(tuple(each.token_ids), each.logprobs) for each in found.outputs] for found in engine.generate(given, every)
    ]


def tokens_of(answers: list[list[Any]]) -> list[list[Any]]:
    return [[tokens for tokens, _ in each] for each in answers]


def with_all_pages(source: Path, given: list[list[int]], settings: dict[str, Any], **params: Any) -> list[list[Any]]:
    """Answers of one prompt at a time, of which nothing is found or guessed, where each block has a page."""
    settings = settings | {"enable_prefix_caching": False, "speculative_config": {"method": "none"}}
    with (
        mock.patch.object(memory, "windows_of", return_value=[]),
        InferenceEngine(EngineConfig(model=str(source), block_size=16, **settings)) as engine,
    ):
        inner: Any = engine._engine
        assert inner.scheduler.windows is None
        return [ask(engine, [prompt], **params)[0] for prompt in given]


FEATURES = ("hits", "chunks", "guesses", "preemption", "several answers", "a folder", "ranks")


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("second", FEATURES)
@pytest.mark.parametrize("first", FEATURES)
def test_every_pair(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str) -> None:
    check(mixed, tmp_path, monkeypatch, {first, second})


def check(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both: set[str], page: int = 6144) -> None:
    """On the compiled runner answers have the bits of those for which each block has a page.

    `page` are the bytes of a page of all pools together.
    """
    mixed, given = source, long_prompts()
    params: dict[str, Any] = {"n": 2, "temperature": 0.8, "seed": 3} if "several answers" in both else {}
    ranks: dict[str, Any] = {"cpu_ranks": 2, "threads": 2} if "ranks" in both else {}
    guesses = {"method": "suffix", "num_speculative_tokens": 5} if "guesses" in both else {"method": "none"}
    expected = with_all_pages(mixed, given, ranks, **params)
    known = {tuple(prompt): found for prompt, found in zip(given, tokens_of(expected), strict=True)}
    monkeypatch.setattr(Drafter, "propose", lambda _, lives: guess(known, lives))
    settings: dict[str, Any] = {"max_num_batched_tokens": 20 if "chunks" in both else 64}
    if "preemption" in both:  # there is room for one prompt, and for ten pages of the layers with a window
        settings |= {
            "max_num_seqs": 3,
            "max_model_len": 256,
            "kv_cache_memory": (16 if page == 6144 else 0) * 4096 + 10 * page,
        }
    if "a folder" in both:
        settings["prompt_cache_path"] = tmp_path
    with windowed(mixed, speculative_config=guesses, **settings, **ranks) as engine:
        assert ask(engine, given, **params) == expected
        if "hits" in both:
            assert ask(engine, given[::-1], **params) == expected[::-1]
        counts = engine.stats()
    assert counts.cached_prompt_tokens
    assert bool(counts.preemptions) == ("preemption" in both)
    assert bool(counts.accepted_draft_tokens) == ("guesses" in both)
    assert counts.accepted_draft_tokens < counts.draft_tokens or "guesses" not in both
    if "a folder" in both:
        with windowed(mixed, speculative_config=guesses, **settings, **ranks) as again:
            assert ask(again, given[:1], **params) == expected[:1]
            assert again.stats().kept_blocks_read == 12


MANY_WINDOWS = (
    mixed_caches.Shape(4, 2, 32, window=40),
    mixed_caches.Shape(8, 1, 64, window=24),
    mixed_caches.Shape(2, 2, 16, window=9),
    mixed_caches.Shape(8, 2, 32, window=33, reads=0),
    mixed_caches.Shape(2, 1, 64, window=24, reads=1),
)


@pytest.fixture
def sliding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose layers all have windows, of three sizes."""
    monkeypatch.setattr(mixed_caches, "SHAPES", MANY_WINDOWS)
    return write_mixed(tmp_path / "sliding")


PAIRS = [{"hits", "guesses"}, {"chunks", "a folder"}, {"preemption", "hits"}, {"several answers", "ranks"}]


@pytest.mark.parametrize("both", few(PAIRS, *PAIRS[1:3]), ids=" and ".join)
def test_every_layer_may_have_a_window_of_its_own(
    sliding: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both: set[str]
) -> None:
    check(sliding, tmp_path, monkeypatch, both, page=10240)


def test_a_model_of_drafts_has_a_page_for_each_block(mixed: Path) -> None:
    """It stands elsewhere in the text, so that it cannot share the pages of the model for which it drafts."""
    given = long_prompts()
    expected = with_all_pages(mixed, given, {})
    drafts = {"method": "draft_model", "model": str(mixed), "num_speculative_tokens": 3}
    with windowed(mixed, speculative_config=drafts, max_num_batched_tokens=64) as engine:
        inner: Any = engine._engine
        drafter = inner._drafter
        drafter.times, drafter.model.times = same_times, FreeTimes()
        for _ in range(2):
            assert ask(engine, given) == expected
        counts = engine.stats()
        assert not len(drafter.model._runner.page_of)
    assert counts.accepted_draft_tokens
    assert counts.cached_prompt_tokens


def test_a_prompt_that_is_not_cut_has_its_pages(mixed: Path) -> None:
    given, settings = long_prompts(), {"max_num_batched_tokens": 0, "max_model_len": 256}
    expected = with_all_pages(mixed, given, settings)
    with windowed(mixed, **settings) as engine:
        inner: Any = engine._engine
        chunks, schedule = [], inner.scheduler.schedule

        def watched() -> Any:
            step = schedule()
            chunks.extend(run.count for run in step)
            return step

        inner.scheduler.schedule = watched
        assert ask(engine, given) == expected
        assert max(chunks) == len(given[0])
        pages = [len(pool.page_of) for pool in inner.scheduler.windows.pools]
    assert pages[0] > 0


def test_what_has_lost_its_page_comes_from_the_folder(mixed: Path, tmp_path: Path) -> None:
    """A prefix whose blocks are all there, but for the pages of its window, which others have taken."""
    given = [some_tokens(200), *([n, *some_tokens(150)] for n in range(1, 5))]
    expected = with_all_pages(mixed, given, {})
    few_pages = {"max_num_seqs": 1, "max_model_len": 512, "kv_cache_memory": 32 * 4096 + 8 * 6144}
    with windowed(mixed, prompt_cache_path=tmp_path, max_num_batched_tokens=20, **few_pages) as engine:
        inner: Any = engine._engine
        blocks = inner.scheduler.windows
        assert [ask(engine, [each])[0] for each in given[:2]] == expected[:2]
        hashes = block_hashes(given[0], 16, None)
        found = blocks.lookup(hashes)
        assert len(found) == 12, "all of its blocks are there"
        assert blocks.depth(found) < 12, "their pages are not"
        read, cached = engine.stats().kept_blocks_read, engine.stats().cached_prompt_tokens
        assert ask(engine, given[:1]) == expected[:1]
        assert 0 < engine.stats().kept_blocks_read - read <= 3, "the window of 24 tokens alone"
        assert engine.stats().cached_prompt_tokens - cached == 192


# ---- on a device, and in ranks --------------------------------------------------------------------------------------


def with_runners(source: Path, given: list[list[int]], make: Any, *, drafts: int = 0, **how: Any) -> Any:
    """Answers of an engine over runners, one for each rank; free pages of the first one hold NaN.

    Args:
        source: the model.
        given: prompts, of which one more comes in every other step.
        make: makes the model, the runners of all ranks and what the engine runs, given blocks and page pools.
        drafts: the most rows of drafts in a step.
        how: `blocks` of the cache, `pages` of each pool beyond what a sequence needs, and `flights`.
    """
    blocks, rows = how.get("blocks", 60), 40 * how.get("flights", 2)
    rooms = [WindowRoom(window, rows) for window in windows_of(load(source).config.cache_specs)]
    rooms = [replace(room, pages=room.blocks(16) + 1 + how.get("pages", 8)) for room in rooms]
    loaded, runners, runner = make(blocks, rooms)
    pool = WindowedBlocks(rooms, [each.data for each in runners[0].page_of], 16)
    wipe_free(pool, *runners[:1])
    scheduler = Scheduler(pool, 4, 40, draft_rows=drafts, in_flight=runner.in_flight)
    drafter = Drafter(SpeculativeConfig(num_speculative_tokens=5), drafts) if drafts else None
    if drafter is not None:
        drafter.times = same_times
    built = Engine(runner, scheduler, preparation_for(loaded, 256, seed=0), drafter)
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    waiting = [
        GenerationRequest(request_id=str(n), prompt_token_ids=each, params=greedy) for n, each in enumerate(given)
    ]
    requests = {each.request_id: OutputCollector(each) for each in waiting}
    for step in range(3000):
        if waiting and step % 2:
            built.add(built.prepare(waiting.pop(0)))
        for piece in built.step():
            requests[piece.request_id].add(piece)
        if not waiting and not built.has_work:
            break
    built.close()
    return [tuple(request.result().outputs[0].token_ids) for request in requests.values()], built.stats()


def device_parts(source: Path, **how: Any) -> Any:
    """See `with_runners`: one rank, on a stream that is as late as one may be."""

    def make(blocks: int, rooms: list[WindowRoom]) -> Any:
        loaded, stream = load(source, op_by_op=True, dtype="f32"), LazyStream()
        limits = DeviceLimits(40, 4 + how.get("rows", 0), 16, 16)
        keys: dict[str, Any] = {"graphs": how.get("graphs", True), "captured_prompts": how.get("captured", 0)}
        runner = DeviceRunner(loaded.decoder, limits, stream, torch.float32, overlaps=not how.get("rows"), **keys)
        for work in runner.largest_steps():
            work()
        runner.allocate(blocks, NO_STATES, rooms)
        return loaded, [runner], runner

    return make


DEVICE: list[dict[str, Any]] = [
    {}, {"graphs": False}, {"captured": 40}, {"rows": 12, "few": True}, {"blocks": 20, "pages": 4},
    {"sliding": True, "few": True},
]  # fmt: skip


@pytest.mark.parametrize(
    "more",
    few(DEVICE, DEVICE[3]),
    ids=["graphs", "plain", "captured prompts", "guesses", "preemption", "three windows"],
)
def test_the_runner_of_a_gpu_gives_the_same(
    mixed: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    source = request.getfixturevalue("sliding") if more.get("sliding") else mixed
    given, rows = long_prompts(), more.get("rows", 0)
    if more.get("few"):  # sums that are exact take long
        given = [given[0][:70], [*given[0][:40], 7, 8, 9], given[0][:70]]
    with exact_sums():
        expected = tokens_of(with_all_pages(source, given, {"op_by_op": True, "dtype": "f32"}, max_tokens=24))
        known = {tuple(prompt): found for prompt, found in zip(given, expected, strict=True)}
        monkeypatch.setattr(Drafter, "propose", lambda _, lives: guess(known, lives))
        found, counts = with_runners(source, given, device_parts(source, **more), drafts=rows, **more)
    assert [[each] for each in found] == expected
    assert counts.cached_prompt_tokens
    assert bool(counts.accepted_draft_tokens) == bool(rows)
    assert bool(counts.preemptions) == ("blocks" in more)


def ranked_parts(source: Path, size: int, stages: int, *, gpu: bool) -> Any:
    """See `with_runners`: so many ranks of each stage, threads that are told what processes are told."""

    def make(blocks: int, rooms: list[WindowRoom]) -> Any:
        config = EngineConfig(model=str(source), op_by_op=True, dtype="f32", block_size=16)
        meetings = [Meetings() for _ in range(size)]

        def build(ranks: ThreadRanks) -> tuple[Any, Any, LazyStream | None]:
            part: Any = load_model(config, CPU, lambda *_: None, ranks=ranks)
            part.decoder.prepare(256)
            if not gpu:
                kind = EagerRunner if ranks.stages is None else StageRunner
                return (
                    part,
                    kind(part.decoder, blocks, 16, CPU, torch.float32, None, None, None, NO_STATES, rooms),
                    None,
                )
            if ranks.stages is not None:
                part.decoder.stage.line = MeetingStages(ranks.stages.rank, stages, meetings[ranks.rank])
            stream, limits = LazyStream(), DeviceLimits(40, 4, 16, 16)
            runner = DeviceRunner(part.decoder, limits, stream, torch.float32, captured_prompts=40, overlaps=False)
            for work in runner.largest_steps():
                work()
            runner.allocate(blocks, NO_STATES, rooms)
            while stream.pending:  # a device runs what nobody waits for, too
                stream.progress()
            return part, runner, stream

        (loaded, first, _), *others = in_threads(size, build, stages)
        told: Any = ToldRanks(replace(config, tensor_parallel_size=size), [other[1:] for other in others])
        return loaded, [first, *(other[1] for other in others)], RankedRunner(first, told)

    return make


RANKS = [(2, 1, False), (1, 2, False), (1, 2, True), (2, 1, True)]


@pytest.mark.parametrize(("size", "stages", "gpu"), few(RANKS, *RANKS[2:3]))
def test_ranks_and_stages_free_pages_too(tmp_path: Path, size: int, stages: int, gpu: bool) -> None:
    row = ROWS["Gemma-3"]
    write_tiny(tmp_path, row.model_type, **{**row.config, "max_position_embeddings": 256})
    given = long_prompts()[:4]
    expected = tokens_of(with_all_pages(tmp_path, given, {"op_by_op": True, "dtype": "f32"}, max_tokens=24))
    parts = ranked_parts(tmp_path, size, stages, gpu=gpu)
    found, counts = with_runners(tmp_path, given, parts, flights=stages)
    assert [[each] for each in found] == expected
    assert counts.cached_prompt_tokens


def test_op_by_op_no_answer_is_another(mixed: Path, tmp_path: Path) -> None:
    given, settings = long_prompts()[:3], {"op_by_op": True, "dtype": "f32"}
    expected = tokens_of(with_all_pages(mixed, given, settings, max_tokens=40))
    settings |= {"max_num_batched_tokens": 20, "prompt_cache_path": tmp_path}
    few = {"max_num_seqs": 3, "max_model_len": 256, "kv_cache_memory": 2 * (16 * 4096 + 10 * 6144)}
    for more in ({}, few):
        with windowed(mixed, **settings, **more) as engine:
            assert tokens_of(ask(engine, given, max_tokens=40)) == expected
            counts = engine.stats()
        assert counts.cached_prompt_tokens
        assert bool(counts.preemptions) == bool(more)


def test_after_sleep_nothing_of_before_is_found(mixed: Path) -> None:
    given = long_prompts()[:2]
    expected = with_all_pages(mixed, given, {})
    with windowed(mixed, max_num_batched_tokens=64) as engine:
        for _ in range(2):
            assert ask(engine, given) == expected
            engine.sleep()
            engine.wake_up()
