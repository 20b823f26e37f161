# SPDX-License-Identifier: MIT
"""Experts that the CPU computes within a GPU's steps: the same numbers, in pieces, whatever else is in a step."""

from __future__ import annotations

import dataclasses
import logging
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from candle_vllm.core import ConfigError, EngineConfig
from candle_vllm.core.assembly import model as loading
from candle_vllm.core.assembly import offload
from candle_vllm.core.assembly.encoder import load_any_model
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.devices import Device
from candle_vllm.core.engine.runners import device_build
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.runners.sleeping import Sleeper
from candle_vllm.core.kernels import offloading
from candle_vllm.core.kernels.device_stream import CudaStream
from candle_vllm.core.kernels.moe import host
from candle_vllm.core.kernels.offloading import HostWeights, tensors_in
from candle_vllm.core.layers.adapters import linears_in
from candle_vllm.core.layers.moe import mixtures_of
from candle_vllm.core.memory import MIB
from packages.core.tests.engine.test_device_steps import EVERYTHING, asked, drive, make
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.tiny import (
    cuts,
    error,
    recorded_logits,
    room_of,
    some_tokens,
    step_logits,
    typical_spread,
    write_tiny,
)
from tests.common_run import few

BLOCK = 16
WITH_EXPERTS = [name for name, row in ROWS.items() if any("expert" in key and row.config[key] for key in row.config)]
for without in ("DeepSeek-V3 dense", "Jamba dense", "DeepSeek-V4"):
    WITH_EXPERTS.remove(without)
KINDS = ["Llama-4", "Mixtral", "Qwen2-MoE", "DeepSeek-V3", "gpt-oss"]
IN_BLOCKS = [("Mixtral", "Q8_0"), ("Qwen3-MoE", "Q4_0"), ("gpt-oss", "Q8_0")]
GPU = Device("cuda:0")


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned for a GPU happens, although tensors are on the CPU."""
    usual = loading.plan_split
    monkeypatch.setattr(loading, "plan_split", lambda config, device, *others: usual(config, GPU, *others))
    monkeypatch.setattr(offload, "gpu_memory", lambda _: (100 << 30, 100 << 30))


def load(source: Path, layers: int | None, **settings: Any) -> LoadedModel:
    given = {"op_by_op": True, "max_images": 0, "threads": 2} | settings
    config = EngineConfig(model=str(source), cpu_experts=layers, **given)
    loaded = load_any_model(config, Device("cpu"), lambda *_: None)
    assert isinstance(loaded, LoadedModel)
    return loaded


Made = tuple[DeviceRunner, LazyStream]


@pytest.fixture
def runner_of() -> Iterator[Callable[..., Made]]:
    made: list[DeviceRunner] = []

    def build(
        loaded: LoadedModel,
        *,
        stream: LazyStream | None = None,
        tokens: int = 64,
        sequences: int = 16,
        blocks: int = 200,
        graphs: bool = False,
        prompts: int = 0,
    ) -> Made:
        stream = LazyStream() if stream is None else stream
        computes = device_build.host_experts(EngineConfig(model="m", threads=2), loaded, stream, tokens)
        limits = DeviceLimits(tokens, sequences, 16, BLOCK)
        settings = {"graphs": graphs, "finite_cache": True, "captured_prompts": prompts, "overlaps": computes is None}
        dtype = loaded.placement.torch_dtype
        runner = DeviceRunner(loaded.decoder, limits, stream, dtype, host=computes, **settings)
        made.append(runner)
        for work in runner.largest_steps():
            work()
        runner.allocate(blocks, room_of(loaded.decoder))
        return runner, stream

    yield build
    for runner in made:
        runner.close()


@pytest.mark.one_of_each(2)
@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("name", few(WITH_EXPERTS, *KINDS))
def test_logits_are_those_of_the_whole_model(name: str, tmp_path: Path, runner_of: Callable[..., Made]) -> None:
    """Prompts whole, in pieces and token by token; the experts of one layer, and of all."""
    source = write_tiny(tmp_path / "model", ROWS[name].model_type, **ROWS[name].config)
    tokens = some_tokens()
    whole, pieces = cuts()
    model = load(source, 0)
    right = step_logits(runner_of(model, tokens=80)[0], tokens, whole)
    some = max(2, min(mixtures_of(_layers(model))) + 1)
    for layers, chunks in ((1024, whole), (1024, pieces), (some, pieces)):
        loaded = load(source, layers)
        assert loaded.split is not None
        there = [number for number, each in mixtures_of(_layers(loaded)).items() if each.experts.gate_up.pieces]
        assert there == [number for number in mixtures_of(_layers(loaded)) if number < layers]
        assert error(step_logits(runner_of(loaded, tokens=80)[0], tokens, chunks), right) < 1e-4


def _layers(loaded: LoadedModel) -> Any:
    decoder: Any = loaded.decoder
    return decoder.layers


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize(
    ("name", "kind"), few([("Mixtral", "Q8_0"), ("Qwen3-MoE", "Q4_0"), ("gpt-oss", "Q8_0")], ("Mixtral", "Q8_0"))
)
def test_quantised_experts_stay_as_they_are(
    name: str, kind: str, tmp_path: Path, runner_of: Callable[..., Made]
) -> None:
    """The products are those of the compiled kernels, which the CPU's own engine has."""
    source = write_tiny(tmp_path / "model", ROWS[name].model_type, **ROWS[name].config)
    path = export_gguf(source, tmp_path / "model.gguf", str(ROWS[name].gguf), quantization=kind)
    loaded, tokens = load(path, 1024), some_tokens(24)
    assert loaded.split is not None
    stored = sum(loaded_bytes for loaded_bytes in _stored(path, loaded.split.names))
    assert loaded.split.host_bytes == stored
    ours = step_logits(runner_of(loaded)[0], tokens, [24])
    assert typical_spread(ours, recorded_logits(path, tokens, [24], cpu_experts=0)) < 0.05


def _stored(path: Path, names: frozenset[str]) -> list[int]:
    from gguf import GGUFReader

    return [int(tensor.n_bytes) for tensor in GGUFReader(path).tensors if tensor.name in names]


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_halves_go_there_as_they_are(dtype: str, mixture: Path, runner_of: Callable[..., Made]) -> None:
    """Against fp32: a type that was taken for another would be far off."""
    tokens = some_tokens(24)
    ours = step_logits(runner_of(load(mixture, 1024, dtype=dtype))[0], tokens, [23, 1])
    right = step_logits(runner_of(load(mixture, 0, dtype="f32"))[0], tokens, [24])
    assert 0 < typical_spread(ours.float(), right) < 0.03


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that has some, on a late stream."""
    for name, value in (("memory_allocated", MIB), ("memory_reserved", MIB), ("max_memory_reserved", 9 * MIB)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (999 * MIB, 1999 * MIB))
    monkeypatch.setattr(device_build, "capability", lambda _: 90)
    monkeypatch.setattr(device_build, "CudaStream", lambda _: LazyStream())


@pytest.mark.usefixtures("split", "memory")
def test_an_engine_is_built_so(mixture: Path) -> None:
    loaded = load(mixture, 1)
    config = EngineConfig(model="m", attention_backend="torch", block_size=BLOCK, kv_cache_memory=MIB, threads=2)
    runner, plan = device_build.build_on_gpu(config, loaded, 64, 8, 0.9)
    try:
        assert not runner.overlaps, "the host is busy within a step"
        engine = make(loaded, runner, blocks=plan.num_blocks, sequences=8)
        assert len(drive(engine, asked(EVERYTHING[:1])[:1])["0"][0][1]) == 24
    finally:
        runner.close()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changed = ROWS["Qwen2-MoE"].config | {"max_position_embeddings": 192}
    return write_tiny(tmp_path_factory.mktemp("moe") / "model", "qwen2_moe", **changed)


@pytest.mark.usefixtures("split")
def test_answers_do_not_depend_on_company_or_capture(mixture: Path, runner_of: Callable[..., Made]) -> None:
    """One request at a time, op by op, against all at once in captured steps, whose rows are filled up."""
    loaded = load(mixture, 1024)
    with exact_sums():
        alone: dict[str, Any] = {}
        plain, _ = runner_of(loaded)
        for request in asked(EVERYTHING):
            alone |= drive(make(loaded, plain), [request])
        captured, stream = runner_of(loaded, graphs=True, prompts=64)
        assert drive(make(loaded, captured), asked(EVERYTHING), every=2) == alone
    assert stream.replayed > 0


class Late(LazyStream):
    """Whose copies to the host arrive when they are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.on_their_way: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._hosts: dict[int, torch.Tensor] = {}  # held, or a copy on the device could come to lie where one was

    def staged(self, size: int) -> torch.Tensor:
        made = super().staged(size)
        self._hosts[made.data_ptr()] = made
        return made

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.data_ptr() in self._hosts:
            self.on_their_way.append((target, source.clone()))
        else:
            target.copy_(source)

    def mark(self) -> Any:
        stream, usual = self, super().mark()

        class Mark:
            def wait(self) -> None:
                usual.wait()
                with torch.inference_mode():
                    for target, source in stream.on_their_way:
                        target.copy_(source)
                stream.on_their_way = []

        return Mark()


@pytest.mark.usefixtures("split")
def test_the_host_waits_for_what_it_reads(
    mixture: Path, runner_of: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, tokens = load(mixture, 1024), some_tokens(20)
    right = step_logits(runner_of(loaded)[0], tokens, [19, 1])
    for waits in (True, False):
        stream = Late()
        monkeypatch.setattr(host, "copy", stream.copy)
        if not waits:  # it would be seen
            monkeypatch.setattr(host.HostExperts, "_mark", lambda self: setattr(self, "_sent", _Never()))
        found = step_logits(runner_of(loaded, stream=stream)[0], tokens, [19, 1])
        assert torch.equal(found, right) == waits


class _Never:
    def wait(self) -> None:
        """It does not."""


@pytest.mark.usefixtures("split")
def test_long_steps_are_computed_in_parts(
    mixture: Path, runner_of: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, tokens = load(mixture, 1024), some_tokens(50)
    right = step_logits(runner_of(loaded)[0], tokens, [50])
    monkeypatch.setattr(host, "MOST_ROWS", 16)
    assert torch.equal(step_logits(runner_of(loaded)[0], tokens, [50]), right)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("level", [1, 2])
def test_it_sleeps(level: int, mixture: Path, runner_of: Callable[..., Made]) -> None:
    """At level 2 experts are read from the file again, to where they were."""
    loaded = load(mixture, 1024)
    assert loaded.split is not None
    assert list(loaded.memories) == [loaded.split.host and loaded.split.host.weight_memory]
    away = dataclasses.replace(loaded, placement=dataclasses.replace(loaded.placement, device=GPU))
    sleeper = Sleeper(EngineConfig(model=str(mixture), op_by_op=True, max_images=0, threads=2), away)
    runner, _ = runner_of(loaded, graphs=True)
    sleeper.runners, tokens = [runner], some_tokens(20)
    right = step_logits(runner, tokens, [19, 1])
    sleeper.check(level)
    sleeper.sleep(level)
    experts: Any = _layers(loaded)[0].mlp.experts
    *_, last = experts.gate_up.pieces.values()
    rest = last.data.reshape(-1)[mmap.PAGESIZE :]  # whole pages go back, and the matrix may begin within one
    assert rest.any() == (level == 1)
    if level == 2:
        sleeper._loaded = loaded  # tensors of a device are on the CPU here
    sleeper.wake_up({"weights", "kv_cache"})
    assert torch.equal(step_logits(runner, tokens, [19, 1]), right)


# ---- what is captured in pieces --------------------------------------------------------------------------------------


class Graph:
    """What a capture makes, of a driver that writes down what is asked of it."""

    told: list[str]

    def __init__(self) -> None:
        self.number = sum(each.startswith("begin") for each in self.told)

    def capture_begin(self, **_: Any) -> None:
        assert not torch.is_inference_mode_enabled()
        self.told.append(f"begin {self.number}")

    def capture_end(self) -> None:
        self.told.append(f"end {self.number}")

    def replay(self) -> None:
        self.told.append(f"replay {self.number}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Graph.told = []
    nothing = _Nothing()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    for name in ("Stream", "device", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nothing)
    return Graph.told


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def wait_stream(self, _: object) -> None: ...


def test_captured_work_is_in_pieces_around_what_the_host_does(told: list[str]) -> None:
    stream = CudaStream(torch.device("cpu"))

    def work() -> None:
        told.append("launch a")
        stream.between(lambda: told.append("host"))
        told.append("launch b")

    stream.run(work)
    assert told == ["launch a", "host", "launch b"]
    told.clear()
    replay = stream.capture(work)
    assert told == ["begin 0", "launch a", "end 0", "begin 1", "launch b", "end 1"]
    told.clear()
    stream.run(replay)
    assert told == ["replay 0", "host", "replay 1"]


def test_a_capture_that_fails_in_a_later_piece_is_ended(told: list[str]) -> None:
    stream = CudaStream(torch.device("cpu"))

    def work() -> None:
        stream.between(lambda: None)
        raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        stream.capture(work)
    assert told == ["begin 0", "end 0", "begin 1", "end 1"]
    stream.capture(lambda: None)
    assert told[-2:] == ["begin 2", "end 2"]


# ---- how many, and what is refused -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize(("short", "layers"), [(0, None), (1, 1), (2, 2), (100, 2)])
def test_as_many_go_as_do_not_fit(
    short: int, layers: int | None, mixture: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`short`: how many layers' experts more there are than fit."""
    each = 3 * 6 * 64 * 128 * 4  # fp32
    kept = (1 << 30) + 192 * 2 * 2 * 2 * 32 * 4
    whole = sum(tensor.nbytes for tensor in torch.nn.ParameterDict(_weights(mixture)).values())
    free = whole + kept - (short * each - each // 2 if short else 0)
    monkeypatch.setattr(offload, "gpu_memory", lambda _: (free, 8 << 30))
    with caplog.at_level(logging.INFO):
        loaded = load(mixture, None, cpu_offload_gb=0)
    assert (loaded.split and loaded.split.experts) == layers
    if layers is not None:
        assert f"{layers * each // MIB} MiB, are in main memory, and the CPU computes them" in caplog.text
        assert f"of {free // MIB} MiB that are free on cuda:0, 1024 MiB are reserved for activations" in caplog.text


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name.replace(".", "_"): tensor for name, tensor in load_file(folder / "model.safetensors").items()}


# ---- layers that a GPU reads over the bus ----------------------------------------------------------------------------


@pytest.fixture
def bus(split: None, monkeypatch: pytest.MonkeyPatch) -> list[HostWeights]:
    """Memory of the host that stands for what a GPU sees of it."""
    made: list[HostWeights] = []

    def memory(_: object) -> HostWeights:
        made.append(HostWeights("cpu"))
        return made[-1]

    monkeypatch.setattr(offloading, "HostWeights", memory)
    return made


def test_layers_on_the_bus_compute_the_same(
    bus: list[HostWeights], mixture: Path, runner_of: Callable[..., Made], caplog: pytest.LogCaptureFixture
) -> None:
    """Of the last layer all matrices, alone and beside experts that the CPU computes; as layers, and as gigabytes."""
    tokens = some_tokens(20)
    right = step_logits(runner_of(load(mixture, 0))[0], tokens, [19, 1])
    with caplog.at_level(logging.INFO):
        for experts, given in ((0, {"gpu_layers": 1}), (1, {"gpu_layers": 1}), (1024, {"cpu_offload_gb": 1e-4})):
            loaded = load(mixture, experts, **given)
            first, last = (linears_in(layer) for layer in _layers(loaded))
            assert not any(bus[-1].holds(each) for each in tensors_in(*(linear.matrices for linear in first)))
            there = [each for linear in last for each in tensors_in(linear.matrices)]
            assert len(there) >= (4 if experts == 1024 else 6)
            assert all(bus[-1].holds(each) for each in there)
            assert error(step_logits(runner_of(loaded)[0], tokens, [19, 1]), right) < 1e-4
    assert "the weights of the last 1 of 2 layers, 0 MiB, are in main memory, and the GPU reads them" in caplog.text


@pytest.mark.parametrize("level", [1, 2])
def test_what_is_on_the_bus_sleeps(
    level: int, bus: list[HostWeights], mixture: Path, runner_of: Callable[..., Made]
) -> None:
    """It stays where it is at level 1, and is read from the file again at level 2."""
    loaded = load(mixture, 0, gpu_layers=1)
    away = dataclasses.replace(loaded, placement=dataclasses.replace(loaded.placement, device=GPU))
    sleeper = Sleeper(EngineConfig(model=str(mixture), op_by_op=True, max_images=0, threads=2), away)
    runner, tokens = runner_of(loaded, graphs=True)[0], some_tokens(20)
    sleeper.runners = [runner]
    right, (first, last) = step_logits(runner, tokens, [19, 1]), (_layers(loaded)[n].attention for n in (0, 1))
    sleeper.check(level)
    sleeper.sleep(level)
    kept = [bool(tensors_in(each.qkv.matrices)[0].numel()) for each in (first, last)]
    assert kept == [False, level == 1]
    assert bool(bus[0].nbytes) == (level == 1)
    if level == 2:
        sleeper._loaded = loaded  # tensors of a device are on the CPU here
    sleeper.wake_up({"weights", "kv_cache"})
    assert torch.equal(step_logits(runner, tokens, [19, 1]), right)
    assert bus[0].holds(tensors_in(last.qkv.matrices)[0])


def test_pinned_bytes_by_their_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's tensors are views of pinned pieces; what asks for them is told address and size."""
    asked: list[Any] = []

    def seen(given: Any, device: torch.device) -> torch.Tensor:
        asked.append((given.__cuda_array_interface__, device))
        return given._held

    monkeypatch.setattr(torch, "as_tensor", seen)
    usual = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda size, *, dtype, pin_memory: usual(size, dtype=dtype) if pin_memory else 0
    )
    monkeypatch.setattr(offloading, "PIECE_BYTES", 1024)
    memory, parts = HostWeights("cuda:1"), [torch.arange(100.0), torch.arange(7), torch.arange(200.0).view(2, 100)]
    copies = [part.clone() for part in parts]
    memory.take(parts)
    assert all(torch.equal(part, copy) and memory.holds(part) for part, copy in zip(parts, copies, strict=True))
    assert [part.data_ptr() % 256 for part in parts] == [parts[0].data_ptr() % 256] * 2 + [parts[2].data_ptr() % 256]
    assert [(told["shape"], told["typestr"], str(device)) for told, device in asked] == [((1024,), "|u1", "cuda:1")] * 2
    assert [told["data"] for told, _ in asked] == [(parts[0].data_ptr(), False), (parts[2].data_ptr(), False)]
    assert memory.nbytes == 2048


def test_what_does_not_fit_is_read_over_the_bus(
    bus: list[HostWeights], mixture: Path, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mixture once all experts have gone; where experts stay, as those of token ids, or there are none, at once;
    and nothing where 0."""
    by_id = write_tiny(tmp_path / "by_id", ROWS["DeepSeek-V4"].model_type, **ROWS["DeepSeek-V4"].config)
    monkeypatch.setattr(offload, "gpu_memory", lambda _: (1 << 20, 8 << 30))
    for source, experts, given, wanted in (
        (mixture, None, {}, (2, 0)),
        (mixture, 0, {}, (0, 0)),
        (by_id, None, {}, (0, 0)),
        (toy_model, None, {}, (0, 0)),
        (mixture, None, {"cpu_offload_gb": 0.0}, (2, 2)),
        (mixture, None, {"gpu_layers": 1024}, (2, 2)),
    ):
        split = load(source, experts, **given).split
        assert split is not None
        assert (split.experts, split.layers) == wanted
        assert "MiB are reserved for activations" in split.message
    assert load(mixture, 0, cpu_offload_gb=0).split is None
    assert load(toy_model, 0, gpu_layers=1024).split is None
    with pytest.raises(ConfigError, match="chosen by token id stay on the GPU: leave cpu_experts out"):
        load(by_id, 1)


def test_what_cannot_be_is_refused_by_name(
    toy_model: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"cpu_experts is not implemented for several ranks: .*_size=1"):
        EngineConfig(model="m", cpu_experts=3, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="both say how many layers are on the GPU: set one of them"):
        EngineConfig(model="m", cpu_offload_gb=1, gpu_layers=4)
    assert load(mixture, 3).split is None
    assert "cpu_experts=3 has no effect: the model runs on the CPU, so all weights are in main memory" in caplog.text
    usual = loading.plan_split
    monkeypatch.setattr(loading, "plan_split", lambda config, device, *others: usual(config, GPU, *others))
    monkeypatch.setattr(offload, "gpu_memory", lambda _: (100 << 30, 100 << 30))
    with pytest.raises(ConfigError, match="is for models with experts, and this model is dense: leave it out"):
        load(toy_model, 1)
    monkeypatch.setattr(offload, "matrix_obstacle", lambda _: "they are what they are")
    with pytest.raises(
        ConfigError,
        match=r"the CPU cannot compute these experts, because they are .* set "
        r"cpu_experts=0",
    ):
        load(mixture, 1)
