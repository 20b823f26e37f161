"""What this CPU can do: the vectors and instructions that kernels use, and the level for which they are compiled.

Machine code is made for few levels instead of for every model of CPU, so that what one machine compiled runs on all of
its level.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.util
import platform
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

LANES = 16
"""Numbers of 32 bits in a vector of the kernels."""


class Isa(enum.IntFlag):
    """Instructions beyond the common ground; forced in tests by passing another set."""

    GENERIC = 0
    VNNI = 1  # AVX512-VNNI: 64 products of 8 bits, summed by fours
    BF16 = 2  # AVX512-BF16: 32 products of bfloat16, summed by twos
    AMX = 4  # AMX-BF16: 16 by 16 sums of 32 products of bfloat16


class Level(NamedTuple):
    """A common ground of CPUs.

    Attributes:
        name: in names of folders.
        cpu: what LLVM calls a CPU that has these instructions and few others.
        isa: what of them the kernels ask for by name.
        flags: by which Linux names them.
    """

    name: str
    cpu: str
    isa: Isa
    flags: frozenset[str]


_AVX2 = frozenset(["avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
_AVX512 = _AVX2 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_AMX = _AVX512 | {
    *("amx_bf16", "amx_int8", "amx_tile", "avx512_bf16", "avx512_bitalg", "avx512_fp16", "avx512_vbmi2", "avx512_vnni"),
    *("avx512_vpopcntdq", "avx512ifma", "avx512vbmi", "gfni", "vaes", "vpclmulqdq"),
}
LEVELS = (
    Level("amx", "sapphirerapids", Isa.VNNI | Isa.BF16 | Isa.AMX, _AMX),
    Level("avx512-bf16", "cooperlake", Isa.VNNI | Isa.BF16, _AVX512 | {"avx512_vnni", "avx512_bf16"}),
    Level("avx512-vnni", "cascadelake", Isa.VNNI, _AVX512 | {"avx512_vnni"}),
    Level("avx512", "skylake-avx512", Isa.GENERIC, _AVX512),
    Level("avx2", "x86-64-v3", Isa.GENERIC, _AVX2),
)
"""Of x86-64, the most able first. Source: the x86-64 psABI (v3), Intel's and LLVM's tables of CPUs."""


@cache
def host_level() -> Level:
    """The level of this CPU; where it is none of `LEVELS`, one of its own, whose `cpu` is what LLVM calls this one."""
    flags = frozenset(_cpu_facts("flags"))
    if "amx_tile" in flags and not _may_use_amx():
        flags -= {"amx_tile"}
    return level_of(flags or _flags_of_llvm()) or _native()


def host_isa() -> Isa:
    """The instructions of this CPU that the kernels can use."""
    return host_level().isa


def has_avx2() -> bool:
    """Whether code is made for an x86-64 that is known to have AVX2, as every one of `LEVELS` has."""
    return host_level() in LEVELS


@cache
def bytes_ahead() -> int:
    """How far ahead of a stream of quantised weights the kernels ask for it; at 0 they leave that to the CPU.

    A Xeon with AMX fetches one stream too late by itself: with this a product of Q4_1 takes seven tenths of the time,
    of one row and of eight. On Zen 4 a single row becomes slower.
    """
    return 2048 if "GenuineIntel" in _cpu_facts("vendor_id") else 0


def level_of(flags: frozenset[str]) -> Level | None:
    """The most able level whose flags are all there."""
    return next((level for level in LEVELS if level.flags <= flags), None)


_ARCH_PRCTL, _REQUEST_STATE, _TILES = 158, 0x1023, 18


def _may_use_amx() -> bool:
    """Asks Linux for AMX, for this process: it keeps the large registers of those alone who asked.

    Source: Linux, Documentation/arch/x86/xstate.rst.
    """
    try:
        return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_STATE, _TILES) == 0
    except (OSError, AttributeError):
        return False


def is_linux_x86() -> bool:
    """Whether machine code is linked by `machine_code` itself."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


_OF_LINUX = {"bmi": "bmi1", "lzcnt": "abm", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}
"""Flags that LLVM calls otherwise than Linux does."""


def _flags_of_llvm() -> frozenset[str]:
    """What LLVM found that this CPU has, where the system does not say it (Windows, macOS), in Linux's words."""
    if importlib.util.find_spec("llvmlite") is None:
        return frozenset()
    import llvmlite.binding

    found = llvmlite.binding.get_host_cpu_features()
    return frozenset(_OF_LINUX.get(str(name), str(name)) for name in found if found[name])


def _native() -> Level:
    """No instructions are asked for by name: which of them the CPU has that LLVM names here is LLVM's affair."""
    if importlib.util.find_spec("llvmlite") is None:  # and so nothing that compiles for it
        return Level("native", "", Isa.GENERIC, frozenset())
    import llvmlite.binding

    return Level("native", llvmlite.binding.get_host_cpu_name(), Isa.GENERIC, frozenset())


def _cpu_facts(name: str) -> list[str]:
    """The words that Linux has for a CPU under a name; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if is_linux_x86() else []
    except OSError:
        lines = []
    return next((line.partition(":")[2] for line in lines if line.startswith(name)), "").split()
