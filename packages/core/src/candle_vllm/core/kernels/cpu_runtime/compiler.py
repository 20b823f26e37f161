# SPDX-License-Identifier: MIT
"""Compile Python functions to machine code with Numba and LLVM; imported only if something must be compiled."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba.core import compiler, registry, types
from numba.core.compiler_lock import global_compiler_lock

from candle_vllm.core.kernels.cpu_runtime.level import Level, machine
from candle_vllm.core.kernels.cpu_runtime.machine_code import ENTRY


def compile_function(function: Callable[..., None], level: Level) -> bytes:
    """Compile to an object file (ELF on Linux) whose symbol `ENTRY` is the function with C's calling convention.

    All parameters are int64, and nothing is returned. A division of integers by zero gives 0. An exception ends the
    function without an error, but `machine_code.link` refuses code that can raise one.

    Args:
        level: level of the CPU that will run the code; its architecture may differ from this machine's.

    Raises:
        numba.core.errors.NumbaError: the function cannot be compiled.
    """
    return target_machine(level).emit_object(_compiled(function, level))


def assembly(function: Callable[..., None], level: Level) -> str:
    """Return the assembly of the code that `compile_function` compiles."""
    return target_machine(level).emit_assembly(_compiled(function, level))


@cache
def target_machine(level: Level) -> Any:
    """Return LLVM's description of a level's CPU."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    here = level.machine == machine()
    triple = binding.get_process_triple() if here else f"{level.machine}-unknown-linux-gnu"
    found = binding.Target.from_triple(triple)
    return found.create_target_machine(cpu=level.cpu, features=level.features, opt=3, reloc="pic", codemodel="default")


@global_compiler_lock
def _compiled(function: Callable[..., None], level: Level) -> Any:
    """Return an LLVM module that contains the function, compiled for a level's CPU."""
    target: Any = registry.cpu_target
    target.typing_context.refresh()
    target.target_context.refresh()
    context = target.target_context.with_aot_codegen("kernels", cpu_name=level.cpu)
    library = context.codegen().create_library(function.__name__)
    kinds = [types.int64] * len(inspect.signature(function).parameters)
    flags: Any = compiler.Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    compiled = compiler.compile_extra(
        target.typing_context, context, function, kinds, types.void, flags, {}, library=library
    )
    library.add_ir_module(_entry(context, library, compiled.fndesc))
    library.finalize()
    return library._final_module if level.machine == machine() else _moved(library._final_module, level)


def _moved(module: Any, level: Level) -> Any:
    """Retarget a module from this machine to another architecture with the same sizes of integers and addresses."""
    described = target_machine(level)
    text = re.sub(
        r"^target datalayout = .*$", f'target datalayout = "{described.target_data}"', str(module), flags=re.M
    )
    text = re.sub(r"^target triple = .*$", f'target triple = "{described.triple}"', text, flags=re.M)
    return binding.parse_assembly(re.sub(r"^.*@llvm\.x86\.sse2\.pause\(.*\n", "", text, flags=re.M))


def _entry(context: Any, library: Any, described: Any) -> ir.Module:
    """Return a module with the C function, which calls Numba's function and ignores the returned status."""
    module = library.create_ir_module(ENTRY)
    kinds = [context.get_value_type(kind) for kind in described.argtypes]
    inner = ir.Function(
        module, context.call_conv.get_function_type(types.void, described.argtypes), described.llvm_func_name
    )
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), ENTRY)
    builder = ir.IRBuilder(entry.append_basic_block())
    context.call_conv.call_function(builder, inner, types.void, described.argtypes, entry.args)
    builder.ret_void()
    return module


_ENGINES: list[Any] = []  # LLVM's engines, which hold the code for the life of the process


def load_object(made: bytes) -> int:
    """Link an object file that `machine_code` does not support, by LLVM; return the address of its `ENTRY`."""
    target = binding.Target.from_triple(binding.get_process_triple())
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target.create_target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(made))
    engine.finalize_object()
    _ENGINES.append(engine)
    return engine.get_function_address(ENTRY)
