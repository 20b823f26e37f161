# SPDX-License-Identifier: MIT
"""Compile Triton kernels ahead of time, for GPUs that need not be present (step 6 of a request's life).

A **form** is a specialisation of a Triton kernel. The kernel's module lists the forms that it launches in `AOT`, one
`Build` each; `modules` finds these modules. `compile_build` compiles a form for one compute capability and returns its
resource usage. So a kernel that no longer compiles, spills, or needs more shared memory than an SM has is found on a
machine without a GPU.
Triton is imported only when something is compiled.

`compile_together` is for the GPU that is present: it compiles in parallel the forms that a start needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import pkgutil
import re
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from candle_vllm.core.devices import Device
from candle_vllm.core.threads import usable_cpus

logger = logging.getLogger(__name__)

CAPABILITIES = (75, 80, 90, 100, 120)
TENSOR_CORES = 80
"""Lowest compute capability whose tensor cores Triton uses (its pull request 5066). Below it, products consist of fused
multiply-adds with operands in registers: tiles are smaller, and bfloat16 is not supported."""

WITH_TENSOR_CORES = tuple(capability for capability in CAPABILITIES if capability >= TENSOR_CORES)

AMD = 81  # not a capability of any NVIDIA GPU: the key for AMD's GPUs in tables of tiles, which treat it as 80
AMD_STAGES = 2  # pipeline stages: a thread block has no shared memory for more
AMD_SHARED = 64 * 1024
AMD_TARGETS = MappingProxyType({"gfx942": 64, "gfx1100": 32})  # threads of a wavefront for each target

# For every launch and every build. A product and a sum become one fma, as with nvcc; Triton's own default will change,
# and logs a warning.
OPTIONS = MappingProxyType({"enable_fp_fusion": True})

# Maximum shared memory of a thread block, in bytes. Source: CUDA C++ Programming Guide, technical specifications.
SHARED_LIMITS = MappingProxyType(
    {75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
)

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_AMD_USAGE = re.compile(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)")


def capability(device: torch.device | Device) -> int:
    """Return a GPU's compute capability (90 is 9.0), and 90 for the CPU, on which Triton interprets kernels. For AMD
    GPUs return `AMD`: their numbers have another meaning."""
    if device.type != "cuda":
        return 90
    return AMD if torch.version.hip else _nvidia_capability(device)


@functools.cache  # called at every launch
def _nvidia_capability(device: torch.device | Device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def stages(wanted: int) -> int:
    """Return the number of pipeline stages of a launch; `wanted` is the number in a table of tiles."""
    return wanted if torch.version.hip is None else min(wanted, AMD_STAGES)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. Outside kernels, Triton's `cdiv` takes two microseconds, too slow for launches."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, for n from 1 on."""
    return 1 << (n - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Build:
    """One form of a kernel.

    Attributes:
        kernel: the function decorated with `triton.jit`.
        arguments: Triton's type of each argument that is not a constant: "*bf16", "i32", "fp32".
        constants: the values of the other arguments.
        num_warps, num_stages: as at the launch.
        aligned: integer arguments that are multiples of 16 at the launch. Pointers always count as aligned to 16 bytes,
            as torch's allocations are, except those in `unaligned`.
        unaligned: pointers that may be unaligned.
        label: name that distinguishes the forms of a kernel in reports.
        capabilities: compute capabilities that the form is built for.
    """

    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    label: str = ""
    capabilities: tuple[int, ...] = CAPABILITIES

    def __str__(self) -> str:
        name = getattr(self.kernel, "__name__", str(self.kernel))
        return f"{name}[{self.label}]" if self.label else name


@dataclasses.dataclass(frozen=True)
class Usage:
    """Resource usage of a compiled kernel.

    Attributes:
        registers: registers per thread.
        shared, shared_limit: bytes of shared memory of a thread block, and their maximum.
        stack: bytes of local memory of a thread; more than 0 if registers spill.
    """

    registers: int
    shared: int
    shared_limit: int
    stack: int

    @property
    def fault(self) -> str | None:
        """Description of the problem, if there is one."""
        if self.stack:
            return f"{self.stack} bytes of each thread's registers spill to memory"
        if self.shared > self.shared_limit:
            return f"{self.shared} bytes of shared memory, of which a block may have {self.shared_limit}"
        return None

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.shared} bytes shared, {self.stack} bytes spilled"


def modules() -> dict[str, ModuleType]:
    """Return every module under `kernels` that has an `AOT` table, by its name below `kernels`. Imports triton."""
    import candle_vllm.core.kernels as kernels

    found = {}
    for info in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + "."):
        if info.name.rpartition(".")[2].startswith("triton") and info.name != __name__:
            module = importlib.import_module(info.name)
            if hasattr(module, "AOT"):
                found[info.name.removeprefix(kernels.__name__ + ".")] = module
    return found


def compile_build(build: Build, target: int | str) -> Usage:
    """Compile a form; needs no GPU, and takes a second or more.

    Args:
        build: the form. Targets without bfloat16 use float16 instead, as when a model is loaded.
        target: a compute capability (90 is sm_90), or one of `AMD_TARGETS`, for which the forms for 80 are compiled.

    Raises:
        Exception: any error of Triton if the kernel does not compile; ValueError if the arguments do not match it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(build.kernel.arg_names)
    given = set(build.arguments) | set(build.constants)
    if set(names) != given:
        raise ValueError(f"{build}: missing {sorted(set(names) - given)}, unknown {sorted(given - set(names))}")
    signature = {name: build.arguments.get(name, "constexpr") for name in names}
    if isinstance(target, int) and target < TENSOR_CORES:
        signature = {name: kind.replace("bf16", "fp16") for name, kind in signature.items()}
    pointers = [name for name, kind in signature.items() if kind.startswith("*") and name not in build.unaligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *build.aligned)}
    source = ASTSource(build.kernel, signature, dict(build.constants), attributes)
    options = {**OPTIONS, "num_warps": build.num_warps, "num_stages": build.num_stages}
    if isinstance(target, str):
        options["num_stages"] = min(build.num_stages, AMD_STAGES)
        compiled = triton.compile(source, target=GPUTarget("hip", target, AMD_TARGETS[target]), options=options)
        found = dict(_AMD_USAGE.findall(compiled.asm["amdgcn"]))
        stack = int(found["private_segment_fixed_size"])
        return Usage(int(found["vgpr_count"]), compiled.metadata.shared, AMD_SHARED, stack)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Usage(registers, compiled.metadata.shared, SHARED_LIMITS[target], stack)


def compile_form(module: str, place: int, target: int | str) -> Usage | str:
    """Do what `compile_build` does, with names as arguments and errors as text, for calls in separate processes.

    Args:
        module: a name of `modules`.
        place: index in the module's `AOT` table.
        target: see `compile_build`.
    """
    try:
        return compile_build(modules()[module].AOT[place], target)
    except Exception:
        return traceback.format_exc()  # Triton's own errors cannot be pickled


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack from the assembler's notes in the object: the maximum of its functions."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    found = [(int(registers), int(stack)) for registers, stack in _USAGE.findall(text)]
    assert found, text
    return max(registers for registers, _ in found), max(stack for _, stack in found)


# ---- parallel compilation at a start ---------------------------------------------------------------------------------

_COMPILERS = 16  # threads; Triton's Python code runs in one thread at a time, so more would gain little
_TURN = threading.Lock()  # only one call of `compile_together` at a time replaces Triton's launch functions


def compile_together(work: Callable[[], None], device: torch.device | Device) -> int:
    """Compile the forms of all kernels that `work` launches, in parallel, and load them, without launching any of them.

    Everything else in `work` runs, on memory that no kernel has written. The contents are meaningless, so only kernels,
    which do not run, may use results of kernels as indices. A form that does not compile or load is compiled by its
    launch, which raises the error. If Triton is missing, interprets its kernels, or lacks the internals of 3.6 to 3.9,
    `work` is not called, and each form is compiled by its first launch.

    Args:
        work: runs in this thread and makes the launches that will follow, with arguments of the same forms.
        device: device of the launches.

    Returns:
        number of forms that were compiled or loaded; forms of earlier starts in this process do not count.
    """
    began = time.perf_counter()
    try:
        from triton import knobs
        from triton.runtime._async_compile import AsyncCompileMode, active_mode
        from triton.runtime.jit import JITCallable, JITFunction

        if knobs.runtime.interpret or active_mode.get() is not None:
            return 0
        _ = JITFunction.run, JITFunction._do_compile, JITCallable.parse
    except (ImportError, AttributeError) as error:
        logger.debug("kernels are compiled one after another: %s", error)
        return 0
    with _TURN, _Compilers(device) as compilers:
        mode = AsyncCompileMode(compilers, ignore_errors=True)
        compiling = _only_compiling(JITFunction, lambda: active_mode.get() is mode)
        try:
            with _parsing_in_turn(JITCallable), compiling, mode:
                work()
        except Exception:  # any error: the launches that follow raise it themselves
            logger.debug("not all kernels could be compiled in parallel", exc_info=True)
        finally:
            active_mode.set(None)  # Triton 3.6 does not reset it after an interrupted wait
    if compilers.forms:
        took = time.perf_counter() - began
        logger.info("compiled or loaded %d kernels in %.1f s, %d at a time", compilers.forms, took, compilers.threads)
    return compilers.forms


class _Compilers(ThreadPoolExecutor):
    """Threads that compile forms for a device, and load them there."""

    def __init__(self, device: torch.device | Device) -> None:
        usable = len(usable_cpus())
        self.threads, self.forms = min(_COMPILERS, usable), 0
        on_gpu = (torch.cuda.set_device, (device,)) if device.type == "cuda" else ()
        super().__init__(self.threads, "candle-vllm-compiler", *on_gpu)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.forms += 1

        def ready() -> Any:
            kernel = fn(*args, **kwargs)
            kernel._init_handles()  # Triton 3.6 calls a C compiler for each signature here
            return kernel

        return super().submit(ready)


@contextlib.contextmanager
def _parsing_in_turn(function: Any) -> Iterator[None]:
    """Let one thread at a time parse a function of Triton's class JITCallable.

    Early releases of CPython 3.11 and 3.12 count the depth of syntax trees in one number for all threads (gh-106905),
    and sometimes raise "AST constructor recursion depth mismatch".
    """
    parse, turn = function.parse, threading.Lock()

    def alone(self: Any) -> Any:
        with turn:
            return parse(self)

    function.parse = alone
    try:
        yield
    finally:
        function.parse = parse


@contextlib.contextmanager
def _only_compiling(function: Any, here: Callable[[], bool]) -> Iterator[None]:
    """Make launches of a class of kernels (Triton's JITFunction) only compile while `here()` is true.

    Forms that are being compiled count as compiled. Launches of other threads are unchanged.
    """
    run, do_compile = function.run, function._do_compile
    waiting: list[tuple[dict[str, Any], str, Any]] = []

    def compile_only(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *args, warmup=warmup or here(), **options)

    def compile_once(kernel: Any, key: str, signature: Any, device: Any, *rest: Any, **more: Any) -> Any:
        found = do_compile(kernel, key, signature, device, *rest, **more)
        if here():  # Triton 3.6 would prepare it again at each launch until it is compiled
            forms = kernel.device_caches[device][0]
            forms[key] = found
            waiting.append((forms, key, found))
        return found

    function.run, function._do_compile = compile_only, compile_once
    try:
        yield
    finally:
        function.run, function._do_compile = run, do_compile
        for forms, key, found in waiting:
            if forms.get(key) is found:  # it did not compile
                del forms[key]
