# SPDX-License-Identifier: MIT
"""Which device is chosen, and what is said of a GPU that cannot be used."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import re
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core import ConfigError, InferenceEngine, devices
from candle_vllm.core.devices import CPU, Device, choose_device, fitting, require_torch
from candle_vllm.core.engine.runners.eager_runner import EagerEncoderRunner, EagerTower
from candle_vllm.core.kernels.triton_build import AMD, AMD_STAGES, TENSOR_CORES, capability, stages
from packages.core.tests.kernels.triton.building import CAPABILITIES

GB = 1 << 30


@dataclasses.dataclass
class Gpus:
    """What a pretended driver answers."""

    count: int = 1
    capability: tuple[int, int] = (9, 0)
    free: int = 70 * GB
    fault: str | None = None
    memory_fault: str | None = None
    cuda: str | None = "13.0"
    triton: bool = True
    programs: tuple[str, ...] = ("gcc",)
    folder: Path = Path()

    def keep(self, name: str, text: str = "") -> None:
        """Puts a file there: what Triton's package, its cache, or Python's headers hold."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpus:
    fake = Gpus(folder=tmp_path)
    fake.keep("triton/backends/nvidia/driver.py", "mod = compile_module_from_src(src=src, name='cuda_utils')")
    fake.keep("include/Python.h")
    package = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "triton")])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(devices.shutil, "which", lambda name: name if name in fake.programs else None)
    monkeypatch.setattr(devices.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})

    def start() -> None:
        if fake.fault is not None:
            raise RuntimeError(fake.fault)

    def memory(index: int) -> tuple[int, int]:
        if fake.memory_fault is not None:
            raise RuntimeError(fake.memory_fault)
        return fake.free, 80 * GB

    monkeypatch.setattr(devices, "_driver_has_gpu", lambda: fake.count > 0)
    monkeypatch.setattr(torch.version, "cuda", fake.cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: fake.count)
    monkeypatch.setattr(torch.cuda, "init", start)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: fake.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(
        devices.importlib.util, "find_spec", lambda name: package if name != "triton" or fake.triton else None
    )
    return fake


def test_a_gpu_that_can_be_used(gpus: Gpus) -> None:
    gpus.count = 2
    assert choose_device("auto") == Device("cuda:0")
    assert choose_device("cuda") == Device("cuda:0")
    assert choose_device("cuda:1") == Device("cuda:1")
    assert choose_device("cuda:1,cuda:0") == Device("cuda:1")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("wanted", "changes", "message"),
    [
        ("cuda", {"count": 0}, "no GPU was found"),
        ("cuda:1", {}, "there is one GPU, cuda:0"),
        ("cuda:7", {"count": 4}, "there are 4 GPUs, cuda:0 to cuda:3"),
        ("cuda", {"fault": "The NVIDIA driver on your system is too old (found version 11040)."}, "driver is too old"),
        ("cuda", {"fault": "Found no NVIDIA driver on your system."}, "no NVIDIA driver"),
        ("cuda", {"fault": "CUDA unknown error\nmore"}, "CUDA cannot be initialised: CUDA unknown error"),
        (
            "cuda",
            {"capability": (7, 0)},
            "Pretended GPU has compute capability 7.0 and 7.5 is needed: torch for CUDA 13",
        ),
        ("cuda", {"free": GB}, "its memory is in use: 1024 of 81920 MB are free"),
        ("cuda", {"memory_fault": "CUDA error: out of memory\nmore"}, "CUDA error: out of memory"),
        ("cuda", {"triton": False}, "triton is not installed"),
    ],
)
def test_a_gpu_that_cannot(
    gpus: Gpus, wanted: str, changes: dict[str, object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in changes.items():
        setattr(gpus, name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        choose_device(wanted)
    assert caught.value.setting == "device"
    assert "device='cpu'" in str(caught.value)
    assert "\n" not in str(caught.value)
    if wanted == "cuda":
        with caplog.at_level(logging.WARNING):
            assert choose_device("auto") == CPU
        assert (message in caplog.text) == (gpus.count > 0), "a GPU that is there and not used is worth a line"


def test_a_compiler_that_triton_lacks(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.programs = ()
    with pytest.raises(ConfigError, match=r"a C compiler and none was found: .*apt install gcc python3-dev.* set CC"):
        choose_device("cuda")
    for programs, compiler in ((("clang",), None), (("/opt/cc",), "/opt/cc")):
        gpus.programs = programs
        if compiler is not None:
            monkeypatch.setenv("CC", compiler)
        assert choose_device("cuda").type == "cuda"
    gpus.programs = ("gcc", "clang")
    with pytest.raises(ConfigError, match="CC names a compiler that does not exist"):  # Triton looks for no other then
        choose_device("cuda")


def test_a_header_that_triton_lacks(gpus: Gpus) -> None:
    header = gpus.folder / "include" / "Python.h"
    header.unlink()
    with pytest.raises(ConfigError, match=rf"{header} is missing: .*apt install python3-dev"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (f"cache/ABC/cuda_utils{sysconfig.get_config_var('EXT_SUFFIX')}", ""),
        ("triton/backends/nvidia/driver.py", "import triton._C.cuda_utils"),
    ],
    ids=["built before", "built into triton"],
)
def test_a_triton_that_needs_no_compiler(gpus: Gpus, name: str, text: str) -> None:
    gpus.programs = ()
    (gpus.folder / "include" / "Python.h").unlink()
    gpus.keep(name, text)
    assert choose_device("cuda").type == "cuda"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_here_builds_what_the_check_looks_for() -> None:
    """A Triton that calls it otherwise, or needs it no longer, makes the check wrong."""
    package = importlib.util.find_spec("triton")
    assert package is not None
    assert package.submodule_search_locations
    text = Path(package.submodule_search_locations[0], "backends", "nvidia", "driver.py").read_text()
    assert "compile_module_from" in text
    assert 'name="cuda_utils"' in text


def test_turing_can_be_used(gpus: Gpus) -> None:
    gpus.capability = (7, 5)
    assert choose_device("auto") == Device("cuda:0")


def test_an_amd_gpu_can_be_used(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's ROCm build calls it cuda; what it says of capabilities is the number of an architecture."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    gpus.keep("triton/backends/amd/driver.py", "mod = compile_module_from_src(src=src, name='hip_utils')")
    for architecture in ((9, 4), (6, 0), (11, 0)):
        gpus.capability = architecture
        assert choose_device("auto") == choose_device("cuda") == Device("cuda:0")
        assert capability(Device("cuda:0")) == AMD
    gpus.count = 0
    with pytest.raises(ConfigError, match="no AMD driver is installed"):
        choose_device("cuda")


def test_what_stands_for_amd_is_no_nvidia_gpu() -> None:
    assert capability(torch.device("cpu")) == 90
    assert AMD not in CAPABILITIES
    assert TENSOR_CORES <= AMD < 89, "tensor cores, and no e4m3"


def test_fewer_tiles_are_under_way_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (stages(5), stages(1)) == (5, 1)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert (stages(5), stages(1)) == (AMD_STAGES, 1)


def test_a_torch_without_cuda(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="built without CUDA"):
        choose_device("cuda")
    assert choose_device("auto") == CPU


def test_a_gpu_without_torch(gpus: Gpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    command = (
        r"torch is not installed: in a clone of the repository run `uv run --extra cuda candle-vllm` or .*"
        r"pip install 'candle-vllm\[cuda\]'`"
    )
    with pytest.raises(ConfigError, match=rf"^device 'cuda' cannot be used: {command}\. .*set device='cpu'$"):
        choose_device("cuda")
    assert not caplog.records
    assert choose_device("auto") == CPU
    (record,) = caplog.records
    assert re.fullmatch(f"a GPU was found but cannot be used, so the CPU is used: {command}", record.getMessage())


def test_an_amd_gpu_without_torch(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(devices, "_nvidia_driver", lambda: None)
    monkeypatch.setattr(devices, "_AMD_DRIVER", gpus.folder)
    with pytest.raises(ConfigError, match="torch is not installed: install one that was built for ROCm"):
        choose_device("cuda")


def test_a_torch_that_cannot_be_imported(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails, and it is there
    with pytest.raises(ConfigError, match="torch cannot be imported: import of torch halted"):
        choose_device("cuda")


def test_op_by_op_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    require_torch("op_by_op is set")  # it is there
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError) as caught:
        require_torch("op_by_op is set", "leave it out")
    assert str(caught.value) == (
        "op_by_op is set, so layers run op by op in torch, which is not installed: "
        "leave it out, or install torch: "
        "in a clone of the repository run `uv run --extra torch candle-vllm` or `uv tool install '.[torch]'`; "
        "with the wheels of a release run `uv pip install 'candle-vllm[torch]'`"
    )


class Driver:
    """What `libcuda.so.1` answers."""

    def __init__(self, started: int, count: int) -> None:
        self._started, self._count = started, count

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self._started

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._count
        return self._started


@pytest.mark.parametrize(
    ("started", "count", "there"), [(0, 1, True), (0, 0, False), (100, 0, False), (34, 0, False), (803, 0, True)]
)
def test_the_driver_is_asked_for_gpus(started: int, count: int, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not start, for another reason than that there is none, is worth an explanation."""
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Driver(started, count))
    assert devices._driver_has_gpu() == there


def test_auto_imports_no_torch_where_there_is_no_driver() -> None:
    code = (
        "import sys\nfrom candle_vllm.core import devices\n"
        "devices._driver_has_gpu = lambda: False\n"
        "assert devices.choose_device('auto') == devices.CPU\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_engine_refuses_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="device='cpu'"):
        InferenceEngine("anything", device="cuda")


def test_memory_that_runs_out_is_named(gpus: Gpus) -> None:
    gpus.free = 3 * GB
    message = r"the weights of m take about 20480 MiB .* of which 3072 are left"
    with pytest.raises(ConfigError, match=message), fitting(Device("cuda:0"), "the weights of m", 20 * GB):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_encoders_and_towers_compute_on_their_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches kernels on the thread's current device, wherever the tensors are."""
    current, seen = [0], list[int]()

    @contextlib.contextmanager
    def device(there: str) -> Iterator[None]:
        current.append(torch.device(there).index)
        yield
        current.pop()

    def layer(x: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append(current[-1])
        return x

    numbers = np.zeros(2, np.int64)
    config = types.SimpleNamespace(scores=False, labels=(), deep=(), read=lambda tile: rows)
    rows: Any = types.SimpleNamespace(places=numbers, grid=(), windows=None)
    rows.patches, rows.in_order = lambda: np.zeros((2, 4), np.float32), lambda found: found
    encoder: Any = types.SimpleNamespace(config=config, forward=layer)
    tower: Any = types.SimpleNamespace(config=config, layers=[layer], place=lambda *_: (numbers, None), begin=layer)
    tower.norm = tower.cells = tower.project = layer
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
    EagerEncoderRunner(encoder, Device("cuda:1")).encode(numbers, numbers, numbers, np.array([0, 2]), None)
    encoding = EagerTower(tower, Device("cuda:1")).embeddings(np.zeros((1, 2, 2, 3), np.uint8))
    for _ in encoding:
        assert current == [0], "engine steps run here, perhaps on another device"
    assert current == [0]
    assert seen == [1] * 6
