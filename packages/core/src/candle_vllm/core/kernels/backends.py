# SPDX-License-Identifier: MIT
"""Convert stored matrices to the layouts of GPU kernels, or decode them if no kernel multiplies their format.

Methods of a `Backend` return the matrix and, for the log, why a quantised matrix had to be decoded, or None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from candle_vllm.core.devices import Device
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.matrices import BlockMatrix, CodeMatrix, DeviceMatrix, TensorMatrix
from candle_vllm.core.kernels.torch_numbers import check_range, load_tensor
from candle_vllm.core.quantization.group_codes import Blocks, GroupCodes
from candle_vllm.core.quantization.scaled_codes import ScaledCodes
from candle_vllm.core.quantization.tensors import StoredTensor


@dataclasses.dataclass(frozen=True)
class PlainBackend:
    """The `Backend` of `quantization.tensors` that decodes every format to plain elements, for torch on any device.

    Attributes:
        device: device of the matrices.
        dtype: element type of plain matrices and of activations.
    """

    device: torch.device | Device
    dtype: torch.dtype

    def plain(self, stored: StoredTensor) -> tuple[DeviceMatrix, str | None]:
        return self.decoded(stored, None)

    def blocks(self, stored: StoredTensor, read: Callable[[], Blocks]) -> tuple[DeviceMatrix, str | None]:
        del read
        return self.plain(stored)

    def codes(
        self, stored: StoredTensor, read: Callable[[], GroupCodes], blocks: Callable[[], Blocks | None]
    ) -> tuple[DeviceMatrix, str | None]:
        del read, blocks
        return self.plain(stored)

    def floats(
        self, stored: StoredTensor, span: int, read: Callable[[], ScaledCodes]
    ) -> tuple[DeviceMatrix, str | None]:
        del span, read
        return self.plain(stored)

    def decoded(self, stored: StoredTensor, why: str | None) -> tuple[DeviceMatrix, str | None]:
        """Decode to a plain matrix; return it and `why`."""
        return TensorMatrix(self.numbers(stored)), why

    def numbers(self, stored: StoredTensor) -> torch.Tensor:
        """Load a tensor of any shape; plain elements are converted on `device`, because a GPU is faster."""
        there = stored.dtype is not None and self.device.type != "cpu"
        values = load_tensor(stored, None if there else self.dtype).to(self.device).to(self.dtype)
        check_range(stored, values)
        return values


@dataclasses.dataclass(frozen=True)
class DeviceBackend(PlainBackend):
    """The kernels of a GPU; on the CPU their references in torch, for tests.

    Attributes:
        groups: whether the layer has kernels for integer codes in groups; other codes become GGUF blocks or plain.
        floats_kept: whether the layer has kernels for small floats (FP8, FP4) with scales; otherwise they are decoded.
    """

    groups: bool
    floats_kept: bool

    def blocks(self, stored: StoredTensor, read: Callable[[], Blocks]) -> tuple[DeviceMatrix, str | None]:
        from candle_vllm.core.kernels import gguf_linear

        blocks, (rows, columns) = read(), stored.shape
        order = None if blocks.order is None else torch.from_numpy(blocks.order).to(self.device)
        try:
            return BlockMatrix(gguf_linear.pack(blocks.raw, blocks.type, rows, columns, self.device), order), None
        except UnsupportedModelError as error:
            return self.decoded(stored, str(error))

    def codes(
        self, stored: StoredTensor, read: Callable[[], GroupCodes], blocks: Callable[[], Blocks | None]
    ) -> tuple[DeviceMatrix, str | None]:
        from candle_vllm.core.kernels import group_linear
        from candle_vllm.core.kernels.triton_build import TENSOR_CORES, capability

        if self.groups and capability(self.device) >= TENSOR_CORES:
            matrix = group_linear.from_codes(read(), self.device)
            if matrix is not None:
                return CodeMatrix(matrix), None
        found = blocks()
        if found is None or found.order is not None:
            return self.decoded(stored, "no kernel multiplies such groups on a GPU")
        return self.blocks(stored, lambda: found)

    def floats(
        self, stored: StoredTensor, span: int, read: Callable[[], ScaledCodes]
    ) -> tuple[DeviceMatrix, str | None]:
        from candle_vllm.core.kernels import group_linear
        from candle_vllm.core.kernels.triton_build import TENSOR_CORES, capability

        if not self.floats_kept:
            return self.decoded(stored, "such a layer has no kernel for small floats on a GPU")
        if capability(self.device) < TENSOR_CORES:
            return self.decoded(stored, "small floats have no kernel below compute capability 8.0")
        try:
            group_linear.check_span(span, stored.shape[1])  # before scales are repeated for every row
            found = read()
            if self.dtype == torch.float16 and found.largest > torch.finfo(torch.float16).max:
                # for many rows the kernel rounds weights to f16 before it multiplies
                return self.decoded(stored, "weights may be beyond the range of f16")
            return CodeMatrix(group_linear.pack_floats(found, self.device)), None
        except UnsupportedModelError as error:
            return self.decoded(stored, str(error))
