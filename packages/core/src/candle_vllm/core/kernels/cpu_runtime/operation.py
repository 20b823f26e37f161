"""Operations: compiled functions that a plan calls by address, each compiled once per machine and kept on disk.

An operation is `op(arguments, thread, threads)`. `arguments` is its row of the plan, int64 numbers: [0] its own
address, [1] flags and the row's length in bytes (shifted by 8), [2] the address of the step's numbers (`StepNumber`),
from [3] on what the operation itself defines: addresses and sizes. Every thread of the team calls it with its own
number and does its share; it never waits.
"""

from __future__ import annotations

import enum
import logging
import platform
import struct
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import llvmlite.binding
import numpy as np
from numba import cfunc, types

from candle_vllm.core.kernels.cpu_runtime.emit import Isa
from candle_vllm.core.kernels.cpu_runtime.kernel_cache import compile_kept

logger = logging.getLogger(__name__)
T = TypeVar("T")

SIGNATURE = types.void(types.CPointer(types.int64), types.int64, types.int64)
FIRST_ARGUMENT = 3
BARRIER = 1  # flag: every thread waits for the others behind this operation
IS_X86 = int(platform.machine().lower() in ("x86_64", "amd64", "i686"))


class StepNumber(enum.IntEnum):
    """Where a step's own numbers stand in the array that every operation can read."""

    TOKENS = 0  # T
    SEQUENCES = 1  # R
    LOGIT_ROWS = 2  # rows whose logits are wanted
    PAIRS = 3  # of tokens and experts, in the mixture that runs; written by the plan itself
    COUNT = 8


def host_isa() -> Isa:
    """The instructions of this CPU that the kernels can use."""
    features = llvmlite.binding.get_host_cpu_features()
    isa = Isa.GENERIC
    if features.get("avx512vnni") and features.get("avx512bw"):
        isa |= Isa.VNNI
    if features.get("avx512bf16"):
        isa |= Isa.BF16
    return isa


def compile_operation(function: Callable[..., None]) -> int:
    """Compiles `function(arguments, thread, threads)`, or takes it from the cache; returns its address.

    The address is valid for the life of the process. `function` may close over integers only.
    """
    # Numba has an index of variants for each name, which two processes must not write at once: one could get the
    # other's variant. With its constants in its name every variant has an index of its own.
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        assert isinstance(cell.cell_contents, int)
        function.__qualname__ += f".{name}{int(cell.cell_contents)}"
    compiled = compile_kept(
        lambda cached: cfunc(SIGNATURE, cache=cached, error_model="numpy", fastmath=False)(function)
    )
    _keep(compiled)
    assert compiled.address is not None
    return compiled.address


def address_of(array: np.ndarray) -> int:
    """Where an array's data begins."""
    return array.ctypes.data


def float_bits(value: float) -> int:
    """A float32 as an argument of an operation, which reads it by `float_from_bits`."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


@cache
def _kept() -> list[Any]:
    return []


def _keep(compiled: Any) -> None:
    """Holds compiled code for the life of the process: plans know it only by address."""
    _kept().append(compiled)
