# SPDX-License-Identifier: MIT
"""Choose the implementation of a kernel for a tensor."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def on_gpu(x: torch.Tensor) -> bool:
    """Return whether Triton's kernels compute x: on a GPU, or on the CPU if Triton interprets its kernels, in tests."""
    return x.is_cuda or interpreted()


def interpreted() -> bool:
    """Return whether Triton is imported and interprets its kernels, by TRITON_INTERPRET."""
    triton = sys.modules.get("triton")
    return triton is not None and bool(triton.knobs.runtime.interpret)
