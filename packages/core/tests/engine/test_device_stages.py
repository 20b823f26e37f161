# SPDX-License-Identifier: MIT
"""Stages whose steps are launched and captured, as GPUs have them, several in flight: the answers of all layers."""

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
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests import lazy_stream
from packages.core.tests.engine.late_stages import Staged
from packages.core.tests.engine.test_device_steps import (
    CONTEXT,
    CPU,
    EVERYTHING,
    FORMED,
    RARE,
    SHORT,
    SIZE,
    asked,
    device_runner,
    drive,
    make,
)
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.thread_ranks import Meetings, MeetingStages, ThreadRanks, in_threads
from tests.common_run import few


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    with exact_sums():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"max_position_embeddings": CONTEXT, "num_hidden_layers": 4}
    return write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config("llama", **sizes))


Wanted = tuple[list[SamplingParams], dict[str, Any]]
"""What is asked, and the answers."""


def load(model: Path, ranks: ThreadRanks | None = None) -> LoadedModel:
    return load_model(EngineConfig(model=str(model), op_by_op=True), Device("cpu"), lambda *_: None, ranks=ranks)


def staged_of(model: Path, stages: int, ranks: int = 1, *, serial: bool = False, **settings: Any) -> Staged:
    def build(part: LoadedModel, stream: LazyStream) -> DeviceRunner:
        return device_runner(part, stream=stream, **settings)[0]

    return Staged(lambda own: load(model, own), build, stages, ranks, serial=serial)


def step_by_step(model: Path, params: list[SamplingParams]) -> dict[str, Any]:
    """Of all layers in one place, op by op, one step at a time."""
    whole = load(model)
    return drive(make(whole, EagerRunner(whole.decoder, 200, SIZE, CPU, torch.float32)), asked(params))


def answers(staged: Staged, params: list[SamplingParams], *, every: int = 0, **settings: Any) -> Any:
    return drive(staged.watched(make(staged.parts[0], staged.runner, **settings)), asked(params), every=every)


@pytest.fixture(scope="module", params=few([EVERYTHING, SHORT], SHORT), ids=["everything", "short"])
def wanted(model: Path, request: pytest.FixtureRequest) -> Wanted:
    return request.param, step_by_step(model, request.param)


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.every_case)], ids=["one rank", "two ranks"]
)
def staged(model: Path, request: pytest.FixtureRequest) -> Iterator[Staged]:
    """Two stages whose steps are captured, with prompts of up to 40 tokens."""
    with staged_of(model, 2, request.param, graphs=True, prompts=40) as made:
        yield made


def test_answers_are_those_of_one_step_at_a_time(staged: Staged, wanted: Wanted) -> None:
    """Sequences come while others run; two steps are in flight wherever there are two."""
    params, expected = wanted
    replayed, staged.flights = staged.stream.replayed, []
    assert answers(staged, params, every=2) == expected
    assert staged.stream.replayed > replayed
    assert staged.flights.count(2) > len(staged.flights) / 2
    assert max(staged.flights) == 2
    assert all(each.behind for each in staged.others), "told what comes next before it has computed"
    sent = staged.sent()
    assert {len(shape) for shape in sent} == {3}
    assert {shape[1] for shape in sent} > {1, 3, 5}, "a captured step sends the tokens there are"


@pytest.mark.every_case
def test_sequences_that_are_preempted_or_aborted_in_flight(staged: Staged, model: Path) -> None:
    """Their blocks are others' at once, while a step that was begun before still writes them."""
    long = [SamplingParams(temperature=0.9, seed=seed, max_tokens=32, ignore_eos=True) for seed in range(12)]
    expected = step_by_step(model, long)
    engine = staged.watched(make(staged.parts[0], staged.runner, blocks=12, budget=24))
    begin, ended = engine.step, list[str]()

    def step() -> Any:
        pieces = begin()
        runs = [run for flight in engine._flights for run in flight.step if run.sequence in engine._live]
        some = [run for run in runs if ended or not run.wanted]  # a piece of a prompt at first
        if some and (not ended or (len(ended) < 3 and engine.stats().preemptions >= len(ended))):
            ended.append(some[0].sequence.request.request_id)
            pieces += engine.abort(ended[-1])
        return pieces

    engine.step = step  # type: ignore[method-assign]
    found = drive(engine, asked(long))
    assert len(ended) == 3
    assert [found[name] for name in found if name not in ended] == [
        expected[name] for name in found if name not in ended
    ]
    assert engine.stats().preemptions >= 2
    assert engine.stats().num_free_blocks == 12
    staged.sent()


@pytest.mark.every_case
def test_caches_are_dropped_and_made_anew(staged: Staged, wanted: Wanted) -> None:
    """What was captured, and the places of what goes over borders, are others then."""
    params, expected = wanted
    told = [threading.Event() for _ in staged.others]

    def again(runner: DeviceRunner) -> None:
        runner.drop_cache()
        runner.restore_cache()
        runner.wake_up()

    for other, event in zip(staged.others, told):
        other.tell(again)
        other.tell(lambda _, event=event: event.set())
    again(staged.first)
    assert all(event.wait(60) for event in told)
    assert answers(staged, params) == expected


@pytest.mark.parametrize(
    ("stages", "settings"),
    [
        (3, {"graphs": False}),
        (2, {"graphs": True, "serial": True}),
        pytest.param(3, {"graphs": False, "serial": True}, marks=pytest.mark.every_case),
        pytest.param(4, {"graphs": True, "prompts": 64}, marks=pytest.mark.every_case),
    ],
)
def test_more_stages(stages: int, settings: dict[str, Any], model: Path, wanted: Wanted) -> None:
    """More steps in flight than a border has places; and devices that run one stream at a time."""
    params, expected = wanted
    with staged_of(model, stages, **settings) as made:
        found = drive(made.watched(make(made.parts[0], made.runner)), asked(params)[:7], every=1)
        assert found == {name: expected[name] for name in found}
        assert max(made.flights) == made.first.in_flight == stages
        assert all(each.behind for each in made.others)
        assert made.first.caches[-1].keys.numel() == 0 < made.first.caches[0].keys.numel()
        made.sent()


@pytest.mark.every_case
@pytest.mark.parametrize("params", [RARE, FORMED], ids=["rare", "formed"])
def test_every_way_of_drawing(params: list[SamplingParams], staged: Staged, model: Path) -> None:
    assert answers(staged, params, every=2) == step_by_step(model, params)


DRAWN = [
    SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.7, seed=5, max_tokens=5, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=1, max_tokens=5, ignore_eos=True, logprobs=0),
    SamplingParams(temperature=1.5, seed=2, max_tokens=5, ignore_eos=True, top_p=0.95, logprobs=1),
    SamplingParams(temperature=1.1, seed=3, max_tokens=5, ignore_eos=True, top_k=7, min_p=0.01),
    SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, presence_penalty=1.5, logprobs=1),
    SamplingParams(temperature=0.8, seed=4, max_tokens=5, ignore_eos=True, repetition_penalty=1.3, prompt_logprobs=1),
]
"""Each way in which rows are drawn from."""


@pytest.mark.parametrize(
    ("stages", "ranks", "settings"),
    few(
        [
            (2, 2, {"graphs": True, "prompts": 16}),
            (2, 2, {"graphs": True, "serial": True}),
            (2, 2, {"graphs": False}),
            (2, 4, {"graphs": False, "serial": True}),
            (3, 2, {"graphs": True, "prompts": 32}),
        ],
        (2, 2, {"graphs": True, "prompts": 16}),
    ),
    ids=str,
)
def test_ranks_of_stages_draw_together(stages: int, ranks: int, settings: dict[str, Any], tmp_path: Path) -> None:
    """Steps are in flight while ranks gather logits; the ranks of a stage come to the same exchanges in the same
    order."""
    sizes = {"max_position_embeddings": CONTEXT, "num_hidden_layers": stages, "num_key_value_heads": ranks}
    model = write_toy_model(tmp_path / "toy", toy_config("llama", **sizes))
    expected = step_by_step(model, DRAWN)
    with staged_of(model, stages, ranks, sequences=4, budget=32, **settings) as made:
        engine = made.watched(make(made.parts[0], made.runner, sequences=4, budget=32))
        begun = [len(group[0].asked) for group in made.groups]
        found = drive(engine, asked(DRAWN)[: len(DRAWN)], every=1)
        assert found == {name: expected[name] for name in found}
        assert max(made.flights) == made.first.in_flight == stages
        assert made.flights.count(stages) > len(made.flights) / 2
        made.sent()
        for group, before in zip(made.groups, begun, strict=True):
            assert len(group[0].asked) > before
            assert all(each.asked == group[0].asked for each in group)
        assert not any(each.failed for each in made.others)


def test_what_would_wait_in_a_circle_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices that both hand on before they take do so where a device runs one stream at a time, however many it
    has; and the ends of a border may not be asked for different things."""
    monkeypatch.setattr(lazy_stream, "_PATIENCE", 1.0)

    def work(line: MeetingStages, first: str, size: int) -> str:
        stream, x = LazyStream(serial=True), torch.zeros(2, size)
        out = stream.beside()
        ends = [(out, lambda: line.send(x, 1 - line.rank)), (stream, lambda: take(line, x))]
        for to, end in ends if first == "hands on" else ends[::-1]:
            to.run(end)
        try:
            for each in (stream, out):
                each.mark().wait()
        except (RuntimeError, AssertionError) as error:
            return str(error)
        return ""

    def take(line: MeetingStages, x: torch.Tensor) -> None:
        line.receive(x, 1 - line.rank)

    def found(order: tuple[str, str], sizes: tuple[int, int]) -> list[str]:
        meetings = Meetings()
        return in_threads(
            1,
            lambda ranks: work(MeetingStages(rank := ranks.stages.rank, 2, meetings), order[rank], sizes[rank]),  # type: ignore[union-attr]
            2,
        )

    assert found(("hands on", "takes"), (3, 3)) == ["", ""]
    assert all("another device has not come" in each for each in found(("hands on", "hands on"), (3, 3)))
    assert any("0 sends" in each for each in found(("hands on", "takes"), (3, 4)))
