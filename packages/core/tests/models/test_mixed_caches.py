# SPDX-License-Identifier: MIT
"""Layers that differ in heads, head sizes and windows, and layers that read the keys and values of others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, SamplingParams, memory
from candle_vllm.core.assembly.stages import stage_of
from candle_vllm.core.engine.drafts.drafting import Drafter
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner
from candle_vllm.core.kernels.attention.rows import WindowedCache
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.memory import Room, plan_cache
from candle_vllm.core.models import registry
from packages.core.tests.models import mixed_caches
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
)

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


@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}], ids=["compiled", "eager"])
def test_cache_chunks_and_disk_change_no_answer(mixed: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    prompts = [some_tokens(64), [*some_tokens(48), 7, 8, 9], some_tokens(64)]
    alone = [answers(mixed, [prompt], enable_prefix_caching=False, **settings)[0] for prompt in prompts]
    kept = settings | {"prompt_cache_path": tmp_path}
    for more in ({}, {"max_num_batched_tokens": 20, "max_num_seqs": 4}):
        assert answers(mixed, prompts, **kept, **more) == alone


def test_each_layer_must_fit_the_type_of_the_cache(mixed: Path) -> None:
    with pytest.raises(ConfigError, match="heads of 16"):
        answers(mixed, [[1]], kv_cache_dtype="q8_0")


def test_a_stage_cannot_read_what_another_keeps(mixed: Path) -> None:
    line, checkpoint = mock.Mock(size=2, rank=0), mock.Mock(tensors={})
    with pytest.raises(ConfigError, match="read the keys and values of others"):
        stage_of("mixed", mixed_caches.FAMILY, load(mixed).config, checkpoint, line)


# ---- pages behind the window ----------------------------------------------------------------------------------------


def wipe(runner: Any, page: int) -> None:
    """Fills a page of the layers with a window with NaN."""
    caches = runner._own if isinstance(runner, RecordedRunner) else runner.caches
    for cache in caches:
        if isinstance(cache, WindowedCache) and isinstance(runner, EagerRunner):
            for part in cache:
                part[page] = float("nan")
        elif isinstance(cache, WindowedCache):
            stretch, place = divmod(page, cache.keys.shape[2])
            for part in cache:
                part.view(np.uint16)[stretch, :, place] = 0x7FC0


def windowed(source: Path, **settings: Any) -> InferenceEngine:
    """An engine whose free pages hold NaN."""
    engine = InferenceEngine(EngineConfig(**{"model": str(source), "block_size": 16, "max_num_seqs": 4} | settings))
    inner: Any = engine._engine
    pages, runner = inner.scheduler.windows, inner.runner
    take_back = pages._take_back

    def wiped(block: int) -> None:
        page = int(pages._page_of[block])
        take_back(block)
        wipe(runner, page)

    pages._take_back = wiped
    for page in (0, *pages._free_pages):
        wipe(runner, page)
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
        mock.patch.object(memory, "largest_window", return_value=0),
        InferenceEngine(EngineConfig(model=str(source), block_size=16, **settings)) as engine,
    ):
        inner: Any = engine._engine
        assert inner.scheduler.windows is None
        return [ask(engine, [prompt], **params)[0] for prompt in given]


FEATURES = ("hits", "chunks", "guesses", "preemption", "several answers", "a folder", "ranks")


@pytest.mark.one_of_each
@pytest.mark.parametrize("second", FEATURES)
@pytest.mark.parametrize("first", FEATURES)
def test_every_pair(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str) -> None:
    """On the compiled runner answers have the bits of those for which each block has a page."""
    both, given = {first, second}, long_prompts()
    params: dict[str, Any] = {"n": 2, "temperature": 0.8, "seed": 3} if "several answers" in both else {}
    ranks: dict[str, Any] = {"cpu_ranks": 2, "threads": 2} if "ranks" in both else {}
    guesses = {"method": "suffix", "num_speculative_tokens": 5} if "guesses" in both else {"method": "none"}
    expected = with_all_pages(mixed, given, ranks, **params)
    known = {tuple(prompt): found for prompt, found in zip(given, tokens_of(expected), strict=True)}
    monkeypatch.setattr(Drafter, "propose", lambda _, lives: guess(known, lives))
    settings: dict[str, Any] = {"max_num_batched_tokens": 20 if "chunks" in both else 64}
    if "preemption" in both:  # there is room for one prompt, and for ten pages of the layers with a window
        settings |= {"max_num_seqs": 3, "max_model_len": 256, "kv_cache_memory": 16 * 4096 + 10 * 6144}
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


def test_op_by_op_no_answer_is_another(mixed: Path, tmp_path: Path) -> None:
    given, settings = long_prompts()[:3], {"enforce_eager": True, "dtype": "f32"}
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
