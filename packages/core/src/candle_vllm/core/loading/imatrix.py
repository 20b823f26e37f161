# SPDX-License-Identifier: MIT
"""Importance matrices of llama.cpp: the importance of each input of a weight matrix, measured on calibration texts.

An entry has a tensor's GGUF name and, for each column, the sum of the squares of the column's inputs; the entry of a
tensor that holds all experts has a row for each expert. Two formats are read:

    GGUF   tensors `NAME.in_sum2` F32 [experts, columns] and `NAME.counts` F32 [experts], the number of inputs
    .dat   int32 entries; for each: int32 length of the name, the name, int32 calls, int32 N, float32 [N]

Only the proportions within a row matter, so counts only show which experts had no inputs, and calls are not used.
Source: llama.cpp's `tools/imatrix` and `tools/quantize`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

import numpy as np

from candle_vllm.core.errors import InvalidFileError, WeightsError
from candle_vllm.core.loading.gguf import MAX_TENSOR_NAME_BYTES, MAX_TENSORS, open_gguf
from candle_vllm.core.loading.tensors import MappedFile
from candle_vllm.core.loading.views import ColumnOrder, constant
from candle_vllm.core.loading.weights import Counted, Line

LEAST = 1e-6
"""Minimum importance of a column, relative to its row's mean, so that every group of columns has some weight."""

_SUMS, _COUNTS = ".in_sum2", ".counts"


class Imatrix:
    """Entries of an importance matrix file, by name: float32 arrays [rows * columns], not negative."""

    def __init__(self, path: Path, entries: Mapping[str, np.ndarray]) -> None:
        self.path = path
        self.entries: Mapping[str, np.ndarray] = MappingProxyType(dict(entries))

    def of(self, name: str, columns: int, experts: int = 1) -> np.ndarray | None:
        """Return float32 [experts, columns], the importance divided by the row's mean; None without an entry.

        Raises WeightsError if the entry has another shape.
        """
        found = self.entries.get(name)
        if found is None:
            return None
        if found.size != experts * columns:
            wanted = f"{columns:,}" if experts == 1 else f"{experts} times {columns:,}"
            raise WeightsError(
                f"{self.path}: the entry of {name} has {found.size:,} elements and the tensor needs {wanted}: the file "
                "was made with another model"
            )
        rows = found.reshape(experts, columns).astype(np.float64)
        mean = rows.mean(axis=1, keepdims=True)
        rows = np.divide(rows, mean, out=np.ones_like(rows), where=mean > 0)  # 1 for an expert without inputs
        return np.maximum(rows, LEAST).astype(np.float32)

    def of_line(self, line: Line, columns: int, config: Counted) -> np.ndarray | None:
        """Return the result of `of` for a GGUF line, float32 [1, columns], in the order of the layer's inputs."""
        for (written, view), name in zip(line.names, line.spelled, strict=True):
            if line.expert is None or written != name:
                found = self.of(name, columns)
            else:
                found = self.of(name, columns, config.num_experts)
                found = None if found is None else found[line.expert : line.expert + 1]
            if found is not None and isinstance(view, ColumnOrder):
                return view(constant(name, found, self.path), config).load("F32")
            if found is not None:
                return found
        return None


def read_imatrix(path: Path) -> Imatrix:
    """Read a file of either format.

    Raises:
        ModelNotFoundError: the file does not exist.
        InvalidFileError: the file is damaged, or has neither format.
        ModelLoadError: the file cannot be read, or its GGUF version is not supported.
    """
    with closing(MappedFile(path)) as file:
        if file.buffer[:4] != b"GGUF":
            return Imatrix(path, _checked(path, _dat_entries(file)))
    return Imatrix(path, _checked(path, _gguf_entries(path)))


def _checked(path: Path, entries: Iterator[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, numbers in entries:
        if name in found:
            raise InvalidFileError(f"{path}: there are two entries of {name!r:.200}")
        if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
            raise InvalidFileError(f"{path}: the entry of {name!r:.200} has an element that is no sum of squares")
        found[name] = numbers
    if not found:
        raise InvalidFileError(f"{path} holds no importance matrix: there is no entry in it")
    return found


def _gguf_entries(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with open_gguf(path) as checkpoint:
        for name, stored in checkpoint.tensors.items():
            if not name.endswith(_SUMS):
                continue
            bare = name.removesuffix(_SUMS)
            counts = checkpoint.tensors.get(bare + _COUNTS)
            rows = stored.numel // max(1, stored.shape[-1])
            if counts is None or {stored.type_name, counts.type_name} != {"F32"} or not counts.numel == rows > 0:
                raise InvalidFileError(f"{path}: {name} and its counts must be F32, a count for each of {rows} rows")
            sums = stored.load().reshape(rows, -1).copy()
            sums[counts.load().reshape(-1) == 0] = 0
            yield bare, sums.reshape(-1)


def _dat_entries(file: MappedFile) -> Iterator[tuple[str, np.ndarray]]:
    at = 0

    def take(count: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= count <= file.size - at:
            raise InvalidFileError(f"{file.path}: {what} takes {count:,} bytes and {file.size - at:,} are left")
        found = file.view(at, count).tobytes()
        at += count
        return found

    def number(what: str, most: int) -> int:
        (found,) = struct.unpack("<i", take(4, what))
        if not 0 <= found <= most:
            raise InvalidFileError(f"{file.path} is no importance matrix: {what} is {found:,}")
        return found

    for index in range(number("the number of entries", MAX_TENSORS)):
        size = number(f"the length of name {index}", MAX_TENSOR_NAME_BYTES)
        try:
            name = take(size, f"name {index}").decode()
        except UnicodeDecodeError as error:
            raise InvalidFileError(f"{file.path}: name {index} is no UTF-8") from error
        number(f"the number of calls of entry {index}", (1 << 31) - 1)
        count = number(f"the number of elements of entry {index}", (1 << 31) - 1)
        yield name, np.frombuffer(take(4 * count, f"entry {index}"), "<f4")
