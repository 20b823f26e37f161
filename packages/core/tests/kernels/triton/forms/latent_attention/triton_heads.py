# SPDX-License-Identifier: MIT
"""Forms of the kernels of `latent_attention/triton_heads` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.latent_attention.triton_heads import _constants, head_linear_kernel
from packages.core.tests.kernels.triton.building import WITH_TENSOR_CORES, Build

FORMS = (
    Build(
        head_linear_kernel,
        dict.fromkeys(("x", "weight", "y"), "*bf16") | dict.fromkeys(("tokens", "x_token", "x_head"), "i32"),
        _constants(128, 128, 512, 2),
        aligned=("x_token", "x_head"),
        label="bf16",
        capabilities=WITH_TENSOR_CORES,
    ),
)
