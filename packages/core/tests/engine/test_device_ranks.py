# SPDX-License-Identifier: MIT
"""Ranks whose steps are launched and captured, as GPUs have them: the answers of ranks that run op by op."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_device_steps import CPU, EVERYTHING, SIZE, asked, device_runner, drive, make

from candle_vllm.core import EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.devices import Device
from candle_vllm.core.engine.eager_runner import EagerRunner
from candle_vllm.core.engine.rank_line import Forward, ToldBatches, as_ints
from candle_vllm.core.engine.ranks import RankedRunner
from candle_vllm.core.testing.exact_sums import exact_sums
from candle_vllm.core.testing.thread_ranks import ThreadRanks, in_threads
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model

CONTEXT = 192


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    with exact_sums():
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedModel]:
    """Of two ranks, of which the first has two of three heads of keys."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": CONTEXT}
    folder = write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config("llama", **sizes))
    config = EngineConfig(model=str(folder), enforce_eager=True)
    return in_threads(2, lambda ranks: load_model(config, Device("cpu"), lambda *_: None, ranks=ranks))


class Beside:
    """The second rank, in a thread; told as over a line."""

    def __init__(self, runner: Any, stream: Any) -> None:
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.failed: Exception | None = None
        self._runner, self._stream = runner, stream
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        batches = ToldBatches()
        while (message := self._told.get()) is not None:
            try:
                if isinstance(message, Forward):
                    self._runner.forward(batches.batch(message), ())
                else:
                    self._runner.score(as_ints(message.rows))
                if self._stream is not None:
                    self._stream.mark().wait()
            except Exception as error:
                self.failed = error
                return

    def tell(self, message: Any) -> None:
        assert self.failed is None
        self._told.put(message)

    def close(self) -> None:
        self._told.put(None)
        self._thread.join(30)


def together(parts: list[LoadedModel]) -> None:
    """The two parts meet anew: a test that failed may have left them apart."""
    shared, barrier = [None, None], threading.Barrier(2)
    for rank, part in enumerate(parts):
        decoder: Any = part.decoder
        ranks = ThreadRanks(rank, 2, shared, barrier)
        for layer in decoder.layers:
            layer.attention.output.collective = layer.mlp.down.collective = ranks
        for table in (decoder.embed, decoder.head):
            table.share = table.share._replace(collective=ranks)


def answers(parts: list[LoadedModel], params: list[SamplingParams], **settings: Any) -> dict[str, Any]:
    together(parts)
    if settings:  # both are built, and capture, at the same time
        (first, _), (second, stream) = in_threads(2, lambda ranks: device_runner(parts[ranks.rank], **settings))
    else:
        stream = None
        first, second = (EagerRunner(part.decoder, 200, SIZE, CPU, torch.float32) for part in parts)
    beside: Any = Beside(second, stream)
    runner = RankedRunner(first, beside)
    try:
        return drive(make(parts[0], runner, drafts=settings.get("drafts", 0)), asked(params), every=3)
    finally:
        beside.close()


@pytest.mark.parametrize("settings", [{"graphs": True}, {"graphs": True, "prompts": 64}, {"drafts": 24}], ids=str)
def test_answers_are_those_op_by_op(parts: list[LoadedModel], settings: dict[str, Any]) -> None:
    assert answers(parts, EVERYTHING, **settings) == answers(parts, EVERYTHING)


@pytest.mark.parametrize(
    "settings", [{"graphs": True, "prompts": 64}, pytest.param({"graphs": True}, marks=pytest.mark.every_case)], ids=str
)
def test_stages_give_the_answers_of_all_layers(settings: dict[str, Any], tmp_path: Path) -> None:
    """What goes over a border is sent and received within what is captured."""
    folder = write_toy_model(tmp_path, toy_config("llama", max_position_embeddings=CONTEXT, num_hidden_layers=3))
    config = EngineConfig(model=str(folder), enforce_eager=True)

    def load(ranks: ThreadRanks | None) -> LoadedModel:
        return load_model(config, Device("cpu"), lambda *_: None, ranks=ranks)

    def built(ranks: ThreadRanks) -> tuple[Any, Any]:
        assert ranks.stages is not None
        return device_runner(stages[ranks.stages.rank], **settings)

    whole, stages = load(None), in_threads(1, load, 2)
    right = drive(make(whole, EagerRunner(whole.decoder, 200, SIZE, CPU, torch.float32)), asked(EVERYTHING), every=3)
    (first, _), (second, stream) = in_threads(1, built, 2)
    beside: Any = Beside(second, stream)
    try:
        assert drive(make(stages[0], RankedRunner(first, beside)), asked(EVERYTHING), every=3) == right
    finally:
        beside.close()
    assert first.key_caches[-1].numel() == second.key_caches[0].numel() == 0
