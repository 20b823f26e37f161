# SPDX-License-Identifier: MIT
"""Forms of the kernels of `kv_write/triton` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.kv_write.triton import _constants, _row_constants, kv_write_kernel, write_rows_kernel
from packages.core.tests.kernels.triton.building import CAPABILITIES, Build


def _build(dtype: str, cache: str, width: int) -> Build:
    fp8 = cache == "fp8e4nv"
    arguments = {"key": f"*{dtype}", "value": f"*{dtype}", "key_cache": f"*{cache}", "value_cache": f"*{cache}"}
    arguments |= {"slots": "*i64", "key_stride": "i32", "value_stride": "i32"}
    scales = ("key_scale", "value_scale")
    constants = {**_constants(width, fp8), **({} if fp8 else dict.fromkeys(scales))}
    return Build(
        kv_write_kernel,
        arguments | (dict.fromkeys(scales, "*fp32") if fp8 else {}),
        constants,
        aligned=("key_stride", "value_stride"),
        label=f"{dtype}-{cache}-{width}",
        # Triton converts to e4m3 from compute capability 8.9 on.
        capabilities=(90, 100, 120) if fp8 else CAPABILITIES,
    )


def build_types(cache: str, capabilities: tuple[int, ...] = CAPABILITIES) -> tuple[int, ...]:
    """Return the capabilities of GPUs on which a cache uses this type: e4m3 from 8.9 on, its bits (uint8) below."""
    e4m3 = {"fp8e4nv": True, "u8": False}
    return tuple(one for one in capabilities if cache not in e4m3 or (one >= 89) == e4m3[cache])


def _row_build(dtype: str, cache: str, heads: int, dim: int) -> Build:
    arguments = dict.fromkeys(("key", "value"), f"*{dtype}") | dict.fromkeys(("key_cache", "value_cache"), f"*{cache}")
    return Build(
        write_rows_kernel,
        arguments | {"slots": "*i64", "key_stride": "i32", "value_stride": "i32"},
        _row_constants(heads, dim, 16, 127.0 if cache == "i8" else 448.0),
        aligned=("key_stride", "value_stride"),
        label=f"{dtype}-{cache}-{heads}x{dim}-rows",
        capabilities=build_types(cache),
    )


FORMS = (
    _build("bf16", "bf16", 1024),
    _build("fp16", "fp16", 80),
    _build("fp32", "fp32", 640),
    _build("bf16", "fp8e4nv", 1024),
    _row_build("bf16", "i8", 8, 128),
    _row_build("bf16", "fp8e4nv", 8, 128),
    _row_build("fp16", "u8", 8, 128),
    _row_build("fp16", "i8", 3, 80),
)
