# SPDX-License-Identifier: MIT
"""Adapters in plain torch: the readable reference, which layers that run op by op also use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels.activation_rows import row_elements
from candle_vllm.core.kernels.lora import Changes, Delta, NumberType, PackedAdapter, Place
from candle_vllm.core.kernels.lora.layout import MOST_16, QUARTERS, SPAN, filled
from candle_vllm.core.kernels.torch_numbers import DTYPES

_SMALLEST = np.finfo(np.float32).tiny  # smallest scale


def quantised(matrix: NDArray[np.float32], groups: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise a matrix [R, C] to integers with scales [R, groups].

    A group is C / groups columns, rounded up to a multiple of 8; the last groups have fewer or none. Its scale is its
    largest magnitude divided by 127, rounded up to bfloat16; if that is not a normal float, scale and codes are 0.
    """
    rows, columns = matrix.shape
    size = -(-columns // (8 * groups)) * 8
    whole = np.zeros((rows, groups * size), np.float32)
    whole[:, :columns] = matrix
    whole = whole.reshape(rows, groups, size)
    bits = (np.abs(whole).max(2, initial=0) / np.float32(127)).view(np.uint32)
    scales = (bits + np.uint32(0xFFFF) & np.uint32(0xFFFF0000)).view(np.float32)
    scales[scales < _SMALLEST] = 0
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    codes = np.rint(whole * inverse[..., None]).astype(np.int8)
    return codes.reshape(rows, -1)[:, :columns], scales


def decoded(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Decode the codes and scales of `quantised`."""
    columns, groups = codes.shape[1], scales.shape[1]
    return codes * scales.repeat(-(-columns // (8 * groups)) * 8, 1)[:, :columns]


def in_16_bits(x: torch.Tensor, most: float = float(MOST_16)) -> torch.Tensor:
    """Round rows [n, g] to 16-bit integers times a float32 scale: the row's largest magnitude divided by `most`, but 0
    if the magnitude is below 2^-100."""
    largest = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
    scale = torch.where(largest < 2.0**-100, 0, largest / most)
    return torch.round(x * torch.where(scale == 0, 0, 1 / scale)) * scale


def _inputs_in_16_bits(x: torch.Tensor) -> torch.Tensor:
    """Round inputs [n, K] as `in_16_bits` does, in groups of `SPAN` columns of each quarter."""
    quarter = row_elements(x.shape[1]) // QUARTERS
    groups = [columns.split(SPAN, 1) for columns in x.split(quarter, 1)]
    return torch.cat([in_16_bits(group) for of in groups for group in of], 1)


@dataclasses.dataclass(frozen=True, eq=False)
class TorchDelta:
    """A `Delta` as tensors, for rows begin .. end of an adapter site or of an expert; B is multiplied by c."""

    expert: int
    begin: int
    end: int
    scale: float
    a: torch.Tensor | None
    b: torch.Tensor | None
    bias: torch.Tensor | None
    less: torch.Tensor | None  # c - 1
    full: torch.Tensor | None
    rows: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def of(cls, place: Place, name: str, delta: Delta, dtype: NumberType, device: Any) -> TorchDelta:
        """Copy a delta to a device; A, B and `full` are rounded to `dtype` (with I8 as in the contract) and decoded."""

        def tensor(numbers: Any, kind: str = "F32") -> Any:
            return None if numbers is None else torch.from_numpy(np.array(numbers)).to(device, DTYPES[kind])

        def matrix(stored: Any, factor: Any = None, groups: int = 0) -> Any:
            if stored is None:
                return None
            numbers = stored.load("F32")
            numbers = numbers if factor is None else numbers * factor
            if dtype != "I8" or groups == 0:
                return tensor(numbers, "BF16" if dtype == "I8" else dtype)
            if place.lookup:
                return tensor(decoded(*quantised(numbers.T, groups)).T)
            return tensor(decoded(*quantised(numbers, groups)))

        c = delta.column_scale
        return cls(
            *place.parts[name],
            scale=delta.scale,
            a=matrix(delta.a, groups=1 if place.lookup else QUARTERS),
            b=matrix(delta.b, None if c is None else c[:, None], groups=0 if place.lookup else 1),
            bias=tensor(delta.bias),
            less=tensor(None if c is None else c - np.float32(1)),
            full=matrix(delta.full),
            rows=None if delta.rows is None else (torch.from_numpy(delta.rows[0]).to(device), tensor(delta.rows[1])),
        )


class TorchAdapter:
    """An adapter for layers that run op by op.

    Attributes:
        deltas: changes of each adapter site, by its number.
        nbytes: size of all tensors.
    """

    def __init__(self, found: Changes, dtype: NumberType, device: Any = "cpu"):
        self.whole = dtype == "I8"  # inputs and sums are rounded to 16-bit integers, otherwise to `dtype`
        self.dtype = torch.float32 if self.whole else DTYPES[dtype]
        self.deltas = {
            number: [TorchDelta.of(place, name, delta, dtype, device) for name, delta in deltas.items()]
            for number, (place, deltas) in found.items()
        }
        tensors = [
            t for of in self.deltas.values() for d in of for t in (d.a, d.b, d.bias, d.less, d.full, *(d.rows or ()))
        ]
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def added(self, delta: TorchDelta, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return the term that `delta` adds to the model's products `own` [n, N] of x [n, K], in fp32, for t = 1."""
        rounded = x.to(self.dtype).float()
        total = torch.zeros_like(own)
        if delta.full is not None:
            total += rounded @ delta.full.float().T - own
        elif delta.a is not None and delta.b is not None:
            if self.whole:
                rounded = _inputs_in_16_bits(x)
            h = self._sums(rounded @ delta.a.float().T, delta)
            total += h @ delta.b.float().T
        if delta.less is not None:
            total += delta.less * own
        if delta.bias is not None:
            total += delta.bias
        if delta.rows is not None:
            ids, new = delta.rows
            total[:, ids] += rounded @ new.T - own[:, ids]
        return total

    def _sums(self, h: torch.Tensor, delta: TorchDelta) -> torch.Tensor:
        """Return sums [n, r] times s, rounded for the product with B (with A for a table's rows)."""
        if self.whole:
            return in_16_bits(h, min(float(MOST_16), 2**31 // 127 // filled(h.shape[1]))) * delta.scale
        return (h * delta.scale).to(self.dtype).float()

    def looked_up(self, delta: TorchDelta, ids: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return the term that `delta` adds to a table's rows `own` [n, K] with the numbers `ids`."""
        total = torch.zeros_like(own)
        if delta.full is not None:
            return delta.full[ids].float() - own
        if delta.a is not None and delta.b is not None:
            total += self._sums(delta.b[ids].float(), delta) @ delta.a.float()
        if delta.rows is not None:
            numbers, new = delta.rows
            token, place = (ids[:, None] == numbers).nonzero(as_tuple=True)
            total[token] += new[place] - own[token]
        return total


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Rows of a step that have an adapter, and the adapter's scale for each."""

    adapter: PackedAdapter
    rows: torch.Tensor  # [n] int64
    scales: torch.Tensor  # [n, 1]


class EagerAdapters:
    """Adapters of layers that run op by op; the caller of a step sets `groups`, which rows have which adapters."""

    def __init__(self) -> None:
        self.groups: Sequence[Group] = ()

    def choose(self, adapters: Any, device: Any, wanted: NDArray[np.int64] | None = None) -> None:
        """Select the adapters of a step's rows (`AdapterRows` or None), or only of the rows `wanted`."""
        picked = adapters if wanted is None or adapters is None else adapters.among(wanted)
        self.groups = ()
        if picked is not None:
            rows, scales = (torch.from_numpy(numbers).to(device) for numbers in (picked.rows, picked.scales[:, None]))
            spans = zip(picked.adapters, picked.starts[:-1], picked.starts[1:])
            self.groups = [Group(adapter, rows[first:last], scales[first:last]) for adapter, first, last in spans]

    def add(self, place: Place | None, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return y [T, N] = x [T, K] W^T + bias, with the terms that adapters add."""
        deltas = self._at(place)
        if not deltas:
            return y
        own = y.float() if bias is None else y.float() - bias.float()
        total = y.float().clone()
        for group, of in deltas:
            for delta in of:
                columns = slice(delta.begin, delta.end)
                added = group.adapter.layout.added(delta, x[group.rows].float(), own[group.rows, columns])
                total[group.rows, columns] += group.scales * added
        return total.to(y.dtype)

    def look_up(self, place: Place | None, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of a table, changed by adapters."""
        deltas = self._at(place)
        if not deltas:
            return rows
        total, own = rows.float().clone(), rows.float()
        for group, of in deltas:
            for delta in of:
                added = group.adapter.layout.looked_up(delta, ids[group.rows], own[group.rows])
                total[group.rows] += group.scales * added
        return total.to(rows.dtype)

    def add_expert(
        self, place: Place | None, expert: int, tokens: torch.Tensor, x: torch.Tensor, y: torch.Tensor
    ) -> None:
        """Add adapters in place to an expert's products y [n, N] of the rows x [n, K] of `tokens`."""
        for group, of in self._at(place):
            scale = torch.zeros(int(max(group.rows.max(), tokens.max())) + 1, 1, device=y.device)
            scale[group.rows] = group.scales
            for delta in of:
                if delta.expert == expert:
                    columns = slice(delta.begin, delta.end)
                    y[:, columns] += scale[tokens] * group.adapter.layout.added(delta, x, y[:, columns])

    def _at(self, place: Place | None) -> list[tuple[Group, list[TorchDelta]]]:
        if place is None:
            return []
        found = [(group, group.adapter.layout.deltas.get(place.number)) for group in self.groups]
        return [(group, of) for group, of in found if of]
