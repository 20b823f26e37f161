# SPDX-License-Identifier: MIT
"""Functions of 16 floats that the CPU kernels share: exp, tanh, erf, and the activation functions that use them.

Unless a function states otherwise, NaN gives NaN, and relative errors are below 4e-7 (of activations: for inputs > 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I32, SHIFTER, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES

_LOG2E = 1.4426950216293335  # log2(e), rounded to float32

# tanh(x) = x + x^3 * (...) below 0.625. Source: Cephes, tanhf.c (Moshier).
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
# erf(x) = 1 - t (...) exp(-x^2) with t = 1 / (1 + 0.3275911 x). Source: Abramowitz and Stegun, 7.1.26.
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def emit_larger(e: Emitter, x: Any, y: Any) -> Any:
    """Return the larger of x and y in each lane; y if one of them is NaN."""
    return e.b.select(e.b.fcmp_ordered(">", x, y), x, y)


def emit_larger_size(e: Emitter, x: Any, y: Any) -> Any:
    """Return the larger of two magnitudes in each lane; NaN if one of them is, because its bits are the greatest."""
    bits = [e.b.bitcast(each, vector(I32, each.type.count)) for each in (x, y)]
    return e.b.bitcast(e.b.select(e.b.icmp_unsigned(">", *bits), *bits), x.type)


def emit_largest_lane(e: Emitter, value: Any, larger: Callable[..., Any] = emit_larger) -> Any:
    """Return the maximum of 16 floats by `larger`, in every lane."""
    for step in (8, 4, 2, 1):
        lanes = ir.Constant(vector(I32), [(i ^ step) for i in range(LANES)])
        value = larger(e, value, e.b.shuffle_vector(value, value, lanes))
    return value


def emit_exp(e: Emitter, x: Any) -> Any:
    """Clamp 16 floats to [-87, 88]; return their exp. NaN gives NaN if its 9 lowest bits are 0, as in usual NaNs."""
    b = e.b
    low, high = e.constant(F32, -87.0), e.constant(F32, 88.0)
    x = b.select(b.fcmp_ordered(">", x, high), high, x)
    x = b.select(b.fcmp_ordered("<", x, low), low, x)
    shifted = e.fma(x, e.constant(F32, _LOG2E), e.constant(F32, SHIFTER))
    whole = b.fsub(shifted, e.constant(F32, SHIFTER))
    rest = e.fma(x, e.constant(F32, _LOG2E), b.fneg(whole))
    rest = e.fma(x, e.constant(F32, math.log2(math.e) - _LOG2E), rest)
    return e.power_of_two(shifted, rest)


def emit_tanh(e: Emitter, x: Any) -> Any:
    b, one = e.b, e.constant(F32, 1.0)
    size = _absolute(e, x)
    square = b.fmul(x, x)
    odd = e.constant(F32, _TANH[0])
    for factor in _TANH[1:]:
        odd = e.fma(odd, square, e.constant(F32, factor))
    small = e.fma(b.fmul(odd, square), x, x)
    power = emit_exp(e, b.fadd(size, size))
    large = b.fsub(one, b.fdiv(e.constant(F32, 2.0), b.fadd(power, one)))
    return b.select(b.fcmp_unordered("<", size, e.constant(F32, 0.625)), small, _signed_as(e, large, x))


def emit_sigmoid_times(e: Emitter, x: Any, inner: Any) -> Any:
    """Return x * sigmoid(inner)."""
    return e.b.fdiv(x, e.b.fadd(e.constant(F32, 1.0), emit_exp(e, e.b.fneg(inner))))


def emit_silu(e: Emitter, x: Any) -> Any:
    return emit_sigmoid_times(e, x, x)


def emit_gelu_tanh(e: Emitter, x: Any) -> Any:
    """Return GELU by the tanh approximation, where 0.5 (1 + tanh(z)) is the sigmoid of 2z."""
    b = e.b
    twice = 2 * math.sqrt(2 / math.pi)
    factor = e.fma(b.fmul(x, x), e.constant(F32, 0.044715 * twice), e.constant(F32, twice))
    return emit_sigmoid_times(e, x, b.fmul(x, factor))


def emit_gelu(e: Emitter, x: Any) -> Any:
    """Return GELU by the error function; the absolute error of erf is below 3e-7."""
    b, one = e.b, e.constant(F32, 1.0)
    size = b.fmul(_absolute(e, x), e.constant(F32, math.sqrt(0.5)))
    t = b.fdiv(one, e.fma(size, e.constant(F32, 0.3275911), one))
    total = e.constant(F32, _ERF[0])
    for factor in _ERF[1:]:
        total = e.fma(total, t, e.constant(F32, factor))
    power = emit_exp(e, b.fneg(b.fmul(size, size)))
    erf = b.fsub(one, b.fmul(b.fmul(total, t), power))
    return b.fmul(b.fmul(x, e.constant(F32, 0.5)), b.fadd(one, _signed_as(e, erf, x)))


def emit_quick_gelu(e: Emitter, x: Any) -> Any:
    """Return x * sigmoid(1.702 x)."""
    return emit_sigmoid_times(e, x, e.b.fmul(x, e.constant(F32, 1.702)))


def emit_softplus(e: Emitter, x: Any) -> Any:
    """Return log(1 + exp(x)) of 16 floats: max(x, 0) + log(1 + u) with u = exp(-|x|), which is at most 1.

    With s = u / (2 + u), which is at most 1/3, log(1 + u) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...).
    """
    b = e.b
    power = emit_exp(e, b.fneg(_absolute(e, x)))
    s = b.fdiv(power, b.fadd(power, e.constant(F32, 2.0)))
    square = b.fmul(s, s)
    series = e.constant(F32, 1 / 15)
    for odd in (13, 11, 9, 7, 5, 3, 1):
        series = e.fma(series, square, e.constant(F32, 1 / odd))
    above = b.select(b.fcmp_ordered(">", x, e.zeros(F32)), x, e.zeros(F32))
    return e.fma(b.fadd(s, s), series, above)


def emit_relu(e: Emitter, x: Any) -> Any:
    return e.b.select(e.b.fcmp_ordered("<", x, e.zeros(F32)), e.zeros(F32), x)


def emit_relu2(e: Emitter, x: Any) -> Any:
    """Return the square of max(x, 0)."""
    positive = emit_relu(e, x)
    return e.b.fmul(positive, positive)


def emit_swiglu_oai(e: Emitter, gate: Any, up: Any) -> Any:
    """Return gpt-oss's (up + 1) * gate * sigmoid(1.702 gate), with gate at most 7 and up within [-7, 7]."""
    gate, up = emit_limited(e, gate, up, 7.0, 7.0)
    gated = emit_sigmoid_times(e, gate, e.b.fmul(gate, e.constant(F32, 1.702)))
    return e.b.fmul(e.b.fadd(up, e.constant(F32, 1.0)), gated)


def emit_limited(e: Emitter, gate: Any, up: Any, gate_limit: float, limit: float) -> tuple[Any, Any]:
    """Clamp both factors of a gated product: gate, or its activation, to at most `gate_limit`, and up to
    [-limit, limit]."""
    b, most, high, low = e.b, e.constant(F32, gate_limit), e.constant(F32, limit), e.constant(F32, -limit)
    up = b.select(b.fcmp_ordered(">", up, high), high, up)
    up = b.select(b.fcmp_ordered("<", up, low), low, up)
    return b.select(b.fcmp_ordered(">", gate, most), most, gate), up


def _absolute(e: Emitter, x: Any) -> Any:
    return e.call("llvm.fabs.v16f32", vector(F32), [x])


def _signed_as(e: Emitter, size: Any, x: Any) -> Any:
    return e.call("llvm.copysign.v16f32", vector(F32), [size, x])
