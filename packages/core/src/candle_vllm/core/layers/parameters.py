"""What every layer with weights has in common: parts that the loader fills one tensor at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a model's weights live and in which dtype it computes."""

    device: torch.device
    dtype: torch.dtype


class Loadable(Protocol):
    """A layer whose weights come in named parts ("weight", "bias", "q.weight", ...)."""

    def parts(self) -> Mapping[str, torch.Tensor]:
        """Every part that must be loaded, with the tensor that it is copied into."""
        ...
