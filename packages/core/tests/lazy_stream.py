# SPDX-License-Identifier: MIT
"""A device stream without a device, for tests: it runs work as late as possible.

Work is queued, and runs only when the host waits for a mark after it. So a host that reads a result too early, or
overwrites the source of a copy that has not run, always gets wrong values here; on a GPU it would get them rarely.

A device may have several streams, and there may be several devices, each in a thread of its own. When the host waits
for a stream, the other streams run only the work that this stream waits for; while it waits for another device, earlier
work of this device's other streams may run. A device that no host waits for (`progress`) runs its streams in random
order. While work waits for another device, such as a sum over ranks, the other streams may run (`meanwhile`). A
`serial` device runs all work in the order in which it was queued, whatever the stream: code that needs two streams to
run at the same time never ends there, which is an error after `_PATIENCE`.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from typing import NamedTuple

import torch

from candle_vllm.core.kernels.device_stream import Mark, Work

_PATIENCE = 20.0  # seconds for another device


class NotYetError(Exception):
    """Raised by work that waits for the same work of another device; it is run again until that has begun."""


class _Piece(NamedTuple):
    number: int  # order of the work among all work of the device
    work: Work
    mark: _LazyMark | None = None  # mark of another stream that must be reached before


class LazyStream:
    """See `DeviceStream`; computes on the CPU.

    Args:
        other: a stream of the same device, if there is one.
        serial: see above.

    Attributes:
        captured: number of captured pieces of work.
        replayed: number of replays of captured work.
        pools: number of memory pools of captures.
    """

    device = torch.device("cpu")

    def __init__(self, other: LazyStream | None = None, *, serial: bool = False) -> None:
        self.captured = 0
        self.replayed = 0
        self.pools = 1
        self._streams: list[LazyStream] = [] if other is None else other._streams  # of the device
        self._streams.append(self)
        self._numbers: itertools.count[int] = itertools.count() if other is None else other._numbers
        self._random = random.Random(1) if other is None else other._random
        self._serial = serial if other is None else other._serial
        self._todo: deque[_Piece] = deque()
        self._running: _Piece | None = None
        self._given = 0
        self._done = 0

    def run(self, work: Work) -> None:
        """See `DeviceStream`."""
        self._todo.append(_Piece(next(self._numbers), work))
        self._given += 1

    def join(self) -> None:
        """See `DeviceStream`; all other work of the CPU is synchronous."""

    def new_pool(self) -> None:
        """See `DeviceStream`."""
        self.pools += 1

    def capture(self, work: Work) -> Work:
        """See `DeviceStream`."""
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay

    def between(self, host: Work) -> None:
        """See `DeviceStream`; the work before it has run."""
        host()

    def mark(self) -> _LazyMark:
        """See `DeviceStream`."""
        return _LazyMark(self, self._given if self._running is None else self._done)

    def beside(self) -> LazyStream:
        """See `DeviceStream`."""
        return LazyStream(self)

    def after(self, mark: Mark) -> None:
        """See `DeviceStream`."""
        assert isinstance(mark, _LazyMark)
        assert mark.stream in self._streams
        self._todo.append(_Piece(next(self._numbers), _nothing, mark))
        self._given += 1

    def staged(self, size: int) -> torch.Tensor:
        """See `DeviceStream`. Elements that are not written have invalid, very large values."""
        return torch.full((size,), 0x7F, dtype=torch.uint8)

    @property
    def pending(self) -> int:
        """Number of pieces of work of the device that have not run."""
        return sum(len(each._todo) for each in self._streams)

    def run_until(self, count: int) -> None:
        """Run those of the stream's first `count` pieces of work that have not run."""
        until = time.monotonic() + _PATIENCE
        while self._done < count:
            stream = self._first() if self._serial else self
            number, _, mark = stream._todo[0]
            if mark is not None:
                mark.wait()
            if stream.run_next():
                until = time.monotonic() + _PATIENCE
            elif self._serial or not any(each._run_before(number) for each in self._streams if each is not self):
                time.sleep(0.0005)
                if time.monotonic() > until:
                    raise RuntimeError(f"another device has not come to piece {number} of what this one was given")

    def progress(self) -> bool:
        """Run a piece of any of this device's streams that can run; return whether there was one."""
        waiting = [each for each in self._streams if each._todo]
        if self._serial:
            return bool(waiting) and self._first().run_next()
        self._random.shuffle(waiting)
        return any(each.run_next() for each in waiting)

    def meanwhile(self) -> bool:
        """While work waits for another device, run earlier work of other streams, as far as it need not wait; return
        whether any ran. On a serial device no other work runs."""
        piece = self._running
        if piece is None or self._serial:
            return False
        return any(each._run_before(piece.number) for each in self._streams if each is not self)

    def _first(self) -> LazyStream:
        """Return the stream with the oldest piece."""
        return min((each for each in self._streams if each._todo), key=lambda each: each._todo[0].number)

    def _run_before(self, number: int) -> bool:
        """Run the stream's work that is older than a piece, as far as it need not wait; return whether any ran."""
        done = self._done
        while self._todo and self._todo[0].number < number and self.run_next():
            pass
        return self._done > done

    def run_next(self) -> bool:
        """Run the next piece; return whether it could run."""
        piece = self._todo[0]
        if piece.mark is not None and not piece.mark.is_past:
            return False
        self._todo.popleft()
        self._done += 1
        self._running = piece
        try:
            with torch.inference_mode():
                piece.work()
        except NotYetError:
            self._todo.appendleft(piece)
            self._done -= 1
            return False
        finally:
            self._running = None
        return True


def _nothing() -> None:
    """Do nothing: this piece only waits for its mark."""


class _LazyMark:
    def __init__(self, stream: LazyStream, count: int) -> None:
        self.stream = stream
        self._count = count

    @property
    def is_past(self) -> bool:
        over = self.stream._done - (self.stream._running is not None)  # a piece that is waiting is not done
        return over >= self._count

    def wait(self) -> None:
        """See `Mark`."""
        self.stream.run_until(self._count)
