# SPDX-License-Identifier: MIT
"""What the first rank tells all others of its machine, written once into memory that they share, whatever their number.

Slots in a ring, and for each process a count of those that it has written or read; a message that is longer than a slot
takes several. Counts are moved by the system alone (a futex), which orders them behind what was written or read before,
on any processor, and wakes who waits: the first rank wakes one, and whoever was woken wakes two more. Who waits looks
now and then whether the other end is still there. Only Linux has it; elsewhere each rank is told over its line.

Source: futex(2), FUTEX_WAKE_OP; Drepper, Futexes Are Tricky, 2011.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import platform
import socket
import sys
import threading
import time
from typing import Any, BinaryIO, TypeVar

import numpy as np

from candle_vllm.core.engine.ranks.rank_line import MOST_BYTES, Line, decoder
from candle_vllm.core.kernels.collectives import sealed_memory

logger = logging.getLogger(__name__)

SLOTS = 16
SLOT_BYTES = 1 << 17
_HEAD = 8  # bytes at the beginning of a slot: of the message, how many it has and how many follow
PIECE = SLOT_BYTES - _HEAD
"""Bytes of a message that a slot has room for."""
_COUNTS_AT = SLOTS * SLOT_BYTES  # behind the slots
_APART = 64  # bytes from one count to the next, so that each has a cache line of its own
_ALL = 0xFFFFFFFF  # counts begin anew behind it; SLOTS divides their number
LOOK = 0.1  # seconds after which who waits looks whether the other end is still there
_CALLS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}  # futex's number, 64-bit systems
_WAIT, _WAKE, _WAKE_OP = 0, 1, 5
_ADD_ONE = 1 << 28 | 1 << 12  # FUTEX_OP_ADD of 1; and wake one more where the count was 0
_EVERYBODY = 1 << 30

_Message = TypeVar("_Message")


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


class _Ring:
    """Slots and counts as a process has them, and what it asks of the system.

    Args:
        memory: of the ring.

    Raises:
        OSError: this system has no such calls.
    """

    def __init__(self, memory: BinaryIO) -> None:
        number = _CALLS.get(platform.machine())
        if number is None or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise OSError(errno.ENOSYS, f"how a {platform.machine()} calls futex(2) is not known here")
        mapped = mmap.mmap(memory.fileno(), 0)
        self.bytes = memoryview(mapped)
        self._words = self.bytes.cast("I")
        self._at: int = np.frombuffer(mapped, np.uint8).ctypes.data + _COUNTS_AT
        self._number = number
        # What waits lets other threads of this process run; what does not keeps them from coming between.
        self._waiting, self._calling = ctypes.CDLL(None, use_errno=True).syscall, ctypes.PyDLL(None).syscall
        for each in (self._waiting, self._calling):
            each.argtypes, each.restype = [ctypes.c_long] * 7, ctypes.c_long

    def head(self, slot: int) -> tuple[int, int]:
        """Of a slot: how many bytes of the message it has, and how many follow."""
        first = slot * (SLOT_BYTES // 4)
        return self._words[first], self._words[first + 1]

    def set_head(self, slot: int, here: int, more: int) -> None:
        """See `head`."""
        first = slot * (SLOT_BYTES // 4)
        self._words[first], self._words[first + 1] = here, more

    def count(self, which: int) -> int:
        """A process's count."""
        return self._words[(_COUNTS_AT + which * _APART) // 4]

    def add(self, which: int) -> None:
        """One more, behind all that this process has read and written; wakes one who waits for it."""
        at = self._at + which * _APART
        self._calling(self._number, at, _WAKE_OP, 1, 0, at, _ADD_ONE)

    def wake(self, which: int, how_many: int = _EVERYBODY) -> None:
        """So many who wait for a count, which may not have moved."""
        self._calling(self._number, self._at + which * _APART, _WAKE, how_many, 0, 0, 0)

    def has_moved(self, which: int, seen: int, seconds: float) -> bool:
        """Whether a count is no longer the one that was seen, within so long; what was done before it moved is seen.

        A call of the system stands behind reading it, for reading alone keeps no order on some processors.
        """
        wait, at = _Time(int(seconds), int(seconds % 1 * 1e9)), self._at + which * _APART
        if self._waiting(self._number, at, _WAIT, seen, ctypes.addressof(wait), 0, 0):
            return ctypes.get_errno() == errno.EAGAIN  # it had moved; else the time is over, or a signal came
        moved = self.count(which) != seen
        self.wake(which, 2)  # a barrier as well
        return moved


def made_ring(readers: int) -> MessageRing | None:
    """A ring for so many other ranks; None where the system has none."""
    if sys.platform != "linux":
        return None
    try:
        return MessageRing(readers)
    except OSError as error:
        logger.warning("each rank is told by itself, which takes longer: the system has no ring for it (%s)", error)
        return None


class MessageRing:
    """The first rank's end of a ring.

    Args:
        readers: the other ranks of this machine, 1 to so many.

    Attributes:
        memory: for the other ranks' processes, by its descriptor.

    Raises:
        OSError: this system has no such calls.
    """

    def __init__(self, readers: int) -> None:
        self._readers, trial = range(1, readers + 1), readers + 1
        self.memory = sealed_memory(_COUNTS_AT + (trial + 1) * _APART)
        self._writing = threading.Lock()  # steps and adapters have threads of their own
        self._room_until = SLOTS  # the count at which the slowest may not have read what would be overwritten
        self._ended = False
        try:
            self._ring = _Ring(self.memory)
            self._ring.add(trial)
            if self._ring.count(trial) != 1 or not self._ring.has_moved(trial, 0, 0):
                raise OSError(errno.ENOSYS, "futex(2) does not do what it should")
        except OSError:
            self.memory.close()
            raise

    def write(self, data: bytes, patience: float) -> None:
        """Writes an encoded message for all readers; waits for the slowest of them while it is a ring behind.

        Args:
            patience: seconds that it may take to read on.

        Raises:
            BrokenPipeError: the ring has ended.
            TimeoutError: a rank did not read on.
        """
        ring, left, begin = self._ring, len(data), 0
        with self._writing:
            while left:
                if self._ended:
                    raise BrokenPipeError(errno.EPIPE, "the ring has ended")
                number = ring.count(0)
                if number == self._room_until:
                    self._wait_for_room(number, patience)
                slot, here = number % SLOTS, min(left, PIECE)
                left -= here
                ring.set_head(slot, here, left)
                at = slot * SLOT_BYTES + _HEAD
                ring.bytes[at : at + here] = data if here == len(data) else data[begin : begin + here]
                begin += here
                ring.add(0)

    def _wait_for_room(self, number: int, patience: float) -> None:
        until, most = time.monotonic() + patience, 0
        for rank in self._readers:
            while (behind := (number - (count := self._ring.count(rank))) & _ALL) >= SLOTS:
                if self._ended:
                    raise BrokenPipeError(errno.EPIPE, "the ring has ended")
                if time.monotonic() > until:
                    raise TimeoutError(f"rank {rank} has not read on what it was told for {patience:.0f} s")
                self._ring.has_moved(rank, count, LOOK)
            most = max(most, behind)
        self._room_until = (number + SLOTS - most) & _ALL

    def end(self) -> None:
        """Nothing more is written, by whoever waits for room either; those who wait look after their lines at once."""
        self._ended = True
        self._ring.wake(0)
        for rank in self._readers:
            self._ring.wake(rank)

    def close(self) -> None:
        """Lets go of the memory's descriptor."""
        self.memory.close()


class RingLine(Line):
    """A rank's end of a line to the first rank of its machine, by which it is not told; the line's end is the ring's.

    Args:
        end: the socket.
        memory: of the ring.
        rank: which of its readers this one is.

    Raises:
        ValueError: the ring is not for such a rank.
    """

    def __init__(self, end: socket.socket, memory: BinaryIO, rank: int) -> None:
        super().__init__(end)
        self._ring, self._rank = _Ring(memory), rank
        if not 0 < rank < (len(self._ring.bytes) - _COUNTS_AT) // _APART - 1:
            raise ValueError(f"the ring has no count of rank {rank}")

    def receive(self, kind: type[_Message] | Any) -> _Message:
        """See `Line`; one thread of the rank does."""
        data, more = self._piece()
        if more:
            pieces, left = [data], more
            while left:
                data, more = self._piece()
                if not data or len(data) + more != left:
                    raise ValueError(f"{len(data)} bytes and {more} more come where {left} of a message are missing")
                pieces.append(data)
                left = more
            data = b"".join(pieces)
        return decoder(kind).decode(data)

    def _piece(self) -> tuple[bytes, int]:
        """The next slot's bytes, and how many more there are."""
        ring, number = self._ring, self._ring.count(self._rank)
        while not ring.has_moved(0, number, LOOK):
            if self._is_over() and not ring.has_moved(0, number, 0):  # what has come can still be received
                raise EOFError("the other end of the line has gone")
        slot = number % SLOTS
        here, more = ring.head(slot)
        if here > PIECE or here + more > MOST_BYTES:
            raise ValueError(f"a message of {here + more} bytes is announced, {here} of them in a slot")
        at = slot * SLOT_BYTES + _HEAD
        data = bytes(ring.bytes[at : at + here])
        ring.add(self._rank)
        return data, more

    def _is_over(self) -> bool:
        try:  # select(2) knows no descriptor from 1024 on, and a rank's have the numbers of those of the first one
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
