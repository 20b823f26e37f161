"""What every layer with weights has in common: named parts that the loader fills from stored tensors."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.loading.tensors import StoredTensor

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
    from candle_vllm.core.kernels.gguf_linear import GgufMatrix
    from candle_vllm.core.kernels.plain_linear.layout import PlainKind
    from candle_vllm.core.kernels.recorded import Matrix

    Weight: TypeAlias = torch.Tensor | GgufMatrix

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a model's weights live and how it computes.

    Attributes:
        device: of tensors.
        dtype: of tensors; where steps are not recorded, of matrices and activations too.
        weight_memory: where matrices go in the layouts of the compiled CPU kernels, and steps are recorded; None where
            the layers run op by op in torch.
        plain_kind: what recorded steps make of plain matrices; None keeps each one's own type.
        keeps_quantised: quantised matrices stay as they are stored, in the layouts of the GPU's kernels, and each part
            of a layer is held by itself until all are loaded.
        invariant: a token's numbers do not depend on what else is in the step, at some cost.
    """

    device: torch.device
    dtype: torch.dtype
    weight_memory: WeightMemory | None = None
    plain_kind: PlainKind | None = None
    keeps_quantised: bool = False
    invariant: bool = False

    @property
    def recorded(self) -> bool:
        """Matrices keep their types, and steps are recorded."""
        return self.weight_memory is not None

    @property
    def stacked(self) -> bool:
        """A layer's matrices are parts of one tensor of `dtype` from the start."""
        return not (self.recorded or self.keeps_quantised)


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


@runtime_checkable
class Finishes(Protocol):
    """A layer that has something to do once it is filled, rather than when it first runs."""

    def finish(self) -> None:
        """Every part is filled."""
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
        """Decodes the tensor and copies it; what goes to a GPU is converted there."""
        values = stored.load(torch.float32 if self._tensor.device.type == "cpu" else None)
        ordered = values[_row_order(stored, interleaved_heads)] if interleaved_heads else values
        self._tensor.copy_(ordered.to(self._tensor.device))


class MatrixPart:
    """A matrix of recorded steps: quantised or plain as it is stored, laid out anew and put under `name` of `matrices`.

    Args:
        matrices, name: where the matrix goes.
        shape: [N, K].
        placement: of a model whose steps are recorded.
    """

    def __init__(self, matrices: dict[str, Matrix], name: str, shape: tuple[int, int], placement: Placement) -> None:
        self._placement = placement
        self._matrices = matrices
        self._name = name
        self.shape = shape

    def fill(self, stored: StoredTensor, interleaved_heads: int | None) -> None:
        """Packs the tensor."""
        raw = stored.raw()
        if interleaved_heads:
            raw = raw[_row_order(stored, interleaved_heads)]
        try:
            self._matrices[self._name] = self._pack(stored, raw)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{stored.file.path}: tensor {stored.name}: {error}") from error

    def _pack(self, stored: StoredTensor, raw: np.ndarray) -> Matrix:
        from candle_vllm.core.kernels import packed_linear, plain_linear

        memory = self._placement.weight_memory
        if stored.dtype is not None:
            return plain_linear.pack(raw, stored.dtype, *self.shape, kind=self._placement.plain_kind, memory=memory)
        from gguf import GGMLQuantizationType

        return packed_linear.pack(raw, GGMLQuantizationType[stored.type_name], *self.shape, memory)


class DevicePart:
    """A matrix [N, K] of a layer on a GPU: quantised as it is stored, or a plain tensor; put under `name`.

    Args:
        matrices, name: where the matrix goes.
        shape: [N, K].
        placement: of a model that keeps quantised matrices.
    """

    def __init__(self, matrices: dict[str, Weight], name: str, shape: tuple[int, int], placement: Placement) -> None:
        self._matrices = matrices
        self._name = name
        self._placement = placement
        self.shape = shape

    def fill(self, stored: StoredTensor, interleaved_heads: int | None) -> None:
        """Brings the tensor to the device; a quantised one that no kernel multiplies is decoded, which is logged."""
        order = None if interleaved_heads is None else _row_order(stored, interleaved_heads)
        if stored.dtype is None and (packed := self._packed(stored, order)) is not None:
            self._matrices[self._name] = packed
            return
        values = stored.load(self._placement.dtype)
        self._matrices[self._name] = (values if order is None else values[order]).to(self._placement.device)

    def _packed(self, stored: StoredTensor, order: np.ndarray | None) -> GgufMatrix | None:
        from gguf import GGMLQuantizationType

        from candle_vllm.core.kernels import gguf_linear

        raw = stored.raw() if order is None else stored.raw()[order]
        kind = GGMLQuantizationType[stored.type_name]
        try:
            return gguf_linear.pack(raw, kind, *self.shape, self._placement.device)
        except UnsupportedModelError as error:
            logger.warning(
                "%s: tensor %s is decoded, which takes more memory: %s", stored.file.path, stored.name, error
            )
            return None


def _row_order(stored: StoredTensor, heads: int) -> np.ndarray:
    """Row numbers that bring [H * D, ...] from interleaved order (pair i is rows 2i, 2i + 1) to half-split."""
    return np.arange(stored.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
