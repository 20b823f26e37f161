# SPDX-License-Identifier: MIT
"""Forms of the kernels of `linear/triton` that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from candle_vllm.core.kernels.linear.triton import _MERGED, Tile, _constants, _tile, linear_kernel, merge_kernel
from candle_vllm.core.kernels.linear.triton_products import Operand, plain, plain_operand
from packages.core.tests.kernels.triton.building import CAPABILITIES, Build


def build(
    operand: Operand,
    product: Any,
    tile: Tile,
    dtype: str,
    label: str,
    capabilities: tuple[int, ...],
    *,
    form: str = "",
    bias: bool = False,
    aligned: bool = True,
) -> Build:
    """Return a build for an operand with types as planes; `form` is "split", "fold", or another part of the label."""
    arguments = dict.fromkeys(("T", "N", "K", "pitch", "x_stride", "out_stride", "steps", "split_steps"), "i32")
    arguments |= {"x": f"*{dtype}", "out": "*fp32" if form == "split" else f"*{dtype}", "bias": f"*{dtype}"}
    arguments |= dict(zip(("low", "high", "scales", "supers"), operand.planes, strict=True))
    missing = {name: None for name, kind in arguments.items() if kind is None}
    missing |= ({} if bias else {"bias": None}) | ({} if operand.pitch else {"pitch": None})
    plain_too = ("steps", "split_steps") if product is plain else ()  # their values are numbers of columns
    sizes = ("N", "K", "pitch", "x_stride", "out_stride", *plain_too) if aligned else ("out_stride", *plain_too[1:])
    return Build(
        linear_kernel,
        {name: kind for name, kind in arguments.items() if name not in missing},
        {**_constants(operand, product, tile, form == "split", form == "fold", bias), **missing},
        num_warps=tile.warps,
        num_stages=tile.stages,
        aligned=tuple(name for name in sizes if name not in missing),
        label="-".join(str(part) for part in (label, tile.tokens, form) if part),
        capabilities=capabilities,
    )


def _build(
    dtype: str, tokens: int, capability: int, form: str = "whole", *, columns: int = 4096, bias: bool = False
) -> Build:
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    aligned = columns % 16 == 0
    tile = _tile(tokens, kind, capability, aligned)
    operand = plain_operand(f"*{dtype}", 1, columns, columns, tile.columns)
    label = f"{dtype}-{columns}"
    return build(operand, plain, tile, dtype, label, (capability,), form=form, bias=bias, aligned=aligned)


def _merge_build(dtype: str, splits: int, bias: bool) -> Build:
    arguments = {"partial": "*fp32", "out": f"*{dtype}", "T": "i32", "N": "i32", "out_stride": "i32"}
    return Build(
        merge_kernel,
        arguments | ({"bias": f"*{dtype}"} if bias else {}),
        {"SPLITS": splits, "BIAS": bias, "COLUMNS": _MERGED} | ({} if bias else {"bias": None}),
        aligned=("N", "out_stride"),
        label=f"{dtype}-{splits}",
    )


FORMS = (
    *(_build("bf16", tokens, target, "split") for tokens in (16, 32, 64, 128) for target in CAPABILITIES),
    *(_build("bf16", tokens, target, bias=True) for tokens in (16, 128) for target in CAPABILITIES),
    *(_build("bf16", 128, target, "fold") for target in CAPABILITIES),
    *(_build("fp16", 64, target, "fold", bias=True) for target in CAPABILITIES),
    *(_build("fp16", tokens, 90, "fold", columns=1023) for tokens in (16, 128)),
    *(_build("fp32", tokens, target, "fold", bias=True) for tokens in (16, 64) for target in CAPABILITIES),
    _build("fp32", 16, 90, "split"),
    _merge_build("bf16", 5, False),
    _merge_build("fp16", 32, True),
    _merge_build("fp32", 2, True),
)
