# SPDX-License-Identifier: MIT
"""Parameters of layers: named weights that the loader fills from stored tensors, and their placement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.devices import CPU, Device
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.cpu_runtime.packed_file import pack
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.quantization.plain import ELEMENTS
from candle_vllm.core.quantization.tensors import Backend, StoredTensor

if TYPE_CHECKING:
    from candle_vllm.core.kernels.backends import PlainBackend
    from candle_vllm.core.kernels.cpu_runtime.backend import RecordedBackend
    from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
    from candle_vllm.core.kernels.plain_linear.layout import PlainKind

Packed: TypeAlias = tuple[Any, str | None]
"""A packed matrix, and why a quantised matrix needs more memory than in its file, for a log; None if it does not."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Device, types and memory of a model's weights.

    Attributes:
        device: device of the tensors.
        dtype: type of matrices and activations if steps are not recorded, by its name in `quantization/plain.py`.
        weight_memory: memory for matrices in the layouts of the compiled CPU kernels; None without these kernels.
        plain_kind: type of unquantised matrices in recorded steps; None keeps the stored types.
        words: stored types ("F16", "F32") whose matrices recorded steps multiply as integers of 14 bits
            (`kernels/word_linear`), unless `plain_kind` is set.
        keeps_quantised: if steps are not recorded, quantised matrices stay quantised, in the layouts of the GPU's
            kernels; otherwise they are decoded to `dtype`.
        invariant: a token's result has the same bits whatever else is in the step, which costs some speed.
        shapes_only: `empty` returns shapes without memory, and nothing is loaded.
        product_threads: threads of compiled kernels that multiply for layers that run op by op in torch, as in models
            whose modules transformers builds; 0 if the layers are recorded or torch multiplies.
    """

    device: Device
    dtype: str
    weight_memory: WeightMemory | None = None
    plain_kind: PlainKind | None = None
    words: tuple[str, ...] = ()
    keeps_quantised: bool = False
    invariant: bool = False
    shapes_only: bool = False
    product_threads: int = 0

    @property
    def recorded(self) -> bool:
        """Whether steps are recorded, with matrices in the layouts of the CPU kernels."""
        return self.weight_memory is not None and not self.product_threads

    @property
    def torch_dtype(self) -> Any:
        """`dtype` as torch's type."""
        from candle_vllm.core.kernels.torch_numbers import DTYPES

        return DTYPES[self.dtype]

    def empty(self, *shape: int, dtype: str = "F32") -> Value:
        """Allocate memory for parameters such as norms and biases: an array for recorded steps, otherwise a tensor."""
        if self.shapes_only:
            return np.broadcast_to(np.zeros((), ELEMENTS[dtype]), shape)
        if self.recorded:
            return np.empty(shape, ELEMENTS[dtype])
        from candle_vllm.core.kernels.torch_numbers import empty

        return empty(shape, dtype, self.device)

    def constant(self, numbers: NDArray[np.float32]) -> Value:
        """Convert a constant array of the host: unchanged for recorded steps, otherwise a tensor."""
        if self.recorded or self.shapes_only:
            return numbers
        from candle_vllm.core.kernels.torch_numbers import tensor_of

        return tensor_of(numbers, "F32").to(self.device)

    def backend(self, *, groups: bool = False, floats: bool = False) -> RecordedBackend | PlainBackend:
        """Return the backend that packs a layer's matrices.

        Args:
            groups: the layer supports integer codes in groups, for which it reorders its input.
            floats: the layer supports small floats with scales.
        """
        if self.weight_memory is not None:
            from candle_vllm.core.kernels.cpu_runtime.backend import RecordedBackend

            return RecordedBackend(self.weight_memory, self.plain_kind, groups, floats, self.words)
        from candle_vllm.core.kernels.backends import DeviceBackend, PlainBackend

        if not self.keeps_quantised:
            return PlainBackend(self.device, self.torch_dtype)
        return DeviceBackend(self.device, self.torch_dtype, groups, floats)


SHAPES = Placement(CPU, "F32", shapes_only=True)
"""Placement of a model that has shapes and no memory."""


def on_host(values: Value) -> NDArray[np.float32]:
    """Convert a parameter to an array; on the CPU both share memory."""
    if isinstance(values, np.ndarray):
        return values
    plain: Any = values
    return plain.cpu().numpy()


def write_rows(table: Value, first: int, rows: NDArray[np.float32]) -> None:
    """Write rows [n, K] of a `constant` table, on any device, from row `first` on."""
    if isinstance(table, np.ndarray):
        table[first : first + len(rows)] = rows
        return
    from candle_vllm.core.kernels.torch_numbers import tensor_of

    place: Any = table
    place[first : first + len(rows)].copy_(tensor_of(rows, "F32"))


class TensorParameter:
    """Tensor or array into which a stored tensor is copied."""

    sections = 1

    def __init__(self, tensor: Value) -> None:
        self._tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that the stored tensor must have."""
        return tuple(self._tensor.shape)

    def fill(self, stored: StoredTensor) -> str | None:
        """Decode and copy the tensor; for a GPU it is converted on the device."""
        if isinstance(self._tensor, np.ndarray):
            self._tensor[...] = stored.load("F32")
            return
        from candle_vllm.core.kernels.torch_numbers import fill

        fill(self._tensor, stored)


class MatrixParameter:
    """Matrix in the layout of its backend, stored in `pieces` under `name`.

    Args:
        pieces, name: destination of the matrix.
        shape: [N, K].
        backend: returns the backend that packs it.
    """

    def __init__(
        self,
        pieces: dict[str, Any],
        name: str,
        shape: tuple[int, int],
        backend: Callable[[], Backend[Packed]],
        sections: int = 1,
    ) -> None:
        self._pieces, self._name, self._backend = pieces, name, backend
        self.shape, self.sections = shape, sections

    def fill(self, stored: StoredTensor) -> str | None:
        """Pack the tensor, or find it packed in a file."""
        with naming_tensor(stored):
            self._pieces[self._name], why = pack(stored, self._backend())
        return why


@contextmanager
def naming_tensor(stored: StoredTensor) -> Iterator[None]:
    """Prefix the error of an unsupported matrix with the file and the tensor, unless the message begins with them."""
    try:
        yield
    except UnsupportedModelError as error:
        if str(error).startswith(f"{stored.path}: tensor"):
            raise
        raise UnsupportedModelError(f"{stored.path}: tensor {stored.name}: {error}") from error
