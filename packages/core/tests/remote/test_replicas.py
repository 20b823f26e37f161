# SPDX-License-Identifier: MIT
"""Two replicas are one engine to their callers: the same answers, and one that dies is not missed for long."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from candle_vllm.core import (
    AdapterError,
    ConfigError,
    EngineConfig,
    EngineDeadError,
    EngineOverloadedError,
    InferenceEngine,
    InvalidParameterError,
    LoRARequest,
    ModelNotFoundError,
    RemoteEngine,
    ReplicatedEngine,
    SamplingParams,
    StructuredOutputsParams,
)
from candle_vllm.core.engine.adapters.adapter_store import AdapterCall
from candle_vllm.core.engine.requests import AdapterUse
from candle_vllm.core.errors import EngineSleepingError, RequestError
from candle_vllm.core.remote import fleet
from candle_vllm.core.remote.fleet import Fleet, replica_configs
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.toy_adapter import linear_shapes, write_adapter
from packages.core.tests.toy_encoder import write_toy_encoder
from tests.waiting import until, wait_for

CONFIG = toy_config(max_position_embeddings=1 << 15)
SETTINGS: dict[str, Any] = {"threads": 2, "block_size": 16, "speculative_config": {"method": "none"}, "seed": 5}
ALONE: dict[str, Any] = {**SETTINGS, "threads": 1}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=30_000, ignore_eos=True)  # some seconds


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    write_toy_model(folder / "model", CONFIG)
    with InferenceEngine(str(folder / "model"), threads=1) as engine:
        shapes = linear_shapes(engine._require()[1].config)  # type: ignore[attr-defined]
    for seed in range(2):
        write_adapter(folder / f"a{seed}", shapes, seed=seed, size=1.0)
    return folder


@pytest.fixture(scope="module")
def engine(made: Path) -> Iterator[ReplicatedEngine]:
    with ReplicatedEngine(str(made / "model"), data_parallel_size=2, enable_lora=True, **SETTINGS) as engine:
        pids = engine.pids
        yield engine
        pids += engine.pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def conversation(number: int, length: int) -> list[int]:
    return [(31 * number + 7 * place) % 256 for place in range(length)]


def at_rest(engine: ReplicatedEngine) -> bool:
    stats = engine.stats()
    return (
        not stats.num_running
        and not stats.num_waiting
        and stats.num_free_blocks == stats.num_blocks
        and all(each.alive for each in stats.replicas)
    )


def test_answers_are_those_of_one_engine_bit_for_bit(made: Path, engine: ReplicatedEngine) -> None:
    prompts = [conversation(number, 20 + 3 * number) for number in range(12)]
    params = [
        replace(GREEDY, logprobs=2),
        SamplingParams(temperature=0.9, max_tokens=10, n=3, ignore_eos=True),  # seeds follow the order of arrival
        SamplingParams(
            temperature=1.0, seed=4, max_tokens=12, structured_outputs=StructuredOutputsParams(regex="[a-c]{5}")
        ),
    ]
    each = [params[number % 3] for number in range(12)]
    with InferenceEngine(str(made / "model"), **ALONE) as one:
        wanted = one.generate(prompts, each)
        vectors = one.embed(prompts)
    given = engine.generate(prompts, each)
    assert [output.outputs for output in given] == [output.outputs for output in wanted]
    assert [output.embedding for output in engine.embed(prompts)] == [output.embedding for output in vectors]
    assert engine.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False).outputs[0].token_ids
    engine.check_structured_outputs(StructuredOutputsParams(regex="[a-c]{5}"))
    with pytest.raises(InvalidParameterError, match="regex"):
        engine.check_structured_outputs(StructuredOutputsParams(regex="(["))
    wait_for(lambda: at_rest(engine))
    replicas = engine.stats().replicas
    assert all(each.prompt_tokens > 100 for each in replicas)  # both had their part
    assert sum(each.prompt_tokens for each in replicas) == engine.stats().prompt_tokens


def test_sessions_stay_where_their_beginning_is(engine: ReplicatedEngine) -> None:
    engine.reset_prefix_cache()
    for turn in range(1, 4):
        for number in range(6):
            prompt = conversation(50 + number, 64 * turn)
            cached = engine.generate(prompt, GREEDY)[0].num_cached_tokens
            assert cached >= 64 * (turn - 1), (turn, number)
    engine.reset_prefix_cache()
    assert engine.generate(conversation(50, 192), GREEDY)[0].num_cached_tokens == 0
    salted = SamplingParams(temperature=0.0, max_tokens=1, cache_salt="other")
    assert engine.generate(conversation(50, 192), salted)[0].num_cached_tokens == 0
    wait_for(lambda: at_rest(engine))
    seen = [each.cached_prompt_tokens for each in engine.stats().replicas]
    assert min(seen) > 0  # three of the six sessions each, or near it


async def test_ids_are_unique_over_all_and_aborts_find_theirs(engine: ReplicatedEngine) -> None:
    streams = [engine.stream(conversation(n, 30), ENDLESS, request_id=f"r{n}") for n in range(4)]
    await asyncio.gather(*map(anext, streams))
    await until(lambda: [each.num_running for each in engine.stats().replicas] == [2, 2])
    with pytest.raises(InvalidParameterError, match=r"r1.* in use"):
        engine.stream([1, 2, 3], GREEDY, request_id="r1")
    engine.abort("r0")
    engine.abort("nobody")
    assert [piece.finish_reason async for piece in streams[0]][-1] == "abort"
    await streams[1].aclose()
    del streams[2:]
    await until(lambda: at_rest(engine))
    assert engine._require()[0]._router.sequences == 0


def test_the_bound_of_the_queue_is_that_of_all(engine: ReplicatedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._require()[0], "_most", 2)
    held = [engine.generate_stream(conversation(n, 8), ENDLESS) for n in range(2)]
    with pytest.raises(EngineOverloadedError, match="max_queued_requests"):
        engine.generate_stream([1], GREEDY)
    for each in held:
        each.close()
    wait_for(lambda: at_rest(engine))


def test_adapters_are_in_all_replicas(made: Path, engine: ReplicatedEngine) -> None:
    prompt = conversation(3, 40)
    plain = engine.generate(prompt, GREEDY)[0].outputs[0].token_ids
    info = engine.add_lora(LoRARequest("a0", lora_path=str(made / "a0")))
    assert (info.state, engine.list_loras()) == ("ready", (info,))
    uses = [LoRARequest("a0"), None] * 4
    answers = engine.generate([prompt] * 8, GREEDY, lora_request=uses)
    assert {output.outputs[0].token_ids for output in answers[1::2]} == {plain}
    assert len({output.outputs[0].token_ids for output in answers[::2]}) == 1
    assert answers[0].outputs[0].token_ids != plain
    # What a request brought with it is found wherever the next one goes, and means the same there.
    loose = LoRARequest("loose", lora_path=str(made / "a1"))
    first = engine.generate(prompt, GREEDY, lora_request=loose)[0].outputs
    again = engine.generate(
        [conversation(n, 40) for n in range(4)] + [prompt], GREEDY, lora_request=LoRARequest("loose")
    )
    assert again[-1].outputs == first
    with pytest.raises(InvalidParameterError, match="was loaded from other files"):
        engine.generate(prompt, GREEDY, lora_request=LoRARequest("loose", lora_path=str(made / "a0")))
    with pytest.raises(InvalidParameterError, match="only one of 2 replicas"):
        engine.generate(prompt, GREEDY, lora_request=LoRARequest("a0", load_inplace=True))
    with pytest.raises(AdapterError, match="none"):
        engine.add_lora(LoRARequest("bad", lora_path=str(made / "none")))
    assert {each.name for each in engine.list_loras()} == {"a0", "loose"}
    assert engine.pin_lora("a0").pinned
    # One replica has had a request for it, and the other one gets it now.
    engine.generate(prompt, GREEDY, lora_request=LoRARequest("pinned", lora_path=str(made / "a1")))
    assert engine.pin_lora("pinned").pinned
    assert engine.remove_lora("pinned")
    # Files that were never loaded do not occupy a name.
    with pytest.raises(RequestError, match="cannot be used"):
        engine.generate(prompt, GREEDY, lora_request=LoRARequest("late", lora_path=str(made / "none")))
    late = engine.generate(prompt, GREEDY, lora_request=LoRARequest("late", lora_path=str(made / "a1")))
    assert late[0].outputs == first
    assert engine.remove_lora("late")
    assert engine.remove_lora("loose")
    assert not engine.remove_lora("loose")
    with pytest.raises(InvalidParameterError, match="no adapter 'loose'"):
        engine.generate(prompt, GREEDY, lora_request=LoRARequest("loose"))


async def test_a_replica_that_dies_is_started_again_and_the_others_go_on(engine: ReplicatedEngine) -> None:
    """Behind the test of adapters: it gets back what the others have."""
    prompt = conversation(3, 40)
    adapted = (await engine.agenerate(prompt, GREEDY, lora_request=LoRARequest("a0"))).outputs
    before = engine.stats()
    deaths: list[int] = []
    engine.add_death_callback(lambda: deaths.append(1))
    await until(lambda: at_rest(engine))
    streams = [engine.stream(conversation(n, 30), ENDLESS) for n in range(4)]
    known = asyncio.Event()

    async def fate(stream: Any) -> str:
        read = 0
        try:
            while read < 2000:
                await anext(stream)
                read += known.is_set()
        except EngineDeadError as error:
            return str(error)
        return "goes on"

    reading = asyncio.gather(*map(fate, streams))
    await until(lambda: sum(replica.num_running for replica in engine.stats().replicas) == len(streams))
    first, second = (replica.num_running for replica in engine.stats().replicas)
    assert first
    assert second
    old = list(engine.pids)
    os.kill(old[0], signal.SIGKILL)
    await until(lambda: not engine.stats().replicas[0].alive or engine.stats().replicas[0].restarts == 1)
    known.set()
    fates = await reading
    lost = "the engine process has ended (killed by SIGKILL)"
    assert sorted(fates) == ["goes on"] * second + [lost] * first
    for stream in streams:
        await stream.aclose()
    assert (await engine.agenerate(prompt, GREEDY)).outputs  # while one is missing
    assert engine.is_alive
    await until(lambda: at_rest(engine))
    assert engine.pids[0] != old[0]
    assert engine.pids[1] == old[1]
    assert [each.restarts for each in engine.stats().replicas] == [1, 0]
    assert engine.stats().steps > before.steps  # what it had counted is not lost
    each = await asyncio.gather(*(engine.agenerate(prompt, GREEDY, lora_request=LoRARequest("a0")) for _ in range(8)))
    assert all(output.outputs == adapted for output in each)
    await until(lambda: all(replica.prompt_tokens for replica in engine.stats().replicas))
    assert not deaths


def test_all_sleep_and_wake(engine: ReplicatedEngine) -> None:
    prompts = [conversation(n, 40) for n in range(4)]
    awake = engine.generate(prompts, GREEDY)
    engine.sleep()
    assert engine.is_sleeping
    with pytest.raises(EngineSleepingError):
        engine.generate(prompts, GREEDY)
    assert engine._require()[0]._router.sequences == 0
    os.kill(engine.pids[1], signal.SIGKILL)  # what is started again meanwhile sleeps as well
    wait_for(lambda: engine.stats().replicas[1].restarts and at_rest(engine))
    assert all(replica.is_sleeping for replica in engine._require()[0]._living())
    engine.wake_up(["weights"])
    assert engine.is_sleeping
    engine.wake_up()
    assert not engine.is_sleeping
    assert [one.outputs for one in engine.generate(prompts, GREEDY)] == [one.outputs for one in awake]


def test_when_none_is_left_the_engine_has_ended(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "MAX_DEATHS", 0)  # nor is it started again where it dies too often
    told = threading.Event()
    engine = ReplicatedEngine(str(made / "model"), data_parallel_size=2, **SETTINGS)
    engine.add_death_callback(told.set)
    os.kill(engine.pids[0], signal.SIGKILL)
    wait_for(lambda: not engine.stats().replicas[0].alive)
    assert engine.generate([1, 2, 3], GREEDY)[0].outputs
    assert not told.is_set()
    os.kill(engine.pids[1], signal.SIGKILL)
    assert told.wait(30)
    assert not engine.is_alive
    with pytest.raises(EngineDeadError, match="all 2 engine processes have ended"):
        engine.generate([1, 2, 3], GREEDY)
    assert engine.stats().steps > 0
    engine.close()
    engine.close()
    with pytest.raises(EngineDeadError, match="closed"):
        engine.generate([1, 2, 3], GREEDY)


def test_it_is_closed_while_a_replica_is_started_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt fails, because the system starts no process."""
    start, failures = fleet.EngineProcess, [OSError(errno.ENOMEM, "Cannot allocate memory")]

    def attempt(config: EngineConfig) -> Any:
        if failures:
            raise failures.pop()
        return start(config)

    monkeypatch.setattr(fleet, "_PAUSE", 0.0)
    engine = ReplicatedEngine(str(made / "model"), data_parallel_size=2, **SETTINGS)
    monkeypatch.setattr(fleet, "EngineProcess", attempt)
    os.kill(engine.pids[0], signal.SIGKILL)
    wait_for(lambda: not engine.stats().replicas[0].alive)
    fleet_of = engine._require()[0]
    wait_for(lambda: any(fleet_of._starting.values()))
    starting = [process for process in fleet_of._starting.values() if process is not None]
    engine.close()
    assert not fleet_of._starting
    assert not failures
    for pid in [process.pid for process in starting]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_model_that_cannot_be_loaded_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        ReplicatedEngine(str(tmp_path / "nowhere"), data_parallel_size=2)


def test_replicas_of_an_encoder_have_no_cache_to_share(tmp_path: Path) -> None:
    folder = str(write_toy_encoder(tmp_path))
    (each, _) = replica_configs(EngineConfig(model=folder, device="cpu", data_parallel_size=2, threads=2))
    with InferenceEngine(each) as engine:
        assert engine.embed("a", use_tqdm=False)
    asked = EngineConfig(model=folder, device="cpu", data_parallel_size=2, kv_fraction=0.5)
    with pytest.raises(ConfigError, match="so kv_fraction has no effect: leave it out"):
        InferenceEngine(replica_configs(asked)[0])


def test_each_replica_has_its_share(toy_model: Path) -> None:
    cpu = EngineConfig(model=str(toy_model), device="cpu", data_parallel_size=3, threads=8)
    each = replica_configs(cpu)
    assert [(one.threads, one.device, one.data_parallel_size) for one in each] == [
        (3, "cpu", 1), (3, "cpu", 1), (2, "cpu", 1),
    ]  # fmt: skip
    assert sum(one.kv_fraction or 0 for one in each) == pytest.approx(0.4)
    fixed = replica_configs(dataclasses.replace(cpu, kv_cache_memory=1 << 20))
    assert {(one.kv_cache_memory, one.kv_fraction) for one in fixed} == {(1 << 20, None)}
    for device, wanted in (("cuda", ["cuda:0", "cuda:1"]), ("cuda:3,cuda:1", ["cuda:3", "cuda:1"])):
        gpus = replica_configs(EngineConfig(model="m", device=device, data_parallel_size=2, threads=1))
        assert [one.device for one in gpus] == wanted
        assert {one.kv_fraction for one in gpus} == {None}
    each = replica_configs(EngineConfig(model="m", device="cuda", data_parallel_size=2, tensor_parallel_size=2))
    assert [(one.device, one.tensor_parallel_size) for one in each] == [("cuda:0,cuda:1", 2), ("cuda:2,cuda:3", 2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:0,cuda:1", "data_parallel_size": 3}, "names 2 GPUs for 3 replicas"),
        ({"device": "cuda:1,cuda:1", "data_parallel_size": 2}, "names a GPU twice"),
        ({"device": "cuda:1", "data_parallel_size": 2}, "names 1 GPUs for 2 replicas"),
    ],
)
def test_devices_and_replicas_must_agree(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        EngineConfig(model="m", **settings)
    assert caught.value.setting == "device"


@pytest.mark.parametrize("kind", [InferenceEngine, RemoteEngine])
def test_one_engine_refuses_to_be_several(kind: type[InferenceEngine] | type[RemoteEngine]) -> None:
    with pytest.raises(ConfigError, match="ReplicatedEngine"):
        kind("m", data_parallel_size=2)


class Scripted:
    """A replica that has or refuses each adapter, and may have ended since."""

    def __init__(self, *, fails: bool = False, ends: bool = False) -> None:
        self._fails, self._ends, self.removed = fails, ends, list[str]()

    def call_adapters(self, call: AdapterCall) -> tuple[()]:
        if self._fails:
            raise AdapterError("no such file")
        return ()

    def remove_lora(self, name: str) -> None:
        if self._ends:
            raise EngineDeadError("the engine process has ended")
        self.removed.append(name)


def bare_fleet(replicas: list[Scripted], loose: OrderedDict[str, str]) -> Fleet:
    fleet = object.__new__(Fleet)
    vars(fleet).update(_changing=threading.Lock(), _closed=threading.Event(), _added={}, _loose=loose, _pinned=set())
    vars(fleet).update(_living=lambda: replicas, _replicas=replicas)
    return fleet


def test_an_adapter_that_one_replica_refuses_leaves_the_others() -> None:
    replicas = [Scripted(ends=True), Scripted(), Scripted(fails=True)]
    with pytest.raises(AdapterError, match="no such file"):
        bare_fleet(replicas, OrderedDict()).call_adapters(AdapterCall("add", AdapterUse(name="a", path="/a")))
    assert replicas[1].removed == ["a"]
    assert replicas[2].removed == ["a"]  # it may still load the adapter, if it only was too slow


def test_a_name_that_another_thread_drops_meanwhile_is_no_error() -> None:
    class Dropping(OrderedDict[str, str]):
        def __setitem__(self, key: str, value: str) -> None:
            super().__setitem__(key, value)
            del self[key]

    use = AdapterUse(name="a", path="/a")
    assert bare_fleet([Scripted()], Dropping())._located(use) == use
