# SPDX-License-Identifier: MIT
"""Adapters in an engine that runs: loads beside its steps, and what becomes of requests meanwhile."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import (
    AdapterError,
    CandleVllmError,
    EngineOverloadedError,
    InferenceEngine,
    InvalidParameterError,
    LoRARequest,
    RequestError,
    SamplingParams,
)
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine import build
from candle_vllm.core.engine.adapters.adapter_store import LoadedAdapter
from candle_vllm.core.engine.requests import AdapterUse, GenerationRequest
from candle_vllm.core.errors import RequestAbortedError
from candle_vllm.core.remote import RemoteEngine
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.toy_adapter import linear_shapes, write_adapter
from tests.waiting import PATIENCE, until, wait_for

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPT = "abc" * 40


class Gate:
    """Holds loads up: each waits until it is open, or until its path is let through."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.begun: list[str] = []

    def around(self, make: Callable[..., Callable[[Path], LoadedAdapter]]) -> Callable[..., Any]:
        def made(*given: Any) -> Callable[[Path], LoadedAdapter]:
            load = make(*given)

            def held_up(path: Path) -> LoadedAdapter:
                self.begun.append(path.name)
                assert self.open.wait(PATIENCE)
                return load(path)

            return held_up

        return made

    def until_begun(self, name: str) -> None:
        wait_for(lambda: name in self.begun)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and adapters a0 to a4 beside it, which change its answers."""
    made = tmp_path_factory.mktemp("adapters")
    write_toy_model(made / "model", toy_config())
    with InferenceEngine(str(made / "model"), threads=1, enable_lora=True) as engine:
        shapes = linear_shapes(engine._require()[1].config)  # type: ignore[attr-defined]
    for number in range(5):
        write_adapter(made / f"a{number}", shapes, seed=number, size=1.0)
    return made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate()
    monkeypatch.setattr(build, "adapter_loader", made.around(build.adapter_loader))
    return made


def open_engine(folder: Path, **settings: Any) -> InferenceEngine:
    given: dict[str, Any] = {"threads": 1, "max_num_seqs": 8, "block_size": 16, "max_model_len": 256, **settings}
    return InferenceEngine(str(folder / "model"), enable_lora=True, **given)


@pytest.fixture
def engine(folder: Path, gate: Gate) -> Iterator[InferenceEngine]:
    with open_engine(folder) as made:
        yield made
        gate.open.set()


def adapter(folder: Path, name: str, *, inplace: bool = False) -> LoRARequest:
    return LoRARequest(name, lora_path=str(folder / name), load_inplace=inplace)


def tokens(engine: Any, lora_request: LoRARequest | None, params: SamplingParams = GREEDY) -> tuple[int, ...]:
    return engine.generate(PROMPT, params, lora_request=lora_request, use_tqdm=False)[0].token_ids


def test_sequences_of_several_adapters_and_of_none_answer_as_alone(folder: Path, engine: InferenceEngine) -> None:
    choices = [None, *(adapter(folder, f"a{number}") for number in range(5))] * 2
    together = engine.generate([PROMPT] * 12, GREEDY, lora_request=choices, use_tqdm=False)
    alone = [tokens(engine, choice) for choice in choices[:6]]
    assert [output.token_ids for output in together] == alone * 2
    assert len(set(alone)) == 6
    mixed = engine.generate(PROMPT, GREEDY, lora_request=[(choices[1], 0.5), (choices[2], 0.5)], use_tqdm=False)  # type: ignore[list-item]
    assert mixed[0].token_ids not in alone
    assert tokens(engine, [(choices[1], 0.0)]) == alone[0]  # type: ignore[arg-type]
    stats = engine.stats()
    assert (stats.adapters, stats.adapters_in_memory, stats.adapter_loads, stats.max_adapters) == (5, 5, 5, 8)


def test_a_mix_is_the_same_in_whatever_order_its_adapters_were_loaded(folder: Path) -> None:
    """To the bit: what a row's adapters add is summed in an order of its own, so that a later load changes nothing."""
    params, found = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0), set[tuple[float, ...]]()
    names = ["a0", "a1", "a2"]
    mix: Any = [(LoRARequest(name), scale) for name, scale in zip(names, (0.7, 0.4, 0.3))]
    for loaded in (names, names[::-1], ["a1", "a2", "a0"]):
        with open_engine(folder) as engine:
            for name in loaded:
                engine.add_lora(adapter(folder, name))
            (answer,) = engine.generate(PROMPT, params, lora_request=mix, use_tqdm=False)
            found.add(tuple(position.chosen.logprob for position in answer.outputs[0].logprobs or ()))
    assert len(found) == 1


def test_a_mix_without_room_is_refused_and_holds_up_nobody(folder: Path) -> None:
    with open_engine(folder) as engine:
        most = max(engine.add_lora(adapter(folder, name)).nbytes for name in ("a0", "a1"))
    with open_engine(folder, lora_memory=most) as engine:
        mix: Any = [(adapter(folder, "a0"), 0.5), (adapter(folder, "a1"), 0.5)]
        given: list[Any] = [mix, adapter(folder, "a2"), None]
        streams = [engine.generate_stream(PROMPT, GREEDY, lora_request=each) for each in given]
        with pytest.raises(RequestError, match=r"take \d+ bytes: raise max_cpu_loras or lora_memory") as caught:
            list(streams[0])
        assert caught.value.param == "lora_request"
        assert [sum(len(piece.token_ids) for piece in stream) for stream in streams[1:]] == [12, 12]


async def test_a_load_holds_up_neither_steps_nor_other_requests(
    folder: Path, engine: InferenceEngine, gate: Gate
) -> None:
    gate.open.clear()
    held = engine.stream(PROMPT, GREEDY, lora_request=adapter(folder, "a0"))
    gate.until_begun("a0")
    neighbours = await asyncio.gather(*(engine.agenerate(PROMPT + str(number), GREEDY) for number in range(4)))
    assert [len(output.token_ids) for output in neighbours] == [12] * 4
    assert engine.stats().waiting_adapters == {"a0": 1}
    gate.open.set()
    pieces = [piece async for piece in held]
    assert pieces[-1].finish_reason == "length"


def test_a_load_begins_before_the_engine_hears_of_the_request(
    folder: Path, engine: InferenceEngine, gate: Gate
) -> None:
    """It may be in a long step."""
    inner, use = engine._require()[0], AdapterUse(name="a0", path=str(folder / "a0"))
    inner.prepare(GenerationRequest(request_id="r", prompt_token_ids=[1], params=GREEDY, adapters=(use,)))
    gate.until_begun("a0")
    assert not inner.has_work


async def test_an_engine_that_only_waits_for_a_load_sleeps(folder: Path, engine: InferenceEngine, gate: Gate) -> None:
    steps = 0
    inner = engine._require()[0]
    step = inner.step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return step()

    inner.step = counted  # type: ignore[method-assign]
    gate.open.clear()
    streams = [engine.stream(PROMPT, GREEDY, lora_request=adapter(folder, "a0")) for _ in range(3)]
    gate.until_begun("a0")
    wait_for(lambda: inner.waits)
    await asyncio.sleep(0.2)
    assert steps <= 3  # one for each request
    gate.open.set()
    for stream in streams:
        assert [piece async for piece in stream][-1].finish_reason == "length"
    assert gate.begun == ["a0"]


def test_a_loop_of_ones_own_waits_for_a_load(folder: Path, engine: InferenceEngine, gate: Gate) -> None:
    gate.open.clear()
    engine.add_request(PROMPT, GREEDY, request_id="r", lora_request=adapter(folder, "a0"))
    assert engine.step() == []
    inner = engine._require()[0]
    wait, idle, waits = inner.wait, 0, 0

    def waited(seconds: float) -> None:
        nonlocal waits
        waits += inner.waits
        gate.open.set()
        wait(seconds)

    inner.wait = waited  # type: ignore[method-assign]
    pieces: list[Any] = []
    while engine.has_unfinished_requests:
        found = engine.step()
        idle += not found and not pieces
        pieces += found
    assert pieces[-1].finish_reason == "length"
    assert idle <= waits + 8  # steps without a token before the first one: of its prompt, or they slept


async def test_a_step_that_fails_leaves_no_other_request_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(folder, max_num_seqs=1) as engine:
        inner = engine._require()[0]
        forward = inner.runner.forward

        def fails_while_one_waits(batch: Any, states: Any) -> None:
            if inner.scheduler.waiting:
                raise ValueError("once")
            forward(batch, states)

        monkeypatch.setattr(inner.runner, "forward", fails_while_one_waits)
        long = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True)
        asked = [asyncio.create_task(engine.agenerate("abc", params)) for params in (long, GREEDY)]
        with pytest.raises(CandleVllmError, match="once"):
            await asked[0]
        assert (await asyncio.wait_for(asked[1], PATIENCE)).finish_reason == "length"


async def test_a_request_is_cancelled_while_its_adapter_is_loaded(
    folder: Path, engine: InferenceEngine, gate: Gate
) -> None:
    gate.open.clear()
    asked = asyncio.create_task(engine.agenerate(PROMPT, GREEDY, lora_request=adapter(folder, "a0")))
    await until(lambda: "a0" in gate.begun)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    wait_for(lambda: engine.stats().num_waiting == 0)
    gate.open.set()
    await until(lambda: engine.stats().adapters_in_memory == 1)
    assert (await engine.agenerate(PROMPT, GREEDY, lora_request=LoRARequest("a0"))).text
    assert gate.begun == ["a0"]


async def test_an_engine_is_closed_while_an_adapter_is_loaded(folder: Path, gate: Gate) -> None:
    engine = open_engine(folder)
    gate.open.clear()
    asked = asyncio.create_task(engine.agenerate(PROMPT, GREEDY, lora_request=adapter(folder, "a0")))
    await until(lambda: "a0" in gate.begun)
    await asyncio.to_thread(engine.close)
    with pytest.raises(RequestAbortedError):
        await asked
    gate.open.set()


async def test_a_load_that_fails_ends_its_own_requests(folder: Path, engine: InferenceEngine, gate: Gate) -> None:
    gate.open.clear()
    bad = LoRARequest("bad", lora_path=str(folder / "model"))
    asked = [asyncio.create_task(engine.agenerate(PROMPT, GREEDY, lora_request=bad)) for _ in range(3)]
    others = [asyncio.create_task(engine.agenerate(PROMPT, GREEDY, lora_request=one)) for one in (None,)]
    await asyncio.sleep(0)
    await asyncio.to_thread(gate.until_begun, "model")
    gate.open.set()
    for task in asked:
        with pytest.raises(RequestError, match="adapter 'bad' cannot be used: ") as caught:
            await task
        assert caught.value.param == "lora_request"
    assert (await others[0]).finish_reason == "length"
    with pytest.raises(InvalidParameterError, match="adapter 'bad' cannot be used"):  # at once, for a while
        await engine.agenerate(PROMPT, GREEDY, lora_request=LoRARequest("bad"))
    assert gate.begun == ["model"]
    assert engine.stats().adapter_load_failures == 1


def test_what_cannot_be_is_refused_by_name(folder: Path, engine: InferenceEngine) -> None:
    with pytest.raises(InvalidParameterError, match="there is no adapter 'x': give its path"):
        tokens(engine, LoRARequest("x"))
    with pytest.raises(AdapterError, match=r"adapter 'gone' cannot be used: .* does not exist"):
        engine.add_lora(LoRARequest("gone", lora_path=str(folder / "gone")))
    assert engine.list_loras() == ()
    with pytest.raises(InvalidParameterError, match="2 prompts and 3 lora_requests"):
        engine.generate(["a", "b"], lora_request=[None] * 3, use_tqdm=False)
    with pytest.raises(InvalidParameterError, match="adapter 'a0' is named twice"):
        tokens(engine, [(adapter(folder, "a0"), 1.0)] * 2)  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match="the scale must be a number within"):
        tokens(engine, [(adapter(folder, "a0"), float("nan"))])  # type: ignore[arg-type]
    with open_engine(folder, max_loras=1) as single:
        mix: Any = [(adapter(folder, "a0"), 1.0), (adapter(folder, "a1"), 1.0)]
        with pytest.raises(InvalidParameterError, match=r"combines 2 adapters, and at most 1 are allowed \(max_loras"):
            tokens(single, mix)


def test_an_adapter_is_unloaded_in_the_middle_of_answers(folder: Path, engine: InferenceEngine) -> None:
    reached, going = threading.Event(), threading.Event()

    def pause(past: Any, logits: Any) -> Any:
        if len(past) == len(PROMPT) + 4:
            reached.set()
            assert going.wait(PATIENCE)
        return logits

    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, n=16, logits_processors=[pause])
    expected = tokens(engine, adapter(folder, "a0"))
    store = engine._require()[0].adapters
    assert store is not None
    (entry,) = [each for each in store._entries.values() if each.name == "a0"]
    assert entry.loaded is not None
    memory = weakref.ref(entry.loaded.packed)
    answers: list[Any] = []
    asker = threading.Thread(
        target=lambda: answers.extend(engine.generate(PROMPT, params, lora_request=LoRARequest("a0"), use_tqdm=False))
    )
    asker.start()
    assert reached.wait(PATIENCE)
    assert engine.remove_lora("a0")
    assert engine.list_loras() == ()
    with pytest.raises(InvalidParameterError, match="there is no adapter 'a0'"):
        tokens(engine, LoRARequest("a0"))
    going.set()
    asker.join()
    assert [output.token_ids for output in answers[0].outputs] == [expected] * 16
    wait_for(lambda: engine.stats().adapter_bytes == 0)
    tokens(engine, None)
    del entry
    gc.collect()
    assert memory() is None


def test_files_that_have_changed_are_another_adapter_to_the_prefix_cache(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a0", tmp_path / "a")
    with open_engine(folder) as engine:
        old = engine.generate(PROMPT, GREEDY, lora_request=adapter(tmp_path, "a"), use_tqdm=False)[0]
        again = engine.generate(PROMPT, GREEDY, lora_request=adapter(tmp_path, "a"), use_tqdm=False)[0]
        assert (old.num_cached_tokens, again.num_cached_tokens) == (0, 112)
        shutil.copytree(folder / "a1", tmp_path / "a", dirs_exist_ok=True)
        assert tokens(engine, LoRARequest("a")) == old.token_ids  # nobody has asked for the new files
        new = engine.generate(PROMPT, GREEDY, lora_request=adapter(tmp_path, "a", inplace=True), use_tqdm=False)[0]
        assert new.num_cached_tokens == 0
        assert new.token_ids == tokens(engine, adapter(folder, "a1")) != old.token_ids
        assert tokens(engine, LoRARequest("a")) == new.token_ids
        assert engine.stats().adapter_loads == 3


def test_forty_requests_for_five_adapters_have_room_for_two(folder: Path) -> None:
    choices = [adapter(folder, f"a{number % 5}") for number in range(40)]
    with open_engine(folder, max_cpu_loras=2) as engine:
        outputs = engine.generate([PROMPT] * 40, GREEDY, lora_request=choices, use_tqdm=False)
        alone = [tokens(engine, choice) for choice in choices[:5]]
        assert [output.token_ids for output in outputs] == alone * 8
        stats = engine.stats()
        assert stats.adapters_in_memory == 2
        assert stats.adapter_evictions >= 3


def test_an_adapter_is_pinned(folder: Path) -> None:
    with open_engine(folder, max_cpu_loras=2) as engine:
        engine.add_lora(adapter(folder, "a0"))
        assert engine.pin_lora("a0").pinned
        for number in range(1, 5):
            engine.add_lora(adapter(folder, f"a{number}"))
        ready = {each.name: each for each in engine.list_loras() if each.state == "ready"}
        assert set(ready) == {"a0", "a4"}
        assert (ready["a0"].rank, ready["a0"].modules) == (8, 14)


def test_vectors_have_adapters(folder: Path, engine: InferenceEngine) -> None:
    plain, adapted = (engine.embed("abc", use_tqdm=False, lora_request=each) for each in (None, adapter(folder, "a0")))
    assert plain[0].embedding != adapted[0].embedding
    (score,) = engine.score([("abc", "abd")], use_tqdm=False, lora_request=LoRARequest("a0"))
    assert score.score != engine.score([("abc", "abd")], use_tqdm=False)[0].score


def test_an_engine_in_another_process_has_adapters(folder: Path) -> None:
    config = EngineConfig(model=str(folder / "model"), threads=1, max_num_seqs=8, enable_lora=True, max_model_len=256)
    with RemoteEngine(config) as engine, open_engine(folder, block_size=64) as own:
        info = engine.add_lora(adapter(folder, "a0"))
        assert (info.name, info.rank, info.state) == ("a0", 8, "ready")
        assert tokens(engine, LoRARequest("a0")) == tokens(own, adapter(folder, "a0"))
        mix = [(LoRARequest("a0"), 0.5), (adapter(folder, "a1"), 0.25)]
        assert tokens(engine, mix) == tokens(own, mix)  # type: ignore[arg-type]
        with pytest.raises(InvalidParameterError, match="there is no adapter 'x'; there are a0, a1") as caught:
            tokens(engine, LoRARequest("x"))
        assert caught.value.param == "lora_request"
        with pytest.raises(AdapterError, match="adapter 'bad' cannot be used"):
            engine.add_lora(LoRARequest("bad", lora_path=str(folder / "model")))
        with pytest.raises(RequestError, match="adapter 'bad' cannot be used"):
            tokens(engine, LoRARequest("bad", lora_path=str(folder / "model")))
        assert engine.pin_lora("a1").pinned
        assert [each.name for each in engine.list_loras()] == ["a0", "a1", "bad"]
        assert engine.remove_lora("a0")
        assert not engine.remove_lora("a0")
        wait_for(lambda: engine.stats().adapters == 2)


def test_an_adapter_that_is_not_loaded_in_time_is_told(
    folder: Path, engine: InferenceEngine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("candle_vllm.core.engine.adapters.adapter_store.PATIENCE", 0.01)
    gate.open.clear()
    with pytest.raises(EngineOverloadedError, match="adapter 'a0' was not loaded within 0 s; try again later"):
        engine.add_lora(adapter(folder, "a0"))


def test_adapters_are_off_unless_they_are_switched_on(folder: Path) -> None:
    with InferenceEngine(str(folder / "model"), threads=1) as engine:
        with pytest.raises(InvalidParameterError, match=r"adapter 'a0': adapters are off; .* enable_lora=True"):
            tokens(engine, adapter(folder, "a0"))
        with pytest.raises(InvalidParameterError, match="adapters are off"):
            engine.add_lora(adapter(folder, "a0"))
        assert engine.list_loras() == ()
