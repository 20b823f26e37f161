"""Operations: compiled functions that a plan calls by address, each compiled once per machine and kept on disk.

An operation is `op(arguments, thread, threads)`. `arguments` is its row of the plan, int64 numbers: [0] its own
address, [1] flags and the row's length in bytes (shifted by 8), [2] the address of the step's numbers (`StepNumber`),
from [3] on what the operation itself defines: addresses and sizes. Every thread of the team calls it with its own
number and does its share; it never waits.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba import cfunc, types

from candle_vllm.core.config import cache_folder
from candle_vllm.core.kernels.cpu_runtime.emit import Isa

logger = logging.getLogger(__name__)

SIGNATURE = types.void(types.CPointer(types.int64), types.int64, types.int64)
FIRST_ARGUMENT = 3
BARRIER = 1  # flag: every thread waits for the others behind this operation
IS_X86 = int(platform.machine().lower() in ("x86_64", "amd64", "i686"))


class StepNumber(enum.IntEnum):
    """Where a step's own numbers stand in the array that every operation can read."""

    TOKENS = 0  # T
    SEQUENCES = 1  # R
    LOGIT_ROWS = 2  # rows whose logits are wanted
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


@cache
def use_kernel_cache() -> bool:
    """Points Numba's cache at a folder of this version and CPU; False, and a warning, where it cannot be written.

    A compiled operation contains the code of the functions that it calls, and Numba does not see when those change, so
    the folder's name is a hash of all kernel sources. Concurrent processes are safe: Numba replaces files atomically.
    """
    folder = cache_folder() / "kernels" / _fingerprint()
    try:
        if not folder.exists():
            logger.warning("compiling the CPU kernels for this machine: once, and some ten seconds")
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if writable:
        numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
    else:
        logger.warning("kernels are compiled at every start: the cache folder %s cannot be written", folder)
    return writable


def compile_operation(function: Callable[..., None]) -> int:
    """Compiles `function(arguments, thread, threads)`, or takes it from the cache; returns its address.

    The address is valid for the life of the process.
    """
    compiled = cfunc(SIGNATURE, cache=use_kernel_cache(), error_model="numpy", fastmath=False)(function)
    _keep(compiled)
    assert compiled.address is not None
    return compiled.address


def address_of(array: np.ndarray) -> int:
    """Where an array's data begins."""
    return array.ctypes.data


@cache
def _kept() -> list[Any]:
    return []


def _keep(compiled: Any) -> None:
    """Holds compiled code for the life of the process: plans know it only by address."""
    _kept().append(compiled)


def _fingerprint() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.glob("*/*.py")):
        digest.update(path.read_bytes())
    cpu, flags = llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()
    digest.update(f"{numba.__version__} {llvmlite.__version__} {cpu} {flags}".encode())
    return digest.hexdigest()[:16]
