# SPDX-License-Identifier: MIT
"""Forms of the kernels of `moe/triton_experts` that are compiled ahead of time."""

from __future__ import annotations

from typing import Any, Literal

from candle_vllm.core.kernels.group_linear.layout import Numbers
from candle_vllm.core.kernels.linear.triton import tile_for
from candle_vllm.core.kernels.linear.triton_products import plain_operand
from candle_vllm.core.kernels.matrices import Stored
from candle_vllm.core.kernels.moe.arguments import Activation
from candle_vllm.core.kernels.moe.triton_experts import (
    _PART,
    _SERVERS,
    TOGETHER,
    _arithmetic,
    _constants,
    _tiles,
    few_kernel,
    many_kernel,
    sum_kernel,
)
from candle_vllm.core.kernels.packed_linear.layout import PackedKind
from packages.core.tests.kernels.triton.building import WITH_TENSOR_CORES, Build
from packages.core.tests.kernels.triton.forms.gguf_linear import triton as gguf
from packages.core.tests.kernels.triton.forms.gguf_linear.triton import OWN_FORMS
from packages.core.tests.kernels.triton.forms.group_linear import triton as group


def _build(
    kernel: Any,
    kind: PackedKind | Numbers | Literal["plain"],
    gate: Activation | None,
    tokens: int,
    capabilities: tuple[int, ...],
    *,
    bias: str | None = None,
    dtype: str = "bf16",
    columns: int = 2048,
    group_size: int = 128,
) -> Build:
    stored: Stored = "plain" if kind == "plain" else "gguf" if isinstance(kind, PackedKind) else "floats"
    tiles = _tiles(stored, kind.name if isinstance(kind, PackedKind) else kind, capabilities[0])
    tile = tile_for(tokens, tiles.few if kernel is few_kernel else tiles.many)
    label = f"{dtype}-{columns}"
    if kind == "plain":
        operand = plain_operand(f"*{dtype}", 1, columns, columns, tile.columns)
    elif isinstance(kind, PackedKind):
        operand, label = gguf.planned(kind, columns), kind.name
    else:
        operand = group.planned(4 if kind == "e2m1" else 8, group_size, False, columns, kind)
        label = f"{kind}-{group_size}"
    arithmetic = _arithmetic(stored, few=kernel is few_kernel)
    extra = {"SLOTS": 8} if kernel is few_kernel else {"TOGETHER": TOGETHER}
    types: dict[str, Any] = dict.fromkeys(("T", "X", "N", "K", "pitch", "x_stride", "steps", "blocks"), "i32")
    types |= dict.fromkeys(("experts", "order", "table"), "*i32") | dict.fromkeys(("x", "out"), f"*{dtype}")
    types |= dict(zip(("low", "high", "scales", "supers"), operand.planes, strict=True))
    types["bias"] = None if bias is None else f"*{bias}"
    missing = {name: None for name, found in types.items() if found is None}
    missing |= {} if operand.pitch else {"pitch": None}
    sizes = ("N", "K", "pitch", "x_stride", *(("steps",) if stored == "plain" else ()))
    return Build(
        kernel,
        {name: types[name] for name in kernel.arg_names if name in types and name not in missing},
        {**_constants(operand, arithmetic, tile, 8, gate), **extra, **missing},
        num_warps=tile.warps,
        num_stages=tile.stages,
        aligned=tuple(name for name in sizes if name not in missing),
        label=f"{label}x{tokens}{'-' + gate if gate else ''}{'-bias' if bias else ''}",
        capabilities=capabilities,
    )


def _sum(dtype: str, top_k: int) -> Build:
    types = {"results": f"*{dtype}", "weights": "*fp32", "experts": "*i32", "y": f"*{dtype}", "X": "i32", "E": "i32"}
    return Build(sum_kernel, types, {"TOP": top_k, "BLOCK": _PART}, aligned=("E",), label=f"{dtype}-{top_k}")


_HOPPER, _TURING, _OTHERS = (90,), (75,), (120,)

_TOKENS = {few_kernel: (8, 16, 32, 64), many_kernel: (16, 32, 64, 128)}

_BOTH = tuple(_TOKENS.items())

FORMS = (
    _sum("bf16", 8),
    _sum("fp16", 2),
    *(_build(few_kernel, "plain", gate, tokens, _SERVERS) for gate in ("silu", None) for tokens in (8, 16, 64)),
    *(_build(many_kernel, "plain", gate, tokens, _SERVERS) for gate in ("silu", None) for tokens in (16, 32, 64, 128)),
    _build(few_kernel, "plain", "gelu_tanh", 32, _SERVERS, dtype="fp16", columns=1440),
    _build(many_kernel, "plain", "gelu_tanh", 128, _SERVERS, dtype="fp16", columns=1440),
    _build(few_kernel, "plain", "swiglu_oai", 16, _SERVERS, columns=2880, bias="fp32"),
    _build(many_kernel, "plain", "swiglu_oai", 128, _SERVERS, columns=2880, bias="fp32"),
    *(_build(kernel, "plain", "silu_7", wide[-1], _SERVERS, columns=4096) for kernel, wide in _BOTH),
    _build(few_kernel, "plain", None, 8, _SERVERS, columns=2880, bias="fp32"),
    _build(few_kernel, "plain", "relu2", 16, _SERVERS, columns=2688),
    *(_build(kernel, "plain", "silu", tokens, _TURING, dtype="fp16") for kernel, wide in _BOTH for tokens in wide),
    *(_build(kernel, "plain", "silu", tokens, _OTHERS) for kernel, wide in _BOTH for tokens in wide),
    _build(many_kernel, "plain", "gelu_tanh", 128, _OTHERS, dtype="fp16", columns=1440),
    _build(many_kernel, "plain", "swiglu_oai", 128, _OTHERS, columns=2880, bias="fp32"),
    _build(few_kernel, "plain", "swiglu_oai", 16, _TURING, dtype="fp16", columns=2880, bias="fp32"),
    _build(many_kernel, "plain", None, 128, _TURING, dtype="fp16", columns=2880, bias="fp32"),
    *(_build(few_kernel, kind, "silu", 16, _HOPPER) for kind in OWN_FORMS),
    _build(few_kernel, PackedKind.Q4_K, "silu", 8, WITH_TENSOR_CORES),
    _build(few_kernel, PackedKind.Q6_K, None, 8, WITH_TENSOR_CORES),
    _build(few_kernel, PackedKind.Q4_K, "gelu_tanh", 32, WITH_TENSOR_CORES),
    _build(few_kernel, PackedKind.Q4_K, "silu", 64, _HOPPER),
    _build(few_kernel, PackedKind.Q5_K, None, 64, _HOPPER),
    *(_build(few_kernel, kind, gate, 64, WITH_TENSOR_CORES) for kind in OWN_FORMS[-2:] for gate in ("silu", None)),
    _build(few_kernel, PackedKind.IQ4_XS, "silu", 64, _TURING),
    *(_build(many_kernel, kind, "silu", 128, _HOPPER) for kind in OWN_FORMS),
    *(_build(many_kernel, PackedKind.Q4_K, "silu", tokens, WITH_TENSOR_CORES) for tokens in _TOKENS[many_kernel]),
    *(_build(many_kernel, PackedKind.Q6_K, None, tokens, WITH_TENSOR_CORES) for tokens in (16, 128)),
    _build(few_kernel, PackedKind.Q5_0, "swiglu_oai", 16, WITH_TENSOR_CORES, bias="fp32"),
    _build(few_kernel, PackedKind.Q5_0, None, 8, WITH_TENSOR_CORES, bias="fp32"),
    _build(many_kernel, PackedKind.Q5_0, "swiglu_oai", 128, WITH_TENSOR_CORES, bias="fp32"),
    *(_build(few_kernel, kind, "silu", 8, _TURING) for kind in OWN_FORMS),
    *(_build(few_kernel, PackedKind.Q4_K, "gelu_tanh", tokens, _TURING) for tokens in (16, 32, 64)),
    *(_build(many_kernel, kind, "silu", 128, _TURING) for kind in OWN_FORMS),
    *(_build(many_kernel, PackedKind.Q4_K, None, tokens, _TURING) for tokens in (16, 32, 64)),
    _build(few_kernel, PackedKind.Q5_0, "swiglu_oai", 16, _TURING, bias="fp32"),
    _build(few_kernel, "e4m3", "silu", 8, WITH_TENSOR_CORES),
    _build(few_kernel, "e5m2", "gelu_tanh", 32, _HOPPER, group_size=2048),
    _build(few_kernel, "e4m3", "silu", 64, _HOPPER),
    _build(many_kernel, "e4m3", "silu", 128, WITH_TENSOR_CORES),
    _build(many_kernel, "e4m3", None, 16, _HOPPER),
    *(_build(few_kernel, "e2m1", "silu", tokens, _HOPPER, group_size=2048) for tokens in (16, 64)),
    _build(many_kernel, "e2m1", "silu", 128, _HOPPER, group_size=2048),
)
