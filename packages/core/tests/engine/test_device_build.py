# SPDX-License-Identifier: MIT
"""The plan of a GPU's memory and what is refused, over a pretended GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from candle_vllm.core import ConfigError, EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.devices import Device
from candle_vllm.core.engine import build as engine_build
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners import device_build
from candle_vllm.core.engine.runners.device_build import build_on_gpu
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.kernels import dispatch
from candle_vllm.core.kernels.device_stream import Work
from candle_vllm.core.loading.cache_specs import StateRoom, paged
from candle_vllm.core.memory import MIB, CachePlan
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.test_sight_families import write_sight
from packages.core.tests.models.tiny import write_tiny
from packages.core.tests.thread_ranks import Meetings, MeetingStages, ThreadRanks, in_threads
from packages.core.tests.toy_sight import write_toy_sight
from tests.common_run import few


@dataclasses.dataclass
class Memory:
    """What a pretended GPU says: `peak` is what the largest steps took."""

    free: int = 1000 * MIB
    peak: int = 100 * MIB
    capability: tuple[int, int] = (9, 0)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    fake = Memory()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50 * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 50 * MIB + fake.peak)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (fake.free, 2 * fake.free))
    monkeypatch.setattr(device_build, "capability", lambda device: 10 * fake.capability[0] + fake.capability[1])
    monkeypatch.setattr(device_build, "CudaStream", lambda device: LazyStream())
    return fake


@pytest.fixture(scope="module")
def loaded(toy_model: Path) -> LoadedModel:
    config = EngineConfig(model=str(toy_model), op_by_op=True)
    return load_model(config, torch.device("cpu"), lambda *_: None)


def build(loaded: LoadedModel, **settings: Any) -> Any:
    config = EngineConfig(model="toy", **({"attention_backend": "torch", "block_size": 16} | settings))
    return build_on_gpu(config, loaded, 64, 8, 0.9)


def test_the_cache_gets_its_share_of_what_steps_leave(
    loaded: LoadedModel, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    memory.free = 400 * MIB
    with caplog.at_level(logging.INFO):
        runner, plan = build(loaded, kv_fraction=0.01)
    # less two peaks of 100 MiB, 128 for the rest, and three times 8 rows of 272 logits
    assert plan.num_blocks == int((72 * MIB - runner.edit_bytes) * 0.01) // plan.block_bytes
    assert runner.edit_bytes == 3 * 8 * 272 * 4
    assert len(runner.caches[0].keys) == plan.num_blocks
    assert "0.01 of 72 MiB free beside 50 MiB of weights and 328 MiB for steps" in caplog.text
    assert "not captured as CUDA graphs with attention by torch: " in caplog.text, "the reference is not captured"


@pytest.mark.parametrize(("device", "megabytes"), [("cpu", 250), ("cuda", 1000)])
def test_adapters_share_main_memory_with_a_cache_that_is_there_too(
    loaded: LoadedModel, device: str, megabytes: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_build, "available_memory", lambda: 4_000_000_000)
    monkeypatch.setattr(engine_build, "adapter_loader", lambda *_: None)
    there = dataclasses.replace(loaded, placement=dataclasses.replace(loaded.placement, device=torch.device(device)))
    plan = CachePlan(2000, 1_000_000, 100, "", states=StateRoom(1, 0, 0, 1_000_000_000))
    with caplog.at_level(logging.INFO):
        engine_build.adapter_store(EngineConfig(model="toy", enable_lora=True), there, object(), 4, plan)  # type: ignore[arg-type]
    assert f"adapters may take {megabytes} MB" in caplog.text


def test_a_picture_has_its_memory_while_it_is_encoded(memory: Memory, tmp_path: Path) -> None:
    config = EngineConfig(model=str(write_toy_sight(tmp_path)), op_by_op=True)
    loaded = load_model(config, torch.device("cpu"), lambda *_: None)
    assert loaded.tower is not None
    memory.free = 340 * MIB
    plans = [build(each, kv_fraction=0.1)[1] for each in (loaded, dataclasses.replace(loaded, tower=None))]
    less = (plans[1].num_blocks - plans[0].num_blocks) * plans[0].block_bytes
    assert less == pytest.approx(loaded.tower.tower.config.step_bytes(1) / 10, abs=2 * plans[0].block_bytes)


def test_pictures_whose_tokens_see_each_other_are_not_reproducible(memory: Memory, tmp_path: Path) -> None:
    config = EngineConfig(model=str(write_sight(tmp_path, "Gemma 3")), op_by_op=True)
    loaded = load_model(config, torch.device("cpu"), lambda *_: None)
    with pytest.raises(ConfigError, match="set max_images=0") as caught:
        build(loaded, deterministic=True)
    assert caught.value.setting == "deterministic"
    build(dataclasses.replace(loaded, tower=None))[0].close()


def test_stages_are_built_at_once(memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps connect them; places for what goes over borders are there when memory is planned."""
    model = write_toy_model(tmp_path, toy_config(num_hidden_layers=3))
    config = EngineConfig(model=str(model), attention_backend="torch", block_size=16, pipeline_parallel_size=2)
    monkeypatch.setattr(device_build, "CudaStream", lambda device: LazyStream(serial=True))
    monkeypatch.setattr(device_build, "compile_together", lambda work, device: 0)  # is for one thread of a process
    meetings = Meetings()

    def built(ranks: ThreadRanks) -> tuple[Any, int]:
        assert ranks.stages is not None
        part = load_model(dataclasses.replace(config, op_by_op=True), Device("cpu"), lambda *_: None, ranks=ranks)
        decoder: Any = part.decoder
        decoder.stage.line = MeetingStages(ranks.stages.rank, 2, meetings)
        runner, plan = build_on_gpu(config, part, 64, 8, 0.9, ranks=ranks)
        return runner, plan.num_blocks

    (first, blocks), (second, others) = in_threads(1, built, 2)
    assert blocks == others > 0
    assert (first.in_flight, second.in_flight, first.overlaps) == (2, 2, False)
    assert {shape for shapes in meetings.asked.values() for shape in shapes} == {(2, 1, 64), (1, 64)}


def test_forms_are_compiled_before_steps_are_measured(
    loaded: LoadedModel, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    forward = loaded.decoder.forward

    def step(*given: Any) -> torch.Tensor:
        order.append("step")
        return forward(*given)

    def together(work: Work, device: torch.device) -> int:
        assert device == torch.device("cpu")
        order.append("together")
        work()
        order.append("compiled")
        return 1

    monkeypatch.setattr(loaded.decoder, "forward", step)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: order.append("measure"))
    monkeypatch.setattr(device_build, "compile_together", together)
    build(loaded, kv_cache_memory=MIB)[0].close()
    first = order[: order.index("measure")]
    assert (first[0], first[-1]) == ("together", "compiled")
    again = order[order.index("measure") :]
    assert first.count("step") == again[: first.count("step") + 3].count("step") > 0, "all of them, to their end"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "name", few([name for name, row in ROWS.items() if row.interpreted], "Gemma-4 experts", "Qwen3.5", "DeepSeek-V4")
)
def test_no_result_of_a_kernel_is_an_index_for_torch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`compile_together` runs steps without their kernels, on memory of any contents, in which torch would find wrong
    indices. On a GPU that is an error of the device, after which nothing runs."""
    from triton.runtime.jit import JITFunction

    source = write_tiny(tmp_path / "model", ROWS[name].model_type, **ROWS[name].config)
    config = EngineConfig(model=str(source), op_by_op=True, dtype="bf16", max_model_len=256)
    model, usual = load_model(config, torch.device("cpu"), lambda *_: None), torch.empty

    def spoilt(*shape: Any, **given: Any) -> torch.Tensor:
        made = usual(*shape, **given)
        made.untyped_storage().fill_(0x7F)
        return made

    monkeypatch.setattr(torch, "empty", spoilt)
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    launched = list[str]()
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.__name__))
    model.decoder.prepare(256)
    stream, limits = LazyStream(), DeviceLimits(64, 4, 16, 16)
    runner = DeviceRunner(model.decoder, limits, stream, torch.bfloat16, captured_prompts=64)
    for work in runner.largest_steps():
        work()
    stream.mark().wait()
    assert len(set(launched)) > 10
    runner.close()


@pytest.mark.parametrize(
    ("capability", "dtype", "stored"),
    [
        ((9, 0), "auto", torch.float32),
        ((9, 0), "fp8", torch.float8_e4m3fn),
        ((9, 0), "fp8_per_token_head", torch.float8_e4m3fn),
        ((8, 0), "fp8_per_token_head", torch.uint8),
        ((7, 5), "int8_per_token_head", torch.int8),
    ],
)
def test_it_answers(
    loaded: LoadedModel, memory: Memory, capability: tuple[int, int], dtype: str, stored: torch.dtype
) -> None:
    from candle_vllm.core.engine.build import preparation_for
    from candle_vllm.core.engine.cache.block_manager import BlockManager
    from candle_vllm.core.engine.step.engine import Engine
    from candle_vllm.core.engine.step.scheduler import Scheduler

    memory.capability = capability
    runner, plan = build(loaded, kv_cache_memory=MIB, kv_cache_dtype=dtype)
    assert runner.caches[0].keys.dtype == stored
    assert plan.block_bytes == runner.block_bytes
    specs = paged(loaded.config.cache_specs)
    head, elements = specs[0].key_dim, sum(spec.elements for spec in specs)
    assert plan.block_bytes == 16 * elements * (head + 4 if "token" in dtype else head * stored.itemsize) // head
    scheduler = Scheduler(BlockManager(plan.num_blocks, 16), 8, 64)
    engine = Engine(runner, scheduler, preparation_for(loaded, plan.max_model_len))
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    engine.add(engine.prepare(GenerationRequest(request_id="r", prompt_token_ids=[1, 2, 3], params=params)))
    tokens = [token for _ in range(8) for piece in engine.step() for token in piece.token_ids]
    assert len(tokens) == 5
    taken = runner.copy_out(0)()
    assert len(taken) == plan.block_bytes
    runner.copy_in(1, taken)
    assert runner.copy_out(1)() == taken, "scales go with their numbers"
    runner.close()


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"peak": 600 * MIB}, {}, r"64 tokens and 8 sequences .* try max_num_batched_tokens=16 or max_num_seqs=2"),
        ({}, {"kv_cache_memory": 900 * MIB}, rf"set kv_cache_memory={604 * MIB} \(bytes\) or less"),
        ({}, {"attention_backend": "flash_attn"}, r"attention_backend 'flash_attn' cannot serve this model"),
        ({}, {"attention_backend": "triton", "block_size": 8}, r"blocks of at least 16 tokens"),
        ({"capability": (8, 0)}, {"attention_backend": "triton", "kv_cache_dtype": "fp8"}, r"compute capability 8.9"),
        (
            {"capability": (8, 0)},
            {"kv_cache_dtype": "q4_0"},
            r"kv_cache_dtype='q4_0' is for the CPU: on a GPU set 'int8_per_token_head'",
        ),
        ({"capability": (8, 0)}, {"key_cache_dtype": "fp8"}, r"leave key_cache_dtype out, or set kv_cache_dtype"),
        ({}, {"kv_cache_memory": MIB, "max_model_len": 100000}, "beyond the model's context"),
    ],
    ids=str,
)
def test_what_does_not_fit_names_a_flag(
    loaded: LoadedModel, memory: Memory, changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    for name, value in changes.items():
        setattr(memory, name, value)
    with pytest.raises(ConfigError, match=message):
        build(loaded, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_sinks": True}, "does not support attention sinks"),
        ({"attention_softcap": 50.0}, "has no soft cap"),
        ({"slopes": (0.5,)}, "ALiBi"),
        ({"relative_logits": True}, "relative logits"),
    ],
)
def test_what_a_model_asks_of_attention_is_told_to_the_backend(
    loaded: LoadedModel, memory: Memory, change: dict[str, Any], message: str
) -> None:
    half = dataclasses.replace(loaded.placement, dtype="BF16")
    asking = dataclasses.replace(loaded, placement=half, config=dataclasses.replace(loaded.config, **change))
    with pytest.raises(ConfigError, match=message):
        build(asking, attention_backend="torch_flash")


def test_memory_that_runs_out_in_the_largest_step(
    loaded: LoadedModel, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loaded.decoder, "forward", full)
    with pytest.raises(ConfigError, match="1000 of 2000 MiB are free"):
        build(loaded)
