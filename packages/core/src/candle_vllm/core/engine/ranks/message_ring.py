# SPDX-License-Identifier: MIT
"""A ring in shared memory: the first rank writes each message once, and all other ranks of its machine read it.

The ring has slots, and for each process a count of slots that it has written or read; a message that is longer than a
slot takes several. Counts are changed by futex calls only, which order them after earlier memory accesses on any
processor, and wake waiting processes: the first rank wakes one, and each woken process wakes two more. A waiting
reader regularly checks whether the writer still exists. On systems other than Linux, connections are used instead.

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
_HEAD = 8  # bytes of a slot's header: the message's bytes in this slot, and in later slots
PIECE = SLOT_BYTES - _HEAD
"""Bytes of a message that a slot has room for."""
_COUNTS_AT = SLOTS * SLOT_BYTES  # offset of the counts, after the slots
_APART = 64  # bytes from one count to the next, so that each has its own cache line
_ALL = 0xFFFFFFFF  # largest count, after which counts continue at 0; SLOTS divides 2**32
LOOK = 0.1  # seconds after which a waiting reader checks whether the writer still exists
_CALLS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}  # call number, 64-bit systems
_WAIT, _WAKE, _WAKE_OP = 0, 1, 5
_ADD_ONE = 1 << 28 | 1 << 12  # FUTEX_OP_ADD of 1; wakes a second process if the count was 0
_EVERYBODY = 1 << 30

_Message = TypeVar("_Message")


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


class _Ring:
    """A process's mapping of the ring's shared memory (slots and counts), and its futex calls. Raises OSError if the
    number of the futex call on this processor is not known, or the memory cannot be mapped."""

    def __init__(self, memory: BinaryIO) -> None:
        number = _CALLS.get(platform.machine())
        if number is None or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise OSError(errno.ENOSYS, f"how a {platform.machine()} calls futex(2) is not known here")
        mapped = mmap.mmap(memory.fileno(), 0)
        self.bytes = memoryview(mapped)
        self._words = self.bytes.cast("I")
        self._at: int = np.frombuffer(mapped, np.uint8).ctypes.data + _COUNTS_AT
        self._number = number
        # A waiting call releases the GIL; the other calls are short and keep it.
        self._waiting, self._calling = ctypes.CDLL(None, use_errno=True).syscall, ctypes.PyDLL(None).syscall
        for each in (self._waiting, self._calling):
            each.argtypes, each.restype = [ctypes.c_long] * 7, ctypes.c_long

    def head(self, slot: int) -> tuple[int, int]:
        """Return how many bytes of a message a slot has, and how many are in later slots."""
        first = slot * (SLOT_BYTES // 4)
        return self._words[first], self._words[first + 1]

    def set_head(self, slot: int, here: int, more: int) -> None:
        first = slot * (SLOT_BYTES // 4)
        self._words[first], self._words[first + 1] = here, more

    def count(self, which: int) -> int:
        """Return a process's count."""
        return self._words[(_COUNTS_AT + which * _APART) // 4]

    def add(self, which: int) -> None:
        """Increment a count, after all earlier reads and writes of this process; wake a process that waits for it."""
        at = self._at + which * _APART
        self._calling(self._number, at, _WAKE_OP, 1, 0, at, _ADD_ONE)

    def wake(self, which: int, how_many: int = _EVERYBODY) -> None:
        """Wake `how_many` processes that wait for a count, even if it has not changed."""
        self._calling(self._number, self._at + which * _APART, _WAKE, how_many, 0, 0, 0)

    def wait_for_change(self, which: int, seen: int, seconds: float) -> bool:
        """Wait until a count differs from `seen`, at most `seconds`; return whether it does.

        If it returns True, memory accesses that preceded the change are visible: reading the count is no barrier on
        some processors, but the futex call is."""
        wait, at = _Time(int(seconds), int(seconds % 1 * 1e9)), self._at + which * _APART
        if self._waiting(self._number, at, _WAIT, seen, ctypes.addressof(wait), 0, 0):
            return ctypes.get_errno() == errno.EAGAIN  # changed already; else a timeout or a signal
        moved = self.count(which) != seen
        self.wake(which, 2)  # a barrier as well
        return moved


def made_ring(readers: int) -> MessageRing | None:
    """Create a ring for `readers` other ranks; return None if the system does not support it."""
    if sys.platform != "linux":
        return None
    try:
        return MessageRing(readers)
    except OSError as error:
        logger.warning("messages are sent to each rank separately, which is slower: no shared-memory ring (%s)", error)
        return None


class MessageRing:
    """The first rank's end of a ring for `readers` other ranks of this machine, which are numbered from 1. They inherit
    the descriptor of its shared `memory`. Raises OSError if this system has no futex calls, or no memory that processes
    can share."""

    def __init__(self, readers: int) -> None:
        self._readers, trial = range(1, readers + 1), readers + 1
        self.memory = sealed_memory(_COUNTS_AT + (trial + 1) * _APART)
        self._writing = threading.Lock()  # steps and adapters have threads of their own
        self._room_until = SLOTS  # the writer's count up to which slots are known to be free
        self._ended = False
        try:
            self._ring = _Ring(self.memory)
            self._ring.add(trial)
            if self._ring.count(trial) != 1 or not self._ring.wait_for_change(trial, 0, 0):
                raise OSError(errno.ENOSYS, "futex(2) does not do what it should")
        except OSError:
            self.memory.close()
            raise

    def write(self, data: bytes, patience: float) -> None:
        """Write an encoded message for all readers; wait for the slowest reader while the ring is full.

        Raises BrokenPipeError if the ring has ended, and TimeoutError if it stays full for `patience` seconds.
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
                    raise TimeoutError(f"rank {rank} has not read the messages sent to it for {patience:.0f} s")
                self._ring.wait_for_change(rank, count, LOOK)
            most = max(most, behind)
        self._room_until = (number + SLOTS - most) & _ALL

    def end(self) -> None:
        """End all writes, also a waiting one; wake waiting readers, which check their connections at once."""
        self._ended = True
        self._ring.wake(0)
        for rank in self._readers:
            self._ring.wake(rank)

    def close(self) -> None:
        self.memory.close()


class RingLine(Line):
    """A rank's connection to the first rank, on the same machine: it receives over the ring and sends over the socket.
    When the socket is closed, the ring has ended as well. Raises ValueError if the ring has no reader with this rank.
    """

    def __init__(self, end: socket.socket, memory: BinaryIO, rank: int) -> None:
        super().__init__(end)
        self._ring, self._rank = _Ring(memory), rank
        if not 0 < rank < (len(self._ring.bytes) - _COUNTS_AT) // _APART - 1:
            raise ValueError(f"the ring has no count of rank {rank}")

    def receive(self, kind: type[_Message] | Any) -> _Message:
        """See `Line`; only one thread may receive."""
        data, more = self._piece()
        if more:
            pieces, left = [data], more
            while left:
                data, more = self._piece()
                if not data or len(data) + more != left:
                    raise ValueError(f"a slot has {len(data)} bytes and announces {more} more; {left} were expected")
                pieces.append(data)
                left = more
            data = b"".join(pieces)
        return decoder(kind).decode(data)

    def _piece(self) -> tuple[bytes, int]:
        """Return the next slot's bytes, and how many bytes of the message are in later slots."""
        ring, number = self._ring, self._ring.count(self._rank)
        while not ring.wait_for_change(0, number, LOOK):
            if self._is_over() and not ring.wait_for_change(0, number, 0):  # arrived messages can still be read
                raise EOFError("the other end of the line has gone")
        slot = number % SLOTS
        here, more = ring.head(slot)
        if here > PIECE or here + more > MOST_BYTES:
            raise ValueError(f"a slot announces {here} bytes and {more} more; at most {PIECE}, and {MOST_BYTES} in all")
        at = slot * SLOT_BYTES + _HEAD
        data = bytes(ring.bytes[at : at + here])
        ring.add(self._rank)
        return data, more

    def _is_over(self) -> bool:
        try:  # not select(2), which cannot handle descriptors above 1023, as inherited ones may be
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
