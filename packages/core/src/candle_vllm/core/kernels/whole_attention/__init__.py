# SPDX-License-Identifier: MIT
"""Attention of encoders: every token sees its whole text, and nothing is cached.

Contract: qkv [T, 3 * H * D] of any float dtype has the queries of all heads, their keys and their values side by side,
for texts that stand behind each other. y [T, H * D] in qkv's dtype, in new memory: softmax(q k^T / sqrt(D)) v within
each text, for each head. A text's result does not depend on the others. In recorded steps everything is fp32, and D is
any number; elsewhere it is torch's own kernels. With `turned`, queries and keys are first rotated as
`kernels/rotary` says, in whose tables each token has a row; qkv does not last then.
Source: Vaswani et al., 2017, arXiv:1706.03762; Heo et al., 2024, arXiv:2403.13298 (rotation by rows and columns).
"""

from __future__ import annotations

from collections.abc import Sequence

from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.rotary import Turned


def whole_attention(qkv: Value, heads: int, lengths: Sequence[int], turned: Turned | None = None) -> Value:
    """y, see above.

    Args:
        qkv: see above.
        heads: H.
        lengths: tokens of each text, in order; texts of one length side by side are computed together. While a step is
            recorded it is not looked at: the step's own numbers are.
        turned: see above.
    """
    if isinstance(qkv, Recorded):
        return qkv.attend_whole(heads, None if turned is None else (turned.places, turned.cos, turned.sin))
    from candle_vllm.core.kernels.whole_attention import reference

    return reference.whole_attention(qkv, heads, lengths, turned)
