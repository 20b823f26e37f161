# SPDX-License-Identifier: MIT
"""Compile Triton kernels ahead of time, for GPUs that need not be present.

A **form** is a specialisation of a Triton kernel. The tables in `forms`, one file for each module with kernels, list
the forms that are launched. `compile_build` compiles a form for one compute capability and returns its resource usage.
So a kernel that no longer compiles, spills, or needs more shared memory than an SM has is found on a machine without a
GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from candle_vllm.core.kernels.triton_build import AMD_STAGES, OPTIONS, TENSOR_CORES

FORMS = Path(__file__).with_name("forms")

CAPABILITIES = (75, 80, 90, 100, 120)
WITH_TENSOR_CORES = tuple(capability for capability in CAPABILITIES if capability >= TENSOR_CORES)

AMD_SHARED = 64 * 1024
AMD_TARGETS = MappingProxyType({"gfx942": 64, "gfx1100": 32})  # threads of a wavefront for each target

# Maximum shared memory of a thread block, in bytes. Source: CUDA C++ Programming Guide, technical specifications.
SHARED_LIMITS = MappingProxyType(
    {75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
)

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_AMD_USAGE = re.compile(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)")


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


def tables() -> dict[str, tuple[Build, ...]]:
    """Return the forms of every module with kernels, by its name below `candle_vllm.core.kernels`. Imports triton."""
    found = {}
    for path in sorted(FORMS.rglob("*.py")):
        name = ".".join(path.relative_to(FORMS).with_suffix("").parts)
        found[name] = importlib.import_module(f"packages.core.tests.kernels.triton.forms.{name}").FORMS
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
        module: a name of `tables`.
        place: index in the module's table.
        target: see `compile_build`.
    """
    try:
        return compile_build(tables()[module][place], target)
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
