# SPDX-License-Identifier: MIT
"""The quantised linear layer in plain torch, literal enough to check by eye; the reference of tests."""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.gguf_linear.layout import GgufMatrix
from candle_vllm.core.kernels.packed_linear.layout import GROUP


def linear(
    x: torch.Tensor,
    matrix: GgufMatrix,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """See the contract in `kernels/gguf_linear`; float32 weights and sums, rounded once."""
    weights = dequantise(matrix).T
    parts = [row.float() @ weights for row in x.split(1 if invariant else max(len(x), 1))]
    return rounded(torch.cat(parts), x.dtype, bias, out)


def rounded(y: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    """Return fp32 sums plus bias, rounded once; in `out` if it is given."""
    y = (y if bias is None else y + bias.float()).to(dtype)
    return y if out is None else out.copy_(y)


def embedding(token_ids: torch.Tensor, matrix: GgufMatrix, dtype: torch.dtype) -> torch.Tensor:
    """See the contract in `kernels/gguf_linear`."""
    return dequantise(matrix)[token_ids].to(dtype)


def dequantise(matrix: GgufMatrix) -> torch.Tensor:
    """Return the weights as float32 [N, K], exactly as ggml decodes blocks of the matrix's kind."""
    planes, layout = matrix.planes, matrix.planes.layout
    codes = codes_of(matrix.low, planes.low, planes.groups)
    if matrix.high is not None:
        high = matrix.high
        if planes.high == 1:  # an element has the bits of two steps
            high = torch.stack([high, high >> 8], 1).flatten(0, 1)[: len(matrix.low)]
        codes |= codes_of(high, planes.high, planes.groups) << planes.low
    scale, minimum = _scales(matrix)  # [N, K / width, 1]
    numbers = codes.flatten(1) - layout.zero
    if layout.values is not None:
        numbers = torch.tensor(layout.values, dtype=torch.int32, device=codes.device)[codes.flatten(1)]
    weights = numbers.float().unflatten(1, (-1, layout.width)) * scale
    if minimum is not None:
        weights += minimum
    return weights.flatten(1)[:, : matrix.columns].contiguous()


def codes_of(plane: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """Unpack a plane [steps, N, 16] to codes int32 [N, steps, groups, 16, 2]."""
    words = plane.to(torch.int32).transpose(0, 1)
    fields = [
        torch.stack([words >> bits * (group + groups * half) & (1 << bits) - 1 for half in range(2)], -1)
        for group in range(groups)
    ]
    return torch.stack(fields, 2)


def _scales(matrix: GgufMatrix) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scales, and minima or None, float32 [N, K / width, 1]."""
    layout = matrix.planes.layout
    words = matrix.scales.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)  # [N, steps, words]
    if matrix.supers is None:
        floats = words.flatten(1).contiguous().view(torch.float16).float()
        if layout.minimum:
            return floats[:, 0::2, None], floats[:, 1::2, None]
        return floats[:, :, None], None
    supers = matrix.supers.t().clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    scale, minimum = (half.repeat_interleave(256 // layout.width, 1) for half in (supers[:, 0::2], supers[:, 1::2]))
    if not layout.minimum:
        return (scale * words.view(torch.int8).flatten(1) * matrix.planes.factor)[:, :, None], None
    small = words.view(torch.uint8)  # [N, steps, 8]
    if layout.width == GROUP:
        first, second = small[:, :, :4].flatten(1), small[:, :, 4:].flatten(1)
    else:
        first, second = small.flatten(1) & 15, small.flatten(1) >> 4
    return (scale * first)[:, :, None], (minimum * second)[:, :, None]
