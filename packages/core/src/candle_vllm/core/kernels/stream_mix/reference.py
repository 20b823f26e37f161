# SPDX-License-Identifier: MIT
"""Mixing residual streams in plain torch."""

from __future__ import annotations

import torch


def mix_streams(
    x: torch.Tensor, table: torch.Tensor, gates: torch.Tensor | None, scale: torch.Tensor | None, least: float | None
) -> torch.Tensor:
    """See the contract in the package; `least` is the lower bound of the mean square, None without `level`."""
    streams = x.float().unflatten(1, (table.shape[2], -1))  # [T, N, E]
    if least is not None:
        squares = streams.square().mean(-1, keepdim=True)
        levelled = streams * squares[:, :1].sqrt() * squares.clamp(min=least).rsqrt()
        streams = torch.cat([streams[:, :1], levelled[:, 1:]], 1)
    weights = table[0].expand(len(x), -1, -1)
    if gates is not None:
        weights = weights + (gates.float().tanh() @ table[1:].flatten(1)).unflatten(1, table.shape[1:])
    y = (weights[..., None] * streams[:, None]).sum(2)  # [T, M, E]
    return (y if scale is None else y * scale).flatten(1).to(x.dtype)
