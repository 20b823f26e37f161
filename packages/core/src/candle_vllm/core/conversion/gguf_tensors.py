# SPDX-License-Identifier: MIT
"""Tensors of a GGUF file, found by reading a family's table of names in reverse.

The table defines how a stored tensor of either format becomes the model's tensor, by a view. A GGUF tensor is written
such that its view gives the model's tensor. If the view selects and orders rows, the same view of an array of row
numbers gives the row at which to write each row of the model's tensor. Experts in MXFP4 stay MXFP4: their codes are put
in the order of GGUF's blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import Constant, Made, rows_of_bytes
from candle_vllm.core.loading.weights import Line, WeightName, beside_gguf
from candle_vllm.core.quantization.fp4 import mxfp4_blocks
from candle_vllm.core.quantization.plain import ELEMENTS
from candle_vllm.core.quantization.tensors import StoredTensor

_Piece = tuple[Line, StoredTensor]  # a line of the table for GGUF, and the model's tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Assembled(Made):
    """Rows of several tensors in a new order; `pieces` are row numbers, and the tensors with these rows."""

    pieces: tuple[tuple[np.ndarray, StoredTensor], ...]

    def raw(self) -> np.ndarray:
        rows = np.empty(self.shape, ELEMENTS[self.type_name]).reshape(sum(order.size for order, _ in self.pieces), -1)
        for order, stored in self.pieces:
            rows[order] = stored.load(self.type_name).reshape(order.size, -1)
        return rows_of_bytes(rows, self.shape)

    def release(self) -> None:
        for _, stored in self.pieces:
            stored.release()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _AssembledBlocks(_Assembled):
    """Rows in MXFP4 in a new order; they stay MXFP4."""

    def raw(self) -> np.ndarray:
        blocks = [(order, mxfp4_blocks(stored)) for order, stored in self.pieces]
        out = np.empty((sum(len(order) for order, _ in blocks), blocks[0][1].shape[1]), np.uint8)
        for order, rows in blocks:
            out[order] = rows
        return out


def gguf_tensors(
    table: Sequence[WeightName],
    checkpoint: Checkpoint,
    config: Any,
    gguf_config: Any,
    has_place: Callable[[str], bool],
    preferred: Sequence[str] = (),
) -> Iterator[tuple[str, str, StoredTensor]]:
    """Yield name, first target in the model, and tensor (plain or MXFP4) of all GGUF tensors, in table order.

    Args:
        checkpoint, config: tensors of safetensors files, and the model's config from its config.json.
        gguf_config: the same config as GGUF metadata will describe it.
        has_place: whether the model has a line's target.
        preferred: parts of names that choose among a line's alternatives; otherwise the first is used.

    Raises:
        UnsupportedModelError: GGUF has no name for a tensor, or no form for its rows.
    """
    found: defaultdict[str, list[_Piece]] = defaultdict(list)
    for stored_line, line in beside_gguf(table, config):
        name = stored_line.find(checkpoint.tensors) if has_place(stored_line.target) else None
        if name is None:
            continue
        if not line.names:
            raise UnsupportedModelError(f"{checkpoint.path}: GGUF has no name for tensor {name}")
        line = preferring(line, preferred)
        found[line.first].append((line, stored_line.look(checkpoint.tensors[name], name, config)))
    for name, pieces in found.items():
        yield name, pieces[0][0].target, joined(name, pieces, gguf_config)


def preferring(line: Line, parts: Sequence[str]) -> Line:
    """Return the line with the names that contain one of `parts` first; the first name is written."""
    wanted = [pair for pair in line.names if any(part in pair[0] for part in parts)]
    return dataclasses.replace(line, names=(*wanted, *(pair for pair in line.names if pair not in wanted)))


def joined(name: str, pieces: Sequence[_Piece], config: Any) -> StoredTensor:
    """Return the tensor of the file, from which the table's views give all its pieces."""
    line, first = pieces[0]
    written, view = line.names[0]
    experts = config.num_experts if line.expert is not None and "{e}" not in written else 0
    if view is None and not experts:
        return first if len(pieces) == 1 else _stacked(name, [stored for _, stored in pieces])
    undone = getattr(view, "undone", None)  # views that do more than order rows have this method
    if undone is not None:
        return undone(first, config)
    rows = sum(stored.shape[0] for _, stored in pieces)
    shape = (experts, rows // experts, *first.shape[1:]) if experts else (rows, *first.shape[1:])
    orders = [_rows_of(line, shape, stored, config) for line, stored in pieces]
    if sorted(np.concatenate(orders).tolist()) != list(range(rows)):
        raise UnsupportedModelError(f"{first.path}: {first.name} cannot be put into GGUF's tensor {name}")
    if len(pieces) == 1 and not experts and np.array_equal(orders[0], np.arange(rows)):
        return first
    return _assembled(name, shape, list(zip(orders, (stored for _, stored in pieces))))


def _stacked(name: str, parts: Sequence[StoredTensor]) -> StoredTensor:
    """Stack tensors of one shape as the entries of one tensor: the norms of a layer's heads."""
    assert len({part.shape for part in parts}) == 1, name
    each = math.prod(parts[0].shape[:-1])
    orders = np.arange(len(parts) * each).reshape(len(parts), each)
    return _assembled(name, (len(parts), *parts[0].shape), list(zip(orders, parts)))


def _assembled(name: str, shape: tuple[int, ...], pieces: Sequence[tuple[np.ndarray, StoredTensor]]) -> StoredTensor:
    first, dtypes = pieces[0][1], {stored.dtype for _, stored in pieces}
    if dtypes == {None}:  # only MXFP4 tensors have no dtype here: see `write.py`
        nbytes = sum(stored.nbytes for _, stored in pieces)
        return _AssembledBlocks(name, shape, first.type_name, nbytes, first.path, tuple(pieces))
    dtype = first.dtype if len(dtypes) == 1 and first.dtype is not None else "F32"
    return _Assembled(name, shape, dtype, math.prod(shape) * ELEMENTS[dtype].itemsize, first.path, tuple(pieces))


def _rows_of(line: Line, shape: Sequence[int], stored: StoredTensor, config: Any) -> np.ndarray:
    """Return which rows of a file's tensor of `shape` a line reads, in the line's order."""
    count = len(shape) - len(stored.shape) + 1  # dimensions that number rows
    numbers = np.arange(math.prod(shape[:count])).reshape(*shape[:count], *[1] * (len(shape) - count))
    probe = Constant(line.first, numbers.shape, "I64", numbers.nbytes, stored.path, numbers)
    return line.look(probe, line.first, config).load("I64").reshape(-1)
