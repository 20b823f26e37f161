# SPDX-License-Identifier: MIT
"""Forms of the kernels of `delta_rule/triton_scan` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.delta_rule.triton_scan import CACHE_STRIDES, STRIDES, Form, block_of, scan_kernel
from candle_vllm.core.kernels.states import TABLES
from packages.core.tests.kernels.triton.building import Build


def build_arguments(dtype: str) -> dict[str, str]:
    """Return the Triton types of the arguments of a layer's kernels, except constants."""
    arguments = dict.fromkeys(("q", "k", "v", "a", "b", "out"), f"*{dtype}")
    arguments |= dict.fromkeys(("decay", "bias", "states", "kept"), "*fp32") | dict.fromkeys(TABLES[:-1], "*i32")
    return arguments | {"most": "fp32", "scale": "fp32"} | dict.fromkeys((*STRIDES, *CACHE_STRIDES), "i32")


def _build(
    dtype: str, key_heads: int, heads: int, dim: int, value_dim: int = 0, each: int = 1, *, least: float = 0.0
) -> Build:
    usual = not value_dim
    form = Form(key_heads, heads, dim, value_dim or dim, NORMED=usual, CORRECTS=usual, EACH=each, LEAST=least)
    return Build(
        scan_kernel,
        build_arguments(dtype) | ({"skip": "*fp32"} if value_dim else {}),
        {"FORM": form, "BLOCK_V": block_of(form)} | ({} if value_dim else {"skip": None}),
        aligned=(*STRIDES, *CACHE_STRIDES),
        unaligned=TABLES,
        label=f"{dtype}-{key_heads}x{heads}x{dim}"
        + (f"x{value_dim}" if value_dim else "-channels" * (each > 1) + "-bounded" * bool(least)),
    )


FORMS = (
    _build("bf16", 16, 32, 128),
    _build("fp32", 16, 48, 128),
    _build("bf16", 16, 16, 256),
    _build("bf16", 32, 32, 128, each=128),  # Kimi Linear
    _build("bf16", 64, 64, 128, each=128, least=-5.0),  # GLM-5.3-Flash
    _build("bf16", 8, 96, 128, 80),  # Mamba 2 of Nemotron 3 Nano 4B
    _build("bf16", 1, 1, 16, 8192, each=0),  # Mamba 1 of Falcon Mamba 7B and Jamba
)
