"""From a Python function to machine code, by Numba and LLVM; imported only where something has to be compiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba.core import compiler, registry, types
from numba.core.compiler_lock import global_compiler_lock

from candle_vllm.core.kernels.cpu_runtime.machine_code import ENTRY


@global_compiler_lock
def compile_function(function: Callable[..., None], cpu: str) -> bytes:
    """An object file (ELF under Linux) whose symbol `ENTRY` is the function, as C sees it.

    All parameters are int64, and nothing is returned. There are no errors of Python's: a division by zero gives what
    the hardware gives, and what is raised only ends the function.

    Args:
        function: may close over integers only.
        cpu: what LLVM calls the CPU that will run it.

    Raises:
        numba.core.errors.NumbaError: the function cannot be compiled.
    """
    target: Any = registry.cpu_target
    target.typing_context.refresh()
    target.target_context.refresh()
    context = target.target_context.with_aot_codegen("kernels", cpu_name=cpu)
    library = context.codegen().create_library(function.__name__)
    kinds = [types.int64] * len(inspect.signature(function).parameters)
    flags: Any = compiler.Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    compiled = compiler.compile_extra(
        target.typing_context, context, function, kinds, types.void, flags, {}, library=library
    )
    library.add_ir_module(_entry(context, library, compiled.fndesc))
    return library.emit_native_object()


def _entry(context: Any, library: Any, described: Any) -> ir.Module:
    """A module with the C function, which calls Numba's and forgets its status."""
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


def load_object(made: bytes) -> int:
    """The address of an object file's `ENTRY`, linked by LLVM, where `machine_code` does not do it."""
    target = binding.Target.from_triple(binding.get_process_triple())
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target.create_target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(made))
    engine.finalize_object()
    _engines().append(engine)
    return engine.get_function_address(ENTRY)


@cache
def _engines() -> list[Any]:
    """What holds the code for the life of the process."""
    return []
