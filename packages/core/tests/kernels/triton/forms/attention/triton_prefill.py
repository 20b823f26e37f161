# SPDX-License-Identifier: MIT
"""Forms of the kernels of `attention/triton_prefill` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.attention.triton_prefill import _constants, prefill_kernel, tiles
from candle_vllm.core.kernels.triton_build import next_power_of_2
from packages.core.tests.kernels.triton.building import CAPABILITIES, WITH_TENSOR_CORES, Build
from packages.core.tests.kernels.triton.forms.kv_write.triton import build_types

POINTERS = ("key_scale", "value_scale", "sinks", "slopes", "relative")


def _builds(
    dtype: str,
    dim: int,
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
    rows: str = "",
) -> list[Build]:
    cache = rows or ("fp8e4nv" if fp8 else dtype)
    arguments = {"q": f"*{dtype}", "key_cache": f"*{cache}", "value_cache": f"*{cache}", "out": f"*{dtype}"}
    arguments |= {"query_start": "*i32", "context_lens": "*i32", "block_tables": "*i32", "scale": "fp32", "cap": "fp32"}
    arguments |= dict.fromkeys(("rows", "q_stride", "table_stride"), "i32")
    arguments |= {"decoding": "*i32"} if mixed else {}
    pointers = (
        ("key_scale", "value_scale") * fp8 + ("sinks",) * sinks + ("slopes",) * slopes + ("relative",) * bool(extent)
    )
    label = f"{dtype}-d{dim}-g{group}-s{block_size}" + "-window" * bool(window) + "-cap" * cap + "-fp8" * fp8
    label += f"-{rows}-rows" * bool(rows)
    builds = []
    for target in build_types(cache, WITH_TENSOR_CORES if dim > 256 else CAPABILITIES):
        shape = tiles(next_power_of_2(dim), 4 if dtype == "fp32" else 2, group, target, relative=bool(extent))
        build = Build(
            prefill_kernel,
            arguments | dict.fromkeys(pointers, "*fp32"),
            _constants(shape, 8, group, dim, block_size, window, cap, fp8, sinks, bool(rows))
            | {"EXTENT": extent}
            | {name: None for name in POINTERS if name not in pointers}
            | ({} if mixed else {"decoding": None}),
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
            aligned=("q_stride",),
            unaligned=("query_start", "context_lens", "block_tables", "decoding"),
            label=label + "-sinks" * sinks + "-slopes" * slopes + "-relative" * bool(extent) + "-mixed" * mixed,
            capabilities=(target,),
        )
        builds.append(build)
    return builds


FORMS = (
    *_builds("bf16", 128, 4, 16),
    *_builds("bf16", 128, 4, 16, mixed=True),
    *_builds("bf16", 128, 4, 64),
    *_builds("fp16", 64, 7, 16),
    *_builds("bf16", 80, 1, 32),
    *_builds("bf16", 8, 2, 16),
    *_builds("bf16", 256, 4, 16, window=1024, cap=True),
    *_builds("bf16", 512, 8, 16),
    *_builds("fp32", 128, 4, 16),
    *_builds("fp32", 512, 8, 16),
    *_builds("fp32", 256, 1, 16, window=1024),
    *_builds("bf16", 128, 4, 16, fp8=True),
    *_builds("bf16", 64, 8, 16, window=128, sinks=True),
    *_builds("bf16", 64, 1, 16, slopes=True),
    *_builds("bf16", 128, 8, 16, extent=1024),
    *_builds("bf16", 128, 4, 16, window=512, extent=512),
    *_builds("bf16", 256, 4, 16, extent=1024),
    *_builds("bf16", 64, 4, 16, extent=1024),
    *_builds("fp32", 128, 8, 16, extent=1024),
    *_builds("bf16", 128, 8, 16, extent=1024, rows="i8"),
    *_builds("bf16", 128, 4, 16, rows="i8"),
    *_builds("bf16", 128, 4, 16, rows="fp8e4nv"),
    *_builds("fp16", 128, 4, 16, rows="u8"),
    *_builds("fp32", 128, 4, 16, rows="i8"),
    *_builds("bf16", 256, 4, 16, window=1024, cap=True, rows="i8"),
)
