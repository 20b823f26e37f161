# SPDX-License-Identifier: MIT
"""Instruction sets of this CPU, and the level for which kernels are compiled.

Machine code is compiled for a few levels instead of for every CPU model, so that code from one machine runs on all
machines of the level. The level is detected at its first use; `choose_level` can select a lower one.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.util
import platform
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from candle_vllm.core.errors import ConfigError

LANES = 16
"""Number of 32-bit lanes in a vector of the kernels."""


class Isa(enum.IntFlag):
    """Instruction sets beyond the baseline. Tests use sets that this CPU does not have."""

    GENERIC = 0
    VNNI = 1  # AVX512-VNNI: 64 products of 8 bits, summed in groups of four
    BF16 = 2  # AVX512-BF16: 32 products of bfloat16, summed in pairs
    AMX = 4  # AMX-BF16 and -INT8: 16 by 16 sums of 32 products of bfloat16, or of up to 64 of 8 bits
    AVX512 = 8  # 32 registers of 512 bits; every CPU with VNNI or BF16 has them
    AVX2 = 16  # 16 registers of 256 bits; every CPU with AVX-512 has them
    AVX_VNNI = 32  # the instructions of VNNI with 256 bits, without AVX-512
    NEON = 64  # 32 registers of 128 bits
    DOTPROD = 128  # 16 products of 8 bits, summed in groups of four; all groups use the same four activations
    I8MM = 256  # product of 2 x 8 and 8 x 2 matrices of 8-bit integers
    ARM_BF16 = 512  # as DOTPROD, but with bfloat16, summed in pairs
    VBMI = 1024  # AVX512-VBMI: selects 64 bytes out of 128

    @property
    def bf16(self) -> Isa:
        """The instruction sets for bfloat16 products, if any."""
        return self & (Isa.BF16 | Isa.AMX | Isa.ARM_BF16)

    @property
    def wide(self) -> bool:
        """Whether there are 32 registers of 512 bits."""
        return bool(self & (Isa.AVX512 | Isa.VNNI | Isa.BF16))


class Level(NamedTuple):
    """Instruction set level of CPUs.

    Attributes:
        name: name in folders and settings.
        machine: Python's name of the architecture on Linux.
        cpu: LLVM's name of a CPU with these instructions and few others.
        isa: instruction sets that the kernels use explicitly.
        flags: Linux's names of the instruction sets.
        features: LLVM's names of instructions to add to `cpu` or to remove, such as "+avxvnni,-avx512f".
    """

    name: str
    machine: str
    cpu: str
    isa: Isa
    flags: frozenset[str]
    features: str = ""


_AVX2 = frozenset(["avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
_AVX512 = _AVX2 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_AMX = _AVX512 | {
    *("amx_bf16", "amx_int8", "amx_tile", "avx512_bf16", "avx512_bitalg", "avx512_fp16", "avx512_vbmi2", "avx512_vnni"),
    *("avx512_vpopcntdq", "avx512ifma", "avx512vbmi", "gfni", "vaes", "vpclmulqdq"),
}
_VBMI = _AVX512 | {"avx512_vnni", "avx512vbmi"}
_WIDE = Isa.AVX512 | Isa.AVX2
_NEON = frozenset(["asimd"])
_DOTPROD = _NEON | frozenset(["atomics", "asimddp", "fphp", "asimdhp"])
LEVELS = (
    Level("amx", "x86_64", "sapphirerapids", Isa.AMX | Isa.BF16 | Isa.VBMI | Isa.VNNI | _WIDE, _AMX),
    Level(
        "avx512-bf16",
        "x86_64",
        "cooperlake",
        Isa.BF16 | Isa.VBMI | Isa.VNNI | _WIDE,
        _VBMI | {"avx512_bf16"},
        "+avx512vbmi",
    ),
    Level("avx512-vbmi", "x86_64", "cascadelake", Isa.VBMI | Isa.VNNI | _WIDE, _VBMI, "+avx512vbmi"),
    Level("avx512-vnni", "x86_64", "cascadelake", Isa.VNNI | _WIDE, _AVX512 | {"avx512_vnni"}),
    Level("avx512", "x86_64", "skylake-avx512", _WIDE, _AVX512),
    Level("avx-vnni", "x86_64", "x86-64-v3", Isa.AVX_VNNI | Isa.AVX2, _AVX2 | {"avx_vnni"}, "+avxvnni"),
    Level("avx2", "x86_64", "x86-64-v3", Isa.AVX2, _AVX2),
    Level(
        "neon-bf16",
        "aarch64",
        "generic",
        Isa.ARM_BF16 | Isa.I8MM | Isa.DOTPROD | Isa.NEON,
        _DOTPROD | {"i8mm", "bf16"},
        "+lse,+fullfp16,+dotprod,+i8mm,+bf16",
    ),
    Level("neon-dotprod", "aarch64", "generic", Isa.DOTPROD | Isa.NEON, _DOTPROD, "+lse,+fullfp16,+dotprod"),
    Level("neon", "aarch64", "generic", Isa.NEON, _NEON),
)
"""Levels, the highest first in each architecture. Sources: the x86-64 psABI (v3); CPU tables of vendors and LLVM."""


# ---- level of this CPU -----------------------------------------------------------------------------------------------


_CHOSEN = list[Level]()  # the chosen level; empty if no level was chosen


def host_level() -> Level:
    """Return the level that kernels are compiled for: the chosen level, otherwise the highest level of this CPU."""
    return next(iter(_CHOSEN), None) or best_level()


@cache
def best_level() -> Level:
    """Return the highest level of this CPU; if none fits, the level "native", for the CPU model that LLVM detects."""
    return level_of(host_flags()) or _native()


def choose_level(name: str | None) -> None:
    """Compile kernels for the named level from now on, in this process; None is the highest level of this CPU.

    Raises:
        ConfigError: this CPU lacks instructions of the level.
    """
    if name is None:
        _CHOSEN.clear()
        return
    able = [level for level in LEVELS if level.flags <= host_flags() and level.machine == machine()]
    found = next((level for level in able if level.name == name), None)
    if found is None:
        names = ", ".join(level.name for level in able) or "none of the known levels"
        raise ConfigError(
            f"cpu_level={name!r} needs instructions that this CPU does not have; it supports {names}", "cpu_level"
        )
    _CHOSEN[:] = [found]


def host_isa() -> Isa:
    """Return the instruction sets that kernels use explicitly at `host_level`."""
    return host_level().isa


def machine() -> str:
    """Return the architecture of this CPU, as Linux names it."""
    found = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(found, found)


def level_of(flags: frozenset[str], named: str = "") -> Level | None:
    """Return the highest level of an architecture (this machine's by default) whose flags are all present."""
    named = named or machine()
    return next((level for level in LEVELS if level.machine == named and level.flags <= flags), None)


@cache
def bytes_ahead() -> int:
    """Return the prefetch distance of the kernels for quantised weights, in bytes; 0 leaves prefetching to the CPU.

    The hardware prefetchers of a Xeon with AMX and of a Zen 3 load too late. On Zen 4, software prefetches make the
    product of a single row slower.
    """
    vendor, flags = _cpu_facts("vendor_id"), _cpu_facts("flags")
    return 2048 if "GenuineIntel" in vendor or ("AuthenticAMD" in vendor and "avx512f" not in flags) else 0


def links_here() -> bool:
    """Whether `machine_code` links the machine code, without LLVM."""
    return sys.platform == "linux" and machine() in ("x86_64", "aarch64")


@cache
def host_flags() -> frozenset[str]:
    """Return the instruction sets of this CPU by Linux's names, as reported by the system, or else by LLVM."""
    if machine() == "aarch64":
        with suppress(OSError, AttributeError):  # if the system does not have the interface
            if sys.platform == "linux":
                return _flags_of_hwcap()
            if sys.platform == "darwin":
                return _flags_of_macos()
    flags = frozenset(_cpu_facts("flags"))
    if "amx_tile" in flags and not _may_use_amx():
        flags -= {"amx_tile"}
    return flags or _flags_of_llvm()


_ARCH_PRCTL, _REQUEST_STATE, _TILES = 158, 0x1023, 18


def _may_use_amx() -> bool:
    """Request permission from Linux to use AMX in this process; return whether it is granted.

    Linux saves AMX registers only for processes with this permission. Source: Linux, Documentation/arch/x86/xstate.rst.
    """
    try:
        return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_STATE, _TILES) == 0
    except (OSError, AttributeError):
        return False


_HWCAP, _HWCAP2 = 16, 26
_HWCAPS = {
    _HWCAP: {"asimd": 1, "atomics": 8, "fphp": 9, "asimdhp": 10, "asimddp": 20},
    _HWCAP2: {"i8mm": 13, "bf16": 14},
}
"""Bits of the auxiliary vector. Source: Linux, arch/arm64/include/uapi/asm/hwcap.h."""


def _flags_of_hwcap() -> frozenset[str]:
    ask = ctypes.CDLL(None).getauxval
    ask.argtypes, ask.restype = [ctypes.c_ulong], ctypes.c_ulong
    return frozenset(name for place, bits in _HWCAPS.items() for name, bit in bits.items() if ask(place) >> bit & 1)


_MACOS = {"atomics": "LSE", "fphp": "FP16", "asimdhp": "FP16", "asimddp": "DotProd", "i8mm": "I8MM", "bf16": "BF16"}
"""Apple's names of instructions: hw.optional.arm.FEAT_... Every Apple processor has NEON."""


def _flags_of_macos() -> frozenset[str]:
    ask = ctypes.CDLL(None).sysctlbyname

    def has(name: str) -> bool:
        found, size = ctypes.c_int(0), ctypes.c_size_t(4)
        asked = f"hw.optional.arm.FEAT_{name}".encode()
        return ask(asked, ctypes.byref(found), ctypes.byref(size), None, ctypes.c_size_t(0)) == 0 and found.value == 1

    return frozenset(["asimd", *(flag for flag, name in _MACOS.items() if has(name))])


_OF_LINUX = {
    "bmi": "bmi1",
    "lzcnt": "abm",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avxvnni": "avx_vnni",
    "neon": "asimd",
    "lse": "atomics",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
}
"""Linux's name of each flag for which LLVM has another name."""


def _flags_of_llvm() -> frozenset[str]:
    """Return the CPU's flags as LLVM detects them, by Linux's names, for systems that do not report them (Windows)."""
    if importlib.util.find_spec("llvmlite") is None:
        return frozenset()
    import llvmlite.binding

    found = llvmlite.binding.get_host_cpu_features()
    return frozenset(_OF_LINUX.get(str(name), str(name)) for name in found if found[name])


def _native() -> Level:
    """Return a level without instruction sets for the CPU that LLVM detects."""
    if importlib.util.find_spec("llvmlite") is None:  # without it, kernels cannot be compiled
        return Level("native", machine(), "", Isa.GENERIC, frozenset())
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()  # a virtual machine may hide some of the CPU model
    return Level("native", machine(), binding.get_host_cpu_name(), Isa.GENERIC, frozenset(), features)


def _cpu_facts(name: str) -> list[str]:
    """Return the words of an entry of /proc/cpuinfo on Linux on x86-64; empty elsewhere."""
    try:
        linux = sys.platform == "linux" and machine() == "x86_64"
        lines = Path("/proc/cpuinfo").read_text().splitlines() if linux else []
    except OSError:
        lines = []
    return next((line.partition(":")[2] for line in lines if line.startswith(name)), "").split()
