# SPDX-License-Identifier: MIT
"""Quantise weights: rows of floats to blocks of twelve GGUF types.

Contract: x float32 [N, elements per block], the N blocks of whole rows, to uint8 [N, bytes per block], in the layout of
ggml's `ggml-common.h`. Each block depends only on its own elements and their columns' importance.

  - q4_0, q5_0, q8_0 derive the scale from the element that is farthest from 0, q4_1 and q5_1 the scale and minimum from
    the smallest and largest element; then every element is rounded. The `gguf` package gives the same values.
  - q2_K, q4_K, q5_K search a scale and a minimum for each group of 16 or 32 elements, q3_K and q6_K a scale for each
    group of 16: several step sizes are tried. Each gives codes, and the codes give a scale (and minimum) by weighted
    least squares; the one with the smallest error is used. An element's weight is floor * root mean square + |x| in the
    first three types, floor * mean square + x^2 in the others, with the mean of the group (`floor`: see `searches.py`).
    Then a block's scales are stored as small integers, and every element is rounded by the stored scale.
  - iq4_nl, iq4_xs search a scale for each group of 32, and every element becomes the nearest value of a table of 16.
    Scales are tried that bring the element farthest from 0 near either end of the table. The weight is mean square +
    x^2.

With an importance matrix, an element's weight in these searches is importance * root(2 * mean square + x^2) instead,
with the importance of the element's column and the mean square of the element's block.

`cpu.py` is compiled, and gives the same bytes on every CPU. Source: llama.cpp's `ggml-quants.c`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime.kernel_cache import NO_KERNELS, can_compile
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, c_function
from candle_vllm.core.kernels.weight_quant.searches import TYPES
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType


def quantiser(ggml_type: GGMLQuantizationType) -> Callable[..., bool]:
    """Return the compiled function that quantises blocks; raises ConfigError if kernels cannot run.

    Its arguments are x and the result, see the package, and maybe the importance of the columns of a row, float32 [C],
    which only types with a search use. It returns whether all elements can be quantised.
    """
    assert ggml_type.name in TYPES
    if not can_compile():
        raise ConfigError(f"weights cannot be quantised: {NO_KERNELS}", "isq")
    compiled = c_function("weight_quant.cpu:make_quantise", 6, ggml_type)

    def quantise(x: np.ndarray, out: np.ndarray, importance: np.ndarray | None = None, /) -> bool:
        assert x.dtype == np.float32 and x.flags.c_contiguous and out.flags.c_contiguous  # noqa: PT018
        good, at, period = np.zeros(1, np.int64), 0, 1
        if importance is not None:
            assert importance.dtype == np.float32 and importance.flags.c_contiguous  # noqa: PT018
            assert importance.size % x.shape[1] == 0
            at, period = address_of(importance), importance.size // x.shape[1]
        compiled(address_of(x), address_of(out), len(x), address_of(good), at, period)
        return bool(good[0])

    return quantise
