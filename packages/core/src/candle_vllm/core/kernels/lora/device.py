# SPDX-License-Identifier: MIT
"""LoRA adapters in a GPU's steps: adapters on the device, and the map from a step's rows to adapters.

An adapter that is not on the device is copied there in one piece when a step uses it; its addresses fill a LoRA slot. A
step can have as many adapters as there are slots; the least recently used adapter is replaced. Two launches of
`triton.py` add adapters to a layer's product; the launches' tables have fixed addresses, so that captured steps can use
them. If an adapter changes a lookup, or replaces a matrix or rows, or a row has several adapters, torch computes all
adapters of the step, which is not captured.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.errors import AdapterError
from candle_vllm.core.kernels.device_stream import DeviceStream, Sent, Staging, Work, copy
from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.lora import Changes, PackedAdapter, Place
from candle_vllm.core.kernels.lora.layout import GPU_COLUMNS, GPU_FIELDS, GPU_RANKS
from candle_vllm.core.kernels.lora.reference import EagerAdapters, TorchAdapter, TorchDelta
from candle_vllm.core.kernels.torch_numbers import NAMES

if TYPE_CHECKING:
    from candle_vllm.core.kernels.lora.triton import Blocks, Slots

NARROW = 16  # rows of a block in captured steps, and in steps where no adapter has more rows
_BOUNDARY = 256  # alignment in bytes
_TENSORS = ("a", "b", "bias", "less", "full")


class Entries(Protocol):
    """Map from a step's rows to adapters: the engine's `AdapterRows`."""

    @property
    def rows(self) -> NDArray[np.int64]: ...
    @property
    def scales(self) -> NDArray[np.float32]: ...
    @property
    def starts(self) -> NDArray[np.int64]: ...
    @property
    def adapters(self) -> Sequence[PackedAdapter]: ...
    def among(self, wanted: NDArray[np.int64], /) -> Any: ...


# ---- an adapter ------------------------------------------------------------------------------------------------------


def refuse_experts(found: Changes) -> None:
    """Raise AdapterError if an adapter changes experts: a GPU's kernels of experts add no adapters."""
    if any(place.experts for place, _ in found.values()):
        raise AdapterError(
            "the adapter changes experts, which is supported on the CPU only: serve the model there, or merge the "
            "adapter into it (candle-vllm quantize --lora)"
        )


class DeviceAdapter(TorchAdapter):
    """Adapter, in the type of the activations, in one piece of host memory that a GPU can copy, except for
    `TorchDelta.rows`.

    Args:
        staged: function that allocates host memory.

    Attributes:
        piece: the memory, uint8.
        plain: whether the kernels of `triton.py` support all changes of the adapter.

    Raises:
        AdapterError: the adapter changes experts.
    """

    def __init__(self, found: Changes, dtype: torch.dtype, staged: Callable[[int], torch.Tensor]) -> None:
        refuse_experts(found)
        super().__init__(found, NAMES[dtype])  # type: ignore[arg-type]
        self.plain = all(
            not place.lookup and delta.full is None and delta.rows is None
            for place, deltas in found.values()
            for delta in deltas.values()
        )
        held = self._tensors()
        wide = [_widened(tensor, name) for _, name, tensor in held]
        begins = list(itertools.accumulate((-(-t.nbytes // _BOUNDARY) * _BOUNDARY for t in wide), initial=0))
        self.piece = staged(begins[-1])
        for (delta, name, old), new, begin in zip(held, wide, begins):
            there = self.piece[begin : begin + new.nbytes].view(new.dtype).view(new.shape)
            there.copy_(new)
            object.__setattr__(delta, name, there[tuple(slice(size) for size in old.shape)])
        self.nbytes += self.piece.nbytes - sum(old.nbytes for _, _, old in held)

    def on(self, piece: torch.Tensor) -> TorchAdapter:
        """Return the same adapter with tensors in `piece`, a copy of its memory, and copies of `TorchDelta.rows`."""
        made = TorchAdapter.__new__(TorchAdapter)
        made.dtype, made.nbytes, made.whole = self.dtype, self.nbytes, self.whole
        made.deltas = {number: [self._moved(delta, piece) for delta in of] for number, of in self.deltas.items()}
        return made

    def _tensors(self) -> list[tuple[TorchDelta, str, torch.Tensor]]:
        every = [(delta, name) for of in self.deltas.values() for delta in of for name in _TENSORS]
        return [(delta, name, getattr(delta, name)) for delta, name in every if getattr(delta, name) is not None]

    def _moved(self, delta: TorchDelta, piece: torch.Tensor) -> TorchDelta:
        moved: dict[str, Any] = {}
        for name in _TENSORS:
            tensor: torch.Tensor | None = getattr(delta, name)
            if tensor is not None:
                begin, span = tensor.data_ptr() - self.piece.data_ptr(), tensor.stride(0) * len(tensor)
                whole = piece[begin : begin + span * tensor.itemsize].view(tensor.dtype)
                moved[name] = whole.as_strided(tensor.shape, tensor.stride())
        if delta.rows is not None:
            moved["rows"] = tuple(part.to(piece.device) for part in delta.rows)
        return dataclasses.replace(delta, **moved)


def _widened(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Pad a matrix with columns up to the multiple that `triton.py` reads."""
    multiple = {"a": GPU_COLUMNS, "b": GPU_RANKS}.get(name)
    return tensor if multiple is None else torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % multiple))


# ---- adapters of a step ----------------------------------------------------------------------------------------------


class _Held:
    """An adapter that has a slot; `there` is set when its copy to the device is queued."""

    def __init__(self, slot: int, nbytes: int) -> None:
        self.slot, self.nbytes = slot, nbytes
        self.there: TorchAdapter | None = None


class DeviceAdapters(EagerAdapters):
    """Adapters of a GPU's steps. A step's map from rows to adapters is set before its layers run.

    Args:
        dtype: type of the model's activations.
        slots: maximum number of adapters of a step.
        rank: largest rank of an adapter.
        rows: number of rows of the largest captured step.
        memory: bytes of all adapters on the device above which adapters that the step does not use are removed.
        in_flight: maximum number of steps that the host may be ahead of the device.
    """

    def __init__(
        self,
        stream: DeviceStream,
        places: Iterable[Place],
        dtype: torch.dtype,
        *,
        slots: int,
        rank: int,
        rows: int,
        memory: int,
        in_flight: int = 2,
    ) -> None:
        super().__init__()
        self._stream, self._dtype, self._rank, self._memory = stream, dtype, rank, memory
        self._blocks: Blocks | None = None
        self._held: OrderedDict[int, _Held] = OrderedDict()  # by serial number, the least recently used first
        self._gone: deque[int] = deque()
        self._watched: set[int] = set()  # serial numbers of adapters whose end of life is reported to `_gone`
        self._slots_in_all, self._free = slots, list(range(slots))
        device = stream.device
        self._has_kernels = on_gpu(torch.empty(0, device=device))
        self._parts = {
            place.number: sorted(place.parts.values()) for place in places if not (place.lookup or place.experts)
        }
        sizes = [slots * len(parts) for parts in self._parts.values()]
        self._begins = dict(zip(self._parts, itertools.accumulate(sizes, initial=0)))
        total = sum(sizes)
        self._host = (np.zeros((total, GPU_FIELDS), np.int64), np.zeros(total, np.int32), np.zeros(total, np.float32))
        self._there = [torch.from_numpy(table.copy()).to(device) for table in self._host]
        self._columns = {
            number: torch.tensor([(begin, end - begin) for _, begin, end in parts], dtype=torch.int32).to(device)
            for number, parts in self._parts.items()
        }
        self._rows = rows
        lines = {"table": ((3, rows), np.int32), "rows": ((rows,), np.int32), "scales": ((rows,), np.float32)}
        tables = {f"{of}_{name}": kind for of in _OF for name, kind in lines.items()}
        self._staging = Staging(stream, tables, room=0, pieces=max(2, in_flight))
        stream.join()

    def packed(self, found: Changes) -> DeviceAdapter:
        """Pack an adapter in host memory."""
        return DeviceAdapter(found, self._dtype, self._stream.staged)

    def capturable(self, entries: Entries) -> bool:
        """Whether a captured step can use these adapters."""
        return len(entries.rows) <= self._rows and self._launches(entries)

    def send(self, entries: Entries | None, drawn: NDArray[np.int64]) -> None:
        """Send the adapters of a captured step to the device; `drawn` are the rows whose logits are computed."""
        held = {} if entries is None else self._bring(entries)
        host, _ = self._staging.host()
        for of, some in zip(_OF, (entries, None if entries is None else entries.among(drawn))):
            host[f"{of}_table"][...] = [[-1], [0], [0]]
            if some is not None:
                slots = [held[adapter.serial].slot for adapter in some.adapters]
                table = block_table(some.starts.tolist(), slots, NARROW)
                host[f"{of}_table"][:, : table.shape[1]] = table
                host[f"{of}_rows"][: len(some.rows)] = some.rows
                host[f"{of}_scales"][: len(some.rows)] = some.scales
        self._staging.send(0)

    def taking_sent(self, *, head: bool) -> None:
        """Add the adapters of `send` from now on, to products of layers or of the head. Call it in stream work."""
        from candle_vllm.core.kernels.lora.triton import Blocks

        table, rows, scales = (self._staging.device[f"{_OF[head]}_{name}"] for name in ("table", "rows", "scales"))
        self._blocks, self.groups = Blocks(table, rows, scales, NARROW), ()

    def taking(self, entries: Entries | None) -> Work:
        """Send the adapters of a step that is not captured; return stream work that starts adding them."""
        if entries is None:
            return self.taking_none
        held, device = self._bring(entries), self._stream.device
        if not self._launches(entries):

            def in_torch() -> None:
                there = [
                    dataclasses.replace(adapter, layout=held[adapter.serial].there) for adapter in entries.adapters
                ]
                self._blocks = None
                self.choose(msgspec.structs.replace(entries, adapters=there), device)  # type: ignore[type-var]

            return in_torch
        from candle_vllm.core.kernels.lora.triton import Blocks, wide_block

        most = wide_block(device) if np.diff(entries.starts).max() > NARROW else NARROW
        slots = [held[adapter.serial].slot for adapter in entries.adapters]
        numbers = (block_table(entries.starts.tolist(), slots, most), entries.rows.astype(np.int32), entries.scales)
        sent = [Sent(self._stream, array) for array in numbers]

        def launched() -> None:
            table, rows, scales = (each.there() for each in sent)
            self._blocks, self.groups = Blocks(table, rows, scales, most), ()

        return launched

    def taking_none(self) -> None:
        """Add no adapters from now on. Call it in stream work."""
        self._blocks, self.groups = None, ()

    def add(self, place: Place | None, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `EagerAdapters`; with kernels, y is changed in place."""
        if self._blocks is None or place is None:
            return super().add(place, x, y, bias)
        from candle_vllm.core.kernels.lora.triton import add_deltas

        add_deltas(y, x.to(y.dtype), self._slots(place.number), self._blocks, bias)
        return y

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _launches(self, entries: Entries) -> bool:
        """Whether kernels can add the adapters: all changes are supported, and no row has more than one adapter."""
        plain = all(adapter.layout.plain for adapter in entries.adapters)
        return self._has_kernels and plain and bool((np.diff(np.sort(entries.rows)) > 0).all())

    def _slots(self, number: int) -> Slots:
        """Return the tables of all slots for an adapter site."""
        from candle_vllm.core.kernels.lora.triton import Slots

        parts, begin, slots = self._parts[number], self._begins[number], self._slots_in_all
        end, shape = begin + slots * len(parts), (slots, len(parts))
        addresses, ranks, scales = (table[begin:end].view(*shape, *table.shape[1:]) for table in self._there)
        widest = max(last - first for _, first, last in parts)
        return Slots(addresses, ranks, scales, self._columns[number], widest, self._rank)

    def _bring(self, entries: Entries) -> dict[int, _Held]:
        """Assign slots to adapters, and send those that are not on the device; return all of them by serial number."""
        while self._gone:
            self._leave(serial := self._gone.popleft())
            self._watched.discard(serial)
        wanted = {adapter.serial for adapter in entries.adapters}
        for adapter in entries.adapters:
            if adapter.serial in self._held:
                self._held.move_to_end(adapter.serial)
                continue
            others = [serial for serial in self._held if serial not in wanted]
            taken = sum(held.nbytes for held in self._held.values()) + adapter.nbytes
            while others and (not self._free or taken > self._memory):
                taken -= self._held[others[0]].nbytes
                self._leave(others.pop(0))
            held = self._held[adapter.serial] = _Held(self._free.pop(), adapter.nbytes)
            if adapter.serial not in self._watched:
                self._watched.add(adapter.serial)
                weakref.finalize(adapter.layout, self._gone.append, adapter.serial).atexit = False
            self._stream.run(functools.partial(self._fetch, adapter.layout, held))
        return {serial: self._held[serial] for serial in wanted}

    def _leave(self, serial: int) -> None:
        held = self._held.pop(serial, None)
        if held is not None:
            self._free.append(held.slot)

    def _fetch(self, layout: DeviceAdapter, held: _Held) -> None:
        """Copy an adapter to the device, and update the tables of its slot; runs in the stream."""
        piece = torch.empty_like(layout.piece, device=self._stream.device)
        copy(piece, layout.piece)
        held.there = there = layout.on(piece)
        addresses, ranks, scales = self._host
        for number, parts in self._parts.items():
            begin = self._begins[number] + held.slot * len(parts)
            own = slice(begin, begin + len(parts))
            addresses[own], ranks[own], scales[own] = 0, 0, 0
            for delta in there.deltas.get(number, ()):
                at = begin + parts.index((delta.expert, delta.begin, delta.end))
                tensors = (delta.a, delta.b, delta.less, delta.bias)
                addresses[at] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
                ranks[at], scales[at] = 0 if delta.a is None else len(delta.a), delta.scale
        for table, new in zip(self._there, self._host):
            copy(table, Sent(self._stream, new).there())


_OF = ("layers", "head")


def block_table(starts: Sequence[int], slots: Sequence[int], most: int) -> NDArray[np.int32]:
    """Return the table [3, blocks] of `triton.Blocks`, with at most `most` rows of a group in a block.

    Args:
        starts: [G + 1] first index of each of G groups in `triton.Blocks.rows`, and the end of the last group.
        slots: [G] slot of each adapter.
    """
    blocks = [
        (slot, begin, min(most, last - begin))
        for slot, first, last in zip(slots, starts[:-1], starts[1:], strict=True)
        for begin in range(first, last, most)
    ]
    return np.array(blocks, np.int32).T
