"""The few things that a GPU's steps need of CUDA: work in order, captured work, and marks to wait for; steps 5 to 7.

A `DeviceStream` runs what it is given in order and at some later time. What a step reads or writes on the device is
given to it; what the host reads is read behind a mark. So a test can put a stream in its place that runs nothing before
it is waited for.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Work: TypeAlias = Callable[[], None]


class Mark(Protocol):
    """A place in the order of a stream's work."""

    def wait(self) -> None:
        """Returns when all work before the mark is done."""
        ...


class DeviceStream(Protocol):
    """Work on a device, in order."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        ...

    def run(self, work: Work) -> None:
        """Puts work behind what was given before. It must not wait for the device."""
        ...

    def join(self) -> None:
        """What was done on the device without the stream comes before what is given to it from now on."""
        ...

    def capture(self, work: Work) -> Work:
        """Work that does the same on the same memory, at little cost; it is given to `run`. Captures, runs nothing.

        The work must have run once before. Tensors that it makes stay, and are overwritten whenever it runs.
        """
        ...

    def mark(self) -> Mark:
        """Marks the end of what was given so far."""
        ...

    def staged(self, size: int) -> torch.Tensor:
        """Memory of the host, uint8 [size], from which copies to the device need not wait."""
        ...


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies between the device and staged memory, or on the device; work."""
    target.copy_(source, non_blocking=True)


class Sent:
    """An array of the host on its way to the device: a copy in staged memory, from which work need not wait.

    Args:
        stream: whose work will ask for it.
        array: copied now.
    """

    def __init__(self, stream: DeviceStream, array: NDArray[Any]) -> None:
        kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
        self._stream = stream
        self._staged = stream.staged(array.nbytes).view(kind).view(array.shape)
        self._staged.numpy()[...] = array

    def there(self) -> torch.Tensor:
        """The array on the device; work."""
        return self._staged.to(self._stream.device, non_blocking=True)


class CudaStream:
    """A CUDA stream of its own, and graphs whose passing tensors share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self.join()

    def run(self, work: Work) -> None:
        """See `DeviceStream`."""
        # The engine's thread is not the one that made the stream: device and stream are each thread's own.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream), torch.inference_mode():
            work()

    def join(self) -> None:
        """See `DeviceStream`."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def capture(self, work: Work) -> Work:
        """See `DeviceStream`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream), _no_collection():
            # Not `torch.cuda.graph`: it empties caches each time, which takes longer than this. The generator's state,
            # which a capture registers, must not be made in inference mode.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                with torch.inference_mode():
                    work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the first error is the one that says something
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay

    def mark(self) -> _CudaMark:
        """See `DeviceStream`."""
        with torch.cuda.device(self.device):
            event = torch.cuda.Event()
            event.record(self._stream)
        return _CudaMark(event)

    def staged(self, size: int) -> torch.Tensor:
        """See `DeviceStream`."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing is collected meanwhile: pinned memory that is freed records an event, which a capture would take up."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """See `Mark`."""
        self._event.synchronize()
