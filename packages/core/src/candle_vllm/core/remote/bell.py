"""Bell: wakes a thread that waits in a poll, from any other thread. Used on both sides, between steps 3 and 10."""

from __future__ import annotations

import contextlib
import os
import threading


class Bell:
    """A pipe that holds a byte while something is to be looked at.

    Attributes:
        descriptor: readable once it was rung. Clear it before looking at what happened, or a ring may be lost.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a stream may be dropped, and so aborted, in the midst of anything
        self._closed = False
        self.descriptor, self._write = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._write, False)

    def ring(self) -> None:
        """Something happened. Thread-safe; nothing happens once it is closed."""
        with self._lock, contextlib.suppress(BlockingIOError):  # a full pipe is readable as well
            if not self._closed:
                os.write(self._write, b"\0")

    def clear(self) -> None:
        """What happened is being looked at."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.descriptor, 4096)

    def close(self) -> None:
        """Lets go of the pipe; nobody may wait for it any more. Closing twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.descriptor)
                os.close(self._write)
