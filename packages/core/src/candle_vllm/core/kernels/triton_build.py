# SPDX-License-Identifier: MIT
"""What the launches of Triton kernels share, and parallel compilation at a start (step 6 of a request's life).

A **form** is a specialisation of a Triton kernel. `compile_together` compiles in parallel the forms that a start needs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import torch

from candle_vllm.core.devices import Device
from candle_vllm.core.threads import usable_cpus

logger = logging.getLogger(__name__)

TENSOR_CORES = 80
"""Lowest compute capability whose tensor cores Triton uses (its pull request 5066). Below it, products consist of fused
multiply-adds with operands in registers: tiles are smaller, and bfloat16 is not supported."""

AMD = 81  # not a capability of any NVIDIA GPU: AMD's GPUs have tensor cores, but not the largest tiles
AMD_STAGES = 2  # pipeline stages: a thread block has no shared memory for more

# For every launch. A product and a sum become one fma, as with nvcc; Triton's own default will change,
# and logs a warning.
OPTIONS = MappingProxyType({"enable_fp_fusion": True})


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


# ---- parallel compilation at a start ---------------------------------------------------------------------------------

_COMPILERS = 16  # threads; Triton's Python code runs in one thread at a time, so more would gain little
_TURN = threading.Lock()  # only one call of `compile_together` at a time replaces Triton's launch functions


def compile_together(work: Callable[[], None], device: torch.device | Device) -> int:
    """Compile the forms of all kernels that `work` launches, in parallel, and load them, without launching any of them.

    Everything else in `work` runs, on memory that no kernel has written. The contents are meaningless, so only kernels,
    which do not run, may use results of kernels as indices. A form that does not compile or load is compiled by its
    launch, which raises the error. If Triton is missing, interprets its kernels, compiles asynchronously already, or
    lacks the internals of 3.6 to 3.9, `work` is not called, and each form is compiled by its first launch.

    Args:
        work: runs in this thread and makes the launches that will follow, with arguments of the same forms.
        device: device of the launches.

    Returns:
        number of forms, those that did not compile included; forms of earlier starts in this process do not count.
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
