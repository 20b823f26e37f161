# SPDX-License-Identifier: MIT
"""Forms of the kernels of `latent_attention/triton_write` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.latent_attention.triton_write import _constants, latent_write_kernel
from packages.core.tests.kernels.triton.building import WITH_TENSOR_CORES, Build

FORMS = tuple(
    Build(
        latent_write_kernel,
        dict.fromkeys(("rope", "latent", "cache"), "*bf16")
        | {"slots": "*i32", "rope_stride": "i32", "latent_stride": "i32"},
        _constants(rope, 512),
        aligned=("rope_stride", "latent_stride"),
        label="bf16" + "-unrotated" * (not rope),
        capabilities=WITH_TENSOR_CORES,
    )
    for rope in (64, 0)  # DeepSeek, GLM-5.3-Flash
)
