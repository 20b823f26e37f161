# SPDX-License-Identifier: MIT
"""A device stream without a device, for tests: as late as a GPU may ever be.

Work is kept, and runs only when somebody waits for a mark behind it. So a host that reads a result too early, or
overwrites what a copy has yet to read, gets wrong numbers here every time, where a GPU would give them now and then.

A device may have several streams, and there may be several devices, each in a thread of its own. Of streams beside the
one that is waited for, what it waits for runs, and no more; where that is another device, what was given to the
streams of this one before may run meanwhile. A device that nobody waits for (`progress`) runs its streams in any order
that they allow, a random one. Work that waits for another device in its midst, as a sum over ranks does, lets the other
streams run meanwhile (`meanwhile`). One that is `serial` runs everything in the order in which it was given, whichever
stream has it: so what relies on two streams to run at once waits for ever there, which is an error after a while.
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
    """Raised by work that another device must have come to as well; it is run again, until it has."""


class _Piece(NamedTuple):
    number: int  # in the order of all that was given to the device
    work: Work
    mark: _LazyMark | None = None  # of a stream beside, which must have come so far


class LazyStream:
    """See `DeviceStream`; computes on the CPU.

    Args:
        other: a stream of the same device, if there is one.
        serial: see above.

    Attributes:
        captured: how many pieces of work were captured.
        replayed: how often captured work has run.
    """

    device = torch.device("cpu")

    def __init__(self, other: LazyStream | None = None, *, serial: bool = False) -> None:
        self.captured = 0
        self.replayed = 0
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
        """See `DeviceStream`; the CPU does everything else at once."""

    def capture(self, work: Work) -> Work:
        """See `DeviceStream`."""
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay

    def between(self, host: Work) -> None:
        """See `DeviceStream`; what the work did before it is done."""
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
        """See `DeviceStream`. What is not written holds numbers that are too large for anything."""
        return torch.full((size,), 0x7F, dtype=torch.uint8)

    @property
    def pending(self) -> int:
        """Pieces of work of the device that have not run."""
        return sum(len(each._todo) for each in self._streams)

    def run_until(self, count: int) -> None:
        """Runs the first `count` pieces of work that were ever given, as far as they have not run."""
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
        """Runs a piece of any of this device's streams, where one can be run; whether there was one."""
        waiting = [each for each in self._streams if each._todo]
        if self._serial:
            return bool(waiting) and self._first().run_next()
        self._random.shuffle(waiting)
        return any(each.run_next() for each in waiting)

    def meanwhile(self) -> bool:
        """In work that waits for another device: runs what the other streams were given before it, as far as that waits
        for nothing; whether anything was. Of a serial device nothing runs beside it."""
        piece = self._running
        if piece is None or self._serial:
            return False
        return any(each._run_before(piece.number) for each in self._streams if each is not self)

    def _first(self) -> LazyStream:
        """The stream with the piece that was given first."""
        return min((each for each in self._streams if each._todo), key=lambda each: each._todo[0].number)

    def _run_before(self, number: int) -> bool:
        """Runs what was given to the device before a piece, as far as it waits for nothing; whether anything was."""
        done = self._done
        while self._todo and self._todo[0].number < number and self.run_next():
            pass
        return self._done > done

    def run_next(self) -> bool:
        """Runs the next piece; whether it could be run."""
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
    """The piece waits."""


class _LazyMark:
    def __init__(self, stream: LazyStream, count: int) -> None:
        self.stream = stream
        self._count = count

    @property
    def is_past(self) -> bool:
        over = self.stream._done - (self.stream._running is not None)  # what waits in its midst is not
        return over >= self._count

    def wait(self) -> None:
        """See `Mark`."""
        self.stream.run_until(self._count)
