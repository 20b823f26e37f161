"""Compiling Triton kernels ahead of time, for GPUs that need not be there (step 6 of a request's life).

A Triton kernel's module names in `AOT` the forms that it launches, one `Build` each; `modules` finds these modules.
`compile_build` compiles a form for one compute capability and says what it takes, so that a kernel that no longer
compiles, spills, or asks for more shared memory than an SM has is found on a machine without a GPU. Triton is imported
only when something is compiled.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import subprocess
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

CAPABILITIES = (80, 90, 100)

# For every launch and every build. A product and a sum become one fma, as nvcc does it; Triton's own default is about
# to change, and warns.
OPTIONS = MappingProxyType({"enable_fp_fusion": True})

# What one thread block may have, in bytes. Source: CUDA C++ Programming Guide, table of technical specifications.
SHARED_LIMITS = MappingProxyType({80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024})

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own costs two microseconds a call outside kernels, which a launch would feel."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, for n from 1 on."""
    return 1 << (n - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Build:
    """One form of a kernel.

    Attributes:
        kernel: the function under `triton.jit`.
        arguments: Triton's type of each argument that is not a constant: "*bf16", "i32", "fp32".
        constants: the values of the others.
        num_warps, num_stages: as at the launch.
        aligned: integer arguments that are multiples of 16 at the launch. Pointers always count as aligned to 16 bytes,
            as torch's allocations are, but for those in `unaligned`.
        unaligned: pointers without that promise.
        label: tells the forms of a kernel apart in reports.
        capabilities: what it is built for.
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
    """What a compiled kernel takes.

    Attributes:
        registers: per thread.
        shared: bytes of shared memory of a thread block, `shared_limit` what it may have.
        stack: bytes of local memory of a thread; more than 0 where registers spill.
    """

    registers: int
    shared: int
    shared_limit: int
    stack: int

    @property
    def fault(self) -> str | None:
        """What is wrong with it, if something is."""
        if self.stack:
            return f"{self.stack} bytes of each thread's registers spill to memory"
        if self.shared > self.shared_limit:
            return f"{self.shared} bytes of shared memory, of which a block may have {self.shared_limit}"
        return None

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.shared} bytes shared, {self.stack} bytes spilled"


def modules() -> dict[str, ModuleType]:
    """Every module under `kernels` that has an `AOT` table, by its name below `kernels`. Imports triton."""
    import candle_vllm.core.kernels as kernels

    found = {}
    for info in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + "."):
        if info.name.rpartition(".")[2].startswith("triton") and info.name != __name__:
            module = importlib.import_module(info.name)
            if hasattr(module, "AOT"):
                found[info.name.removeprefix(kernels.__name__ + ".")] = module
    return found


def compile_build(build: Build, capability: int) -> Usage:
    """Compiles a form for a compute capability (90 is sm_90); needs no GPU, and takes a second or more.

    Raises:
        whatever Triton raises where the kernel does not compile; ValueError where the arguments are not the kernel's.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(build.kernel.arg_names)
    given = set(build.arguments) | set(build.constants)
    if set(names) != given:
        raise ValueError(f"{build}: missing {sorted(set(names) - given)}, unknown {sorted(given - set(names))}")
    signature = {name: build.arguments.get(name, "constexpr") for name in names}
    pointers = [name for name, kind in signature.items() if kind.startswith("*") and name not in build.unaligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *build.aligned)}
    source = ASTSource(build.kernel, signature, dict(build.constants), attributes)
    options = {**OPTIONS, "num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Usage(registers, compiled.metadata.shared, SHARED_LIMITS[capability], stack)


def compile_form(module: str, place: int, capability: int) -> Usage | str:
    """As `compile_build`, for processes of their own: by names, and with the trace of what goes wrong as a text.

    Args:
        module: a name of `modules`.
        place: in its `AOT` table.
        capability: see `compile_build`.
    """
    try:
        return compile_build(modules()[module].AOT[place], capability)
    except Exception:
        return traceback.format_exc()  # Triton's own errors do not travel between processes


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, as the assembler noted them in the object; the most of its functions."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    found = [(int(registers), int(stack)) for registers, stack in _USAGE.findall(text)]
    assert found, text
    return max(registers for registers, _ in found), max(stack for _, stack in found)
