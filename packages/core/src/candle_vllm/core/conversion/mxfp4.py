"""Rows in MXFP4 as blocks of GGUF's type of that name: the same numbers, their codes in another order.

A block is the byte of the scale and 16 bytes, whose lower halves are the codes of the first 16 weights and whose upper
ones those of the other 16. Source: ggml-common.h.
"""

from __future__ import annotations

import numpy as np

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.quantization.fp4 import MIDDLE, MX_GROUP
from candle_vllm.core.quantization.group_codes import GroupCodes
from candle_vllm.core.quantization.scaled_codes import E2M1
from candle_vllm.core.quantization.stored import QuantisedTensor
from candle_vllm.core.quantization.tensors import StoredTensor

_BIAS = 128  # of the exponent that belongs to twice the numbers of e2m1


def mxfp4_blocks(stored: StoredTensor) -> np.ndarray:
    """Blocks of a tensor's rows [..., R, K], uint8 [R, 17 K / 32].

    Raises:
        WeightsError: a scale is not a number.
    """
    assert isinstance(stored, QuantisedTensor)
    found: GroupCodes = stored.codes()
    assert found.group_of is None
    if not np.isfinite(found.scales).all():
        raise WeightsError(f"{stored.path}: tensor {stored.name} has a scale that is not a number")
    table = np.zeros(2 * MIDDLE, np.uint8)
    for code in reversed(range(len(E2M1))):  # of the two that are 0, the first is last
        table[MIDDLE + int(2 * E2M1[code])] = code
    codes = table[found.codes].reshape(*found.scales.shape, MX_GROUP)
    half = MX_GROUP // 2
    out = np.empty((*found.scales.shape, 1 + half), np.uint8)
    out[..., 0] = np.frexp(found.scales)[1] - 1 + _BIAS
    out[..., 1:] = codes[..., :half] | codes[..., half:] << 4
    return out.reshape(len(out), -1)
