"""SiLU-and-multiply, the gate of SwiGLU.

Contract: x [T, 2F] holds gate then up, of any float dtype; y [T, F] = silu(gate) * up has x's dtype, in new memory; the
arithmetic is fp32. Source: Shazeer, 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.silu_mul import reference


def silu_mul(x: Value) -> Value:
    """silu(x[:, :F]) * x[:, F:]."""
    if isinstance(x, Recorded):
        return x.silu_mul()
    assert x.dim() == 2
    assert x.shape[1] % 2 == 0
    return reference.silu_mul(x)
