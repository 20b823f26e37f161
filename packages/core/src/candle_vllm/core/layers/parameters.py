"""What every layer with weights has in common: named parts that the loader fills from stored tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from candle_vllm.core.loading.tensors import StoredTensor

if TYPE_CHECKING:
    from candle_vllm.core.kernels.packed_linear.layout import PackedMatrix
    from candle_vllm.core.kernels.packed_linear.memory import WeightMemory


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a model's weights live and how it computes.

    Attributes:
        device: of plain weights.
        dtype: of plain weights and of activations.
        weight_memory: where matrices go that stay quantised, in the layout of the compiled CPU kernels; None elsewhere.
    """

    device: torch.device
    dtype: torch.dtype
    weight_memory: WeightMemory | None = None

    @property
    def packed(self) -> bool:
        """Matrices stay quantised, and steps are recorded."""
        return self.weight_memory is not None


class Part(Protocol):
    """A place for one stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that the stored tensor must have."""
        ...

    def fill(self, stored: StoredTensor, interleaved_heads: int | None) -> None:
        """Takes the tensor; with `interleaved_heads` its rows are first brought to half-split rotary order."""
        ...


class Loadable(Protocol):
    """A layer whose weights come in named parts ("weight", "bias", "q.weight", ...)."""

    def parts(self) -> Mapping[str, Part]:
        """Every part that must be loaded."""
        ...


class TensorPart:
    """A plain tensor that stored numbers are copied into."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that the stored tensor must have."""
        return tuple(self._tensor.shape)

    def fill(self, stored: StoredTensor, interleaved_heads: int | None) -> None:
        """Decodes the tensor and copies it."""
        values = stored.load(torch.float32)
        self._tensor.copy_(values[_row_order(stored, interleaved_heads)] if interleaved_heads else values)


class PackedPart:
    """A matrix that stays quantised: its bytes are laid out anew and put under `name` of `matrices`."""

    def __init__(
        self, matrices: dict[str, PackedMatrix], name: str, shape: tuple[int, int], memory: WeightMemory
    ) -> None:
        self._memory = memory
        self._matrices = matrices
        self._name = name
        self.shape = shape

    def fill(self, stored: StoredTensor, interleaved_heads: int | None) -> None:
        """Packs the tensor."""
        from gguf import GGMLQuantizationType

        from candle_vllm.core.kernels.packed_linear.pack import pack

        raw = stored.raw()
        if interleaved_heads:
            raw = raw[_row_order(stored, interleaved_heads)]
        self._matrices[self._name] = pack(raw, GGMLQuantizationType[stored.type_name], *self.shape, self._memory)


def _row_order(stored: StoredTensor, heads: int) -> np.ndarray:
    """Row numbers that bring [H * D, ...] from interleaved order (pair i is rows 2i, 2i + 1) to half-split."""
    return np.arange(stored.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
