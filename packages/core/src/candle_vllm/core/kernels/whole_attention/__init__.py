# SPDX-License-Identifier: MIT
"""Attention of encoders: each token attends to its whole text or a window of it; nothing is cached.

Contract: H query heads, K KV heads, D elements of a head. qkv [T, (H + 2 K) * D] of any float dtype has the queries of
all heads, then the keys, then the values, for the T tokens of concatenated texts; each KV head belongs to H / K
adjacent query heads. y [T, H * D] in qkv's dtype, in new memory, is softmax(q k^T / sqrt(D) + b) v within each text,
for each head. b is the bias by the distance between query and key, if any, and minus infinity outside the window. A
text's result does not depend on the other texts. Recorded steps compute in fp32; otherwise torch's own kernels compute
y. With `turned`, queries and keys are first rotated as in `kernels/rotary`, and recorded steps overwrite qkv.
Source: Vaswani et al., 2017, arXiv:1706.03762; Heo et al., 2024, arXiv:2403.13298 (rotation by rows and columns).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.rotary import Turned


def whole_attention(
    qkv: Value,
    heads: int,
    lengths: Sequence[int],
    turned: Turned | None = None,
    *,
    kv_heads: int | None = None,
    bias: Value | None = None,
    window: int | None = None,
) -> Value:
    """Return y; see above.

    Args:
        heads: H.
        lengths: tokens of each text, in order; adjacent texts of one length are computed together. Recorded steps use
            the lengths of the step's sequences instead.
        kv_heads: K; None is H.
        bias: fp32 [N, 2 P - 1], N = H or 1, for texts of at most P tokens: column d + P - 1 is for keys d tokens after
            the query.
        window: maximum distance in tokens between a query and a key; None for all.
    """
    if isinstance(qkv, Recorded):
        turning = None if turned is None else (turned.places, turned.cos, turned.sin)
        return qkv.attend_whole(heads, heads if kv_heads is None else kv_heads, turning, (bias, window))
    from candle_vllm.core.kernels.whole_attention import reference

    return reference.whole_attention(qkv, heads, lengths, turned, kv_heads=kv_heads, bias=bias, window=window)


def disentangled_attention(qkv: Value, near: Value, heads: int, lengths: Sequence[int], rows: np.ndarray) -> Value:
    """Return y with DeBERTa's scores, (q_i k_j + q_i near_k[r] + near_q[r] k_j) / sqrt(3 D); r is the row of i - j.

    Recorded steps do not support it.

    Args:
        qkv, heads, lengths: as for `whole_attention`.
        near: [2 S, 3 H * D]: queries and keys of 2 S relative positions, and values, not used, in the layout of qkv.
        rows: int64 [2 P - 1] for texts of at most P tokens; element i - j + P - 1 is r.
    """
    from candle_vllm.core.kernels.whole_attention import reference

    return reference.disentangled_attention(qkv, near, heads, lengths, rows)
