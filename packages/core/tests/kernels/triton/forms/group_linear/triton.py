# SPDX-License-Identifier: MIT
"""Forms of the kernels of `group_linear/triton` that are compiled ahead of time."""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.group_linear.layout import GroupMatrix, Numbers
from candle_vllm.core.kernels.group_linear.triton import ROUNDED_TILES, TILES, operand
from candle_vllm.core.kernels.linear.triton import tile_for
from candle_vllm.core.kernels.linear.triton_products import Operand, exact, rounded
from packages.core.tests.kernels.triton.building import WITH_TENSOR_CORES, Build
from packages.core.tests.kernels.triton.forms.linear.triton import build


def planned(bits: int, group: int, zeros: bool, columns: int = 4096, numbers: Numbers = "int") -> Operand:
    """Return the operand of a matrix that does not exist, for kernels that are compiled ahead of time."""
    scales = {"int": torch.int32 if zeros else torch.int16}.get(numbers, torch.float32)
    kind = {torch.int16: torch.bfloat16, torch.int32: torch.float16}.get(scales, torch.float32)
    matrix = GroupMatrix(1, columns, bits, group, kind, torch.empty(0), torch.empty(0, dtype=scales), numbers=numbers)
    types = {torch.int16: "*i16", torch.int32: "*i32", torch.float32: "*fp32"}
    planes = "*i32", "*i32" if numbers == "e2m1" else None, types[scales], None
    return operand(matrix)._replace(planes=planes)


def _build(
    bits: int,
    group: int,
    zeros: bool,
    tokens: int,
    capabilities: tuple[int, ...] = (90,),
    *,
    dtype: str = "bf16",
    columns: int = 4096,
    form: str = "split",
    numbers: Numbers = "int",
) -> Build:
    given = planned(bits, group, zeros, columns, numbers)
    label = f"{f'{bits}bits' if numbers == 'int' else numbers}-{group // 32}parts{'-zeros' if zeros else ''}"
    if form == "many":
        tile = tile_for(tokens, ROUNDED_TILES)
        return build(given, rounded, tile, dtype, label, capabilities, form=form, bias=zeros)
    return build(given, exact, tile_for(tokens, TILES), dtype, label, capabilities, form=form, bias=form == "whole")


_FORMS = [(bits, group, zeros) for bits in (4, 8) for group in (32, 64, 128) for zeros in (False, True)]

FORMS = (
    *(_build(*form, 16) for form in _FORMS),
    *(_build(4, 128, zeros, tokens, WITH_TENSOR_CORES) for zeros in (False, True) for tokens in (1, 64)),
    *(_build(bits, group, True, 128, form="fold") for bits in (4, 8) for group in (32, 128)),
    _build(8, 4128, False, 32, dtype="fp16", columns=4128, form="whole"),
    _build(4, 32, True, 16, WITH_TENSOR_CORES, dtype="fp16", columns=4128, form="whole"),
    _build(8, 128, False, 16, WITH_TENSOR_CORES, numbers="e4m3"),
    _build(8, 128, False, 128, numbers="e4m3", form="fold"),
    _build(8, 4128, False, 64, numbers="e5m2", dtype="fp16", columns=4128, form="whole"),
    _build(4, 4096, False, 16, WITH_TENSOR_CORES, numbers="e2m1"),
    _build(4, 4096, False, 128, numbers="e2m1", form="fold"),
    *(_build(*form, 128, form="many") for form in _FORMS),
    *(_build(4, 128, True, tile.tokens, WITH_TENSOR_CORES, form="many") for tile in ROUNDED_TILES),
    _build(8, 4128, False, 128, WITH_TENSOR_CORES, dtype="fp16", columns=4128, form="many"),
    _build(8, 128, False, 128, numbers="e4m3", form="many"),
    _build(8, 4128, False, 128, dtype="fp16", columns=4128, numbers="e5m2", form="many"),
    _build(4, 4096, False, 128, numbers="e2m1", form="many"),
)
