# SPDX-License-Identifier: MIT
"""Forms of the kernels of `latent_attention/triton_prefill` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.latent_attention.triton_prefill import _constants, latent_prefill_kernel, tiles
from packages.core.tests.kernels.triton.building import WITH_TENSOR_CORES, Build


def _build(
    dtype: str, heads: int, rope: int = 64, latent: int = 512, block_size: int = 64, *, mixed: bool = False
) -> Build:
    shape = tiles(4 if dtype == "fp32" else 2)
    arguments = dict.fromkeys(("q_rope", "q_latent", "cache", "out"), f"*{dtype}")
    arguments |= {"query_start": "*i32", "context_lens": "*i32", "block_tables": "*i32", "scale": "fp32"}
    arguments |= {"decoding": "*i32"} if mixed else {}
    strides = ("rope_token", "rope_head", "latent_token", "latent_head")
    arguments |= dict.fromkeys(("rows", *strides, "table_stride"), "i32")
    return Build(
        latent_prefill_kernel,
        arguments,
        _constants(shape, heads, rope, latent, block_size) | ({} if mixed else {"decoding": None}),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        aligned=strides,
        unaligned=("query_start", "context_lens", "block_tables", "decoding"),
        label=f"{dtype}-h{heads}-s{block_size}" + "-unrotated" * (not rope) + "-mixed" * mixed,
        capabilities=WITH_TENSOR_CORES,
    )


FORMS = (
    _build("bf16", 128),
    _build("bf16", 128, mixed=True),
    _build("bf16", 16),
    _build("bf16", 64, 0),  # GLM-5.3-Flash
    _build("fp32", 128),
)
