# SPDX-License-Identifier: MIT
"""Pack an adapter that matches a model into the memory layout of a backend."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import AdapterError
from candle_vllm.core.kernels.activation_rows import row_elements
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, c_function, float_bits
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.kernels.lora import Changes, Delta, FittedAdapter, NumberType, PackedAdapter, Place
from candle_vllm.core.kernels.lora import layout as lay
from candle_vllm.core.quantization.plain import read_plain
from candle_vllm.core.quantization.tensors import StoredTensor

SERIALS = itertools.count(1)
"""Serial numbers of packed adapters, unique in the process."""

Places = Mapping[str, Sequence[Place]]
"""The adapter sites of a model, by the paths of its layers."""


def pack_adapter(
    fitted: FittedAdapter,
    places: Places,
    dtype: NumberType,
    *,
    compiled: bool,
    packed: Callable[[Changes], Any] | None = None,
) -> PackedAdapter:
    """Pack an adapter into the layout of a backend.

    Args:
        dtype: type in which the adapter is multiplied.
        compiled: whether to pack for the compiled CPU operations; otherwise for torch.
        packed: function that creates another backend's layout instead.

    Raises:
        AdapterError: the adapter changes a matrix that this backend cannot change.
    """
    found = changes_of(fitted, places)
    if packed is not None:
        layout = packed(found)
    elif compiled:
        layout = Packing(dtype).pack(found, places)
    else:
        from candle_vllm.core.kernels.lora.reference import TorchAdapter

        layout = TorchAdapter(found, dtype)
    return packed_adapter(fitted, layout, nbytes=layout.nbytes)


def packed_adapter(fitted: FittedAdapter, layout: Any, nbytes: int) -> PackedAdapter:
    """Return an adapter with a backend's layout, and the properties that do not depend on it."""
    every = [delta for deltas in fitted.deltas.values() for delta in deltas.values()]
    return PackedAdapter(
        digest=fitted.digest,
        alora=fitted.alora,
        rank=fitted.rank,
        norm=fitted.norm,
        modules=len(every),
        nbytes=nbytes,
        serial=next(SERIALS),
        apart=any(map(_is_apart, every)),
        layout=layout,
    )


def changes_of(fitted: FittedAdapter, places: Places) -> Changes:
    """Return an adapter's changes by the number of the adapter site; raises the errors of `pack_adapter`."""
    found: dict[int, tuple[Place, dict[str, Delta]]] = {}
    for path, deltas in fitted.deltas.items():
        for name, delta in deltas.items():
            place = next((place for place in places.get(path, ()) if name in place.parts), None)
            if place is None:
                raise AdapterError(
                    f"the adapter changes {path}:{name}weight, which is no matrix that this model multiplies"
                )
            if place.experts and _is_apart(delta):
                raise AdapterError(
                    f"{path}:{name}weight: adapters of experts may have only A, B and biases, neither DoRA nor whole "
                    "matrices"
                )
            if place.lookup and delta.column_scale is not None:
                raise AdapterError(f"{path}:{name}weight: a table whose rows are looked up does not support DoRA")
            found.setdefault(place.number, (place, {}))[1][name] = delta
    return found


def _is_apart(delta: Delta) -> bool:
    """See `PackedAdapter.apart`."""
    return delta.column_scale is not None or delta.full is not None or delta.rows is not None


def numbers_of(stored: StoredTensor | None) -> NDArray[np.float32]:
    """Return the elements of a stored tensor, which must not be None, as floats."""
    assert stored is not None
    return stored.load("F32")


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledAdapter:
    """An adapter in the layout of `layout.py`.

    Attributes:
        address: address of its table.
        nbytes: size of all its memory in bytes.
        dtype: type in which it is multiplied.
        memory: arrays that hold the table, the descriptions and the matrices.
    """

    address: int
    nbytes: int
    dtype: NumberType
    memory: Sequence[np.ndarray]


class Packing:
    """Packing of a single adapter into the layout of `layout.py`; it is multiplied in `dtype`."""

    def __init__(self, dtype: NumberType) -> None:
        self.dtype: NumberType = dtype
        self.form = lay.NumberForm[dtype]
        self._memory: list[np.ndarray] = []
        self._pieces = WeightMemory()

    def pack(self, found: Changes, places: Places) -> CompiledAdapter:
        """Pack the changes from `changes_of`."""
        every = [delta for _, deltas in found.values() for delta in deltas.values()]
        # All matrices are in one array, site after site, if the estimate of its size suffices.
        room = sum(self._bytes_of(delta) for delta in every) * 17 // 16
        self._pieces = WeightMemory(room + 512 * (len(every) + len(places)))
        address = self.table(found, places)
        return CompiledAdapter(address, sum(each.nbytes for each in self._memory), self.dtype, self._memory)

    def _bytes_of(self, delta: Delta) -> int:
        """Estimate the bytes of a delta's matrices."""
        products = sum(math.prod(part.shape) for part in (delta.a, delta.b) if part is not None)
        scales = 0 if self.form is not lay.NumberForm.I8 or delta.b is None else 2 * delta.b.shape[0] + 512
        full = 0 if delta.full is None else math.prod(delta.full.shape)
        return products * self.form.bytes + scales + full * self.form.whole.bytes

    def table(self, found: Changes, places: Places) -> int:
        """Write the descriptions and then the table; return the table's address."""
        made = np.zeros(1 + max((place.number for each in places.values() for place in each), default=0), np.int64)
        for number, (place, deltas) in found.items():
            if place.experts:
                every = np.zeros(place.experts, np.int64)
                for expert in range(place.experts):
                    of = {name: delta for name, delta in deltas.items() if place.parts[name][0] == expert}
                    every[expert] = self._describe(place, of) if of else 0
                made[number] = self.told(every)
            else:
                made[number] = self._describe(place, deltas)
        return self.told(made)

    def _describe(self, place: Place, deltas: Mapping[str, Delta]) -> int:
        """Write a description; return its address."""
        parts = sorted((place.parts[name][1:], delta) for name, delta in deltas.items())
        ranks = [lay.filled(delta.rank) for _, delta in parts]
        made = np.zeros(lay.HEAD + lay.PART * len(parts), np.int64)
        made[1:3] = lay.filled(sum(ranks)), len(parts)
        offset, halves = 0, list[tuple[np.ndarray, ...]]()
        for number, ((begin, end), delta) in enumerate(parts):
            part = made[lay.HEAD + lay.PART * number :][: lay.PART]
            rows = place.columns if place.lookup else end - begin
            part[[lay.BEGIN, lay.ROWS, lay.OFFSET]] = begin, rows, offset
            offset += ranks[number]
            self._fill(part, place, delta, rows)
            if delta.a is not None and not place.lookup:
                halves.append(self._half(delta.a, lay.filled(delta.rank), row_elements(place.columns)))
        if place.lookup and parts[0][1].b is not None:
            made[0] = self.kept(self.bits_of(parts[0][1].b))
        if halves:
            matrix, *scales = map(np.concatenate, zip(*halves, strict=True))
            made[0] = self.kept(lay.blocks_of(matrix, self.form, *scales))
        return self.told(made)

    def _half(self, a: StoredTensor, rank: int, columns: int) -> tuple[np.ndarray, ...]:
        """Return A, padded; with I8 also the scales of its ranks."""
        if self.form is not lay.NumberForm.I8:
            return (lay.filled_with_zeros(self.bits_of(a), rank, columns),)
        codes, scales = self.codes_of(a, lay.QUARTERS)
        scales = lay.filled_with_zeros(scales.reshape(len(scales), -1), rank, 2 * lay.QUARTERS)
        return lay.filled_with_zeros(codes, rank, columns), scales.reshape(rank, lay.QUARTERS, 2)

    def _fill(self, part: NDArray[np.int64], place: Place, delta: Delta, rows: int) -> None:
        """Fill in a part's elements, except its position."""
        scale = delta.column_scale
        if delta.full is not None and not place.lookup:
            part[lay.STEPS], part[lay.MATRIX] = self._panels(self.bits_of(delta.full), self.form.whole)
            part[lay.FULL] = 1
            part[lay.LESS] = self._floats(np.full(rows, -1, np.float32))
        elif delta.a is not None:
            if self.form is lay.NumberForm.I8:
                turned, b = place.lookup, delta.a if place.lookup else delta.b
                codes, scales = self.codes_of(b, 1, scale, turned=turned)
                part[lay.STEPS], part[lay.MATRIX] = self._panels(codes, self.form, scales[:, 0])
            else:
                bits = self.bits_of(delta.a).T if place.lookup else self.bits_of(delta.b, scale)
                part[lay.STEPS], part[lay.MATRIX] = self._panels(bits, self.form)
        part[lay.RANK] = delta.rank
        part[lay.SCALE] = float_bits(delta.scale)
        if delta.bias is not None:
            part[lay.BIAS] = self._floats(delta.bias)
        if scale is not None:
            part[lay.LESS] = self._floats(scale - np.float32(1))
        if delta.rows is not None or (delta.full is not None and place.lookup):
            ids, new = delta.rows if delta.rows is not None else (None, numbers_of(delta.full))
            if ids is not None:
                order = np.argsort(ids)
                ids, new = ids[order], new[order]
                part[lay.IDS] = self.kept(np.ascontiguousarray(ids, np.int64))
            part[lay.COUNT] = len(new)
            part[lay.NEW] = self._floats(new)

    def _panels(self, b: np.ndarray, form: lay.NumberForm, scales: np.ndarray | None = None) -> tuple[int, int]:
        """Write B [N, r] as panels; return the number of steps, and the address."""
        steps, panels = lay.panels_of(b, form, scales)
        return steps, self.kept(panels)

    def _floats(self, numbers: NDArray[np.float32]) -> int:
        return self.kept(np.ascontiguousarray(numbers, np.float32))

    # ---- reading and storing -----------------------------------------------------------------------------------------

    def bits_of(self, stored: StoredTensor | None, scale: NDArray[np.float32] | None = None) -> np.ndarray:
        """Return a matrix, its rows times `scale`, in the adapter's type; bfloat16 (also with I8) as bits."""
        assert stored is not None
        dtype = self.form.whole.name
        if scale is None:
            return stored.load(dtype)
        numbers = numbers_of(stored) * scale[:, None]
        return read_plain(numbers.reshape(-1).view(np.uint8), "F32", numbers.shape, dtype)

    def codes_of(
        self,
        stored: StoredTensor | None,
        groups: int,
        scale: NDArray[np.float32] | None = None,
        *,
        turned: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Quantise a matrix, or its transpose if `turned`, with rows times `scale`, as `reference.quantised` does.
        Return codes [R, C] and scales [R, groups, 2]."""
        numbers = numbers_of(stored)
        if scale is not None:
            numbers = numbers * scale[:, None]
        if turned:
            numbers = np.ascontiguousarray(numbers.T)
        rows, columns = numbers.shape
        made = np.empty(rows * (columns + 2 * groups), np.uint8)
        quantise(numbers, made, np.array([[0, rows, columns, groups, 0]]))
        codes, scales = np.split(made, [rows * columns])
        return codes.reshape(rows, columns), scales.reshape(rows, groups, 2)

    def told(self, words: NDArray[np.int64]) -> int:
        """Store integers and addresses that operations read; return their address."""
        return self.kept(words)

    def kept(self, numbers: np.ndarray) -> int:
        """Store a copy at the start of a cache line, with room for vector reads past its end; return its address."""
        memory = self._pieces.take(numbers.nbytes + 64)
        memory[: numbers.nbytes].view(numbers.dtype).reshape(numbers.shape)[...] = numbers
        self._memory.append(memory)
        return address_of(memory)


def quantise(numbers: np.ndarray, target: NDArray[np.uint8], matrices: NDArray[np.int64]) -> None:
    """Quantise matrices within an array of float32 numbers, or of the bits of bfloat16, see `cpu_quantise`."""
    assert numbers.flags.c_contiguous
    assert matrices.flags.c_contiguous
    form = lay.NumberForm.BF16 if numbers.dtype == np.uint16 else lay.NumberForm.F32
    function = c_function("lora.cpu_quantise:make_quantise", 4, form)
    function(address_of(numbers), address_of(target), address_of(matrices), len(matrices))
