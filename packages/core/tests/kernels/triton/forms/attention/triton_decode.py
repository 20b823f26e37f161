# SPDX-License-Identifier: MIT
"""Forms of the kernels of `attention/triton_decode` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.attention.triton_decode import (
    _constants,
    _merge_constants,
    _size,
    decode_kernel,
    merge_kernel,
    splits,
)
from candle_vllm.core.kernels.kv_write.scaled_rows import SCALE
from candle_vllm.core.kernels.triton_build import next_power_of_2
from packages.core.tests.kernels.triton.building import WITH_TENSOR_CORES, Build
from packages.core.tests.kernels.triton.forms.kv_write.triton import build_types


def _builds(
    dtype: str,
    dim: int,
    kv_heads: int,
    group: int,
    block_size: int,
    *,
    window: int = 0,
    cap: bool = False,
    fp8: bool = False,
    sinks: bool = False,
    slopes: bool = False,
    extent: int = 0,
    mixed: bool = False,
    turing: bool = False,
    rows: str = "",
) -> tuple[Build, Build]:
    cache = rows or ("fp8e4nv" if fp8 else dtype)
    size = _size(dim, 4 if dtype == "fp32" else 2, 1 if fp8 or rows else 2, bool(rows))
    shape = splits(next_power_of_2(dim), size, kv_heads, 75 if turing else 90)
    constants = _constants(shape, kv_heads, group, dim, block_size, window, cap, sinks)
    partials = {"partial_values": "*fp32", "partial_states": "*fp32", "out": f"*{dtype}", "context_lens": "*i32"}
    partials |= {"first": "i32"} | ({"decoding": "*i32"} if mixed else {})
    arguments = {"q": f"*{dtype}", "key_cache": f"*{cache}", "value_cache": f"*{cache}", "block_tables": "*i32"}
    arguments |= {**partials, "scale": "fp32", "cap": "fp32"}
    arguments |= dict.fromkeys(("rows", "q_stride", "table_stride"), "i32")
    scales, sink = ("key_scale", "value_scale"), {"sinks": "*fp32"} if sinks else {}
    label = f"{dtype}-d{dim}-g{group}-s{block_size}" + "-window" * bool(window) + "-cap" * cap + "-fp8" * fp8
    label += "-sinks" * sinks + "-slopes" * slopes + "-mixed" * mixed + f"-{rows}-rows" * bool(rows)
    label += "-relative" * bool(extent)
    none = dict.fromkeys(("sinks",) * (not sinks) + ("decoding",) * (not mixed))
    targets = (75,) if turing else build_types(cache, WITH_TENSOR_CORES)
    return (
        Build(
            decode_kernel,
            arguments
            | sink
            | (dict.fromkeys(scales, "*fp32") if fp8 else {})
            | ({"slopes": "*fp32"} if slopes else {})
            | ({"relative": "*fp32"} if extent else {}),
            {
                **constants,
                "EXTENT": extent,
                "FP8": fp8,
                "EXTRA": SCALE * block_size * kv_heads * bool(rows),
                **none,
                **({} if fp8 else dict.fromkeys(scales)),
            }
            | ({} if slopes else {"slopes": None})
            | ({} if extent else {"relative": None}),
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
            aligned=("q_stride",),
            unaligned=("context_lens", "block_tables", "decoding"),
            label=label,
            capabilities=targets,
        ),
        Build(
            merge_kernel,
            partials | sink,
            _merge_constants(constants) | none,
            num_warps=2,
            unaligned=("decoding",),
            label=label,
            capabilities=targets,
        ),
    )


FORMS = (
    *_builds("bf16", 128, 8, 4, 16),
    *_builds("bf16", 128, 8, 4, 16, mixed=True),
    *_builds("bf16", 128, 8, 4, 64)[:1],
    *_builds("fp16", 64, 2, 7, 16)[:1],
    *_builds("bf16", 80, 32, 1, 32)[:1],
    *_builds("bf16", 8, 8, 1, 64)[:1],
    *_builds("bf16", 256, 4, 4, 16, window=1024, cap=True),
    *_builds("bf16", 512, 1, 8, 16),
    *_builds("fp32", 128, 8, 4, 16)[:1],
    *_builds("fp32", 512, 1, 8, 16)[:1],
    *_builds("bf16", 128, 8, 4, 16, fp8=True)[:1],
    *_builds("fp32", 128, 8, 4, 16, fp8=True)[:1],
    *_builds("bf16", 64, 8, 8, 16, window=128, sinks=True),
    *_builds("bf16", 64, 16, 1, 16, slopes=True)[:1],
    *_builds("bf16", 128, 8, 8, 16, extent=1024)[:1],
    *_builds("bf16", 128, 16, 4, 16, window=512, extent=512)[:1],
    *_builds("bf16", 128, 8, 4, 16, rows="i8")[:1],
    *_builds("bf16", 128, 8, 4, 16, rows="fp8e4nv")[:1],
    *_builds("bf16", 128, 8, 4, 16, rows="u8")[:1],
    *_builds("fp32", 128, 8, 4, 16, rows="i8")[:1],
    *_builds("bf16", 256, 4, 4, 16, window=1024, cap=True, rows="i8")[:1],
    *_builds("fp16", 128, 8, 4, 16, rows="i8", turing=True)[:1],
    *_builds("fp16", 128, 8, 4, 16, rows="u8", turing=True)[:1],
    *_builds("fp16", 128, 8, 4, 16, turing=True),
    *_builds("fp16", 128, 8, 4, 16, mixed=True, turing=True),
    *_builds("fp16", 64, 8, 8, 16, window=128, sinks=True, turing=True)[:1],
    *_builds("fp16", 80, 32, 1, 32, turing=True)[:1],
    *_builds("fp16", 256, 4, 4, 16, window=1024, cap=True, turing=True)[:1],
    *_builds("fp32", 128, 8, 4, 16, turing=True)[:1],
)
