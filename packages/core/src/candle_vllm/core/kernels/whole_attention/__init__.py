# SPDX-License-Identifier: MIT
"""Attention of encoders: every token sees its whole text, and nothing is cached.

Contract: qkv [T, (H + 2 K) * D] of any float dtype has the queries of all heads, their keys and their values side by
side, for texts that stand behind each other; each of the K key heads serves H / K neighbouring heads of queries.
y [T, H * D] in qkv's dtype, in new memory: softmax(q k^T / sqrt(D) + b) v within each text, for each head. b is the
bias of the distance between query and key, where there is one, and minus infinity outside of the window. A text's
result does not depend on the others. In recorded steps everything is fp32, and D is any number; elsewhere it is torch's
own kernels. With `turned`, queries and keys are first rotated as `kernels/rotary` says, in whose tables each token has
a row; qkv does not last then.
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
    """y, see above.

    Args:
        qkv: see above.
        heads: H.
        lengths: tokens of each text, in order; texts of one length side by side are computed together. While a step is
            recorded it is not looked at: the step's own numbers are.
        turned: see above.
        kv_heads: K; None is H.
        bias: fp32 [N, 2 P - 1] for texts of at most P tokens, N = H or 1 for all heads: column d + P - 1 belongs to
            keys d tokens behind the query.
        window: most tokens between a query and a key that it sees; None is all.
    """
    if isinstance(qkv, Recorded):
        turning = None if turned is None else (turned.places, turned.cos, turned.sin)
        return qkv.attend_whole(heads, heads if kv_heads is None else kv_heads, turning, (bias, window))
    from candle_vllm.core.kernels.whole_attention import reference

    return reference.whole_attention(qkv, heads, lengths, turned, kv_heads=kv_heads, bias=bias, window=window)


def disentangled_attention(qkv: Value, near: Value, heads: int, lengths: Sequence[int], rows: np.ndarray) -> Value:
    """y of DeBERTa's scores, (q_i k_j + q_i near_k[r] + near_q[r] k_j) / sqrt(3 D), r the row of i - j; in torch alone.

    Args:
        qkv, heads, lengths: as for `whole_attention`.
        near: [2 S, 3 H * D] has the same of relative positions.
        rows: int64 [2 P - 1], r of i - j in column i - j + P - 1.
    """
    from candle_vllm.core.kernels.whole_attention import reference

    return reference.disentangled_attention(qkv, near, heads, lengths, rows)
