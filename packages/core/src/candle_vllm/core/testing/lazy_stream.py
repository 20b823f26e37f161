# SPDX-License-Identifier: MIT
"""A device stream without a device, for tests: as late as a GPU may ever be.

Work is kept, and runs only when somebody waits for a mark behind it. So a host that reads a result too early, or
overwrites what a copy has yet to read, gets wrong numbers here every time, where a GPU would give them now and then.
"""

from __future__ import annotations

from collections import deque

import torch

from candle_vllm.core.kernels.device_stream import Work


class LazyStream:
    """See `DeviceStream`; computes on the CPU.

    Attributes:
        captured: how many pieces of work were captured.
        replayed: how often captured work has run.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0
        self._todo: deque[Work] = deque()
        self._running = False
        self._given = 0
        self._done = 0

    def run(self, work: Work) -> None:
        """See `DeviceStream`."""
        self._todo.append(work)
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
        return _LazyMark(self, self._done if self._running else self._given)

    def staged(self, size: int) -> torch.Tensor:
        """See `DeviceStream`. What is not written holds numbers that are too large for anything."""
        return torch.full((size,), 0x7F, dtype=torch.uint8)

    @property
    def pending(self) -> int:
        """Pieces of work that have not run."""
        return len(self._todo)

    def run_until(self, count: int) -> None:
        """Runs the first `count` pieces of work that were ever given, as far as they have not run."""
        with torch.inference_mode():
            while self._done < count:
                self._done += 1
                self._running = True
                try:
                    self._todo.popleft()()
                finally:
                    self._running = False


class _LazyMark:
    def __init__(self, stream: LazyStream, count: int) -> None:
        self._stream = stream
        self._count = count

    def wait(self) -> None:
        """See `Mark`."""
        self._stream.run_until(self._count)
