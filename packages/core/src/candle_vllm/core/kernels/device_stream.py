# SPDX-License-Identifier: MIT
"""The few things that a GPU's steps need of CUDA: work in order, captured work, marks to wait for, staged memory.

A `DeviceStream` runs what it is given in order and at some later time. What a step reads or writes on the device is
given to it; what the host reads is read behind a mark. So a test can put a stream in its place that runs nothing before
it is waited for.

An array of the host comes over as one of many in the piece of memory that `Staging` copies once a step, or by itself,
as `Sent`. No memory that the host writes may still be on its way to the device when it is written again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.devices import Device
from candle_vllm.core.threads import collector_paused

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

    def between(self, host: Work) -> None:
        """In work: the host does something before it gives the stream what follows, also where that is captured.

        Captured work is in pieces then. `host` runs no work; it may mark what was given before it, and wait for that.
        """
        ...

    def mark(self) -> Mark:
        """Marks the end of what was given so far."""
        ...

    def beside(self) -> DeviceStream:
        """Another stream of the same device; its work and this one's are in no order but by `after`."""
        ...

    def after(self, mark: Mark) -> None:
        """What is given from now on comes after a mark of a stream beside this one; waits for nothing here."""
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
    """`DeviceStream` of CUDA: a stream of its own, and graphs whose passing tensors share one pool of memory."""

    def __init__(self, device: torch.device | Device) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._pieces: list[Work] | None = None  # of what is being captured
        self._graph: torch.cuda.CUDAGraph | None = None
        self.join()

    def run(self, work: Work) -> None:
        # The engine's thread is not the one that made the stream: device and stream are each thread's own.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream), torch.inference_mode():
            work()

    def join(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def capture(self, work: Work) -> Work:
        self._pieces = pieces = list[Work]()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream), collector_paused():
            try:
                self._begin_piece()
                with torch.inference_mode():
                    work()
                self._end_piece()
            except BaseException:
                if self._graph is not None:
                    with contextlib.suppress(RuntimeError):  # the first error is the one that says something
                        self._graph.capture_end()
                raise
            finally:
                self._pieces = self._graph = None

        def replay() -> None:
            for piece in pieces:
                piece()

        return replay

    def _begin_piece(self) -> None:
        # Not `torch.cuda.graph`: it empties caches each time, which takes longer than this. The generator's state,
        # which a capture registers, must not be made in inference mode.
        with torch.inference_mode(mode=False):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graph = graph

    def _end_piece(self) -> None:
        graph, self._graph = self._graph, None
        assert graph is not None
        assert self._pieces is not None
        graph.capture_end()
        self._pieces.append(graph.replay)

    def between(self, host: Work) -> None:
        if self._pieces is None:
            host()
            return
        self._end_piece()
        self._pieces.append(host)
        self._begin_piece()

    def mark(self) -> _CudaMark:
        with torch.cuda.device(self.device):
            event = torch.cuda.Event()
            event.record(self._stream)
        return _CudaMark(event)

    def beside(self) -> CudaStream:
        return CudaStream(self.device)

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        self._stream.wait_event(mark.event)

    def staged(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        """See `Mark`."""
        self.event.synchronize()


ALIGNMENT = 64
"""Numbers of 32 bits between which an array may begin: 256 bytes, the most that a kernel could want."""

_TORCH = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


class Staging:
    """Named arrays on the host and on the device, and behind them room for what each step lays out anew.

    Args:
        stream: where copies go.
        arrays: shape and dtype (int32, float32 or float64) of each array, in order.
        room: numbers of 32 bits behind them.
        pieces: how many steps the host may be ahead of the copies.

    Attributes:
        device: the arrays on the device; their memory never moves.
        device_room: [room] int32 on the device.
    """

    def __init__(
        self,
        stream: DeviceStream,
        arrays: Mapping[str, tuple[tuple[int, ...], type[np.generic]]],
        room: int,
        pieces: int = 2,
    ) -> None:
        self._stream = stream
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (shape, kind) in arrays.items():
            size = math.prod(shape) * np.dtype(kind).itemsize
            places[name] = (end, end + size)
            end += aligned(-(-size // 4)) * 4
        self._begin = end // 4  # of the room
        self._host = [stream.staged(end + 4 * room).view(torch.int32) for _ in range(pieces)]
        self._device = torch.zeros(end // 4 + room, dtype=torch.int32, device=stream.device)
        self.device: dict[str, torch.Tensor] = {}
        self.device_room = self._device[self._begin :]
        self._views: list[dict[str, NDArray[Any]]] = [{} for _ in range(pieces)]
        self._rooms: list[NDArray[np.int32]] = [host.numpy()[self._begin :] for host in self._host]
        for name, (shape, kind) in arrays.items():
            first, last = places[name]
            self.device[name] = self._device.view(torch.uint8)[first:last].view(_TORCH[np.dtype(kind)]).view(shape)
            for host, views in zip(self._host, self._views):
                views[name] = host.numpy().view(np.uint8)[first:last].view(kind).reshape(shape)
        self._turn = 0

    def host(self) -> tuple[Mapping[str, NDArray[Any]], NDArray[np.int32]]:
        """The arrays and the room to write the next step into; `send` must follow."""
        self._turn = (self._turn + 1) % len(self._host)
        return self._views[self._turn], self._rooms[self._turn]

    def send(self, used: int) -> None:
        """Copies the arrays, and the first `used` numbers of the room."""
        end = self._begin + used
        source, target = self._host[self._turn][:end], self._device[:end]
        self._stream.run(lambda: copy(target, source))


def aligned(count: int) -> int:
    """The least multiple of `ALIGNMENT` that is at least `count`."""
    return -(-count // ALIGNMENT) * ALIGNMENT
