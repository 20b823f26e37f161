# pyright: reportCallIssue=false, reportArgumentType=false
"""RMSNorm of every head of a value, in place. The norm of whole rows is part of `kernels/activation_quant`."""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import types
from numba.extending import intrinsic

from candle_vllm.core.kernels.activation_quant.cpu import rms_scale
from candle_vllm.core.kernels.cpu_runtime.emit import F32, LANES, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation, float_bits
from candle_vllm.core.kernels.cpu_runtime.primitives import float_from_bits, int64_at


@intrinsic
def scale_in_place(_: Any, x: Any, weight: Any, scale: Any, columns: Any) -> Any:
    """x <- x * scale * weight for a multiple of 16 columns."""
    signature = types.void(types.int64, types.int64, types.float32, types.int64)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        factor = e.splat(args[2])

        def body(index: Any, state: list[Any]) -> list[Any]:
            offset = b.mul(index, e.int64(4 * LANES))
            at = b.add(args[0], offset)
            weights = e.load(b.add(args[1], offset), vector(F32))
            e.store(at, b.fmul(b.fmul(e.load(at, vector(F32)), factor), weights))
            return state

        e.loop(b.sdiv(args[3], e.int64(LANES)), [], body)
        return context.get_dummy_value()

    return signature, code


def head_norm(a, thread, threads):
    """The operation. Arguments: see `head_norm_row`."""
    numbers = int64_at(a[2])
    x, stride, heads, head_dim, weight = a[3], a[4], a[5], a[6], a[7]
    eps = float_from_bits(a[8])
    total = numbers[StepNumber.TOKENS.value] * heads
    for unit in range(total * thread // threads, total * (thread + 1) // threads):
        row = unit // heads
        at = x + (row * stride + (unit - row * heads) * head_dim) * 4
        scale_in_place(at, weight, rms_scale(at, head_dim, eps), head_dim)


@cache
def head_norm_operation() -> int:
    """Address of the compiled operation."""
    return compile_operation(head_norm)


def head_norm_row(*, x: int, stride: int, heads: int, head_dim: int, weight: int, eps: float) -> list[int]:
    """The operation's arguments.

    Args:
        x: address of the first head of float32 rows, `stride` floats apart.
        heads, head_dim: heads stand side by side; head_dim is a multiple of 32.
        weight: address of head_dim floats.
        eps: of the norm.
    """
    return [x, stride, heads, head_dim, weight, float_bits(eps)]
