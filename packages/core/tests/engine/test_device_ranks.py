# SPDX-License-Identifier: MIT
"""Ranks whose steps are launched and captured, as GPUs have them: the answers of ranks that run op by op."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from candle_vllm.core import EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.devices import Device
from candle_vllm.core.engine.ranks.ranks import RankedRunner
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.kernels.collectives.token_shares import TokenShares
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.engine.late_stages import join
from packages.core.tests.engine.test_device_steps import CPU, EVERYTHING, SHORT, SIZE, asked, device_runner, drive, make
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import write_tiny
from packages.core.tests.thread_ranks import ThreadRanks, ToldRanks, in_threads
from tests.common_run import few

CONTEXT = 192
CONFIG = EngineConfig(model="toy")
CAPTURED = {"graphs": True, "prompts": 64}
LIMITS: dict[str, Any] = {"sequences": 8}


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    with exact_sums():
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedModel]:
    """Of two ranks, of which the first has two of three heads of keys."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": CONTEXT}
    folder = write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config("llama", **sizes))
    config = EngineConfig(model=str(folder), op_by_op=True)
    return in_threads(2, lambda ranks: load_model(config, Device("cpu"), lambda *_: None, ranks=ranks))


def together(parts: list[LoadedModel]) -> None:
    """The two parts meet anew: a test that failed may have left them apart."""
    shared, barrier = [None, None], threading.Barrier(2)
    for rank, part in enumerate(parts):
        join(part, ThreadRanks(rank, 2, shared, barrier))


def answers(parts: list[LoadedModel], params: list[SamplingParams], **settings: Any) -> dict[str, Any]:
    together(parts)
    return drawn(parts, params, **settings)


def drawn(
    parts: list[LoadedModel], params: list[SamplingParams], most: int | None = None, **settings: Any
) -> dict[str, Any]:
    """Of the first so many requests."""
    if settings:  # both are built, and capture, at the same time
        (first, _), (second, stream) = in_threads(
            2, lambda ranks: device_runner(parts[ranks.rank], **LIMITS, **settings)
        )
    else:
        stream = None
        first, second = (EagerRunner(part.decoder, 200, SIZE, CPU, torch.float32) for part in parts)
    beside: Any = ToldRanks(CONFIG, [(second, stream)])
    runner = RankedRunner(first, beside)
    try:
        return drive(make(parts[0], runner, **LIMITS, drafts=settings.get("drafts", 0)), asked(params)[:most], every=1)
    finally:
        beside.close()


@pytest.fixture(scope="module", params=few([EVERYTHING, SHORT], SHORT), ids=["everything", "short"])
def wanted(parts: list[LoadedModel], request: pytest.FixtureRequest) -> tuple[list[SamplingParams], dict[str, Any]]:
    """What is asked, and the answers op by op."""
    return request.param, answers(parts, request.param)


@pytest.mark.parametrize("settings", few([{"graphs": True}, CAPTURED, {"drafts": 24}], CAPTURED), ids=str)
def test_answers_are_those_op_by_op(
    parts: list[LoadedModel], wanted: tuple[list[SamplingParams], dict[str, Any]], settings: dict[str, Any]
) -> None:
    params, right = wanted
    assert answers(parts, params, **settings) == right


def test_tokens_are_sent_to_their_experts_in_steps_that_are_not_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with prompts; a captured step, and one that is measured, has all tokens on each rank."""
    row, some = ROWS["Qwen2-MoE"], SHORT[:4]
    write_tiny(tmp_path, row.model_type, **row.config | {"max_position_embeddings": CONTEXT})
    settings: dict[str, Any] = {"enable_expert_parallel": True, "tensor_parallel_size": 2, "op_by_op": True}
    config = EngineConfig(model=str(tmp_path), all2all_backend="all_to_all", **settings)
    parts = in_threads(2, lambda ranks: load_model(config, Device("cpu"), lambda *_: None, ranks=ranks))
    right = drawn(parts, some, 4)
    begun, sums, begin, add_up = list[bool](), list[bool](), TokenShares.begin, TokenShares.sum

    def begins(self: TokenShares, tokens: int, *, may_divide: bool) -> None:
        begun.append(may_divide)
        begin(self, tokens, may_divide=may_divide)

    def summed(self: TokenShares, y: Any) -> Any:
        found = add_up(self, y)
        sums.append(len(found) < len(y))
        return found

    monkeypatch.setattr(TokenShares, "begin", begins)
    monkeypatch.setattr(TokenShares, "sum", summed)
    (first, _), (second, stream) = in_threads(2, lambda ranks: device_runner(parts[ranks.rank], **LIMITS))
    assert not any(begun)
    beside: Any = ToldRanks(config, [(second, stream)])
    try:
        engine = make(parts[0], RankedRunner(first, beside), **LIMITS)
        assert drive(engine, asked(some)[:4], every=1) == right
    finally:
        beside.close()
    assert any(begun)
    assert any(sums)
