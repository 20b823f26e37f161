# SPDX-License-Identifier: MIT
"""Which implementation of a kernel computes a tensor; inside step 6 of a request's life."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def on_gpu(x: torch.Tensor) -> bool:
    """Whether Triton's kernels compute x: on a GPU, and on the CPU where Triton interprets its kernels, for tests."""
    return x.is_cuda or interpreted()


@cache
def interpreted() -> bool:
    """Whether Triton runs its kernels in Python; it decides so when it is imported (TRITON_INTERPRET=1)."""
    triton = sys.modules.get("triton")
    return triton is not None and bool(triton.knobs.runtime.interpret)
