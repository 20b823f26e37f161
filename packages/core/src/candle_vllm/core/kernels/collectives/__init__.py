# SPDX-License-Identifier: MIT
"""Collective operations of a model's ranks: all-reduce, all-gather, all-to-all, and sends between pipeline stages.

A **rank** is one of the processes that compute a model together. All ranks call the same operations in the same order.
Source: Shoeybi et al., 2019, arXiv:1909.08053 (Megatron-LM).
"""

from __future__ import annotations

import collections
import datetime
import errno
import logging
import mmap
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from candle_vllm.core.kernels.recorded import Value

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_CONNECTING = 10.0  # seconds in which ranks that have found each other must be connected
_ABANDONED: list[Any] = []
_LOOK = datetime.timedelta(seconds=0.5)  # interval at which a waiting rank checks whether another has ended
SLOT_BYTES = 1 << 19  # bytes that ranks sum or gather at a time in shared memory
_PIECE = SLOT_BYTES // 4  # elements of these
FIRST_SLOT = 4096  # offset of a rank's slots in the rank's block, after the counter
BLOCK_BYTES = FIRST_SLOT + 2 * SLOT_BYTES  # bytes of a rank's block
_TURNS = 2000  # number of polls for another rank of this machine, about 25 us, after which this rank sleeps
_NAPS = 50e-6, 1e-3  # seconds of a waiting rank's first sleep, and of its longest


class Stages(Protocol):
    """Pipeline stages of a model whose layers are divided: one rank's connections to its peers in the other stages.

    Tensors arrive in the order in which they were sent. Between GPUs, results of the last stage return to the
    first stage over a separate connection, so that they do not wait for activations between these two stages.

    Attributes:
        rank, size: this rank's stage, from 0 on, and the number of stages.
    """

    rank: int
    size: int

    def send(self, x: Value, to: int) -> None:
        """Send x [...], which must not be written to any more; the host does not wait for the receiver."""

    def receive(self, x: Value, source: int) -> Value:
        """Fill x with a tensor that a stage sent, and return it."""

    def least(self, number: int) -> int:
        """See `Collective`."""

    def close(self) -> None:
        """See `Collective`."""


class Sums(Protocol):
    """Sum of partial results over ranks."""

    def sum(self, x: Value) -> Value:
        """Sum x [T, ...] over all ranks; return all rows, or this rank's rows in a step that `TokenShares` divides."""


class Collective(Protocol):
    """Collective operations of one rank with the other ranks of its model, or of its pipeline stage.

    Attributes:
        rank, size: this rank, from 0 on, and the number of ranks.
        stages: the pipeline stages; None without pipeline parallelism.
    """

    rank: int
    size: int
    stages: Stages | None

    def sum(self, x: Value) -> Value:
        """Add up x [...] of all ranks, perhaps in place; the result has the same bits on each rank."""

    def gather(self, x: Value, width: int, out: Value | None = None) -> Value:
        """Concatenate x [T, up to width] of all ranks to [T, size * width]; missing columns of a rank are 0.

        The result may be written to `out` [T, size * width], contiguous, which saves an allocation.
        """

    def exchange(self, x: Value, sent: Sequence[int], received: Sequence[int]) -> Value:
        """Send rows from each rank to each (all-to-all); return the received rows, [sum of received, C], in rank order.

        Args:
            x: [sum of sent, C], of any type: rows for the first rank, then for the second rank, and so on.
            sent, received: number of rows to and from each rank, this one included.
        """

    def least(self, number: int) -> int:
        """Return the minimum of an integer below 2^63 over the ranks of all stages."""

    def close(self) -> None:
        """Close the connections to the other ranks."""


def is_first(ranks: Collective) -> bool:
    """Return whether this is the engine's own rank, the first rank of the first stage."""
    return ranks.rank == 0 and (ranks.stages is None or ranks.stages.rank == 0)


class VocabularyShare(NamedTuple):
    """A rank's part of a vocabulary table whose rows are divided.

    Attributes:
        collective: the ranks.
        first: this rank's first row.
        most: rows of each rank, except that the last ranks may have fewer.
        total: V, the rows of the whole table.
    """

    collective: Collective
    first: int
    most: int
    total: int

    def whole(self, own: Value, out: Value | None = None) -> Value:
        """Gather the parts [T, up to `most`] of all ranks to rows [T, V]; for `out` see `Collective.gather`."""
        return self.collective.gather(own, self.most, out)[:, : self.total]


class Notes(Protocol):
    """Key-value store through which processes find each other (rendezvous)."""

    def set(self, key: str, value: bytes) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Wait until the key is written; return the value."""

    def has(self, key: str) -> bool:
        """Whether the key is written."""

    def add(self, key: str, amount: int) -> int:
        """Add to an integer, which is 0 at first; return the sum."""


def _store(notes: Notes) -> Any:
    """Wrap a store for torch.distributed, because torch's own TCPStore accepts any client, on every address."""
    from torch import distributed

    class NotesStore(distributed.Store):
        def set(self, key: str, value: Any) -> None:
            notes.set(key, bytes(value))

        def get(self, key: str) -> bytes:
            return notes.get(key)

        def wait(self, keys: list[str], timeout: Any = None) -> None:
            del timeout
            for key in keys:
                notes.get(key)

        def check(self, keys: list[str]) -> bool:
            return all(map(notes.has, keys))

        def add(self, key: str, value: int) -> int:
            return notes.add(key, value)

    return NotesStore()


def shared_memory(ranks: int) -> BinaryIO | None:
    """Return shared memory for the collectives of this machine's ranks; None without support. See `sealed_memory`."""
    if sys.platform != "linux":
        return None
    try:
        return sealed_memory(ranks * BLOCK_BYTES)
    except OSError as error:
        logger.warning("ranks sum over Gloo, which is slower: the system provides no shared memory (%s)", error)
        return None


def sealed_memory(size: int) -> BinaryIO:
    """Create zeroed memory of `size` bytes that ranks of this machine share by its file descriptor.

    The memory has no name by which other processes could open it, and its size is fixed.

    Raises:
        OSError: the system is not Linux, or forbids such memory.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "only Linux has it")
    import fcntl

    made = os.memfd_create("candle-vllm-ranks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    file = os.fdopen(made, "r+b", buffering=0)
    file.truncate(size)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file


class _SharedMemory:
    """Collectives of this machine's ranks in shared memory: float32 sums in the order of the ranks, and gathers.
    The layout is in `cpu.py`.

    `first` is the index of the block of the group's first rank, `gone` is set when another rank has ended. Raises
    ValueError if the memory is too small; both operations raise RuntimeError if a rank has ended or does not arrive.
    """

    def __init__(
        self, memory: BinaryIO, first: int, rank: int, size: int, patience: float, gone: threading.Event
    ) -> None:
        from candle_vllm.core.kernels.cpu_runtime.operation import address_of, c_function

        self._memory = np.frombuffer(mmap.mmap(memory.fileno(), (first + size) * BLOCK_BYTES), np.uint8)
        self._state = np.zeros(1, np.int64)
        self._given = address_of(self._memory) + first * BLOCK_BYTES, rank, size
        self._state_at = address_of(self._state)
        self._number, self._patience, self._gone = 0, patience, gone
        self._add_up = c_function("collectives.cpu:add_up", 8)
        self._stand_together = c_function("collectives.cpu:stand_together", 10)

    def add(self, address: int, count: int) -> None:
        """Overwrite `count` floats at an address with their sums."""
        for start in range(0, count, _PIECE):
            self._do(self._add_up, address + 4 * start, min(_PIECE, count - start))

    def put_together(self, address: int, count: int, out: int) -> None:
        """Gather `count` elements of 4 bytes of each rank to address `out`, in the order of the ranks."""
        for start in range(0, count, _PIECE):
            place = out + 4 * start, 4 * count
            self._do(self._stand_together, address + 4 * start, min(_PIECE, count - start), *place)

    def _do(self, function: Callable[..., None], *piece: int) -> None:
        self._number += 1
        self._state[0] = 0
        given = *self._given, self._number, *piece, _TURNS, self._state_at
        function(*given)
        if self._state[0] != 2:
            self._wait(function, given)

    def _wait(self, function: Callable[..., None], given: tuple[int, ...]) -> None:
        nap, most = _NAPS
        until = time.monotonic() + self._patience
        while self._state[0] != 2:
            if self._gone.is_set():
                raise RuntimeError("another rank has ended")
            if time.monotonic() > until:
                raise RuntimeError(f"the other ranks did not arrive within {self._patience:.0f} s")
            time.sleep(nap)
            nap = min(2 * nap, most)
            function(*given)


class ProcessGroup:
    """Ranks in separate processes, over torch.distributed: NCCL between GPUs, otherwise Gloo; see `Collective`.

    With `memory`, CPU ranks of one machine sum floats of up to 32 bits, and gather rows of whole 4-byte words, in it.

    No global group is created, so that a process may have several such groups, and use torch.distributed itself.

    Args:
        rank, size, stages: see `Collective`.
        device: device of the tensors.
        notes: store through which the ranks find each other.
        name: name of the group in the store.
        patience: seconds that a rank waits for the others within a step; connecting may take `_CONNECTING` seconds.
        host: the address at which Gloo listens for the other ranks.
        memory: shared memory of all ranks, if they are on one machine; see `shared_memory`.
        first: index in that memory of this group's first rank.
        ring: whether the group is used as `Stages`. Between GPUs, results that return to the first stage then have
            their own communicator: it runs operations in order, and a send that waits would delay them.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: str,
        notes: Notes,
        name: str,
        *,
        patience: float,
        host: str = "127.0.0.1",
        stages: Stages | None = None,
        memory: BinaryIO | None = None,
        first: int = 0,
        ring: bool = False,
    ) -> None:
        import torch
        from torch import distributed

        self.rank, self.size, self.stages = rank, size, stages
        self._sent: collections.deque[tuple[Any, Any]] = collections.deque()  # sends in flight, and their tensors
        self._gone = threading.Event()
        self._receiver: _Receiver | None = None
        self._store = found = _store(notes)  # must live as long as the groups, whose C++ code calls it
        wait = datetime.timedelta(seconds=patience)
        gloo: Any = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = datetime.timedelta(seconds=_CONNECTING)
        self._host: Any = gloo(distributed.PrefixStore(f"{name}/host", found), rank, size, options)
        self._host._set_default_timeout(wait)
        self._group: Any = self._host
        self._back: Any = self._host
        self._shared: _SharedMemory | None = None
        if memory is not None and torch.device(device).type == "cpu" and size > 1:
            self._shared = _SharedMemory(memory, first, rank, size, patience, self._gone)
        if torch.device(device).type == "cuda" and size > 1:
            nccl: Any = distributed.ProcessGroupNCCL
            named = nccl.Options()
            named._timeout = wait
            self._group = self._back = nccl(distributed.PrefixStore(f"{name}/device", found), rank, size, named)
            if ring:
                self._back = nccl(distributed.PrefixStore(f"{name}/back", found), rank, size, named)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        if self._shared is None or not x.is_floating_point() or x.itemsize > 4:
            if self._group is self._host and self.size > 2 and x.is_floating_point():
                return x.copy_(self._sum_in_order(x.view(-1)).view(x.shape))
            self._over(self._group.allreduce([x]))
            return x
        wide = x.float()  # x itself, or a float32 copy of a narrower x; its sum is rounded once
        self._shared.add(wide.data_ptr(), wide.numel())
        return x if wide is x else x.copy_(wide)

    def _sum_in_order(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x [N] in the order of the ranks: each rank adds up all elements of a short x, otherwise a share of them.

        In the library's own sum, the order of ranks depends on an element's index, and so on the rest of the step.
        """
        if x.nbytes <= SLOT_BYTES:
            return added_up(self.gather(x[None], len(x)).view(self.size, -1))
        most = -(-len(x) // self.size)
        counts = [max(0, min(most, len(x) - rank * most)) for rank in range(self.size)]
        own = counts[self.rank]
        parts = self.exchange(x[:, None], counts, [own] * self.size).view(self.size, own)
        return self.gather(added_up(parts)[None], most)[0, : len(x)]

    def _over(self, work: Any, *, on_host: bool = False) -> None:
        """Wait until the operation is done, or another rank has ended."""
        if self._group is not self._host and not on_host:
            work.wait()  # only the GPU's stream waits
            return
        while True:
            try:
                work.wait(_LOOK)
            except RuntimeError:
                if self._gone.is_set() or work.is_completed():  # any other error than the timeout of this wait
                    raise
            else:
                return

    def gather(self, x: torch.Tensor, width: int, out: torch.Tensor | None = None) -> torch.Tensor:
        rows, own = x.shape
        if own < width:
            wider = x.new_zeros(rows, width)
            wider[:, :own] = x
            x = wider
        x, row = x.contiguous(), width * x.itemsize
        if self._shared is not None and row % 4 == 0:
            out = x.new_empty(rows, self.size * width) if out is None else out
            for number in range(rows):
                place = number * row
                self._shared.put_together(x.data_ptr() + place, row // 4, out.data_ptr() + self.size * place)
            return out
        if not rows:  # Gloo cannot gather 0 rows
            return x.new_empty(0, self.size * width)
        parts = x.new_empty(self.size * rows, width)
        self._over(self._group._allgather_base(parts, x))
        return parts.view(self.size, rows, width).transpose(0, 1).reshape(rows, self.size * width)

    def exchange(self, x: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        import torch

        found = x.new_empty(sum(received), x.shape[1])
        ours, theirs = (each.contiguous().view(torch.uint8) for each in (x, found))  # bytes, so that any type works
        self._over(self._group.alltoall_base(theirs, ours, list(received), list(sent)))
        return found

    def least(self, number: int) -> int:
        import torch
        from torch import distributed

        found = torch.tensor([number])
        options: Any = distributed.AllreduceOptions()
        options.reduceOp = distributed.ReduceOp.MIN
        self._over(self._host.allreduce([found], options), on_host=True)
        return int(found) if self.stages is None else self.stages.least(int(found))

    def send(self, x: torch.Tensor, to: int) -> None:
        work = (self._group if to > self.rank else self._back).send([x], to, 0)
        if x.is_cuda:
            work.wait()  # only the stream waits, also in captured work
            return
        self._sent.append((work, x))
        if len(self._sent) > 2 * self.size:  # at most two tensors of a step, and one step in flight for each stage
            self._sent.popleft()[0].wait()  # the oldest was received; Gloo's `is_completed` is false until a wait

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        work = (self._group if source < self.rank else self._back).recv([x], source, 0)
        if x.is_cuda:
            work.wait()
            return x
        if self._receiver is None:
            self._receiver = _Receiver()
        self._receiver.wait(work, self._gone)
        return x

    def abort(self) -> None:
        """Make all waits fail, because another rank has ended; may be called from any thread."""
        self._gone.set()
        for group in {id(each): each for each in (self._group, self._back)}.values():
            if group is not self._host and group is not None:
                group.abort()
        if isinstance(self.stages, ProcessGroup):
            self.stages.abort()

    def close(self) -> None:
        if self._gone.is_set():
            _ABANDONED.append((self._host, self._store))  # the destructor would wait for the call that still waits
        if self._receiver is not None:
            self._receiver.close()
        for group in {id(each): each for each in (self._group, self._back, self._host)}.values():
            end = getattr(group, "abort", None)  # does not wait for other ranks
            if end is not None:
                end()
        self._group = self._back = self._host = None
        if self.stages is not None:
            self.stages.close()


def added_up(parts: torch.Tensor) -> torch.Tensor:
    """Sum parts [n, ...] of n ranks in rank order, at least in fp32, rounded once; on a GPU in any order."""
    import torch

    wide = torch.promote_types(parts.dtype, torch.float32)
    if parts.is_cuda:
        return parts.sum(0, dtype=wide).to(parts.dtype)
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


class _Receiver:
    """Wait for a receive of Gloo in a separate thread, which is abandoned when another rank has ended.

    Such a receive cannot be cancelled without closing all connections.
    """

    def __init__(self) -> None:
        self._works: queue.SimpleQueue[tuple[Any, queue.SimpleQueue[Exception | None]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="candle-vllm-receiver", daemon=True).start()

    def _run(self) -> None:
        while (given := self._works.get()) is not None:
            work, done = given
            try:
                work.wait()
            except Exception as error:  # raised in the waiting thread
                done.put(error)
            else:
                done.put(None)

    def close(self) -> None:
        """End the thread, after a receive that it waits for."""
        self._works.put(None)

    def wait(self, work: Any, gone: threading.Event) -> None:
        """Wait until the tensor has arrived; raise RuntimeError if `gone` is set first."""
        done = queue.SimpleQueue[Exception | None]()
        self._works.put((work, done))
        while True:
            try:
                failed = done.get(timeout=_LOOK.total_seconds())
            except queue.Empty:
                if gone.is_set():
                    raise RuntimeError("another rank has ended") from None
            else:
                if failed is not None:
                    raise failed
                return
