# SPDX-License-Identifier: MIT
"""Convert GGUF's MXFP4 blocks exactly to Q5_0 blocks, for kernels that do not support MXFP4.

A block of MXFP4 is a byte e and 16 bytes of codes, whose elements are integers (twice the e2m1 floats), with the scale
2^(e - 128). A block of Q5_0 is a float16 scale, a word of fifth bits and 16 bytes of nibbles, whose elements are -16 to
15. The 32 codes have the same order in both. Source: ggml-common.h.
"""

from __future__ import annotations

import numpy as np

from candle_vllm.core.quantization.ggml_blocks import BlockParts, put_together
from candle_vllm.core.quantization.ggml_types import CONTENTS, GGMLQuantizationType
from candle_vllm.core.quantization.scaled_codes import E2M1

_SMALLEST, _LARGEST = 104, 143  # exponents whose scale is a float16, 2^-24 to 2^15


def as_q5_0(raw: np.ndarray) -> np.ndarray | None:
    """Convert to blocks of Q5_0 with the same elements, uint8; None if a scale exceeds the range of float16.

    Args:
        raw: blocks of MXFP4, uint8, contiguous.
    """
    blocks = raw.reshape(-1, GGMLQuantizationType.MXFP4.block[1])
    exponents, codes = blocks[:, 0].astype(np.int32), blocks[:, 1:]
    empty = ~np.any(codes & 0x77, axis=1)  # blocks of zeros may have any scale
    if not np.all(empty | (exponents >= _SMALLEST) & (exponents <= _LARGEST)):
        return None
    numbers = (2 * np.array(E2M1)).astype(np.int8).view(np.uint8)
    fives = numbers[np.concatenate([codes & 15, codes >> 4], axis=1)]
    scales = np.where(empty, 0.0, np.exp2(exponents.clip(_SMALLEST, _LARGEST) - 128.0)).astype(np.float16)
    parts = BlockParts(fives, scales[:, None].view(np.uint8))
    return put_together(parts, CONTENTS[GGMLQuantizationType.Q5_0]).reshape(-1)
