# SPDX-License-Identifier: MIT
"""Linear layer with quantised weights and int8 activations, on the CPU; step 6 of a request's life.

Contract. T tokens, K inputs, N outputs; a group is 32 consecutive elements along K. Activations x [T, K] are given as
`xs` float32 [T, K/32], max|x| / 127 of a group; `xq` int8 [T, K], contiguous, x * (1 / xs) rounded to the nearest
integer, ties to even (0 where xs is 0); and `xsum` float32 [T, K/32], xs times the sum of the group's xq. Weights:
[N, K] of one kind, packed in tiles of 16 rows (`layout.py`). The result is float32 (`column`: see `linear_arguments`):

    out[t, column + n] (+)= sum over groups g of xs[t, g] * dot(weight[n, g], xq[t, g]) + bias[n]      t < T, n < N

Products of codes that share a scale are summed exactly. Groups are added in order of K in fp32, always by the same
sequence of operations, so a row's result does not depend on T, the other rows, the threads or the CPU's instruction
set. No other elements of `out` are written. `out` must not overlap the inputs.

`pack` makes a `PackedMatrix` from a GGUF tensor's bytes, in a `WeightMemory` that a model's matrices share.
`cpu.py` and `cpu_gated.py` have the compiled operations; the tests have the contract in plain numpy.
"""

from __future__ import annotations

from candle_vllm.core.kernels.packed_linear.layout import GROUP, PackedKind, PackedMatrix, host_kind, packed_kind
from candle_vllm.core.kernels.packed_linear.pack import pack

__all__ = ["GROUP", "PackedKind", "PackedMatrix", "host_kind", "pack", "packed_kind"]
