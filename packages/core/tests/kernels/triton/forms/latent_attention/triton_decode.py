# SPDX-License-Identifier: MIT
"""Forms of the kernels of `latent_attention/triton_decode` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.latent_attention.triton_decode import _constants, latent_decode_kernel, splits
from packages.core.tests.kernels.triton.building import WITH_TENSOR_CORES, Build


def _build(
    dtype: str, heads: int, rope: int = 64, latent: int = 512, block_size: int = 64, *, mixed: bool = False
) -> Build:
    shape = splits(heads, 4 if dtype == "fp32" else 2)
    arguments = dict.fromkeys(("q_rope", "q_latent", "cache", "out"), f"*{dtype}")
    arguments |= {"partial_values": "*fp32", "partial_states": "*fp32", "scale": "fp32"}
    arguments |= {"context_lens": "*i32", "block_tables": "*i32", "first": "i32"}
    arguments |= {"decoding": "*i32"} if mixed else {}
    strides = ("rope_token", "rope_head", "latent_token", "latent_head")
    arguments |= dict.fromkeys(("rows", *strides, "table_stride"), "i32")
    return Build(
        latent_decode_kernel,
        arguments,
        _constants(shape, heads, rope, latent, block_size) | ({} if mixed else {"decoding": None}),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        aligned=strides,
        unaligned=("context_lens", "block_tables", "decoding"),
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
