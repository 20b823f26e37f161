# SPDX-License-Identifier: MIT
"""Forms of the kernels of `gguf_linear/triton` that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

from candle_vllm.core.kernels.gguf_linear.layout import PLANES
from candle_vllm.core.kernels.gguf_linear.triton import ROUNDED_TILES, _tile, codec, embedding_kernel
from candle_vllm.core.kernels.linear.triton import tile_for
from candle_vllm.core.kernels.linear.triton_products import Operand, exact, rounded
from candle_vllm.core.kernels.packed_linear.layout import LAYOUTS, PackedKind, TileLayout
from packages.core.tests.kernels.triton.building import WITH_TENSOR_CORES, Build
from packages.core.tests.kernels.triton.forms.linear.triton import build

OWN_FORMS = tuple(kind for kind in PLANES if isinstance(LAYOUTS[kind], TileLayout) or kind is PackedKind.IQ2_S)
"""Kinds whose kernels differ by more than a table; the other IQ types have the kernels of IQ4_XS or of IQ2_S."""


def planned(kind: PackedKind, columns: int) -> Operand:
    """Return the operand of a matrix that does not exist, for kernels that are compiled ahead of time."""
    planes = PLANES[kind]
    elements = {0: None, 1: "*i16", 2: "*i16", 4: "*i32", 8: "*i32"}
    types = elements[planes.low], elements[planes.high], "*i32", "*i32" if planes.layout.nested else None
    return Operand(types, 1, columns, None, planes.steps(columns), codec(kind))


def _exact(
    kind: PackedKind,
    tokens: int,
    capabilities: tuple[int, ...] = (90,),
    *,
    dtype: str = "bf16",
    columns: int = 4096,
    form: str = "split",
) -> Build:
    label, tile = f"{kind.name}-{dtype}", _tile(tokens, kind, capabilities[0])
    bias = form == "whole"
    return build(planned(kind, columns), exact, tile, dtype, label, capabilities, form=form, bias=bias)


def _rounded(kind: PackedKind, dtype: str, columns: int, tokens: int, capabilities: tuple[int, ...]) -> Build:
    tile = tile_for(tokens, ROUNDED_TILES)
    return build(planned(kind, columns), rounded, tile, dtype, f"{kind.name}-{dtype}", capabilities, bias=True)


def _embedding(kind: PackedKind, dtype: str) -> Build:
    planes = dict(zip(("low", "high", "scales", "supers"), planned(kind, 4096).planes, strict=True))
    types: dict[str, Any] = {"token_ids": "*i64", **planes, "out": f"*{dtype}", "N": "i32", "K": "i32"}
    missing = {name: None for name, found in types.items() if found is None}
    return Build(
        embedding_kernel,
        {name: found for name, found in types.items() if found is not None},
        {"FORM": codec(kind), "PADDED": False, **missing},
        num_warps=1,
        aligned=("N", "K"),
        label=f"{kind.name}-{dtype}",
    )


_LOOKED_UP = (PackedKind.IQ4_XS, PackedKind.IQ2_S)

_USUAL = (PackedKind.Q4_K, PackedKind.Q6_K, PackedKind.IQ4_XS)

FORMS = (
    *(_exact(kind, 16) for kind in OWN_FORMS),
    *(_exact(kind, tokens, WITH_TENSOR_CORES) for kind in _USUAL for tokens in (1, 64)),
    *(_exact(kind, 32) for kind in _USUAL),
    *(_exact(kind, tokens, WITH_TENSOR_CORES) for kind in _LOOKED_UP for tokens in (1, 32, 64)),
    *(_exact(kind, 128, form="fold") for kind in OWN_FORMS),
    *(_exact(kind, 128, (80, 100, 120), form="fold") for kind in _USUAL),
    _exact(PackedKind.Q3_K, 8, WITH_TENSOR_CORES, dtype="fp16", form="whole"),
    _exact(PackedKind.Q5_1, 16, WITH_TENSOR_CORES, columns=4128, form="whole"),
    *(_exact(kind, tokens, (75,), dtype="fp16") for tokens in (8, 16) for kind in OWN_FORMS),
    *(_exact(kind, 128, (75,), dtype="fp16", form="fold") for kind in _USUAL),
    _exact(PackedKind.Q5_1, 16, (75,), dtype="fp16", columns=4128, form="whole"),
    *(_rounded(kind, "bf16", 4096, 512, (90,)) for kind in OWN_FORMS if PLANES[kind].layout.nested),
    *(
        _rounded(kind, "bf16", 4096, 512, (80, 100, 120))
        for kind in (PackedKind.Q4_K, PackedKind.Q3_K, PackedKind.IQ4_XS)
    ),
    _rounded(PackedKind.Q8_0, "fp16", 4096, 32, WITH_TENSOR_CORES),
    _rounded(PackedKind.Q5_1, "bf16", 4128, 64, WITH_TENSOR_CORES),
    _embedding(PackedKind.Q6_K, "bf16"),
)
