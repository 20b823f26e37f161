# SPDX-License-Identifier: MIT
"""Concatenation of columns in plain torch, on every device."""

from __future__ import annotations

import torch


def side_by_side(*values: torch.Tensor) -> torch.Tensor:
    """See the contract in `__init__.py`."""
    return torch.cat(values, -1)
