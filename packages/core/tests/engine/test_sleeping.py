# SPDX-License-Identifier: MIT
"""Engines that sleep: the memory that they give back, the same answers when they wake, and requests meanwhile."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core import (
    CandleVllmError,
    EngineConfig,
    FinishReason,
    InferenceEngine,
    InvalidParameterError,
    RequestAbortedError,
    SamplingParams,
)
from candle_vllm.core.assembly.encoder import load_any_model
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.devices import CPU, Device
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners import recorded_runner, sleeping
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.runners.sleeping import Sleeper
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.errors import EngineSleepingError
from candle_vllm.core.kernels import offloading
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory, loading, new_memory
from candle_vllm.core.kernels.offloading import HostWeights, OffloadedWeights, tensors_in
from candle_vllm.core.remote.engine import RemoteEngine
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.core.threads import LOADED_PART
from packages.core.tests.engine.drafted import FreeTimes, same_times
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.toy_encoder import write_toy_encoder
from packages.core.tests.toy_gguf import write_toy_gguf
from packages.core.tests.toy_sight import write_toy_sight

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an engine on the CPU does not sleep")

PROMPT = [3 + n * 7 % 90 for n in range(83)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
SETTINGS: dict[str, Any] = {"threads": 1, "kv_cache_memory": 4 << 20, "block_size": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("sleep") / "toy", toy_config(head_dim=32))


def answer(engine: InferenceEngine | RemoteEngine, prompt: Any = PROMPT) -> Any:
    found = engine.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0]
    return tuple(found.token_ids), [entry.chosen.logprob for entry in found.logprobs or ()]


def gguf(folder: Path) -> Path:
    config = toy_config("llama", head_dim=64, hidden_size=256, intermediate_size=512)
    return write_toy_gguf(folder / "toy.gguf", config, quantization="Q4_0", others={"attn_v": "Q8_0"})


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"isq": "q8_0"},
        {"op_by_op": True},
        {"speculative_config": {"method": "draft_model", "model": "itself"}},
    ],
    ids=["recorded", "isq", "eager", "drafts"],
)
def test_answers_are_the_same_after_it(model: Path, settings: dict[str, Any], level: int) -> None:
    if "speculative_config" in settings:
        settings = {"speculative_config": {**settings["speculative_config"], "model": str(model)}}
    with InferenceEngine(model, **SETTINGS, **settings) as engine:
        right = answer(engine)
        for _ in range(2):
            engine.sleep(level)
            assert (engine.is_sleeping, engine.stats().sleep_level) == (True, level)
            engine.wake_up()
            assert (engine.is_sleeping, engine.stats().sleep_level) == (False, 0)
            assert answer(engine) == right
        assert engine.stats().cached_prompt_tokens == 0  # nothing was left in the prefix cache


def test_a_draft_model_reads_again_what_its_cache_has_lost(model: Path) -> None:
    """Of six blocks, which the prompt has in the same order after another prompt that was read without drafts."""
    settings: dict[str, Any] = SETTINGS | {"kv_cache_memory": 100_000, "max_model_len": 96}
    with InferenceEngine(model, **settings, speculative_config={"model": str(model)}) as engine:
        assert engine.stats().num_blocks == 6
        assert engine._engine is not None
        drafter = engine._engine._drafter
        assert drafter is not None
        assert drafter.model is not None
        drafter.times = same_times  # type: ignore[method-assign]
        drafter.model.times = FreeTimes()
        for _ in range(2):
            before = engine.stats()
            answer(engine)
            after = engine.stats()
            tried = after.draft_tokens - before.draft_tokens
            assert tried == after.accepted_draft_tokens - before.accepted_draft_tokens > 0
            engine.sleep(1)
            engine.wake_up()
            engine.generate([PROMPT[::-1]], SamplingParams(max_tokens=1), use_tqdm=False)


def test_quantised_files_are_packed_again(tmp_path: Path) -> None:
    with InferenceEngine(gguf(tmp_path), **SETTINGS) as engine:
        right = answer(engine)
        engine.sleep(2)
        engine.wake_up()
        assert answer(engine) == right


def test_what_sees_sleeps_too(tmp_path: Path) -> None:
    picture = np.random.default_rng(3).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    prompt = {"prompt": "0123456789abcdef<image> what?", "multi_modal_data": {"image": picture}}
    with InferenceEngine(write_toy_sight(tmp_path / "sight"), threads=1, block_size=16) as engine:
        right = answer(engine, prompt)
        engine.sleep(2)
        engine.wake_up()
        again = {**prompt, "multi_modal_data": {"image": picture[::-1]}}
        other = answer(engine, again)
        assert answer(engine, prompt) == right
    with InferenceEngine(tmp_path / "sight", threads=1, block_size=16) as engine:
        assert answer(engine, again) == other  # encoded by weights that were read again


@pytest.mark.parametrize("settings", [{}, {"op_by_op": True}], ids=["recorded", "eager"])
def test_encoders_sleep(tmp_path: Path, settings: dict[str, Any]) -> None:
    with InferenceEngine(write_toy_encoder(tmp_path / "toy"), threads=1, **settings) as engine:
        right = engine.embed(["a cat"], use_tqdm=False)[0].embedding
        for level in (1, 2):
            engine.sleep(level)
            with pytest.raises(EngineSleepingError):
                engine.embed(["a cat"], use_tqdm=False)
            engine.wake_up()
            assert engine.embed(["a cat"], use_tqdm=False)[0].embedding == right


def test_its_memory_goes_back(tmp_path: Path) -> None:
    """Of 60 MB of weights and 30 MB of cache the process has no pages left at level 2."""
    config = toy_config("llama", head_dim=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2)
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    folder = write_toy_model(tmp_path / "toy", config)
    long = [3 + n % 90 for n in range(400)]
    with InferenceEngine(folder, threads=1, kv_cache_memory=64 << 20) as engine:
        right = answer(engine, long)
        sizes = [engine.model_info.weight_bytes, 400 * 2 * 2 * 2 * config["num_key_value_heads"] * config["head_dim"]]
        whole = resident()
        engine.sleep(1)
        without_cache = resident()
        engine.sleep(2)
        bare = resident()
        engine.wake_up()
        assert answer(engine, long) == right
    assert whole - without_cache > 0.8 * sizes[1]
    assert without_cache - bare > 0.9 * sizes[0]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_requests_are_refused_or_aborted(model: Path) -> None:
    with InferenceEngine(model, **SETTINGS) as engine:
        stream = engine.generate_stream(PROMPT, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
        next(stream)
        engine.sleep()
        with pytest.raises(RequestAbortedError):
            list(stream)
        for refused in (lambda: engine.generate([PROMPT], use_tqdm=False), lambda: engine.generate_stream(PROMPT)):
            with pytest.raises(EngineSleepingError, match="wake it up"):
                refused()
        engine.wake_up(["weights"])
        assert engine.is_sleeping
        engine.wake_up(["kv_cache"])
        right = answer(engine)
        levels: tuple[Any, ...] = (0, 3, True, 1.0)
        for level in levels:
            with pytest.raises(InvalidParameterError, match="level"):
                engine.sleep(level)
        with pytest.raises(InvalidParameterError, match="mode"):
            engine.sleep(mode="keep")
        with pytest.raises(InvalidParameterError, match="tags"):
            engine.wake_up(["cache"])
        assert answer(engine) == right


def test_those_that_run_may_end_first(model: Path) -> None:
    with InferenceEngine(model, **SETTINGS) as engine:
        right = answer(engine)
        stream = engine.generate_stream(PROMPT, GREEDY)
        sleeping = threading.Thread(target=lambda: engine.sleep(2, mode="wait"))
        sleeping.start()
        pieces = list(stream)
        sleeping.join()
        assert pieces[-1].finish_reason is FinishReason.LENGTH
        assert engine.is_sleeping
        engine.wake_up()
        assert answer(engine) == right


def test_other_levels_and_parts(model: Path) -> None:
    """Deeper, again, and a part of it: whatever is asked for, it ends awake with the same answers."""
    with InferenceEngine(model, **SETTINGS) as engine:
        right = answer(engine)
        steps: list[Callable[[], None]] = [
            lambda: engine.sleep(1), lambda: engine.sleep(2), lambda: engine.sleep(1),
            lambda: engine.wake_up(["weights"]), lambda: engine.sleep(1), lambda: engine.wake_up(["kv_cache"]),
            lambda: engine.sleep(2), lambda: engine.wake_up(), lambda: engine.wake_up(),
        ]  # fmt: skip
        for step in steps:
            step()
        assert not engine.is_sleeping
        assert answer(engine) == right


def test_a_loop_of_ones_own_sleeps(model: Path) -> None:
    with InferenceEngine(model, **SETTINGS) as engine:
        engine.add_request(PROMPT, GREEDY, request_id="a")
        engine.step()
        with pytest.raises(InvalidParameterError, match="call step"):
            engine.sleep(mode="wait")
        engine.sleep(2)
        assert [piece.finish_reason for piece in engine.step()] == [FinishReason.ABORT]
        with pytest.raises(EngineSleepingError):
            engine.add_request(PROMPT, GREEDY)
        engine.wake_up()
        engine.add_request(PROMPT, GREEDY, request_id="b")


def test_what_cannot_be_read_again_does_not_go(tmp_path: Path, model: Path) -> None:
    with InferenceEngine(model, load_format="dummy", **SETTINGS) as engine:
        right = answer(engine)
        with pytest.raises(CandleVllmError, match="random weights"):
            engine.sleep(2)
        assert not engine.is_sleeping
        engine.sleep(1)
        engine.wake_up()
        assert answer(engine) == right
    folder = write_toy_model(tmp_path / "toy", toy_config(head_dim=32))
    weights = next(folder.glob("*.safetensors"))
    with InferenceEngine(folder, **SETTINGS) as engine:
        right, data = answer(engine), weights.read_bytes()
        engine.sleep(2)
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CandleVllmError, match="have changed since it went to sleep"):
            engine.wake_up()
        assert engine.is_sleeping
        before = weights.stat()
        weights.unlink()
        with pytest.raises(CandleVllmError, match="cannot be read again"):
            engine.wake_up()
        assert before.st_size == len(data)


def test_an_engine_elsewhere_sleeps(model: Path, tmp_path: Path) -> None:
    long = write_toy_model(tmp_path / "toy", toy_config(head_dim=32, max_position_embeddings=8192))
    with RemoteEngine(long, **SETTINGS | {"kv_cache_memory": 16 << 20}) as engine:
        right = answer(engine)
        stream = engine.generate_stream(PROMPT, SamplingParams(temperature=0, max_tokens=8000, ignore_eos=True))
        next(stream)
        engine.sleep(2)
        with pytest.raises(RequestAbortedError):
            list(stream)
        assert engine.is_sleeping
        with pytest.raises(EngineSleepingError):
            engine.generate([PROMPT], use_tqdm=False)
        engine.wake_up(["kv_cache"])
        assert engine.is_sleeping
        engine.wake_up()
        assert answer(engine) == right
    with RemoteEngine(model, load_format="dummy", **SETTINGS) as engine:
        with pytest.raises(CandleVllmError, match="random weights"):
            engine.sleep(2)
        assert not engine.is_sleeping


@pytest.fixture
def on_a_device(model: Path) -> Iterator[tuple[Engine, LoadedModel]]:
    """A GPU's runner, on a stream that is as late as a GPU may be; its tensors are on the CPU."""
    loaded = load_any_model(EngineConfig(model=str(model), op_by_op=True), CPU, lambda *_: None)
    assert isinstance(loaded, LoadedModel)
    elsewhere = dataclasses.replace(loaded, placement=dataclasses.replace(loaded.placement, device=Device("cuda:0")))
    sleeper = Sleeper(EngineConfig(model=str(model), op_by_op=True, device="cpu"), elsewhere)
    runner = DeviceRunner(loaded.decoder, DeviceLimits(64, 4, 16, 16), LazyStream(), torch.float32, finite_cache=True)
    runner.allocate(40)
    sleeper.runners = [runner]
    engine = Engine(runner, Scheduler(BlockManager(40, 16), 4, 64), preparation_for(loaded, 192), sleeper=sleeper)
    yield engine, loaded
    engine.close()


def test_weights_of_a_device_go_to_the_host_and_back(on_a_device: tuple[Engine, LoadedModel]) -> None:
    engine, loaded = on_a_device
    weights = tensors_in(loaded.decoder.layers[0].mlp)  # type: ignore[attr-defined]
    assert len(weights) >= 2
    right = _tokens(engine)
    assert len(right) == 8
    engine.add(engine.prepare(_request("cut")))
    engine.step()
    assert engine.sleep(1)[-1].finish_reason is FinishReason.ABORT
    assert not any(each.numel() for each in weights)
    engine.wake_up(["weights"])
    engine.wake_up(["kv_cache"])
    assert _tokens(engine) == right


@pytest.mark.parametrize(
    ("owner", "name", "call", "first"),
    [(torch.Tensor, "to", 2, ["kv_cache"]), (DeviceRunner, "_allocate", 1, []), (DeviceRunner, "_capture", 1, [])],
    ids=["weights", "cache", "capture"],
)
def test_a_device_without_memory_stays_asleep(
    on_a_device: tuple[Engine, LoadedModel],
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    call: int,
    first: list[str],
) -> None:
    """Another process has taken it; with memory again, the engine wakes up with the same weights."""
    engine, loaded = on_a_device
    right, weights = _tokens(engine), tensors_in(*(layer.mlp for layer in loaded.decoder.layers))  # type: ignore[attr-defined]
    engine.sleep(1)
    engine.wake_up(first)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), call, torch.OutOfMemoryError("CUDA out of memory")))
        with pytest.raises(CandleVllmError, match="stays asleep: CUDA out of memory"):
            engine.wake_up(["weights", "kv_cache"])
    assert engine.is_sleeping
    assert not any(each.numel() for each in weights)
    assert not engine.runner.caches  # type: ignore[attr-defined]
    engine.wake_up(["weights", "kv_cache"])
    assert not engine.is_sleeping
    assert _tokens(engine) == right


def test_a_host_without_memory_leaves_a_device_awake(
    on_a_device: tuple[Engine, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, loaded = on_a_device
    right, weights = _tokens(engine), tensors_in(*(layer.mlp for layer in loaded.decoder.layers))  # type: ignore[attr-defined]
    engine.add(engine.prepare(_request("cut")))
    engine.step()
    with monkeypatch.context() as patch:
        error = RuntimeError("CUDA error: out of memory")  # of pinned memory
        patch.setattr(offloading, "_bytes_of", failing(offloading._bytes_of, 2, error))
        with pytest.raises(CandleVllmError, match="has restored its memory: CUDA error: out of memory"):
            engine.sleep(1)
    assert not engine.is_sleeping
    assert all(each.numel() for each in weights)
    assert engine.has_work
    assert [piece.finish_reason for piece in engine.step()][-1:] == [FinishReason.ABORT]
    assert not engine.has_work
    assert _tokens(engine) == right


def failing(whole: Callable[..., Any], number: int, error: Exception) -> Callable[..., Any]:
    """The same function, which fails at a call."""
    calls = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return whole(*args, **kwargs)

    return call


def test_requests_end_where_memory_does_not_go_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with InferenceEngine(model, **SETTINGS) as engine:
        right = answer(engine)
        stream = engine.generate_stream(PROMPT, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
        next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(recorded_runner, "drop_pages", failing(recorded_runner.drop_pages, 1, OSError(22, "locked")))
            with pytest.raises(CandleVllmError, match="locked"):
                engine.sleep()
        with pytest.raises(RequestAbortedError):
            list(stream)
        assert not engine.is_sleeping
        assert answer(engine) == right


def test_what_can_neither_sleep_nor_wake_refuses_requests(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with InferenceEngine(model, **SETTINGS) as engine:
        right = answer(engine)
        with monkeypatch.context() as patch:
            patch.setattr(recorded_runner, "drop_pages", failing(recorded_runner.drop_pages, 1, OSError(22, "locked")))
            restore = failing(sleeping.Sleeper._restore, 1, RuntimeError("no memory"))
            patch.setattr(sleeping.Sleeper, "_restore", lambda *given: restore(*given))
            with pytest.raises(EngineSleepingError, match=r"neither sleep .*locked.* nor wake up .*no memory"):
                engine.sleep()
        assert engine.is_sleeping
        with pytest.raises(EngineSleepingError):
            answer(engine)
        engine.wake_up()
        assert answer(engine) == right


def test_weights_that_cannot_be_loaded_put_the_cache_to_sleep_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with InferenceEngine(model, **SETTINGS) as engine:
        right = answer(engine)
        engine.sleep(2)
        engine.wake_up(["kv_cache"])
        with monkeypatch.context() as patch:
            patch.setattr(sleeping, "load_any_model", failing(sleeping.load_any_model, 1, MemoryError("no memory")))
            with pytest.raises(CandleVllmError, match="stays asleep: no memory"):
                engine.wake_up()
        engine.wake_up(["weights"])
        assert engine.is_sleeping
        engine.wake_up()
        assert answer(engine) == right


def _request(name: str) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_token_ids=tuple(PROMPT), params=GREEDY)


def _tokens(engine: Engine) -> list[int]:
    engine.add(engine.prepare(_request("a")))
    tokens: list[int] = []
    while engine.has_work:
        for piece in engine.step():
            assert piece.error is None
            tokens += piece.token_ids
    return tokens


def test_each_tensor_goes_back_to_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on a GPU may have a tensor on the CPU: here "meta" is the device of the others, which stay there."""
    monkeypatch.setattr(HostWeights, "holds", lambda _, each: each.is_meta)
    here, nothing = torch.arange(3), torch.empty(1, 0)
    weights = OffloadedWeights([torch.empty(2, device="meta"), nothing, here], HostWeights("cpu"))
    weights.to_host()
    assert not here.numel()
    weights.to_device()
    assert (here.tolist(), nothing.shape) == ([0, 1, 2], (1, 0))


def test_layers_of_another_package_sleep_too() -> None:
    class Block:
        def __init__(self) -> None:
            self.norm, self.first = torch.ones(2), self

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.norm

    block = Block()
    assert [id(each) for each in tensors_in([block, block.norm])] == [id(block.norm)]


def test_places_of_parts_are_given_again() -> None:
    """Whoever comes first: a part's memory is that which it had, and what nobody kept is not held."""
    with loading() as made:
        memory = new_memory()
        kept: dict[int, list[np.ndarray]] = {}
        for part in (0, 1):
            LOADED_PART.set(part)
            kept[part] = [memory.take(100), memory.take(5000)]
            for piece in kept[part]:
                piece[:] = part + 1
        LOADED_PART.set(None)
    assert made == [memory]
    assert WeightMemory().drop() == 0
    with loading(made):
        assert new_memory() is memory
        for part in (1, 0):
            LOADED_PART.set(part)
            for old in kept[part]:
                assert memory.take(len(old)).ctypes.data == old.ctypes.data
            assert (memory.take(5000) != kept[part][1]).any() or memory.take(10).size == 10
            assert all(memory.take(5000).ctypes.data % 64 == 0 for _ in range(8))
        LOADED_PART.set(None)
    assert (kept[1][0] == 2).all()
