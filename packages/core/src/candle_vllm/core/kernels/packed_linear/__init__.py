# SPDX-License-Identifier: MIT
"""Linear layer with quantised weights and int8 activations, on the CPU; step 6 of a request's life.

Contract. Activations: `xq` int8 [T, K], rows K apart; `xs` float32 [T, K/32], max|x| / 127 of each group of 32 (0 for a
group of zeros), x / xs rounded to nearest even; `xsum` float32 [T, K/32], xs times the sum of the group's int8 numbers.
Weights: [N, K] of one kind, packed 16 rows wide (`layout.py`). Result, float32:

    out[t, column + n] (+)= sum over groups g of xs[t, g] * dot(weight[n, g], xq[t, g]) + bias[n]      t < T, n < N

A group's dot product is summed in int32, exactly; groups are added in order of K in fp32, always by the same sequence
of operations, so that a row's result has the same bits whatever T, the other rows, the threads and the CPU's
instructions are. Nothing else of `out` is written. `out` may not overlap the inputs.

`pack` makes a `PackedMatrix` from a GGUF tensor's bytes, in a `WeightMemory` that a model's matrices share;
`dequantise` gives its numbers back; both are numpy. `reference.py` is the contract in plain numpy. `cpu.py` has the
compiled operations, and only a CPU engine imports it.
"""

from __future__ import annotations

from candle_vllm.core.kernels.packed_linear.layout import GROUP, PackedKind, PackedMatrix, host_kind, packed_kind
from candle_vllm.core.kernels.packed_linear.pack import pack
from candle_vllm.core.kernels.packed_linear.reference import dequantise

__all__ = ["GROUP", "PackedKind", "PackedMatrix", "dequantise", "host_kind", "pack", "packed_kind"]
