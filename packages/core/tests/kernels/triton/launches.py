# SPDX-License-Identifier: MIT
"""Runs a toy engine with every Triton launch compiled as a GPU would specialise it, and not executed.

A process of its own, for it puts a driver in Triton's place that says it is an H100. Prints a JSON line for each form
of a kernel that is compiled: {"phase": "together", "start" or "serve", "kernel": name, "fault": text or null, "others":
how many were being compiled besides}.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import threading
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
import triton.compiler
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from candle_vllm.core import EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.kernels import dispatch
from candle_vllm.core.kernels.device_stream import DeviceStream, Work
from candle_vllm.core.kernels.triton_build import compile_together
from candle_vllm.core.sampling import device_sampler
from candle_vllm.core.sampling.sampler import Token
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.kernels.triton.building import SHARED_LIMITS
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.toy_gguf import write_toy_gguf

CONTEXT, SIZE = 512, 16


class Hopper:
    """As much of a driver as compiling and loading ask for.

    Attributes:
        loaded: how many forms were loaded.
    """

    def __init__(self) -> None:
        self.loaded = 0
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_LIMITS[90]},
            load_binary=self._load,
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> object:
        return object()

    def _load(self, *binary: Any) -> tuple[object, object, int, int, int]:
        self.loaded += 1
        return object(), object(), 32, 0, 1024

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Watch:
    """Stands before every launch, and before the compiler."""

    def __init__(self, gpu: Hopper) -> None:
        self.phase = "start"
        self._gpu = gpu
        self._launch, self._compile = jit.JITFunction.run, triton.compiler.compile
        self._under_way = 0
        self._lock = threading.Lock()

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        """Checks arguments and grid, and has the form compiled."""
        together = self.phase == "together" and threading.current_thread() is threading.main_thread()
        assert warmup == together, f"{kernel.__name__} is {'only compiled' if warmup else 'launched'}"
        compiled = self._launch(kernel, *args, grid=grid, warmup=True, **options)
        assert all(type(size) is int and size > 0 for size in grid), (kernel.__name__, grid)
        assert len(grid) < 2 or grid[1] < 1 << 16, (kernel.__name__, grid)
        for value in args:
            assert value is None or isinstance(value, torch.Tensor) or type(value) in (int, float), kernel.__name__
        return compiled

    def compile(self, source: Any, **options: Any) -> Any:
        """Compiles, and prints a line."""
        with self._lock:
            phase, self._under_way = self.phase, self._under_way + 1
        try:
            compiled = self._compile(source, **options)
        finally:
            with self._lock:
                self._under_way -= 1
        shared = compiled.metadata.shared
        fault = f"{shared} bytes of shared memory" if shared > SHARED_LIMITS[90] else None
        line = {"phase": phase, "kernel": source.fn.__name__, "fault": fault, "others": self._under_way}
        with self._lock:
            print(json.dumps(line), flush=True)
        return compiled

    def together(self, work: Work) -> None:
        """Compiles what is launched, and sees that it is loaded."""
        self.phase, before = "together", self._gpu.loaded
        forms = compile_together(work, torch.device("cpu"))
        self.phase = "start"
        assert self._gpu.loaded - before == forms


@triton.jit
def sound_kernel(x, SIZE: tl.constexpr):
    tl.store(x, SIZE)


@triton.jit
def broken_kernel(x):
    tl.store(x, x * x)  # pointers have no product


def other_threads_and_errors(watch: Watch) -> None:
    """Another thread's launch is a launch, and what fails is left to the launches that follow."""
    x = torch.zeros(1)

    def work() -> None:
        broken_kernel[(1,)](x)
        for size in (1, 2):
            sound_kernel[(1,)](x, size)
        with ThreadPoolExecutor(1) as other:
            other.submit(lambda: sound_kernel[(1,)](x, 3)).result()

    def failing() -> None:
        sound_kernel[(1,)](x, 4)
        raise ValueError

    usual = jit.JITFunction.run
    watch.phase = "together"
    assert compile_together(work, torch.device("cpu")) == 3
    assert compile_together(failing, torch.device("cpu")) == 1
    assert jit.JITFunction.run is usual
    watch.phase = "start"
    for size in (1, 2, 3, 4):
        sound_kernel[(1,)](x, size)
    for _ in range(2):
        try:
            broken_kernel[(1,)](x)
        except triton.CompilationError:
            continue
        raise AssertionError("it compiled")


def serve(loaded: LoadedModel, watch: Watch, captured_prompts: int, *, graphs: bool = True, grows: int = 0) -> None:
    """Starts an engine and answers requests of every kind; tokens mean nothing. Each prompt has `grows` tokens more
    than the one before it, and 9."""
    stream, limits = LazyStream(), DeviceLimits(128, 8, CONTEXT // SIZE, SIZE)
    runner = DeviceRunner(
        loaded.decoder, limits, stream, loaded.placement.torch_dtype, captured_prompts=captured_prompts, graphs=graphs
    )
    steps = runner.largest_steps()
    watch.together(lambda: run(steps, stream))
    run(steps, stream)
    runner.allocate(400)
    engine = Engine(runner, Scheduler(BlockManager(400, SIZE), 8, 128), preparation_for(loaded, CONTEXT))
    watch.phase = "serve"
    kinds: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3},
        {"logit_bias": {3: 1.0, 4: 2.0}},
        {"logprobs": 3},
        {"allowed_token_ids": [5, 6]},
        {"min_tokens": 2},
        {"logprobs": 1, "frequency_penalty": 0.3},
        {"logprobs": 0},
    ]
    for index, more in enumerate(kinds):
        params = SamplingParams(
            max_tokens=5 + index, ignore_eos=True, temperature=0.9 * (index % 2), top_p=0.95, **more
        )
        prompt = [5 + index, *range(40, 42 + 9 * index), *[7] * grows * index]
        engine.add(engine.prepare(GenerationRequest(request_id=str(index), prompt_token_ids=prompt, params=params)))
    while engine.has_work:
        for piece in engine.step():
            assert piece.error is None, piece.error


def run(steps: Sequence[Work], stream: DeviceStream) -> None:
    for work in steps:
        work()
    stream.mark().wait()


def begin() -> Watch:
    """Puts both in place, for tensors on the CPU."""
    gpu = Hopper()
    driver.set_active(gpu)  # type: ignore[arg-type]
    watch = Watch(gpu)
    triton.compiler.compile = watch.compile  # type: ignore[assignment]
    jit.JITFunction.run = lambda kernel, *args, **options: watch.run(kernel, *args, **options)  # type: ignore[method-assign]
    dispatch.interpreted = lambda: True  # type: ignore[assignment]  # tensors on the CPU go to Triton
    device_sampler.SampledRows.tokens = drawn  # type: ignore[method-assign]
    return watch


def main() -> None:
    """Quantised weights of several types, and plain ones with norms of heads."""
    watch = begin()
    other_threads_and_errors(watch)
    folder, device = Path(tempfile.mkdtemp()), torch.device("cpu")
    sizes = {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512}
    others = {"attn_v": "Q8_0", "ffn_down": "F16"}
    quantised = write_toy_gguf(folder / "toy.gguf", toy_config(**sizes), quantization="Q4_0", others=others)
    plain = write_toy_model(folder / "plain", toy_config("qwen3", **sizes))
    for path, change in ((quantised, {"keeps_quantised": True}), (plain, {"invariant": True})):
        for captured_prompts in (0, 128):
            serve(load(path, device, change), watch, captured_prompts)


def drawn(rows: device_sampler.SampledRows) -> list[Token]:
    rows.mark.wait()
    return [5] * len(rows.states)


def load(path: Path, device: torch.device, change: dict[str, Any]) -> LoadedModel:
    from candle_vllm.core.assembly import model

    usual = model.choose_placement
    model.choose_placement = lambda *given: dataclasses.replace(usual(*given), **change)
    try:
        return load_model(EngineConfig(model=str(path), op_by_op=True, dtype="bf16"), device, lambda *_: None)
    finally:
        model.choose_placement = usual


if __name__ == "__main__":
    assert triton.__version__
    sys.exit(main())
