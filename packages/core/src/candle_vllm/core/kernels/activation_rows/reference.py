# SPDX-License-Identifier: MIT
"""Rows of activations in plain torch."""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.activation_rows import RowForm, row_elements


def rows(y: torch.Tensor, form: RowForm) -> torch.Tensor:
    """Convert y float32 [T, K], the result of the prologue, to [T, row_elements(K)] in `form`; see the contract."""
    padded = torch.nn.functional.pad(y, (0, row_elements(y.shape[1]) - y.shape[1]))
    return padded.bfloat16() if form is RowForm.BF16 else padded
