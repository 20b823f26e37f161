# SPDX-License-Identifier: MIT
"""Adapters in a GPU's steps: answers are those of layers that run op by op, in captured steps and others."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core import EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.devices import Device
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.outputs import OutputCollector
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.engine.step.batch import AdapterRows
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.errors import AdapterError
from candle_vllm.core.kernels.lora import Delta, FittedAdapter, PackedAdapter, Place
from candle_vllm.core.kernels.lora.device import DeviceAdapters
from candle_vllm.core.kernels.lora.pack import pack_adapter
from candle_vllm.core.kernels.lora.reference import EagerAdapters
from candle_vllm.core.layers.adapters import number_places
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.engine.late_stages import Staged
from packages.core.tests.kernels.lora_field import fitted, low_rank, stored
from packages.core.tests.lazy_stream import LazyStream

CPU = torch.device("cpu")
SIZE, CONTEXT, BLOCKS, SEQUENCES = 16, 96, 60, 2
Places = Mapping[str, Sequence[Place]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = toy_config("qwen2", max_position_embeddings=CONTEXT)  # whose q, k and v have biases
    return write_toy_model(tmp_path_factory.mktemp("toy") / "toy", config)


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load_model(EngineConfig(model=str(model), op_by_op=True), Device("cpu"), lambda *_: None)


def made(places: Places, seed: int, rank: int, *, dora: bool = False, tables: bool = False) -> FittedAdapter:
    """A change of every matrix of the layers; of the head and the table, too, where asked for."""
    rng = np.random.default_rng(seed)
    deltas: dict[str, dict[str, Delta]] = {}
    for path, of in places.items():
        for place in of:
            for name, (_, begin, end) in place.parts.items():
                if path in ("embed", "head") and not tables:
                    continue
                rows, more = end - begin, dict[str, Any]()
                if dora and path not in ("embed", "head"):
                    more["column_scale"] = (1 + rng.standard_normal(rows) / 8).astype(np.float32)
                    more["bias"] = rng.standard_normal(rows).astype(np.float32) / 8
                delta = low_rank(rng, rows, place.columns, rank, **more)
                if path == "head":
                    delta = Delta(full=stored(rng.standard_normal((rows, place.columns))))
                deltas.setdefault(path, {})[name] = delta
    return fitted(deltas)


def engine_of(loaded: LoadedModel, runner: ModelRunner) -> Engine:
    scheduler = Scheduler(BlockManager(BLOCKS, SIZE), SEQUENCES, 40, in_flight=runner.in_flight)
    return Engine(runner, scheduler, preparation_for(loaded, CONTEXT, seed=0))


def answers(engine: Engine, asked: Sequence[Sequence[tuple[PackedAdapter, float]]]) -> list[Any]:
    """Of a prompt for each, begun one step after the other."""
    prompts = [list(range(3 + number, 8 + 2 * number)) for number in range(len(asked))]
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=3, logprobs=1, ignore_eos=True, prompt_logprobs=0 if n == 1 else None
        )
        for n in range(len(asked))
    ]
    waiting = [
        GenerationRequest(request_id=str(n), prompt_token_ids=prompts[n], params=params[n]) for n in range(len(asked))
    ]
    collectors = {request.request_id: OutputCollector(request) for request in waiting}
    while waiting or engine.has_work:
        if waiting:
            lives = engine.prepare(request := waiting.pop(0))
            for live in lives:
                live.sequence.adapters = tuple(asked[int(request.request_id)])
            engine.add(lives)
        for piece in engine.step():
            collectors[piece.request_id].add(piece)
    outputs = [collectors[str(number)].result() for number in range(len(asked))]
    return [
        (
            output.token_ids,
            [pytest.approx(each.chosen.logprob, abs=2e-4) for each in output.outputs[0].logprobs or ()],
            [pytest.approx(each.chosen.logprob, abs=2e-4) for each in output.prompt_logprobs or () if each],
        )
        for output in outputs
    ]


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> Any:
    """Answers of layers that run op by op, for adapters by what they were made of."""
    places = number_places(loaded.decoder, added := EagerAdapters())
    packed: dict[int, PackedAdapter] = {}

    def answer(asked: Sequence[Sequence[tuple[FittedAdapter, float]]]) -> list[Any]:
        number_places(loaded.decoder, added)
        for own in asked:
            for one, _ in own:
                packed.setdefault(id(one), pack_adapter(one, places, "F32", compiled=False))
        runner = EagerRunner(loaded.decoder, BLOCKS, SIZE, CPU, torch.float32, added)
        mine = [[(packed[id(one)], scale) for one, scale in own] for own in asked]
        return answers(engine_of(loaded, runner), mine)

    return answer


def built(
    loaded: LoadedModel, slots: int, stream: LazyStream | None = None
) -> tuple[DeviceRunner, LazyStream, DeviceAdapters]:
    stream = LazyStream() if stream is None else stream
    every = [place for of in number_places(loaded.decoder).values() for place in of]
    added = DeviceAdapters(stream, every, torch.float32, slots=slots, rank=24, rows=SEQUENCES, memory=1 << 30)
    number_places(loaded.decoder, added)
    limits = DeviceLimits(40, SEQUENCES, -(-CONTEXT // SIZE), SIZE)
    runner = DeviceRunner(loaded.decoder, limits, stream, torch.float32, finite_cache=True, adapters=added)
    runner.allocate(BLOCKS)
    return runner, stream, added


def on_device(
    loaded: LoadedModel, asked: Sequence[Sequence[tuple[FittedAdapter, float]]], slots: int = 2
) -> tuple[list[Any], LazyStream, DeviceAdapters]:
    places = number_places(loaded.decoder)
    runner, stream, added = built(loaded, slots)
    packed = {
        id(one): pack_adapter(one, places, "F32", compiled=False, packed=added.packed)
        for own in asked
        for one, _ in own
    }
    replayed = stream.replayed
    found = answers(engine_of(loaded, runner), [[(packed[id(one)], scale) for one, scale in own] for own in asked])
    stream.replayed -= replayed
    return found, stream, added


@pytest.mark.every_case
def test_adapters_of_products_are_in_captured_steps(loaded: LoadedModel, expected: Any) -> None:
    """Several ranks, DoRA and biases among them, beside rows without; more of them than slots, in turns."""
    places = number_places(loaded.decoder)
    one, two, three = made(places, 1, 8), made(places, 2, 20, dora=True), made(places, 3, 1)
    asked = [[(one, 1.0)], [(two, 0.5)], [], [(three, 1.0)]]
    wanted = expected(asked)
    found, stream, added = on_device(loaded, asked, slots=2)
    assert found == wanted
    assert stream.replayed > 4
    assert len(added._held) == 2
    assert expected([[]]) != expected([[(one, 1.0)]]), "adapters say something"


@pytest.mark.every_case
def test_adapters_of_stages_are_in_captured_steps_in_flight(
    model: Path, loaded: LoadedModel, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage has its part of what is told by number; the head's is added when a step lands."""
    turn, run_next = threading.Lock(), LazyStream.run_next

    def in_turn(stream: LazyStream) -> bool:
        with turn:  # Triton's interpreter is for one thread at a time
            return run_next(stream)

    monkeypatch.setattr(LazyStream, "run_next", in_turn)
    places = number_places(loaded.decoder)
    one, two, three = made(places, 1, 8), made(places, 2, 20, dora=True), made(places, 3, 1, tables=True)
    asked = [[(one, 1.0)], [(two, 0.5)], [], [(three, 1.0)]]
    wanted = expected(asked)

    def load(ranks: Any) -> LoadedModel:
        config = EngineConfig(model=str(model), op_by_op=True)
        return load_model(config, Device("cpu"), lambda *_: None, ranks=ranks)

    with Staged(load, lambda part, stream: built(part, 2, stream)[0], 2) as staged:
        parts, packed = staged.parts, dict[int, PackedAdapter]()
        runners = [staged.first, *(each.runner for each in staged.others)]
        for number, adapter in enumerate((one, two, three), 1):
            for rank, (part, runner) in enumerate(zip(parts, runners)):
                assert runner.adapters is not None
                there = number_places(part.decoder, runner.adapters)
                deltas = {path: of for path, of in adapter.deltas.items() if path in there}
                own = dataclasses.replace(adapter, deltas=deltas)
                own = pack_adapter(own, there, "F32", compiled=False, packed=runner.adapters.packed)
                if rank:
                    staged.others[rank - 1].batches.adapters[number] = own  # type: ignore[assignment]
                else:
                    packed[id(adapter)] = own
                    staged.runner._numbers[own.serial] = number
        replayed = staged.stream.replayed
        engine = staged.watched(engine_of(parts[0], staged.runner))
        assert answers(engine, [[(packed[id(each)], scale) for each, scale in own] for own in asked]) == wanted
        assert staged.stream.replayed > replayed
        assert max(staged.flights) == 2


@pytest.mark.every_case
def test_what_launches_do_not_do_is_done_beside_them(loaded: LoadedModel, expected: Any) -> None:
    """Tables, whole heads, and rows with several adapters."""
    places = number_places(loaded.decoder)
    one, two = made(places, 1, 8, tables=True), made(places, 2, 4)
    asked = [[(one, 1.0)], [(two, 0.5), (one, 0.25)], [], [(two, 1.0)]]
    assert on_device(loaded, asked)[0] == expected(asked)


def test_slots_are_given_in_turns(loaded: LoadedModel) -> None:
    """Also where adapters go that nobody has any more."""
    places = number_places(loaded.decoder)
    some = [made(places, seed, 4) for seed in range(5)]
    stream = LazyStream()
    every = [place for of in places.values() for place in of]
    added = DeviceAdapters(stream, every, torch.float32, slots=2, rank=4, rows=2, memory=1 << 30)
    packed = [pack_adapter(one, places, "F32", compiled=False, packed=added.packed) for one in some]

    def bring(adapter: PackedAdapter) -> None:
        rows = np.array([0])
        added._bring(AdapterRows(rows, np.ones(1, np.float32), np.array([0, 1]), [adapter], rows))

    for number in (0, 1, 0, 2):
        bring(packed[number])
    assert list(added._held) == [packed[0].serial, packed[2].serial]
    del packed[0]
    bring(packed[0])
    assert len(added._held) == 2
    assert packed[0].serial in added._held


def test_trained_rows_count_as_memory() -> None:
    place, rows = Place(0, 1000, {"": (0, 0, 64)}, lookup=True), (np.arange(6), np.ones((6, 1000), np.float32))
    added = DeviceAdapters(LazyStream(), [place], torch.float32, slots=1, rank=4, rows=1, memory=1 << 20)
    one = fitted({"embed": {"": dataclasses.replace(low_rank(np.random.default_rng(1), 64, 1000, 2), rows=rows)}})
    made = pack_adapter(one, {"embed": (place,)}, "F32", compiled=False, packed=added.packed)
    assert made.nbytes == made.layout.piece.nbytes + rows[0].nbytes + rows[1].nbytes
    there = AdapterRows(np.array([0]), np.ones(1, np.float32), np.array([0, 1]), [made], np.array([0]))
    held = added._bring(there)[made.serial]
    added._stream.mark().wait()
    assert held.nbytes == made.nbytes
    assert held.there is not None


def test_experts_are_refused(loaded: LoadedModel) -> None:
    stream = LazyStream()
    place = Place(0, 8, {"gate.0.": (0, 0, 8)}, experts=1)
    added = DeviceAdapters(stream, [place], torch.float32, slots=1, rank=4, rows=1, memory=1 << 20)
    one = fitted({"layers.0.mlp.experts": {"gate.0.": low_rank(np.random.default_rng(1), 8, 8, 2)}})
    with pytest.raises(AdapterError, match="experts"):
        pack_adapter(one, {"layers.0.mlp.experts": (place,)}, "F32", compiled=False, packed=added.packed)
