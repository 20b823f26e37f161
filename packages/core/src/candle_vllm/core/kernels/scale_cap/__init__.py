"""Scaling and soft-capping rows in place: embeddings times a factor, logits that end in c tanh(z / c).

Contract: x [T, N] float32 (without a cap any float dtype) becomes x * scale, and with a cap c > 0,
c * tanh(x * scale / c); the arithmetic is fp32. Recorded steps have it as an operation of their own, `cpu.py`.
Source: Gemma Team, 2024, arXiv:2408.00118 (soft cap).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def scale_cap_(x: torch.Tensor, scale: float, cap: float | None = None) -> torch.Tensor:
    """Changes x and returns it; on a GPU by torch's own kernels, which wait for nothing."""
    import torch

    assert cap is None or (cap > 0 and x.dtype == torch.float32)
    from candle_vllm.core.kernels.scale_cap import reference

    return reference.scale_cap_(x, scale, cap)
