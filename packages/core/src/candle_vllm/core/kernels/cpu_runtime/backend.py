# SPDX-License-Identifier: MIT
"""Pack stored matrices for recorded steps; `kernels/backends.py` has the other backends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.quantization.group_codes import Blocks, GroupCodes
from candle_vllm.core.quantization.scaled_codes import ScaledCodes
from candle_vllm.core.quantization.tensors import StoredTensor

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.operation import Matrix
    from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
    from candle_vllm.core.kernels.plain_linear.layout import PlainKind, PlainMatrix


@dataclasses.dataclass(frozen=True)
class RecordedBackend:
    """Backend of the CPU's compiled kernels.

    Attributes:
        memory: allocator of the packed matrices.
        kind: type of unquantised matrices; None keeps the stored types.
        groups: whether the layer can reorder its input as a matrix requires.
        floats_kept: whether the layer supports small floats (FP8, FP4) with scales; otherwise they are decoded.
        words: stored types whose matrices are multiplied as 14-bit integers if `kind` is None, see `Placement`.
    """

    memory: WeightMemory
    kind: PlainKind | None
    groups: bool
    floats_kept: bool
    words: tuple[str, ...] = ()

    def plain(self, stored: StoredTensor) -> tuple[Matrix, str | None]:
        from candle_vllm.core.kernels import plain_linear

        assert stored.dtype is not None
        rows, columns = stored.shape
        if stored.dtype in self.words and self.kind is None:
            from candle_vllm.core.kernels import word_linear

            if (made := word_linear.pack(stored.raw(), stored.dtype, rows, columns, self.memory)) is not None:
                return made, None
        return plain_linear.pack(stored.raw(), stored.dtype, rows, columns, self.kind, self.memory), None

    def blocks(self, stored: StoredTensor, read: Callable[[], Blocks]) -> tuple[Matrix, str | None]:
        from candle_vllm.core.kernels import packed_linear, plain_linear
        from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa

        blocks, (rows, columns) = read(), stored.shape
        bytes_multiplied = blocks.type == GGMLQuantizationType.Q8_0 and host_isa() & (Isa.VNNI | Isa.AVX_VNNI)
        if bytes_multiplied and blocks.order is None:
            made = plain_linear.pack_rows(blocks.raw, rows, columns, self.memory)
            if made is not None:
                return made, None
        matrix = packed_linear.pack(blocks.raw, blocks.type, rows, columns, self.memory)
        return dataclasses.replace(matrix, order=blocks.order), None

    def codes(
        self, stored: StoredTensor, read: Callable[[], GroupCodes], blocks: Callable[[], Blocks | None]
    ) -> tuple[Matrix, str | None]:
        """Convert codes to GGUF blocks if these have exactly the same values in a supported order, else decode them."""
        del read
        found = blocks()
        if found is None:
            return self.decoded(stored, "no GGUF block type has exactly these values")
        if found.order is not None and not self.groups:
            return self.decoded(stored, "no GGUF block type has exactly these values in the order of their inputs")
        return self.blocks(stored, lambda: found)

    def floats(self, stored: StoredTensor, span: int, read: Callable[[], ScaledCodes]) -> tuple[Matrix, str | None]:
        from candle_vllm.core.kernels import scaled_linear

        if not self.floats_kept:
            return self.decoded(stored, "such a layer has no kernel for small floats")
        try:
            scaled_linear.check_span(span, stored.shape[1])  # before scales are repeated for every row
            return scaled_linear.pack(read(), self.memory), None
        except UnsupportedModelError as error:
            return self.decoded(stored, str(error))

    def numbers(self, stored: StoredTensor) -> list[PlainMatrix]:
        """Return the matrices [N, K] of a stored tensor [..., N, K]; decoded elements become `kind`, or bfloat16."""
        from candle_vllm.core.kernels import plain_linear

        *outer, rows, columns = stored.shape
        if stored.quantised:
            dtype = "BF16" if self.kind is None else "F32"  # values are checked against the range of a narrower kind
            raw = stored.load(dtype).view(np.uint8)
        else:
            assert stored.dtype is not None
            dtype, raw = stored.dtype, stored.raw()
        each = raw.reshape(math.prod(outer), -1)
        return [plain_linear.pack(matrix, dtype, rows, columns, self.kind, self.memory) for matrix in each]

    def decoded(self, stored: StoredTensor, why: str) -> tuple[Matrix, str | None]:
        (matrix,) = self.numbers(stored)
        return matrix, why
