# SPDX-License-Identifier: MIT
"""Fast packing of adapters whose files differ only in their weights, by a recorded list of copies.

Packing an adapter that has only A and B depends on its configuration and on the names and shapes of its tensors, the
adapter's **kind**; it only moves elements (with I8, their codes). So one adapter is packed with indices into its file
instead of its elements, which records the source of each element. All other adapters of the kind are then copied in a
few hundred pieces without the GIL, instead of fitting and packing each tensor in Python. Equal pieces, as in most
layers, share their indices. An adapter with NaN or elements from 2^48 on is left to `fit_adapter`, which may raise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.cpu_runtime.operation import address_of
from candle_vllm.core.kernels.cpu_runtime.recorder import aligned
from candle_vllm.core.kernels.lora import FittedAdapter, NumberType, PackedAdapter
from candle_vllm.core.kernels.lora import layout as lay
from candle_vllm.core.kernels.lora.pack import (
    SERIALS,
    CompiledAdapter,
    Packing,
    Places,
    changes_of,
    packed_adapter,
    quantise,
)
from candle_vllm.core.loading.tensors import FileTensor
from candle_vllm.core.quantization.plain import ELEMENTS, read_plain
from candle_vllm.core.quantization.tensors import StoredTensor

_ADDRESS = 1 << 62  # placeholder of the start of the memory in addresses
_PIECE = 1 << 18  # number of elements that a loop processes at a time
_LARGE = 0x5780  # bits of the bfloat16 2^48; the sum of many squares of such elements might overflow


class _UnseenError(Exception):
    """Packing cannot be recorded: it changes elements, or needs elements of no file, or too many indices."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Piece:
    """Sources of a piece of memory: indices of the file's elements, relative to the first, and blank positions."""

    numbers: NDArray[np.intp]
    blank: NDArray[np.intp]


class _Watching(Packing):
    """Pack indices of the file's elements, counted from 1, instead of the elements; 0 is a blank position.

    Args:
        first: offset of the elements in the file, in bytes.
        most: maximum number of indices to store.
        matrices: for I8: the matrices for `cpu_quantise`; indices then refer to the bytes that it writes.

    Attributes:
        words: arrays of integers and addresses, with their positions in memory.
        copies: for each piece: its position, its first element in the file, and the `_Piece`.
    """

    def __init__(self, dtype: NumberType, first: int, most: int, matrices: NDArray[np.int64]) -> None:
        super().__init__(dtype)
        self._first, self._most, self._seen = first, most, dict[bytes, _Piece]()
        self._matrices = matrices
        self.nbytes = self.count = 0
        self.words: list[tuple[int, NDArray[np.int64]]] = []
        self.copies: list[tuple[int, int, _Piece]] = []

    def bits_of(self, stored: StoredTensor | None, scale: NDArray[np.float32] | None = None) -> np.ndarray:
        if scale is not None or self.form is lay.NumberForm.I8:
            raise _UnseenError
        return self._numbers(stored) + 1

    def codes_of(
        self,
        stored: StoredTensor | None,
        groups: int,
        scale: NDArray[np.float32] | None = None,
        *,
        turned: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        numbers = self._numbers(stored)
        starts = self._matrices[:, 0]
        of = self._matrices[np.searchsorted(starts, numbers[:, 0], "right") - 1]
        begin, rows, columns, counted, at = of.T[..., None]
        row = (numbers[:, :1] - begin) // columns
        whole = numbers == begin + row * columns + np.arange(numbers.shape[1])
        other = (counted != groups).any() or (columns != numbers.shape[1]).any() or not whole.all()
        if scale is not None or turned or other:
            raise _UnseenError
        scales = at + rows * columns + 2 * (row * groups + np.arange(groups))
        return numbers - begin + at + 1, scales[..., None] + np.array([1, 2])

    def _numbers(self, stored: StoredTensor | None) -> NDArray[np.int64]:
        """Return the indices of a matrix's elements in the file, from 0 on."""
        assert stored is not None
        places = stored.file_places()
        if places is None or stored.dtype is None:
            raise _UnseenError
        return (places - self._first) // ELEMENTS[stored.dtype].itemsize

    def told(self, words: NDArray[np.int64]) -> int:
        at = self._room(words.nbytes)
        self.words.append((at, words))
        return _ADDRESS + at

    def kept(self, numbers: np.ndarray) -> int:
        flat = numbers.reshape(-1)
        blank = np.flatnonzero(flat == 0)
        base = int(flat[flat > 0].min())
        flat = flat - base
        flat[blank] = 0
        digest = hashlib.sha256(flat.data).digest() + hashlib.sha256(blank.data).digest()
        if digest not in self._seen:
            self.count += flat.size
            if self.count > self._most:
                raise _UnseenError
            self._seen[digest] = _Piece(flat.astype(np.intp), blank)
        at = self._room(flat.size * self.form.bytes)
        self.copies.append((at, base - 1, self._seen[digest]))
        return _ADDRESS + at

    def _room(self, nbytes: int) -> int:
        at = self.nbytes
        self.nbytes += -(-nbytes // 64) * 64
        return at


@dataclasses.dataclass(frozen=True, eq=False)
class Repacking:
    """Recorded packing of adapters of one kind.

    Attributes:
        like: an adapter of the kind, without its memory.
        dtype: type in which the adapters are multiplied.
        stored: type of the file's elements.
        nbytes: size of the packed memory.
        table: offset of the table in the packed memory.
        words: index and value of each int64 of descriptions and tables, and which of them are addresses.
        copies: as in `_Watching`.
        size: number of stored indices.
        products: by (r, K, N): offsets of A [r, K] and B [N, r] in the file, in elements, and the scales s.
        matrices: for I8, arguments of `cpu_quantise`; its results then replace the file's elements.
    """

    like: PackedAdapter
    dtype: NumberType
    stored: str
    nbytes: int
    table: int
    words: tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.intp]]
    copies: list[tuple[int, int, _Piece]]
    products: Mapping[tuple[int, int, int], list[tuple[int, int, float]]]
    size: int
    matrices: NDArray[np.int64]

    def pack(self, data: NDArray[np.uint8], digest: bytes) -> PackedAdapter | None:
        """Pack an adapter from the bytes after its file's header; None if its elements need a closer check."""
        kind = self.dtype if self.dtype != "I8" else "BF16" if self.stored == "BF16" else "F32"
        numbers = _numbers(data, self.stored, kind)
        if not _is_ordinary(numbers):
            return None
        if self.dtype == "I8":
            _, rows, columns, groups, at = self.matrices[-1].tolist()
            codes = np.empty(at + rows * (columns + 2 * groups), np.uint8)
            quantise(numbers, codes, self.matrices)
            numbers = codes
        memory = aligned(self.nbytes + 64, np.uint8)
        for at, base, piece in self.copies:
            target = memory[at : at + piece.numbers.size * numbers.itemsize].view(numbers.dtype)
            numbers[base:].take(piece.numbers, out=target, mode="clip")
            if piece.blank.size:
                target[piece.blank] = 0
        places, values, addresses = self.words
        words, address = memory.view(np.int64), address_of(memory)
        words[places] = values
        words[addresses] += address
        layout = CompiledAdapter(address + self.table, memory.nbytes, self.dtype, [memory])
        return dataclasses.replace(
            self.like, digest=digest, layout=layout, nbytes=layout.nbytes, norm=self._norm(data), serial=next(SERIALS)
        )

    def _norm(self, data: NDArray[np.uint8]) -> float:
        """See `norm_of` of `assembly/adapters.py`; matrices of equal size are processed together."""
        total, size = 0.0, ELEMENTS[self.stored].itemsize

        def together(starts: Sequence[int], *shape: int) -> NDArray[np.float32]:
            parts = [data[size * start : size * (start + shape[0] * shape[1])] for start in starts]
            return _numbers(np.concatenate(parts), self.stored, "F32").reshape(-1, *shape)

        for (rank, columns, rows), each in self.products.items():
            step = max(1, _PIECE // (rank * (columns + rows)))
            for first in range(0, len(each), step):
                of_a, of_b, scales = zip(*each[first : first + step], strict=True)
                a, b = together(of_a, rank, columns), together(of_b, rows, rank)
                a, b = a @ a.swapaxes(1, 2), b.swapaxes(1, 2) @ b
                total += float(np.einsum("lij,lij,l->", a, b, np.square(scales)))
        return math.sqrt(max(total, 0.0))


def repacking_of(
    fitted: FittedAdapter, tensors: Collection[StoredTensor], places: Places, dtype: NumberType, most: int
) -> Repacking | None:
    """Record the packing of adapters of `fitted`'s kind; None if it depends on more than the kind, or exceeds `most`.

    Args:
        tensors: all tensors of the adapter's file.
        places, dtype: as in `pack_adapter`.
        most: maximum number of indices to store.
    """
    deltas = [delta for each in fitted.deltas.values() for delta in each.values()]
    products = {(d.a.name, d.b.name): d.scale for d in deltas if d.a is not None and d.b is not None}
    named = {tensor.name: tensor for tensor in tensors if isinstance(tensor, FileTensor)}
    types = {tensor.type_name for tensor in tensors}
    used = {name for pair in products for name in pair}
    if len(types) > 1 or not types <= {"F32", "F16", "BF16"} or used != {tensor.name for tensor in tensors}:
        return None
    others = (side for d in deltas for side in (d.bias, d.column_scale, d.full, d.rows))
    if not used <= named.keys() or any(side is not None for side in others):
        return None
    stored = types.pop()
    first, size = min(tensor.start for tensor in named.values()), ELEMENTS[stored].itemsize
    matrices = np.empty((0, 5), np.int64)
    if dtype == "I8":
        if any(len(tensor.shape) != 2 for tensor in named.values()):
            return None
        matrices = _matrices([(named[of_a], named[of_b]) for of_a, of_b in products], first, size)
    watching = _Watching(dtype, first, most, matrices)
    try:
        table = watching.table(changes_of(fitted, places), places)
    except _UnseenError:
        return None
    sizes: defaultdict[tuple[int, int, int], list[tuple[int, int, float]]] = defaultdict(list)
    for (of_a, of_b), scale in products.items():
        a, b = named[of_a], named[of_b]
        sizes[a.shape[0], a.shape[1], b.shape[0]].append(((a.start - first) // size, (b.start - first) // size, scale))
    at = [at // 8 + np.arange(len(told)) for at, told in watching.words]
    where, words = np.concatenate(at), np.concatenate([told for _, told in watching.words])
    addresses = np.flatnonzero(words >= _ADDRESS)
    words[addresses] -= _ADDRESS
    return Repacking(
        like=packed_adapter(fitted, None, nbytes=0),
        dtype=dtype,
        stored=stored,
        nbytes=watching.nbytes,
        table=table - _ADDRESS,
        words=(where, words, where[addresses]),
        copies=watching.copies,
        products=sizes,
        size=watching.count,
        matrices=matrices,
    )


def _matrices(pairs: Iterable[tuple[FileTensor, FileTensor]], first: int, size: int) -> NDArray[np.int64]:
    """Return the `matrices` of `cpu_quantise` for A and B, in the order of the file."""
    sides = {side.start: (side.shape, groups) for pair in pairs for side, groups in zip(pair, (lay.QUARTERS, 1))}
    made, at = list[tuple[int, ...]](), 0
    for start, ((rows, columns), groups) in sorted(sides.items()):
        made.append(((start - first) // size, rows, columns, groups, at))
        at += rows * (columns + 2 * groups)
    return np.array(made, np.int64)


def _numbers(data: NDArray[np.uint8], stored: str, wanted: str) -> NDArray[Any]:
    """Return a file's elements in another type, or unchanged."""
    kind = ELEMENTS[stored]
    if stored == wanted:
        numbers = data.view(kind)
        if numbers.flags.aligned:
            return numbers
    return read_plain(data, stored, (len(data) // kind.itemsize,), wanted)


def _is_ordinary(numbers: NDArray[Any]) -> bool:
    """Whether the elements are finite, and sums of their squares cannot overflow."""
    width = 8 * numbers.itemsize - 16  # bits of a float32 that a bfloat16 lacks
    bits = numbers.view(f"u{numbers.itemsize}")
    scratch = np.empty(min(_PIECE, bits.size), bits.dtype)
    for first in range(0, bits.size, _PIECE):
        some = bits[first : first + _PIECE]
        if np.bitwise_and(some, 0x7F80 << width, out=scratch[: some.size]).max() >= _LARGE << width:
            return False
    return True
