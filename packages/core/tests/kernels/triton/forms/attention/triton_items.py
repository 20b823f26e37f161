# SPDX-License-Identifier: MIT
"""Forms of the kernels of `attention/triton_items` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.attention.triton_items import LISTED, list_items_kernel
from packages.core.tests.kernels.triton.building import Build


def _build(window: int, keys: int, splits: int, *, mixed: bool) -> Build:
    return Build(
        list_items_kernel,
        {"items": "*i32", "context_lens": "*i32", "rows": "i32"} | ({"decoding": "*i32"} if mixed else {}),
        {"WINDOW": window, "BLOCK_N": keys, "SPLITS": splits, "CHUNK": 256, "ROWS": LISTED}
        | ({} if mixed else {"decoding": None}),
        unaligned=("context_lens", "decoding"),
        label=f"{keys}x{splits}" + "-window" * bool(window) + "-mixed" * mixed,
    )


FORMS = (
    _build(0, 64, 32, mixed=False),
    _build(0, 64, 32, mixed=True),
    _build(1024, 32, 64, mixed=False),
    _build(0, 16, 32, mixed=True),
)
