# SPDX-License-Identifier: MIT
"""Forms of the kernels of `short_conv/triton` that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

from candle_vllm.core.kernels.short_conv.triton import _constants, _store_constants, conv_kernel, store_kernel
from candle_vllm.core.kernels.states import TABLES
from packages.core.tests.kernels.triton.building import Build


def _build(
    dtype: str,
    channels: int,
    taps: int,
    *,
    single: bool = False,
    stores: bool = False,
    bias: bool = False,
    gated: bool = False,
) -> Build:
    arguments = dict.fromkeys(("x", "states"), f"*{dtype}") | {"kept": "*fp32"} | dict.fromkeys(TABLES, "*i32")
    strides = ("x_stride", "gate_stride", "slot_stride", "kept_slot", "kept_row")
    arguments |= dict.fromkeys(strides, "i32")
    label = f"{dtype}-{channels}x{taps}" + "-single" * single + "-bias" * bias + "-gated" * gated
    more: dict[str, Any] = {"aligned": strides, "unaligned": TABLES, "label": label}
    constants: dict[str, Any] = {}
    optional = {"gate_in": gated} | ({} if stores else {"gate_out": gated, "bias": bias})
    for name, there in optional.items():
        if there:
            arguments[name] = "*fp32" if name == "bias" else f"*{dtype}"
        else:
            constants[name] = None
    if stores:
        return Build(store_kernel, arguments, constants | _store_constants(channels, taps), **more)
    arguments |= {"weight": "*fp32", "y": f"*{dtype}"} | dict.fromkeys(("tokens", "sequences"), "i32")
    constants |= _constants(channels, taps, single=single) | {"SILU": not gated}
    return Build(conv_kernel, arguments, constants, **more)


FORMS = (
    _build("bf16", 8192, 4, single=True),
    _build("bf16", 8192, 4),
    _build("bf16", 8192, 4, stores=True),
    _build("bf16", 2048, 3, single=True, gated=True),
    _build("fp16", 2048, 3, bias=True, gated=True),
    _build("fp16", 2048, 3, stores=True, gated=True),
    _build("fp32", 2048, 3),
)
