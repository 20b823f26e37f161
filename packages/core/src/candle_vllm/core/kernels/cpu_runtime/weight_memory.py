# SPDX-License-Identifier: MIT
"""Memory for the weights of recorded steps, in few large pieces.

A step with one token reads all weights once, at the speed of the memory, which needs huge pages. Numpy requests huge
pages for arrays from 4 MiB on, and most matrices of a small model are smaller, so several matrices share one **piece**,
a large array.

The memory of a model's matrices can be returned to the system while its addresses stay reserved. Loading the model
again fills the memory again, so a recorded step, which contains only addresses, reads the same weights as before.

If the threads are divided into ranks, each rank's rows of a matrix are in the memory of its own NUMA node, also after
the memory was returned and filled again. Pages on the border of two ranks, and matrices beyond `most_areas`, are not.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from candle_vllm.core.threads import AT_EXIT, LOADED_PART, in_chunks, read_or_nothing

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.numa import CpuRanks

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
ALIGNMENT = 64
_CHUNK = 1 << 19  # weights that a thread packs at a time, but at least a tile, so that the data stays in the CPU caches

MAPPED: weakref.WeakSet[Any] = weakref.WeakSet()  # matrices in use that are in mapped files
_MADE: ContextVar[list[WeightMemory] | None] = ContextVar("_MADE", default=None)
_AGAIN: ContextVar[Iterator[WeightMemory] | None] = ContextVar("_AGAIN", default=None)


def pack_tiles(pack: Callable[[int, int], object], tiles: int, columns: int) -> None:
    """Run pack(first, last) for chunks of a matrix's tiles, of 16 rows of `columns` weights, in several threads."""
    in_chunks(pack, tiles, max(1, _CHUNK // (16 * columns)))


@contextmanager
def loading(again: Sequence[WeightMemory] = ()) -> Iterator[list[WeightMemory]]:
    """Context for loading a model; yields a list, to which `new_memory` appends each memory that it returns.

    With `again`, `new_memory` returns these memories of an earlier load in turn, and `take` the same addresses.
    """
    made: list[WeightMemory] = []
    tokens = _MADE.set(made), _AGAIN.set(iter(again) if again else None)
    for memory in again:
        memory.begin_again()
    try:
        yield made
    finally:
        _MADE.reset(tokens[0])
        _AGAIN.reset(tokens[1])


def new_memory(ranks: Callable[[], CpuRanks | None] = lambda: None) -> WeightMemory:
    """Return memory for the weights of a model or of a separately loaded part; `ranks` is called for new memory."""
    again, made = _AGAIN.get(), _MADE.get()
    memory = WeightMemory(ranks=ranks()) if again is None else next(again)
    if made is not None:
        made.append(memory)
    return memory


def can_drop_pages() -> bool:
    """Whether memory can be returned to this system while its addresses stay reserved."""
    return sys.platform == "linux"


def drop_pages(array: np.ndarray) -> int:
    """Free an array's whole pages, which then read as zeros or as their file; return the number of bytes freed."""
    start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length <= 0:
        return 0
    system = ctypes.CDLL(None, use_errno=True)
    if system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), "the system does not take memory back")
    return length


class WeightMemory:
    """Allocator of aligned memory. A piece lives as long as any matrix in it. Safe for several threads.

    Args:
        piece_bytes: size of a piece; a matrix of this size or more has a piece of its own.
        ranks: ranks of the threads that read the memory; None for undivided threads.
    """

    def __init__(self, piece_bytes: int = PIECE_BYTES, ranks: CpuRanks | None = None) -> None:
        self._piece_bytes = piece_bytes
        self.ranks = ranks
        self._left = most_areas() if ranks is not None and ranks.apart else 0
        self._piece = np.empty(0, np.uint8)
        self._used = 0
        self._lock = threading.Lock()
        # For each part of a model, in the order of its `take` calls: the array (while it is in use), offset and size.
        self._taken: dict[object, list[tuple[weakref.ref[np.ndarray], int, int]]] = {}
        self._whole: list[weakref.ref[np.ndarray]] = []  # pieces
        self._stays: set[int] = set()  # addresses of pieces with memory of no part, which are never dropped
        self._again: Counter[object] | None = None  # number of `take` calls of each part since `begin_again`
        self.mapped: dict[str, tuple[Any, str | None]] = {}  # set by `packed_file`: matrices in a mapped file, by key
        self.writer: threading.Thread | None = None  # thread of `packed_file` that writes the matrices to a file
        self.kept: tuple[Path, str] | None = None  # set by `packed_file`: its file, and what that depends on

    def take(self, count: int, tiles: int = 1) -> np.ndarray:
        """Allocate `count` uninitialised bytes, uint8, at a multiple of 64.

        If the rest of a piece is too small, it is abandoned; it was never touched, so it costs no memory.

        Args:
            tiles: number of equal, consecutive tiles of the memory, which threads divide.
        """
        part: Any = LOADED_PART.get()
        with self._lock:
            if self._again is not None and part is not None:
                known = self._taken.get(part, ())
                number = self._again[part]
                self._again[part] += 1
                owner = known[number][0]() if number < len(known) and known[number][2] == count else None
                if owner is not None:
                    return owner[known[number][1] :][:count]
                found = np.empty(count + ALIGNMENT, np.uint8)  # the earlier array and its address are no longer in use
                return found[-found.ctypes.data % ALIGNMENT :][:count]
            found = self._take(count)
            if self._left > 0 and tiles > 1:
                self._place(found, tiles)
            owner: Any = found.base
            if part is None:
                self._stays.add(owner.ctypes.data)
            else:
                place = found.ctypes.data - owner.ctypes.data
                self._taken.setdefault(part, []).append((weakref.ref(owner), place, count))
            return found

    @property
    def can_map(self) -> bool:
        """Whether matrices may be in a mapped file: neither earlier addresses nor NUMA nodes are required."""
        return self._again is None and (self.ranks is None or not self.ranks.apart)

    def end_writer(self) -> None:
        """End the writer, so that it releases the matrices: wait some seconds for the file, or else give it up."""
        if self.writer is not None and (end := AT_EXIT.get(self.writer)) is not None:
            end()

    def begin_again(self) -> None:
        """From now on, let `take` return to each part the same addresses as the first time, if they are in use."""
        self._again = Counter()

    def drop(self) -> int:
        """Return the memory of all parts to the system by `drop_pages`, after the writer's end; return bytes freed."""
        if self.writer is not None:
            self.writer.join()
        pieces = [piece for each in self._whole if (piece := each()) is not None]
        pieces = [piece for piece in pieces if piece.ctypes.data not in self._stays]
        return sum(drop_pages(each) for each in (*pieces, *(matrix.data for matrix, _ in self.mapped.values())))

    def _place(self, taken: np.ndarray, tiles: int) -> None:
        """Bind each rank's tiles to the rank's NUMA node; after `most_areas` areas, tiles stay interleaved."""
        assert self.ranks is not None
        self._left -= self.ranks.place(taken, [taken.size // tiles * tile for tile in self.ranks.borders(tiles)])
        if self._left <= 0:
            logger.warning(
                "weights are only partly bound to their ranks' NUMA nodes, because Linux limits a process's mappings; "
                "the rest is interleaved over all nodes, which is slower: raise vm.max_map_count"
            )

    def _take(self, count: int) -> np.ndarray:
        space = -(-count // ALIGNMENT) * ALIGNMENT
        if self._used + space > self._piece.size:
            size = max(space, self._piece_bytes) + ALIGNMENT
            ranks = self.ranks
            memory = np.empty(size, np.uint8) if ranks is None or not ranks.apart else ranks.pages(size)
            self._whole = [*(each for each in self._whole if each() is not None), weakref.ref(memory)]
            start = -memory.ctypes.data % ALIGNMENT
            piece = memory[start : start + memory.size - ALIGNMENT]
            if space >= self._piece_bytes:  # a matrix with its own piece; later matrices still fill the current piece
                return piece[:count]
            self._piece, self._used = piece, 0
        start, self._used = self._used, self._used + space
        return self._piece[start : start + count]


def mapped_bytes() -> int:
    """Return the bytes of matrices in mapped files, which the system counts as available memory."""
    return sum(matrix.nbytes for matrix in tuple(MAPPED))


def most_areas(root: Path = Path("/")) -> int:
    """Return how many memory mappings may be bound to nodes: half of the mappings that Linux allows a process."""
    text = read_or_nothing(root / "proc/sys/vm/max_map_count").strip()
    return int(text) // 2 if text.isdecimal() else 1 << 15
