# SPDX-License-Identifier: MIT
"""Write a GGUF file: metadata, the table of tensors, then the tensors' data in order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import gguf
import numpy as np
from gguf import GGUFValueType, GGUFWriter

from candle_vllm.core.errors import UnsupportedModelError, WeightsError
from candle_vllm.core.kernels.weight_quant.rows import quantise
from candle_vllm.core.quantization import ggml
from candle_vllm.core.quantization.fp4 import mxfp4_blocks
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.quantization.tensors import StoredTensor

_FLOAT32 = float(np.finfo(np.float32).max)

Progress = Callable[[int, int], object]
"""Called with the written bytes and all bytes."""


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a file to be written.

    Attributes:
        stored: plain elements, blocks of the type `kind`, or MXFP4 as it is stored in safetensors files.
        importance: importance of the columns, see `weight_quant.rows.quantise`.
    """

    name: str
    stored: StoredTensor
    kind: GGMLQuantizationType
    importance: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        size, width = self.kind.block
        return self.stored.numel // size * width

    def tofile(self, file: IO[bytes]) -> None:
        """Write the tensor's data, as `np.ndarray.tofile` does for an array, part by part."""
        written = 0
        for part in self.stored.in_parts():
            data = _bytes(dataclasses.replace(self, stored=part))
            data.tofile(file)
            part.release()
            written += data.nbytes
        assert written == self.nbytes


def write_file(
    path: Path,
    plans: Sequence[PlannedTensor],
    metadata: Mapping[str, Any],
    progress: Progress = lambda *_: None,
    types: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> None:
    """Write a file; the memory needed is one tensor, or one of its parts, and its blocks.

    Args:
        path: the file's path; an existing file is replaced.
        metadata: keys and values: strings, booleans, integers (uint32; in two arrays int32), other numbers (float32),
            lists of one of these types, bytes; empty lists are left out. `general.architecture` is required.
        types: types of copied metadata, see `GgufFile.types`.

    Raises:
        UnsupportedModelError: a number of the metadata exceeds its type, or a copied array holds arrays.
        WeightsError: a tensor's elements cannot be stored in its type.
        OSError: the file cannot be written.
    """
    total = sum(plan.nbytes for plan in plans)
    writer = GGUFWriter(path, str(metadata["general.architecture"]))
    try:
        for key, value in metadata.items():
            if key != "general.architecture":  # the writer has already added it
                _copy(writer, key, value, *types[key]) if key in types else _add(writer, key, value)
        for plan in plans:
            size, width = plan.kind.block
            shape = (*plan.stored.shape[:-1], plan.stored.shape[-1] // size * width)
            kind = gguf.GGMLQuantizationType(plan.kind)
            writer.add_tensor_info(plan.name, shape, np.dtype(np.uint8), plan.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for plan in plans:
            data: Any = plan  # it has what the writer needs of an array: `nbytes` and `tofile`
            writer.write_tensor_data(data)
            done += plan.nbytes
            progress(done, total)
    finally:
        writer.close()


def _copy(writer: GGUFWriter, key: str, value: Any, code: int, element: int) -> None:
    """Add a value with the types that it has in another file; an array's strings may have bytes that are not UTF-8."""
    kind, items = GGUFValueType(code), value.tolist() if isinstance(value, np.ndarray) else value
    if kind != GGUFValueType.ARRAY:
        writer.add_key_value(key, items, kind)
    elif element == GGUFValueType.ARRAY:
        raise UnsupportedModelError(f"{key} is an array of arrays, which is not copied")
    elif items:
        if element == GGUFValueType.STRING:
            items = [text.encode("utf-8", "surrogateescape") for text in items]
        writer.add_key_value(key, items, kind, sub_type=GGUFValueType(element))


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    signed = key.endswith((".token_type", ".deepstack_mapping"))
    long = key.endswith((".layer_multipliers", ".head_vocab_sizes", ".head_offsets"))
    for number in value if isinstance(value, list) else [value]:
        large = isinstance(number, float) and _FLOAT32 < abs(number) < math.inf
        if large or (type(number) is int and not -signed <= number < 1 << (64 if long else 32)):
            raise UnsupportedModelError(f"GGUF's {key} cannot store the number {number}")
    if isinstance(value, bytes):
        writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT8)
    elif not isinstance(value, list):
        writer.add_key_value(key, value, GGUFValueType[kinds[type(value)]])
    elif value:
        kind = "INT32" if signed else "UINT64" if long else kinds[type(value[0])]
        writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=GGUFValueType[kind])


def _bytes(plan: PlannedTensor) -> np.ndarray:
    """Return the tensor's data, uint8 [rows, bytes per row]."""
    stored, rows = plan.stored, max(1, plan.stored.numel // plan.stored.shape[-1])
    if plan.kind in ggml.PLAIN_TYPES:
        values = stored.load(plan.kind.name)
        if plan.kind.name == "F16" and not np.isfinite(values).all():
            raise WeightsError(
                f"{stored.path}: tensor {stored.name} has values beyond the range of float16: choose bf16 or f32"
            )
        return values.reshape(rows, -1).view(np.uint8)
    if stored.dtype is None:
        return mxfp4_blocks(stored) if stored.block_type is None else stored.raw()
    try:
        return quantise(stored.raw(), stored.dtype, stored.shape[-1], plan.kind, plan.importance)
    except ValueError as error:
        raise WeightsError(f"{stored.path}: tensor {stored.name} cannot be quantised: {error}") from error
