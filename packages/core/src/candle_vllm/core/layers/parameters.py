"""What every layer with weights has in common: named parts that the loader fills from stored tensors."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeAlias

import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.quantization.stored import QuantisedTensor
from candle_vllm.core.quantization.tensors import StoredTensor

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
    from candle_vllm.core.kernels.gguf_linear import GgufMatrix
    from candle_vllm.core.kernels.group_linear import GroupMatrix
    from candle_vllm.core.kernels.plain_linear.layout import PlainKind
    from candle_vllm.core.kernels.recorded import Matrix

    Weight: TypeAlias = torch.Tensor | GgufMatrix | GroupMatrix


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


SHAPES = Placement(torch.device("meta"), torch.float32)
"""Where a model has shapes and no memory."""


_LOOKED_AT = 1 << 26  # numbers at a time


def check_range(stored: StoredTensor, values: torch.Tensor) -> None:
    """Refuses weights that float16 cannot hold: where it became their type, they would be infinite.

    Raises:
        UnsupportedModelError: the message names the tensor and the flag.
    """
    if values.dtype != torch.float16 or stored.dtype == torch.float16:
        return
    # In pieces, for looking takes half as much memory again.
    if any(bool(piece.isinf().any()) for piece in values.flatten().split(_LOOKED_AT)):
        raise UnsupportedModelError(
            f"{stored.path}: tensor {stored.name}: weights are beyond the range of f16, which ends at 65504: set "
            "--dtype bf16, or f32, or --device cpu where the GPU has neither for this model"
        )


class TensorPart:
    """A plain tensor that stored numbers are copied into."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that the stored tensor must have."""
        return tuple(self._tensor.shape)

    def fill(self, stored: StoredTensor) -> str | None:
        """Decodes the tensor and copies it; what goes to a GPU is converted there."""
        values = stored.load(torch.float32 if self._tensor.device.type == "cpu" else None)
        self._tensor.copy_(values.to(self._tensor.device))
        check_range(stored, self._tensor)


class MatrixPart:
    """A matrix of recorded steps: quantised or plain as it is stored, laid out anew and put under `name` of `matrices`.

    Args:
        matrices, name: where the matrix goes.
        shape: [N, K].
        placement: of a model whose steps are recorded.
        ordered: whether the layer brings its input to an order of the matrix's own.
        floats: whether the layer multiplies small floats with scales; else they come decoded.
    """

    def __init__(
        self,
        matrices: dict[str, Matrix],
        name: str,
        shape: tuple[int, int],
        placement: Placement,
        *,
        ordered: bool = False,
        floats: bool = False,
    ) -> None:
        self._placement = placement
        self._ordered, self._floats = ordered, floats
        self._matrices = matrices
        self._name = name
        self.shape = shape

    def fill(self, stored: StoredTensor) -> str | None:
        """Packs the tensor."""
        try:
            self._matrices[self._name], why = self._pack(stored)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{stored.path}: tensor {stored.name}: {error}") from error
        return why

    def _pack(self, stored: StoredTensor) -> tuple[Matrix, str | None]:
        from candle_vllm.core.kernels import packed_linear, plain_linear

        memory = self._placement.weight_memory
        if isinstance(stored, QuantisedTensor):
            return self._pack_parts(stored)
        if stored.dtype is not None:
            kind = self._placement.plain_kind
            return plain_linear.pack(stored.raw(), stored.dtype, *self.shape, kind=kind, memory=memory), None
        from gguf import GGMLQuantizationType

        return packed_linear.pack(stored.raw(), GGMLQuantizationType[stored.type_name], *self.shape, memory), None

    def _pack_parts(self, stored: QuantisedTensor) -> tuple[Matrix, str | None]:
        """Small floats, or blocks that hold the numbers exactly, else plain numbers: bfloat16 or what was asked for."""
        from candle_vllm.core.kernels import packed_linear, plain_linear, scaled_linear

        memory, why = self._placement.weight_memory, "no blocks of GGUF hold them exactly"
        if stored.span is not None and not self._floats:
            why = "such a layer has no kernel for small floats"
        elif stored.span is not None:
            try:
                scaled_linear.check_span(stored.span, self.shape[1])  # before scales are repeated for every row
                scaled = stored.scaled()
                assert scaled is not None
                return scaled_linear.pack(scaled, memory), None
            except UnsupportedModelError as error:
                why = str(error)
        blocks = stored.blocks()
        if blocks is not None and (blocks.order is None or self._ordered):
            matrix = packed_linear.pack(blocks.raw, blocks.type, *self.shape, memory)
            return dataclasses.replace(matrix, order=blocks.order), None
        if blocks is not None:
            why += " in the order of their inputs"
        kind = self._placement.plain_kind
        dtype = torch.bfloat16 if kind is None else torch.float32  # float16 is checked for numbers beyond its range
        raw = stored.load(dtype).view(torch.uint8).numpy()
        return plain_linear.pack(raw, dtype, *self.shape, kind=kind, memory=memory), why


class DevicePart:
    """A matrix [N, K] of a layer on a GPU: quantised as it is stored, or a plain tensor; put under `name`.

    Args:
        matrices, name: where the matrix goes.
        shape: [N, K].
        placement: of a model that keeps quantised matrices.
        groups: whether the layer multiplies whole numbers in groups; else they come in blocks, or decoded.
        floats: whether the layer multiplies small floats with scales; else they come decoded.
    """

    def __init__(
        self,
        matrices: dict[str, Weight],
        name: str,
        shape: tuple[int, int],
        placement: Placement,
        *,
        groups: bool = False,
        floats: bool = False,
    ) -> None:
        self._matrices = matrices
        self._name = name
        self._placement = placement
        self._groups, self._floats = groups, floats
        self.shape = shape

    def fill(self, stored: StoredTensor) -> str | None:
        """Brings the tensor to the device; a quantised one that no kernel multiplies is decoded."""
        why = None
        try:
            if stored.dtype is None:
                self._matrices[self._name] = self._packed(stored)
                return None
        except UnsupportedModelError as error:
            why = str(error)
        values = stored.load(self._placement.dtype)
        check_range(stored, values)
        self._matrices[self._name] = values.to(self._placement.device)
        return why

    def _packed(self, stored: StoredTensor) -> GgufMatrix | GroupMatrix:
        """In the layout of its kernel; raises `UnsupportedModelError` where it has none."""
        from gguf import GGMLQuantizationType

        from candle_vllm.core.kernels import gguf_linear, group_linear
        from candle_vllm.core.kernels.triton_build import TENSOR_CORES, capability

        device = self._placement.device
        if not isinstance(stored, QuantisedTensor):
            return gguf_linear.pack(stored.raw(), GGMLQuantizationType[stored.type_name], *self.shape, device)
        if stored.span is not None:
            if not self._floats:
                raise UnsupportedModelError("such a layer has no kernel for small floats on a GPU")
            if capability(device) < TENSOR_CORES:
                raise UnsupportedModelError("small floats have no kernel below compute capability 8.0")
            group_linear.check_span(stored.span, self.shape[1])  # before scales are repeated for every row
            scaled = stored.scaled()
            assert scaled is not None
            if self._placement.dtype == torch.float16 and scaled.largest > torch.finfo(torch.float16).max:
                raise UnsupportedModelError("weights may be beyond the range of f16")  # which many rows meet them in
            return group_linear.pack_floats(scaled, device)
        codes = stored.group_codes() if self._groups and capability(device) >= TENSOR_CORES else None
        if codes is not None and (matrix := group_linear.from_codes(codes, device)) is not None:
            return matrix
        blocks = stored.blocks()
        if blocks is None or blocks.order is not None:
            raise UnsupportedModelError("no kernel multiplies such groups on a GPU")
        return gguf_linear.pack(blocks.raw, blocks.type, *self.shape, device)
