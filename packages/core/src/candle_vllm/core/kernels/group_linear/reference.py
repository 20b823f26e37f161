# SPDX-License-Identifier: MIT
"""The linear layer with weights in groups, in plain torch, for tests, and the decoding of its weights."""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.gguf_linear.reference import codes_of, rounded
from candle_vllm.core.kernels.group_linear.layout import GroupMatrix
from candle_vllm.core.kernels.torch_numbers import DTYPES
from candle_vllm.core.quantization.scaled_codes import E2M1, FLOAT_NAMES, GROUP


def linear(
    x: torch.Tensor, matrix: GroupMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See the contract in the package; float32 weights and sums, rounded once."""
    return rounded(x.float() @ dequantise(matrix).T, x.dtype, bias, out)


def dequantise(matrix: GroupMatrix) -> torch.Tensor:
    """Return the weights as float32 [N, K]."""
    codes = codes_of(matrix.codes, matrix.bits, matrix.parts).flatten(1)[:, : matrix.columns]
    group = torch.arange(matrix.columns, device=matrix.device) // matrix.group
    if matrix.numbers != "int":
        return _floats(codes, matrix) * matrix.scales.T[:, group]
    scale = matrix.scales.to(torch.int16).contiguous().view(matrix.scale_dtype).float().T[:, group]
    zero = (matrix.scales >> 16 & 0xFFFF).float().T[:, group] if matrix.zeros else matrix.zero
    return (codes.float() - zero) * scale


def _floats(codes: torch.Tensor, matrix: GroupMatrix) -> torch.Tensor:
    """Convert codes [N, K] to floats; floats of e2m1 are multiplied by their inner scale."""
    if matrix.inner is None:
        return codes.to(torch.uint8).view(DTYPES[FLOAT_NAMES[matrix.numbers]]).float()
    values = torch.tensor(E2M1, device=codes.device)[codes.long()]
    inner = matrix.inner.transpose(0, 1).reshape(matrix.rows, -1).contiguous()
    shared = inner.view(torch.uint8).view(torch.float8_e4m3fn).float()
    return values * shared.repeat_interleave(GROUP, 1)[:, : matrix.columns]
