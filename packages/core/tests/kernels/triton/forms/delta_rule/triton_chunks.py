# SPDX-License-Identifier: MIT
"""Forms of the kernels of `delta_rule/triton_chunks` that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

from candle_vllm.core.kernels.delta_rule.triton_chunks import (
    _BLOCK_V,
    _HOW,
    _block_k,
    _chunk_names,
    chunk_kernel,
    chunks_kernel,
)
from candle_vllm.core.kernels.delta_rule.triton_scan import CACHE_STRIDES, STRIDES, Form
from candle_vllm.core.kernels.states import TABLES
from packages.core.tests.kernels.triton.building import WITH_TENSOR_CORES, Build
from packages.core.tests.kernels.triton.forms.delta_rule.triton_scan import build_arguments


def _builds(
    dtype: str, key_heads: int, heads: int, dim: int, value_dim: int = 0, each: int = 1, *, least: float = 0.0
) -> tuple[Build, Build]:
    arguments = build_arguments(dtype) | {"positions": "*i32", "matrices": "*bf16", "factors": "*fp32"}
    usual = not value_dim
    form = Form(key_heads, heads, dim, value_dim or dim, NORMED=usual, CORRECTS=usual, EACH=each, LEAST=least)
    more: dict[str, Any] = {**_HOW, "capabilities": WITH_TENSOR_CORES, "unaligned": (*TABLES, "positions")}
    more |= {
        "label": f"{dtype}-{key_heads}x{heads}x{dim}"
        + (f"x{value_dim}" if value_dim else "-channels" * (each > 1) + "-bounded" * bool(least))
    }
    skip, nothing = ({"skip": "*fp32"}, {}) if value_dim else ({}, {"skip": None})
    names = _chunk_names()
    arguments |= {"scaled": "*bf16"} if each > 1 else {}
    nothing |= {} if each > 1 else {"scaled": None}
    chunk = {name: arguments[name] for name in names if name in arguments} | {"tokens": "i32"}
    strides, every = tuple(name for name in STRIDES if name in names), (*STRIDES, *CACHE_STRIDES)
    return (
        Build(
            chunk_kernel,
            chunk,
            {"FORM": form, "BLOCK_K": _block_k(form)} | ({} if each > 1 else {"scaled": None}),
            aligned=strides,
            **more,
        ),
        Build(chunks_kernel, arguments | skip, {"FORM": form, "BLOCK_V": _BLOCK_V} | nothing, aligned=every, **more),
    )


FORMS = (
    *_builds("bf16", 16, 32, 128),
    *_builds("fp16", 16, 48, 128),
    *_builds("bf16", 32, 32, 128, each=128),  # Kimi Linear
    *_builds("bf16", 64, 64, 128, each=128, least=-5.0),  # GLM-5.3-Flash
    *_builds("bf16", 8, 96, 128, 80),  # Mamba 2 of Nemotron 3 Nano 4B
)
