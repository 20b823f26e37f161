# SPDX-License-Identifier: MIT
"""Layers that differ in heads, head sizes and windows, and layers that read the keys and values of others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.assembly.stages import stage_of
from candle_vllm.core.memory import Room, plan_cache
from candle_vllm.core.models import registry
from packages.core.tests.models import mixed_caches
from packages.core.tests.models.mixed_caches import plain_logits, write_mixed
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
