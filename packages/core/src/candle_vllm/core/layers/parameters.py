"""What every layer with weights has in common: named parameters that the loader fills from stored tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.backends import DeviceBackend, PlainBackend, RecordedBackend
from candle_vllm.core.kernels.matrices import Piece
from candle_vllm.core.kernels.torch_numbers import check_range, load_tensor
from candle_vllm.core.quantization.tensors import Backend, StoredTensor

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
    from candle_vllm.core.kernels.plain_linear.layout import PlainKind

Packed: TypeAlias = tuple[Piece, str | None]
"""A matrix, and why a quantised one takes more memory than it is stored in, for a log."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a model's weights live and how it computes.

    Attributes:
        device: of tensors.
        dtype: of tensors; where steps are not recorded, of matrices and activations too.
        weight_memory: where matrices go in the layouts of the compiled CPU kernels, and steps are recorded; None where
            the layers run op by op in torch.
        plain_kind: what recorded steps make of plain matrices; None keeps each one's own type.
        keeps_quantised: where steps are not recorded, quantised matrices stay as they are stored, in the layouts of
            the GPU's kernels; else they become plain numbers of `dtype`.
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

    def empty(self, *shape: int) -> torch.Tensor:
        """Memory for a tensor that stays plain: norms and biases are fp32."""
        return torch.empty(shape, device=self.device, dtype=torch.float32)

    def backend(self, *, groups: bool = False, floats: bool = False) -> RecordedBackend | PlainBackend:
        """What packs a layer's matrices.

        Args:
            groups: the layer multiplies whole numbers in groups, and brings its input to an order of the matrix's own.
            floats: the layer multiplies small floats with scales.
        """
        if self.weight_memory is not None:
            return RecordedBackend(self.weight_memory, self.plain_kind, groups, floats)
        if not self.keeps_quantised:
            return PlainBackend(self.device, self.dtype)
        return DeviceBackend(self.device, self.dtype, groups, floats)


SHAPES = Placement(torch.device("meta"), torch.float32)
"""Where a model has shapes and no memory."""


class TensorParameter:
    """A plain tensor that stored numbers are copied into."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that the stored tensor must have."""
        return tuple(self._tensor.shape)

    def fill(self, stored: StoredTensor) -> str | None:
        """Decodes the tensor and copies it; what goes to a GPU is converted there."""
        values = load_tensor(stored, torch.float32 if self._tensor.device.type == "cpu" else None)
        self._tensor.copy_(values.to(self._tensor.device))
        check_range(stored, self._tensor)


class MatrixParameter:
    """A matrix as its backend keeps it, put under `name` of `pieces`.

    Args:
        pieces, name: where the matrix goes.
        shape: [N, K].
        backend: what packs it.
    """

    def __init__(self, pieces: dict[str, Piece], name: str, shape: tuple[int, int], backend: Backend[Packed]) -> None:
        self._pieces, self._name, self._backend = pieces, name, backend
        self.shape = shape

    def fill(self, stored: StoredTensor) -> str | None:
        """Packs the tensor."""
        with naming_tensor(stored):
            self._pieces[self._name], why = stored.pack_for(self._backend)
        return why


@contextmanager
def naming_tensor(stored: StoredTensor) -> Iterator[None]:
    """Puts the tensor before the message of what no kernel can multiply, unless it is named."""
    try:
        yield
    except UnsupportedModelError as error:
        if str(error).startswith(f"{stored.path}: tensor"):
            raise
        raise UnsupportedModelError(f"{stored.path}: tensor {stored.name}: {error}") from error
